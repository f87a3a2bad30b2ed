"""Models whose family has no adapter, but which have the usual parts in the usual places."""

import re

from torch import nn

from optimum_qvlm.errors import UnsupportedModelError
from optimum_qvlm.models.adapter import Part, holds_linear
from optimum_qvlm.models.llava import LlavaAdapter

PROJECTOR_NAMES = re.compile(r"projector|projection|connector|merger|aligner|adapter|resampler|bridge|mlp1")


class DiscoveredAdapter(LlavaAdapter):
    """Finds tower, projectors and decoder through what transformers calls them.

    It is a guess, which calibration verifies on a real forward: the layers, run alone one after the other, must
    give what the model gave, and the linears of a site must read the same tensor.
    """

    def parts(self) -> tuple[Part, ...]:
        """Tower and projectors where the model takes images, then the decoder.

        Raises:
            UnsupportedModelError: a part is missing or ambiguous.
        """
        if not hasattr(self.model, "get_decoder"):
            raise UnsupportedModelError("it is no model of transformers")
        if getattr(self.config, "is_encoder_decoder", False):
            raise UnsupportedModelError("encoder-decoder models have no single chain of decoder layers")
        self.decoder = self._path(self.model.get_decoder())  # type: ignore[operator]
        tower = self._tower()
        if tower is None:
            if getattr(self.config, "vision_config", None) is not None:
                raise UnsupportedModelError(
                    "its configuration has a vision_config, but no vision tower is in one of the usual places"
                )
            return (Part(name="language", layers=self.numbered(self.layer_list(self.decoder))),)
        if _holds(self.decoder, tower):
            raise UnsupportedModelError(f"the decoder is not a module of its own beside the tower {tower}")
        self.tower = tower
        projectors = self._projectors()
        names = ["projector", *(f"projector {number}" for number in range(2, len(projectors) + 1))][: len(projectors)]
        return (
            self.tower_part(),
            *(Part(name=n, layers=(path,), vision=True) for n, path in zip(names, projectors, strict=True)),
            Part(name="language", layers=self.numbered(self.layer_list(self.decoder))),
        )

    def _tower(self) -> str | None:
        """Path of the vision tower as transformers finds it, None where there is none."""
        towers = self.model.get_encoder(modality="image")  # type: ignore[operator]
        path = self._path(towers)
        return None if _holds(path, self.decoder) else path

    def _projectors(self) -> list[str]:
        """Outermost modules with linears that are named for leading from tower to decoder; of lists, the entries."""
        layers = self.layer_list(self.tower)
        towers: list[str] = []
        for path, module in self.model.named_modules():
            inside = any(_holds(outer, path) for outer in (self.decoder, layers, *towers))
            if not inside and PROJECTOR_NAMES.search(path.rpartition(".")[2]) and holds_linear(module):
                towers += self.numbered(path) if isinstance(module, nn.ModuleList) else [path]
        return towers

    def _path(self, module: nn.Module) -> str:
        paths = (path for path, candidate in self.model.named_modules() if candidate is module)
        return str(next(paths))


def _holds(outer: str, path: str) -> bool:
    """Whether the module at `path` is or lies in the one at `outer`."""
    return outer in ("", path) or path.startswith(f"{outer}.")
