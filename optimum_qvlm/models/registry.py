"""model_type -> adapter."""

from torch import nn

from optimum_qvlm.errors import UnsupportedModelError
from optimum_qvlm.models.adapter import Adapter
from optimum_qvlm.models.discovery import DiscoveredAdapter
from optimum_qvlm.models.idefics3 import Idefics3Adapter
from optimum_qvlm.models.llama import LlamaAdapter
from optimum_qvlm.models.llava import LlavaAdapter
from optimum_qvlm.models.qwen_vl import Qwen3VLAdapter, Qwen25VLAdapter

ADAPTERS: dict[str, type[Adapter]] = {
    "gemma3": LlavaAdapter,
    "idefics3": Idefics3Adapter,
    "internvl": LlavaAdapter,
    "llama": LlamaAdapter,
    "llava": LlavaAdapter,
    "llava_next": LlavaAdapter,
    "mistral": LlamaAdapter,
    "paligemma": LlavaAdapter,
    "qwen2": LlamaAdapter,
    "qwen2_5_vl": Qwen25VLAdapter,
    "qwen3": LlamaAdapter,
    "qwen3_vl": Qwen3VLAdapter,
    "smolvlm": Idefics3Adapter,
}


def register_adapter(model_type: str, adapter: type[Adapter]) -> None:
    """Use `adapter` for models whose config.json says `model_type`; it replaces one that was there.

    Raises:
        UnsupportedModelError: `adapter` is no subclass of `Adapter`.
    """
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise UnsupportedModelError(
            f"the adapter for {model_type!r} must be a subclass of optimum_qvlm.Adapter, got {adapter!r}"
        )
    ADAPTERS[model_type] = adapter


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a transformers model; one that looks for the usual places where its family has none.

    Raises:
        UnsupportedModelError: the family is not known and has another shape.
    """
    model_type = getattr(model.config, "model_type", None)
    if model_type in ADAPTERS:
        return ADAPTERS[model_type](model)
    adapter = DiscoveredAdapter(model)
    try:
        adapter.parts()
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"model_type {model_type!r} ({type(model).__name__}) has no adapter, and its parts were not found: "
            f"{error}. Known: {', '.join(sorted(ADAPTERS))}. Give optimum_qvlm.register_adapter a subclass of "
            "optimum_qvlm.Adapter whose parts() names, in execution order, the chains of layers of the model"
        ) from error
    return adapter
