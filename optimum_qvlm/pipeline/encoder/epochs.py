"""Where the optimisation of the encoder stands after an epoch, as its journal keeps it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optimum_qvlm.pipeline.journal import Journal

NAME = "encoder-epoch"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam knows of a parameter beside how often it was moved."""


@dataclass(slots=True)
class EpochState:
    """The course of the optimisation.

    Attributes:
        weights: of the layers of each part in the loss.
        best: the parameters at the smallest loss.
        losses: before the first epoch and after each, term by term.
        chosen: number of the smallest.
        epoch: how many are done.
    """

    weights: dict[str, list[float]]
    best: list[Tensor]
    losses: list[dict[str, float]] = field(default_factory=list)
    chosen: int = 0
    epoch: int = 0

    def add(self, loss: dict[str, float], parameters: list[Tensor]) -> None:
        """Note the loss after one more epoch, and the parameters if it is the smallest."""
        self.epoch += 1
        self.losses.append(loss)
        if loss["total"] < self.losses[self.chosen]["total"]:
            self.best, self.chosen = parameters, self.epoch


def write_epoch(
    journal: Journal, state: EpochState, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> None:
    """Keep the state, in place of that of the epoch before."""
    tensors = {f"best.{number}": tensor for number, tensor in enumerate(state.best)}
    moved = {}
    for number, parameter in enumerate(parameters):
        tensors[f"value.{number}"] = parameter
        if parameter in optimizer.state:
            moved[str(number)] = int(optimizer.state[parameter]["step"])
            tensors |= {f"{name}.{number}": optimizer.state[parameter][name] for name in MOMENTS}
    values = {
        "weights": state.weights,
        "losses": state.losses,
        "chosen": state.chosen,
        "epoch": state.epoch,
        "moved": moved,
    }
    journal.write(NAME, values, tensors)


def read_epoch(journal: Journal, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> EpochState | None:
    """The state, with parameters and optimizer as they were then; None where there is none that can be used."""
    entry = journal.read(NAME)
    if entry is None:
        return None
    values, tensors = entry.values, entry.tensors
    try:
        count = range(len(parameters))
        held = {
            name: {number: _fitting(tensors[f"{name}.{number}"], parameters[number]) for number in numbers}
            for name, numbers in {
                "value": count,
                "best": count,
                **{name: [int(number) for number in values["moved"]] for name in MOMENTS},
            }.items()
        }
        state = EpochState(
            weights=values["weights"],
            best=list(held["best"].values()),
            losses=values["losses"],
            chosen=values["chosen"],
            epoch=values["epoch"],
        )
        if len(state.losses) != state.epoch + 1 or not 0 <= state.chosen <= state.epoch:
            raise ValueError(f"{len(state.losses)} losses of {state.epoch} epochs")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        journal.refuse(NAME, repr(error))
        return None
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.copy_(held["value"][number])
    for number, steps in values["moved"].items():
        moments = {name: held[name][int(number)] for name in MOMENTS}
        optimizer.state[parameters[int(number)]] = {"step": torch.tensor(float(steps)), **moments}
    return state


def _fitting(tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.dtype != like.dtype or tensor.shape != like.shape:
        raise ValueError(f"{tensor.dtype} {list(tensor.shape)} where {like.dtype} {list(like.shape)} belongs")
    return tensor.to(like.device)
