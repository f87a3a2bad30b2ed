"""What calibration needs to know of a model family: its chains of layers, and which linears share an input."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optimum_qvlm.errors import UnsupportedModelError

SHARED_INPUTS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)
"""Names of sibling linears that read the same tensor in every architecture that uses these names."""

TOKEN_FIELDS = ("image_token_id", "image_token_index", "video_token_id")
"""Fields of configurations that hold the id of a token which stands for a part of an image or video."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """What a model does to the hidden states between one layer of a part and the next.

    Calibration runs layers alone, so it has to do the same. What is mixed in may come from parts that were
    quantized before; it is read anew from the arguments of a call each time a chain enters the part, so the
    full-precision chain gets what the full-precision model computes, the quantized one what the quantized does.

    Attributes:
        owner: dotted path of the module that runs the part's layers; its arguments hold what is mixed in.
        apply: called with the number of the layer that comes next (from 1), the hidden states that the layer
            before returned, and the owner's arguments by name. Returns what enters the next layer, as a new
            tensor where it changes anything.
    """

    owner: str
    apply: Callable[[int, Tensor, Mapping[str, Any]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A chain of layers, each reading the hidden states that the one before returned.

    Attributes:
        name: what people call it: vision, projector, language, head. No two parts of a model share one.
        layers: dotted module paths in execution order.
        vision: whether the vision scheme applies.
        unused: paths of layers that belong here but whose outputs nothing reads. They cannot be calibrated, and
            are rounded to nearest. Calibration verifies that the model's output does not depend on them.
        join: what happens between the layers, None where each reads exactly what the one before returned.
    """

    name: str
    layers: tuple[str, ...]
    vision: bool = False
    unused: tuple[str, ...] = ()
    join: Join | None = None


class Adapter:
    """Describes one model family. Subclasses say where the parts sit; the rest is shared.

    Adapters are made on models without weights too, and must not run or change them.

    Attributes:
        model: the model.
        config: its configuration.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = model.config

    def parts(self) -> tuple[Part, ...]:
        """The chains of the model in execution order."""
        raise NotImplementedError

    def image_tokens(self) -> tuple[int, ...]:
        """Token ids that stand for image patches in the text; empty for a text model.

        By default those that the configuration names in one of the fields `TOKEN_FIELDS`.
        """
        named = [getattr(self.config, field, None) for field in TOKEN_FIELDS]
        return tuple(dict.fromkeys(token for token in named if isinstance(token, int)))

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

    def located(self, path: str) -> str:
        """Where the module that a model with a head has at `path` lies in this one.

        The class that `AutoModel` gives is the base model alone, whose paths lack its name at the start.
        """
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        alone = getattr(self.model, "base_model", None) is self.model
        return path.removeprefix(prefix) if alone else path

    def numbered(self, path: str) -> tuple[str, ...]:
        """Paths of the entries of the module list at `path`.

        Raises:
            UnsupportedModelError: there is no such list.
        """
        path = self.located(path)
        try:
            children = self.model.get_submodule(path)
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no {path}, where its layers were expected"
            ) from error
        if not isinstance(children, Sequence | nn.ModuleList):
            raise UnsupportedModelError(f"{path} of {type(self.model).__name__} is not a list of layers")
        return tuple(f"{path}.{number}" for number in range(len(children)))

    def layer_list(self, path: str) -> str:
        """Path of the list of layers below the module at `path`: the outermost one with linears, the longest.

        Raises:
            UnsupportedModelError: there is none, or two are equally long.
        """
        path = self.located(path)
        lengths = {name: len(self.model.get_submodule(name)) for name in layer_lists(self.model, path)}  # type: ignore[arg-type]
        longest = [name for name, length in lengths.items() if length == max(lengths.values())]
        if len(longest) != 1:
            shown = f"the lists {', '.join(longest)}" if longest else "no list of layers"
            raise UnsupportedModelError(f"{path} of {type(self.model).__name__} holds {shown}, where one was expected")
        return longest[0]


def layer_lists(model: nn.Module, path: str) -> Iterator[str]:
    """Paths of the module lists at or below `path` that lie in no other list and whose entries all hold linears."""
    module = model.get_submodule(path)
    if isinstance(module, nn.ModuleList):
        if len(module) > 0 and all(holds_linear(entry) for entry in module):
            yield path
        return
    for name, _ in module.named_children():
        yield from layer_lists(model, f"{path}.{name}" if path else name)


def holds_linear(module: nn.Module) -> bool:
    """Whether a module is or contains a linear."""
    return any(isinstance(child, nn.Linear) for child in module.modules())
