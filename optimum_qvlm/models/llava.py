"""LLaVA: a CLIP or SigLIP tower, a projector of two linears, a text decoder."""

from optimum_qvlm.models.adapter import Adapter, Part

TOWER_LAYERS = ("model.vision_tower.encoder.layers", "model.vision_tower.vision_model.encoder.layers")


class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration`, whatever tower and decoder it holds."""

    def parts(self) -> tuple[Part, ...]:
        """Tower, projector, decoder. The tower's module path differs between releases of transformers."""
        modules = dict(self.model.named_modules())
        tower = next((path for path in TOWER_LAYERS if path in modules), TOWER_LAYERS[0])
        return (
            Part(name="vision", layers=self.numbered(tower), vision=True),
            Part(name="projector", layers=("model.multi_modal_projector",), vision=True),
            Part(name="language", layers=self.numbered("model.language_model.layers")),
        )

    def image_tokens(self) -> tuple[int, ...]:
        """The placeholder that the processor repeats once per image patch."""
        return (int(self.config.image_token_id),)
