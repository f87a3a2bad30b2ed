"""What calibration needs to know of a model family: its chains of layers, and which linears share an input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from optimum_qvlm.errors import UnsupportedModelError

SHARED_INPUTS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)
"""Names of sibling linears that read the same tensor in every architecture that uses these names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A chain of layers, each reading the hidden states that the one before returned.

    Attributes:
        name: what people call it: vision, projector, language, head.
        layers: dotted module paths in execution order.
        vision: whether the vision scheme applies.
    """

    name: str
    layers: tuple[str, ...]
    vision: bool = False


class Adapter:
    """Describes one model family. Subclasses say where the parts sit; the rest is shared."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = model.config

    def parts(self) -> tuple[Part, ...]:
        """The chains of the model in execution order."""
        raise NotImplementedError

    def image_tokens(self) -> tuple[int, ...]:
        """Token ids that stand for image patches in the text; empty for a text model."""
        return ()

    def sites(self, layer: str) -> list[tuple[str, ...]]:
        """Paths of the linears of a layer, grouped by the input that they share, in definition order.

        Calibration verifies on a real forward that the members of a site receive the same tensor.
        """
        module = self.model.get_submodule(layer)
        if isinstance(module, nn.Linear):
            return [(layer,)]
        paths = [f"{layer}.{name}" for name, child in module.named_modules() if isinstance(child, nn.Linear)]
        sites: list[list[str]] = []
        for path in paths:
            parent, _, leaf = path.rpartition(".")
            family = next((names for names in SHARED_INPUTS if leaf in names), (leaf,))
            mates = (s for s in sites if s[0].rpartition(".")[0] == parent and s[0].rpartition(".")[2] in family)
            site = next(mates, None)
            if site is None:
                sites.append([path])
            else:
                site.append(path)
        return [tuple(site) for site in sites]

    def numbered(self, path: str) -> tuple[str, ...]:
        """Paths of the entries of the module list at `path`.

        Raises:
            UnsupportedModelError: there is no such list.
        """
        try:
            children = self.model.get_submodule(path)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no {path}, where its layers were expected"
            ) from error
        if not isinstance(children, Sequence | nn.ModuleList):
            raise UnsupportedModelError(f"{path} of {type(self.model).__name__} is not a list of layers")
        return tuple(f"{path}.{number}" for number in range(len(children)))
