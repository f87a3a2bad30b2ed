"""What reaches the layers of a model in a real forward, so that each layer can be run again alone."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from optimum_qvlm.compat.torch import flatten
from optimum_qvlm.errors import CalibrationError, UnsupportedModelError
from optimum_qvlm.models.adapter import Join
from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.pipeline.layer_streaming import streamed
from optimum_qvlm.plan import PlannedPart, QuantPlan

HIDDEN = "hidden_states"


class _Stop(Exception):
    """Ends a forward once the wanted tensor was seen."""


@dataclass(frozen=True, slots=True)
class Mixing:
    """What happens to the hidden states on their way to layer `number`, with the owner's arguments on the CPU."""

    join: Join
    number: int
    arguments: dict[str, Any]

    def __call__(self, hidden: Tensor, device: torch.device) -> Tensor:
        """What enters the layer, given what the one before returned."""
        return self.join.apply(self.number, hidden, _to(self.arguments, device, {}))


@dataclass(slots=True)
class LayerCall:
    """All arguments of one call of a layer but the hidden states, on the CPU.

    Attributes:
        name: the keyword of the hidden states, None where they come first.
        mixing: what the model does to them before this layer, None for nothing.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None
    mixing: Mixing | None = None

    def __call__(self, layer: nn.Module, hidden: Tensor, device: torch.device) -> Tensor:
        """Run `layer` on what the layer before returned. Returns its hidden states."""
        if self.mixing is not None:
            hidden = self.mixing(hidden, device)
        args, kwargs = _to(self.args, device, {}), _to(self.kwargs, device, {})
        output = layer(hidden, *args, **kwargs) if self.name is None else layer(*args, **{self.name: hidden}, **kwargs)
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

    def entering(self, hidden: Tensor, arguments: dict[str, Any] | None) -> "Run":
        """The same pass with what enters the part now: hidden states, and the arguments of the part's owner."""
        calls = [
            call
            if call.mixing is None or arguments is None
            else replace(call, mixing=replace(call.mixing, arguments=arguments))
            for call in self.calls
        ]
        return Run(self.batch, hidden, calls)


@dataclass(frozen=True, slots=True)
class Tracer:
    """Runs a model over batches and records what its parts see.

    Attributes:
        model: the model, on the CPU.
        forward: called with a batch's tensors; must run every part.
        parts: the chains of layers.
        device: where to compute.
        joins: what happens between the layers of a part, by its name.
    """

    model: nn.Module
    forward: Callable[..., Any]
    parts: Sequence[PlannedPart]
    device: torch.device
    joins: Mapping[str, Join] = field(default_factory=dict)

    def capture(self, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Run]]:
        """Runs of every part, by the part's name, from one full forward per batch.

        Raises:
            UnsupportedModelError: a layer was called out of turn, or never.
        """
        runs: dict[str, list[Run]] = {part.name: [] for part in self.parts}
        with self._ready(), hooking() as hooks:
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

    def enter(self, part: PlannedPart, batches: Sequence[Mapping[str, Tensor]], runs: Sequence[Run]) -> list[Run]:
        """The runs with what enters `part` now: earlier parts may have been quantized since.

        Each forward ends where the last of its runs enters the part.
        """
        seen: list[Run] = []
        current = _Position()
        expected = [sum(run.batch == number for run in runs) for number in range(len(batches))]
        remaining = 0

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal remaining
            hidden = hidden_of(args, kwargs, part.layers[0].name)[1]
            seen.append(runs[len(seen)].entering(hidden.cpu(), current.owners.get(part.name)))
            remaining -= 1
            if remaining == 0:
                raise _Stop

        with self._ready(), hooking() as hooks:
            self._note_owner(part, current, hooks)
            first = self.model.get_submodule(part.layers[0].path)
            hooks.append(first.register_forward_pre_hook(stop, with_kwargs=True))
            for batch, remaining in zip(batches, expected, strict=True):
                if remaining == 0:
                    continue
                current.memo = {}
                try:
                    self._forward(batch)
                except _Stop:
                    pass
        return seen

    def output(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the model's forward returns first for a batch: logits, or the last hidden states."""
        with self._ready():
            return first_tensor(tuple(self._forward(batch).values()))

    @classmethod
    def of(cls, model: Any, plan: QuantPlan, device: torch.device) -> "Tracer":
        """For a plan and its model's adapter. Forwards use no cache, and compute logits only where a part is there."""
        whole = any(part.name == "head" for part in plan.parts)
        target = model if whole else model.base_model
        joins = {part.name: part.join for part in adapter_for(model).parts() if part.join is not None}
        return cls(model, lambda **inputs: target(**inputs, use_cache=False), plan.parts, device, joins)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        layers = [layer.path for part in self.parts for layer in part.layers]
        with torch.no_grad(), streamed(self.model, layers, self.device):
            yield

    def _forward(self, batch: Mapping[str, Tensor]) -> Any:
        return self.forward(**{name: tensor.to(self.device) for name, tensor in batch.items()})

    def _note_owner(self, part: PlannedPart, current: "_Position", hooks: list[Any]) -> None:
        """Keep the arguments of each call of the part's owner, where its layers are joined."""
        if part.name not in self.joins:
            return
        owner = self.model.get_submodule(self.joins[part.name].owner)
        signature = inspect.signature(owner.forward)

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            for parameter in signature.parameters.values():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    arguments |= arguments.pop(parameter.name, {})
            current.owners[part.name] = _to(arguments, torch.device("cpu"), current.memo)

        hooks.append(owner.register_forward_pre_hook(note, with_kwargs=True))

    def _record(self, part: PlannedPart, runs: list[Run], current: "_Position", hooks: list[Any]) -> None:
        self._note_owner(part, current, hooks)
        for number, layer in enumerate(part.layers):

            def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = number) -> None:
                name, hidden = hidden_of(args, kwargs, part.layers[number].name)
                if number == 0:
                    runs.append(Run(current.batch, hidden.detach().to("cpu", copy=True)))
                elif not runs or len(runs[-1].calls) != number:
                    raise UnsupportedModelError(f"{part.layers[number].name} ran out of turn in the {part.name} part")
                rest = {key: value for key, value in kwargs.items() if key != name}
                cpu = torch.device("cpu")
                call = LayerCall(
                    _to(args[1:] if name is None else args, cpu, current.memo),
                    _to(rest, cpu, current.memo),
                    name,
                )
                if number > 0 and part.name in self.joins:
                    call.mixing = Mixing(self.joins[part.name], number, current.owners[part.name])
                runs[-1].calls.append(call)

            module = self.model.get_submodule(layer.path)
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if len(runs) == 1:
                runs[0].output = first_tensor(output).detach().cpu()

        hooks.append(self.model.get_submodule(part.layers[-1].path).register_forward_hook(after))


@dataclass(slots=True)
class _Position:
    """Where the forwards are: the batch, its tensors that were moved, and the arguments of owners by part."""

    batch: int = 0
    memo: dict[int, Any] = field(default_factory=dict)
    owners: dict[str, dict[str, Any]] = field(default_factory=dict)


@contextmanager
def hooking() -> Iterator[list[Any]]:
    """Inside, a list for handles of hooks, which are removed at its end."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def linear_inputs(layer: nn.Module, paths: Sequence[str], run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Inputs of some linears of a layer in one forward, which ends once all were seen."""
    seen: dict[str, Tensor] = {}
    with hooking() as hooks:
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


def held_bytes(parts: Iterable[Sequence[Run]]) -> int:
    """Bytes that runs leave on the CPU: arguments once, hidden states for the two chains that start from them."""
    tensors: dict[int, Tensor] = {}
    hidden = 0
    for run in (run for runs in parts for run in runs):
        hidden += 2 * run.hidden.nbytes
        for call in run.calls:
            arguments = (call.args, call.kwargs, None if call.mixing is None else call.mixing.arguments)
            tensors |= {id(leaf): leaf for leaf in flatten(arguments)[0] if isinstance(leaf, Tensor)}
    return hidden + sum(tensor.nbytes for tensor in tensors.values())


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], layer: str) -> tuple[str | None, Tensor]:
    """The hidden states among the arguments of a layer's call, with their keyword: None where they come first.

    Without a first argument they are called `hidden_states`, or are the first keyword that holds a tensor.
    """
    if args and HIDDEN not in kwargs:
        name, hidden = None, args[0]
    else:
        tensors = (key for key, value in kwargs.items() if isinstance(value, Tensor))
        name = HIDDEN if HIDDEN in kwargs else next(tensors, None)
        hidden = None if name is None else kwargs[name]
    if not isinstance(hidden, Tensor):
        raise UnsupportedModelError(f"{layer} is called without hidden states; it is no layer of a chain")
    return name, hidden


def observe_inputs(
    layer: nn.Module, paths: Sequence[str], run: Callable[[], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of a whole forward of a layer, with the inputs of some of its linears."""
    seen: dict[str, Tensor] = {}
    with hooking() as hooks:
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
