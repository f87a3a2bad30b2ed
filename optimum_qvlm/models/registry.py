"""model_type -> adapter."""

from torch import nn

from optimum_qvlm.errors import UnsupportedModelError
from optimum_qvlm.models.adapter import Adapter
from optimum_qvlm.models.llama import LlamaAdapter
from optimum_qvlm.models.llava import LlavaAdapter

ADAPTERS: dict[str, type[Adapter]] = {
    "llama": LlamaAdapter,
    "llava": LlavaAdapter,
}


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a transformers model.

    Raises:
        UnsupportedModelError: the family is not known.
    """
    model_type = getattr(model.config, "model_type", None)
    if model_type not in ADAPTERS:
        raise UnsupportedModelError(
            f"model_type {model_type!r} ({type(model).__name__}) is not supported; "
            f"supported: {', '.join(sorted(ADAPTERS))}. An adapter must name the chains of layers of the model: "
            "see optimum_qvlm/models/adapter.py"
        )
    return ADAPTERS[model_type](model)
