"""Plans for the tiny models, as calibration makes them."""

from typing import Any

import torch
from torch import nn

from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.pipeline.captured import Bench, capture
from optimum_qvlm.pipeline.cost import Meter
from optimum_qvlm.pipeline.hidden_chains import Chain
from optimum_qvlm.pipeline.planner import make_plan
from optimum_qvlm.plan import QuantPlan
from tests.configs import make_config

CPU = torch.device("cpu")


def plan_for(model: nn.Module, scheme: str = "w4a8", *, adapter: Any = None, **settings: Any) -> QuantPlan:
    """The plan of a model whose tensors are named on disk as at run time."""
    names = {path: path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = adapter_for(model) if adapter is None else adapter
    return make_plan(chosen, make_config(scheme, **settings).options(), names)


def front_of(model: Any, plan: QuantPlan, batches: Any, **settings: Any) -> Chain:
    """A chain at the front of the last part of a plan."""
    options = make_config(**settings).options()
    bench = Bench(model=model, options=options, device=CPU, meter=Meter())
    return capture(bench, plan, batches).fronts[plan.parts[-1].name]


def forward_of(model: Any) -> Any:
    """The model's forward as calibration runs it."""

    def forward(**inputs: torch.Tensor) -> Any:
        return model(**inputs, use_cache=False)

    return forward
