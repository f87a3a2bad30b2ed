"""Text models of the common decoder shape: `model.layers`, then `lm_head`."""

from optimum_qvlm.models.adapter import Adapter, Part


class LlamaAdapter(Adapter):
    """Llama and the models that share its layout, as Qwen2, Qwen3 and Mistral do."""

    def parts(self) -> tuple[Part, ...]:
        """One chain: the decoder layers."""
        return (Part(name="language", layers=self.numbered("model.layers")),)
