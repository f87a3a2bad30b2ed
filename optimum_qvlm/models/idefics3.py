"""Idefics3 and SmolVLM: as LLaVA, under other names."""

from optimum_qvlm.models.llava import LlavaAdapter


class Idefics3Adapter(LlavaAdapter):
    """A SigLIP-like tower, a connector that folds patches into fewer tokens, a text decoder."""

    tower = "model.vision_model"
    projector = "model.connector"
    decoder = "model.text_model"
