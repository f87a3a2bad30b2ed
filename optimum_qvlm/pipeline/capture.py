"""What reaches the layers of a model in a real forward, so that each layer can be run again alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optimum_qvlm.errors import CalibrationError, UnsupportedModelError
from optimum_qvlm.pipeline.streaming import streamed
from optimum_qvlm.search.plan import PlannedPart

HIDDEN = "hidden_states"


class _Stop(Exception):
    """Ends a forward once the wanted tensor was seen."""


@dataclass(slots=True)
class LayerCall:
    """All arguments of one call of a layer but the hidden states, on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def __call__(self, layer: nn.Module, hidden: Tensor, device: torch.device) -> Tensor:
        """Run `layer` on other hidden states. Returns its hidden states."""
        args, kwargs = _to(self.args, device, {}), _to(self.kwargs, device, {})
        output = layer(*args, **{HIDDEN: hidden}, **kwargs) if self.by_name else layer(hidden, *args, **kwargs)
        return first_tensor(output)


@dataclass(slots=True)
class Run:
    """One pass of one batch through a part.

    Attributes:
        batch: number of the batch.
        hidden: hidden states that enter the first layer, on the CPU.
        calls: one per layer.
        output: what the last layer really returned, kept for the first run only.
    """

    batch: int
    hidden: Tensor
    calls: list[LayerCall] = field(default_factory=list)
    output: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Tracer:
    """Runs a model over batches and records what its parts see.

    Attributes:
        model: the model, on the CPU.
        forward: called with a batch's tensors; must run every part.
        parts: the chains of layers.
        device: where to compute.
    """

    model: nn.Module
    forward: Callable[..., Any]
    parts: Sequence[PlannedPart]
    device: torch.device

    def capture(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Run]]:
        """Runs of every part, by the part's name, from one full forward per batch.

        Raises:
            UnsupportedModelError: a layer was called out of turn, or never.
        """
        runs: dict[str, list[Run]] = {part.name: [] for part in self.parts}
        with self._ready(), _hooks() as hooks:
            current = _Position()
            for part in self.parts:
                self._record(part, runs[part.name], current, hooks)
            for number, batch in enumerate(batches):
                current.batch, current.memo = number, {}
                self._forward(batch)
        for part in self.parts:
            for run in runs[part.name]:
                if len(run.calls) != len(part.layers):
                    raise UnsupportedModelError(
                        f"the forward called {len(run.calls)} of the {len(part.layers)} {part.name} layers; "
                        "the adapter must name exactly the layers that run"
                    )
            if not runs[part.name]:
                raise UnsupportedModelError(
                    f"no calibration sample reached the {part.name} part ({part.layers[0].name})"
                )
        return runs

    def inputs(self, part: PlannedPart, batches: Sequence[Mapping[str, Tensor]], runs: Sequence[Run]) -> list[Tensor]:
        """Hidden states that enter `part` now, one per run: earlier parts may have been quantized since.

        Each forward ends where the last of its runs enters the part.
        """
        seen: list[Tensor] = []
        expected = [sum(run.batch == number for run in runs) for number in range(len(batches))]
        remaining = 0

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal remaining
            seen.append((args[0] if args else kwargs[HIDDEN]).cpu())
            remaining -= 1
            if remaining == 0:
                raise _Stop

        with self._ready(), _hooks() as hooks:
            first = self.model.get_submodule(part.layers[0].path)
            hooks.append(first.register_forward_pre_hook(stop, with_kwargs=True))
            for batch, remaining in zip(batches, expected, strict=True):
                if remaining == 0:
                    continue
                try:
                    self._forward(batch)
                except _Stop:
                    pass
        return seen

    @contextmanager
    def _ready(self) -> Iterator[None]:
        layers = [layer.path for part in self.parts for layer in part.layers]
        with torch.no_grad(), streamed(self.model, layers, self.device):
            yield

    def _forward(self, batch: Mapping[str, Tensor]) -> None:
        self.forward(**{name: tensor.to(self.device) for name, tensor in batch.items()})

    def _record(self, part: PlannedPart, runs: list[Run], current: "_Position", hooks: list[Any]) -> None:
        for number, layer in enumerate(part.layers):

            def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = number) -> None:
                by_name = HIDDEN in kwargs
                hidden = kwargs[HIDDEN] if by_name else args[0]
                if number == 0:
                    runs.append(Run(current.batch, hidden.detach().to("cpu", copy=True)))
                elif not runs or len(runs[-1].calls) != number:
                    raise UnsupportedModelError(f"{part.layers[number].name} ran out of turn in the {part.name} part")
                rest = {name: value for name, value in kwargs.items() if name != HIDDEN}
                cpu = torch.device("cpu")
                call = LayerCall(
                    _to(args if by_name else args[1:], cpu, current.memo),
                    _to(rest, cpu, current.memo),
                    by_name,
                )
                runs[-1].calls.append(call)

            module = self.model.get_submodule(layer.path)
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if len(runs) == 1:
                runs[0].output = first_tensor(output).detach().cpu()

        hooks.append(self.model.get_submodule(part.layers[-1].path).register_forward_hook(after))


@dataclass(slots=True)
class _Position:
    batch: int = 0
    memo: dict[int, Any] = field(default_factory=dict)


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def linear_inputs(layer: nn.Module, paths: Sequence[str], run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Inputs of some linears of a layer in one forward, which ends once all were seen."""
    seen: dict[str, Tensor] = {}
    with _hooks() as hooks:
        for path in paths:

            def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                seen[path] = args[0] if args else kwargs["input"]
                if len(seen) == len(paths):
                    raise _Stop

            hooks.append(layer.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True))
        try:
            run()
        except _Stop:
            pass
    return seen


def observe_inputs(
    layer: nn.Module, paths: Sequence[str], run: Callable[[], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of a whole forward of a layer, with the inputs of some of its linears."""
    seen: dict[str, Tensor] = {}
    with _hooks() as hooks:
        for path in paths:

            def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                seen[path] = args[0] if args else kwargs["input"]

            hooks.append(layer.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True))
        return run(), seen


def first_tensor(output: Any) -> Tensor:
    """The hidden states that a layer returned, alone or first of a tuple."""
    tensor = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(tensor, Tensor):
        raise UnsupportedModelError(f"a layer returned {type(output).__name__}, not hidden states")
    return tensor


def require_finite(tensor: Tensor, where: str, batch: int) -> None:
    """Raise where an activation is NaN or infinite, since nothing measured on it means anything.

    Raises:
        CalibrationError: names the place and the batch.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise CalibrationError(
            f"NaN or infinite activations at {where} in calibration batch {batch}; check that sample, or load the "
            "model in a wider dtype (bfloat16 or float32 in place of float16)"
        )


def _to(value: Any, device: torch.device, memo: dict[int, Any]) -> Any:
    """`value` with every tensor in it on `device`; a tensor met twice is moved once."""
    if isinstance(value, Tensor):
        key = id(value)
        if key not in memo:
            memo[key] = (value, value.detach().to(device))
        return memo[key][1]
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device, memo) for item in value)
    if isinstance(value, dict):
        return {name: _to(item, device, memo) for name, item in value.items()}
    return value
