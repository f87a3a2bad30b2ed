"""LLaVA and what is built like it: a tower, a projector, a text decoder."""

from optimum_qvlm.models.adapter import Adapter, Part, holds_linear


class LlavaAdapter(Adapter):
    """A tower, a projector that reads its output in one go, and a decoder, whatever models these are.

    LLaVA-NeXT, InternVL, PaliGemma and Gemma 3 have the same module names.

    Attributes:
        tower, projector, decoder: dotted paths of these modules.
    """

    tower = "model.vision_tower"
    projector = "model.multi_modal_projector"
    decoder = "model.language_model"

    def parts(self) -> tuple[Part, ...]:
        """Tower, projector, decoder. A projector without linears (Gemma 3 multiplies by a bare matrix) is no part."""
        parts = [self.tower_part()]
        projector = self.located(self.projector)
        if holds_linear(self.model.get_submodule(projector)):
            parts.append(Part(name="projector", layers=(projector,), vision=True))
        return (*parts, Part(name="language", layers=self.numbered(self.layer_list(self.decoder))))

    def tower_part(self) -> Part:
        """The tower's layers, up to the last whose output is read."""
        layers = self.numbered(self.layer_list(self.tower))
        used = self._layers_read(len(layers))
        return Part(name="vision", layers=layers[:used], unused=layers[used:], vision=True)

    def _layers_read(self, count: int) -> int:
        """How many of the tower's `count` layers matter for the features that the configuration selects.

        `vision_feature_layer` counts hidden states: 0 is what enters the first layer, -1 what leaves the last.
        """
        chosen = getattr(self.config, "vision_feature_layer", None)
        if chosen is None:
            return count
        states = [chosen] if isinstance(chosen, int) else list(chosen)
        return max(1, *(state if state >= 0 else count + 1 + state for state in states))
