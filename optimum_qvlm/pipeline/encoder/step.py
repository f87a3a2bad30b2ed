"""The optimisation of tower and projector by gradients through the language model (equations 8 to 10 of the paper)."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from optimum_qvlm.errors import CalibrationError
from optimum_qvlm.modules.qlinear import QuantLinear
from optimum_qvlm.modules.swap import replace_module
from optimum_qvlm.pipeline.cost import Meter
from optimum_qvlm.pipeline.dependency import EntropyOptions, positions
from optimum_qvlm.pipeline.encoder.epochs import EpochState, read_epoch, write_epoch
from optimum_qvlm.pipeline.encoder.modules import LearnedLinear, LearnedSite
from optimum_qvlm.pipeline.encoder.observe import Observer, Seen
from optimum_qvlm.pipeline.journal import Journal
from optimum_qvlm.pipeline.layer_recomputation import frozen, recomputed
from optimum_qvlm.pipeline.layer_streaming import streamed
from optimum_qvlm.pipeline.options import CalibrationOptions
from optimum_qvlm.pipeline.tokens import seeded_order
from optimum_qvlm.plan import ModuleRecord, PlannedLinear, QuantPlan
from optimum_qvlm.search.encoder_loss import (
    LossTerms,
    answer_loss,
    jacobian_weights,
    soft_dependency,
    weighted_entropy,
)
from optimum_qvlm.settings import EncoderOptions

IGNORED = -100

CHANNELS = 64
"""Channels of a layer's output that its dependency is taken over in one step."""

Batch = Mapping[str, Tensor]
Dependency = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLoss:
    """Means over the calibration batches of the terms of the loss and of their sum; see `LossTerms`."""

    answer: float
    entropy: float
    vision: float
    final: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderResult:
    """Outcome of the optimisation.

    Attributes:
        losses: before it, then after each epoch.
        chosen: which of them has the smallest total: what the encoder got. 0 left it as the search did.
        seconds: wall-clock time.
        records: what each linear of the encoder has now, by disk name.
        mean_depths: layers per block of the language model, formed on the features of the encoder in full precision,
            as its search left it, and as it is now; empty where no blocks are formed.
    """

    losses: tuple[EncoderLoss, ...]
    chosen: int
    seconds: float
    records: dict[str, ModuleRecord]
    mean_depths: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For the report, as plain JSON values."""
        return {
            "losses": [asdict(loss) for loss in self.losses],
            "chosen_epoch": self.chosen,
            "seconds": round(self.seconds, 2),
            "mean_depths": list(self.mean_depths),
        }


@dataclass(frozen=True, slots=True)
class SoftDependency:
    """The dependency that blocks are formed by, differentiable, on fewer elements."""

    options: EntropyOptions

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """H(second | first) of two outputs [tokens, channels] in nats; H(second) where shapes differ."""
        order = seeded_order(second.shape[1], self.options.seed)
        channels = order[:CHANNELS].sort().values.to(second.device)
        later = positions(second, self.options).columns(channels)
        earlier = positions(first, self.options).columns(channels) if first.shape == second.shape else None
        return soft_dependency(earlier, later, self.options.softness)


def learns_encoder(plan: QuantPlan, options: CalibrationOptions) -> bool:
    """Whether the step is asked for, and there is something for it to learn."""
    quantized = any(layer.sites for part in plan.parts if part.vision for layer in part.layers)
    text = any(not part.vision for part in plan.parts)
    return options.encoder.epochs > 0 and quantized and text


class EncoderStep:
    """Two halves: `note` while the model is in full precision, `learn` once its vision parts are quantized."""

    def __init__(
        self,
        model: nn.Module,
        plan: QuantPlan,
        options: EncoderOptions,
        dependency: Dependency,
        device: torch.device,
        seed: int = 0,
        meter: Meter | None = None,
    ) -> None:
        self.meter = Meter() if meter is None else meter
        self.model, self.plan, self.options, self.device = model, plan, options, device
        self.dependency = dependency
        self.observer = Observer(model, plan, seed)
        self.linears = [
            linear
            for part in plan.parts
            for layer in part.layers
            for site in layer.sites
            for linear in site.linears
            if part.vision
        ]
        self._weights: dict[str, Tensor] = {}
        self._wanted: list[dict[str, list[Tensor]]] = []

    @classmethod
    def of(
        cls,
        model: nn.Module,
        plan: QuantPlan,
        options: CalibrationOptions,
        device: torch.device,
        meter: Meter | None = None,
    ) -> "EncoderStep | None":
        """The step that the options ask for, None where it is off or there is nothing for it to learn."""
        if not learns_encoder(plan, options):
            return None
        entropy = EntropyOptions.of(plan, options.softness, options.search_tokens, options.seed)
        return cls(model, plan, options.encoder, SoftDependency(entropy), device, options.seed, meter)

    def note(self, batches: Sequence[Batch]) -> None:
        """Keep full-precision weights of the encoder and outputs of encoder and model, on the CPU."""
        for linear in self.linears:
            self._weights[linear.path] = self.model.get_parameter(f"{linear.path}.weight").detach()
        with self.meter.timed("encoder"), torch.no_grad(), streamed(self.model, self._layers(), self.device):
            for number, batch in enumerate(batches):
                with self.observer.watching(number, batch.get("attention_mask")) as seen:
                    self._forward(batch)
                self._wanted.append(seen.ends)

    def modules(self) -> dict[str, QuantLinear]:
        """Quantized linears of the encoder, by path."""
        modules = {linear.path: self.model.get_submodule(linear.path) for linear in self.linears}
        return {path: module for path, module in modules.items() if isinstance(module, QuantLinear)}

    def learn(
        self,
        batches: Sequence[Batch],
        labels: Sequence[Tensor],
        records: Mapping[str, ModuleRecord],
        journal: Journal | None = None,
    ) -> EncoderResult:
        """Optimise the encoder in place, starting at what the search found, or at the epoch that the journal holds.

        `labels` are those of each batch.

        Raises:
            CalibrationError: the loss is NaN or infinite.
        """
        started = time.perf_counter()
        learned = self._stand_in()
        sites = list({id(module.site): module.site for module in learned.values()}.values())
        parameters = [p for module in (*sites, *learned.values()) for p in module.parameters(recurse=False)]
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            for parameter in parameters:
                parameter.requires_grad_(True)
            stack.enter_context(recomputed(self.model, self._layers(), self.device))
            descent = _Descent(self, batches, labels, parameters, [*sites, *learned.values()])
            losses, chosen = descent.run(journal)
        for path, module in learned.items():
            replace_module(self.model, path, module.packed())
        return EncoderResult(
            losses=tuple(losses),
            chosen=chosen,
            seconds=time.perf_counter() - started,
            records={linear.name: self._record(linear, learned, records) for linear in self.linears},
        )

    def seen(self, number: int, batch: Batch, *, slopes: bool = False) -> tuple[Tensor, Seen]:
        """One forward: the last hidden states, and what was observed."""
        with self.observer.watching(number, batch.get("attention_mask"), self._wanted[number], slopes=slopes) as seen:
            hidden = self._forward(batch)
        return hidden, seen

    def terms(self, number: int, batch: Batch, labels: Tensor, weights: Mapping[str, list[float]]) -> LossTerms:
        """The loss of one batch. `weights` are those of each part's layers."""
        hidden, seen = self.seen(number, batch)
        wanted = labels[:, 1:].to(hidden.device)
        chosen = wanted != IGNORED
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        return LossTerms(
            answer=answer_loss(head(hidden[:, :-1][chosen]), wanted[chosen]),
            entropy=self._entropy(seen, weights),
            vision=torch.stack(seen.errors["vision"]).mean(),
            final=torch.stack(seen.errors["final"]).mean(),
        )

    def _entropy(self, seen: Seen, weights: Mapping[str, list[float]]) -> Tensor:
        dependencies, factors = [], []
        for part, layers in seen.samples.items():
            for place in range(1, len(layers)):
                pairs = list(zip(layers[place - 1], layers[place], strict=True))
                # Assignments of all layers at once would take more memory than a layer: they are computed twice.
                found = [checkpoint(self.dependency, a, b, use_reentrant=False) for a, b in pairs]
                dependencies.append(torch.stack(found).mean())
                factors.append(weights[part][place])
        return weighted_entropy(dependencies, factors).to(self.device)

    def _forward(self, batch: Batch) -> Tensor:
        target: Any = self.model.base_model
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
        hidden: Tensor = target(**inputs, use_cache=False).last_hidden_state
        return hidden

    def _layers(self) -> list[str]:
        return [layer.path for part in self.plan.parts for layer in part.layers]

    def _stand_in(self) -> dict[str, LearnedLinear]:
        """Put learnable linears in the place of the encoder's quantized ones."""
        learned: dict[str, LearnedLinear] = {}
        for part in self.plan.parts:
            for site in (site for layer in part.layers for site in layer.sites if part.vision):
                shared: LearnedSite | None = None
                for linear in site.linears:
                    start = self.model.get_submodule(linear.path)
                    assert isinstance(start, QuantLinear)
                    shared = LearnedSite(start) if shared is None else shared
                    learned[linear.path] = LearnedLinear(start, self._weights[linear.path], shared)
                    replace_module(self.model, linear.path, learned[linear.path])
        return learned

    def _record(
        self, linear: PlannedLinear, learned: Mapping[str, LearnedLinear], records: Mapping[str, ModuleRecord]
    ) -> ModuleRecord:
        module = self.model.get_submodule(linear.path)
        assert isinstance(module, QuantLinear)
        return replace(
            records[linear.name],
            format=module.format,
            weight_clip=learned[linear.path].weight_clip(),
        )


class _Descent:
    """Adam on the encoder's parameters, its rate falling to zero, which ends at the best of what it passed."""

    def __init__(
        self,
        step: EncoderStep,
        batches: Sequence[Batch],
        labels: Sequence[Tensor],
        parameters: list[nn.Parameter],
        bounded: Sequence[LearnedSite | LearnedLinear],
    ) -> None:
        self.step, self.batches, self.labels = step, batches, labels
        self.parameters, self.bounded = parameters, bounded
        self.optimizer = torch.optim.Adam(parameters, lr=step.options.learning_rate)
        steps = max(step.options.epochs * len(batches), 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda done: max(1 - done / steps, 0.0))

    def run(self, journal: Journal | None = None) -> tuple[list[EncoderLoss], int]:
        """The loss before and after each epoch, and which of them the parameters are left at.

        Each epoch is kept in the journal, and the last that it holds is gone on from.
        """
        meter, epochs = self.step.meter, self.step.options.epochs
        held = None if journal is None else read_epoch(journal, self.optimizer, self.parameters)
        if held is None:
            with meter.timed("encoder"):
                held = EpochState(weights=self._weights(), best=self._state())
                held.losses.append(asdict(self._evaluate(held.weights)))
        else:
            self._go_on_from(held)
        with logging.tqdm(total=epochs, initial=held.epoch, desc="optimising the encoder", unit="epoch") as bar:
            while held.epoch < epochs:
                with meter.timed("epoch"):
                    for number in range(len(self.batches)):
                        self._advance(number, held.weights)
                    held.add(asdict(self._evaluate(held.weights)), self._state())
                if journal is not None:
                    write_epoch(journal, held, self.optimizer, self.parameters)
                bar.set_postfix_str(f"loss {held.losses[-1]['total']:.4f}, at first {held.losses[0]['total']:.4f}")
                bar.update()
        with torch.no_grad():
            for parameter, value in zip(self.parameters, held.best, strict=True):
                parameter.copy_(value)
        return [EncoderLoss(**loss) for loss in held.losses], held.chosen

    def _go_on_from(self, held: EpochState) -> None:
        """Let the rate fall on from where it was."""
        self.schedule.last_epoch = held.epoch * len(self.batches)
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_lr(), strict=True):
            group["lr"] = rate

    def _weights(self) -> dict[str, list[float]]:
        """Norms of the final error's gradient at every layer, measured once, as weights that sum to one."""
        squares: dict[str, list[float]] = {}
        for number, batch in enumerate(self.batches):
            _, seen = self.step.seen(number, batch, slopes=True)
            torch.stack(seen.errors["final"]).mean().backward()
            for part, values in seen.slopes.items():
                before = squares.setdefault(part, [0.0] * len(values))
                squares[part] = [a + b for a, b in zip(before, values, strict=True)]
        self.optimizer.zero_grad()
        flat = jacobian_weights([value**0.5 for values in squares.values() for value in values])
        places = iter(flat)
        return {part: [next(places) for _ in values] for part, values in squares.items()}

    def _advance(self, number: int, weights: Mapping[str, list[float]]) -> None:
        self.optimizer.zero_grad()
        terms = self.step.terms(number, self.batches[number], self.labels[number], weights)
        loss = terms.total(self.step.options)
        _require_finite(float(loss), number)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        for module in self.bounded:
            module.keep_in_bounds()

    @torch.no_grad()
    def _evaluate(self, weights: Mapping[str, list[float]]) -> EncoderLoss:
        sums = dict.fromkeys(("answer", "entropy", "vision", "final", "total"), 0.0)
        for number, (batch, labels) in enumerate(zip(self.batches, self.labels, strict=True)):
            terms = self.step.terms(number, batch, labels, weights)
            for name in ("answer", "entropy", "vision", "final"):
                sums[name] += float(getattr(terms, name)) / len(self.batches)
            total = _require_finite(float(terms.total(self.step.options)), number)
            sums["total"] += total / len(self.batches)
        return EncoderLoss(**sums)

    def _state(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]


def _require_finite(loss: float, number: int) -> float:
    """The loss of a batch, if it is a number.

    Raises:
        CalibrationError: it is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise CalibrationError(
            f"the loss of the encoder is {loss} in calibration batch {number}; load the model in a wider dtype, lower "
            "encoder.learning_rate, or turn the optimisation off with encoder.epochs=0"
        )
    return loss
