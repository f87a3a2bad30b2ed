"""What is private in transformers, or differs between its releases.

Only the base class of quantizers is imported with this module, the rest when it is used.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor
from transformers.quantizers import HfQuantizer

from optimum_qvlm.compat.lookup import private

SEEN = "5.16 to 5.24"
"""Releases that have all of this."""

Kind = TypeVar("Kind", bound=type)


class QuantizerBase(HfQuantizer):  # type: ignore[misc]
    """A quantizer with public names for the steps of `from_pretrained` that it takes part in, in their order."""

    def before_building(self, config: Any) -> None:
        """The model's configuration is known, but neither is a model built nor an index of its files read.

        No hook is there to look at a configuration: this is the one in which others choose an implementation of
        attention, or before transformers 5.18 a plan for tensor parallelism. It knows the name of the model, or the
        folder, where an auto class loads it.
        """

    def before_loading(self, model: Any, files: list[str]) -> None:
        """The model is built on the meta device; `files` hold its weights."""

    def after_loading(self, model: Any) -> Any:
        """The model has its weights. What is returned takes its place."""
        return model

    def to_plain(self, model: Any, dtype: Any = None) -> Any:
        """The model with plain weights in place of quantized ones: what `dequantize()` of a model calls."""
        raise NotImplementedError

    def update_attn_implementation(self, config: Any) -> Any:
        """See `before_building`."""
        self.before_building(config)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same before transformers 5.18; some later releases call both."""
        return config if hasattr(HfQuantizer, "update_attn_implementation") else self.update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        self.before_loading(model, list(checkpoint_files or ()))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return self.after_loading(model)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return self.to_plain(model, dtype)


def register_method(name: str, config_class: type, quantizer_class: type) -> None:
    """Enter a quantization method into transformers' tables; a second call changes nothing.

    The public decorators raise when a name is there already, as after a module was loaded anew.
    """
    private("transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING", SEEN)[name] = config_class
    private("transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING", SEEN)[name] = quantizer_class


def take_loading_attributes(config_class: type) -> None:
    """Have `from_pretrained` ask a configuration that it is given beside a quantized checkpoint.

    transformers asks for `get_loading_attributes()` only the classes of a closed tuple, and has no way to register
    one more. A second call changes nothing.
    """
    auto = private("transformers.quantizers.auto", SEEN)
    known = private("transformers.quantizers.auto.LOADING_ATTRIBUTES_CONFIG_TYPES", SEEN)
    if config_class not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*known, config_class)


def spared_by_initialisation(kind: Kind) -> Kind:
    """A class of modules or tensors that transformers does not fill with random values after a checkpoint is loaded.

    It looks at the attribute of each module and tensor, which it sets on those that it loaded itself.
    """
    kind._is_hf_initialized = True  # type: ignore[attr-defined]
    return kind


def was_loaded(tensor: Tensor) -> bool:
    """Whether a parameter or buffer got its values from the checkpoint, or from transformers' own initialisation."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def loaded_keys(model: Any, tensors: Iterable[str], state: Mapping[str, Any]) -> dict[str, tuple[str, bool]]:
    """Name of each tensor of a checkpoint -> the key of `state` that loading gives it to, and whether it is converted.

    A key that `state` lacks is one that loading calls unexpected. Converted tensors change their shape, or several
    make one. No public function of transformers says where a tensor goes, and the names in a model change between its
    releases, so this follows `convert_and_load_state_dict_in_model` step by step.
    """
    rename = private("transformers.core_model_loading.rename_source_key", SEEN)
    renaming = private("transformers.core_model_loading.WeightRenaming", SEEN)
    converter = private("transformers.core_model_loading.WeightConverter", SEEN)
    transforms = private("transformers.conversion_mapping.get_model_conversion_mapping", SEEN)(model)
    renamings = [t for t in transforms if isinstance(t, renaming)]
    converters = [t for t in transforms if isinstance(t, converter)]
    prefix, keys = model.base_model_prefix, {}
    for name in tensors:
        key, pattern = rename(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename(name, [], [], prefix, state)
        keys[name] = key, pattern is not None
    return keys


def saved_keys(model: Any, state: Mapping[str, Any]) -> list[str]:
    """The names under which `save_pretrained` writes the tensors of `state`, in its order, by default.

    Nothing public says so before the files are written. Each tensor is asked for alone, since converters may not.
    """
    revert = private("transformers.core_model_loading.revert_weight_conversion", SEEN)
    return [next(iter(revert(model, {key: tensor}))) for key, tensor in state.items()]


def tied_keys(model: Any) -> dict[str, str]:
    """Key of each parameter that shares one with another -> the key of that one. Empty of other models.

    The attribute came with transformers 5, is filled when a model is built, and is on no page.
    """
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def missing_patterns(model: Any) -> tuple[str, ...]:
    """Patterns of keys that a model says a checkpoint may lack."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def unexpected_patterns(model: Any) -> tuple[str, ...]:
    """Patterns of names that a model says a checkpoint may hold in vain."""
    return tuple(model._keys_to_ignore_on_load_unexpected or ())


def expect_more(model: Any, patterns: Iterable[str]) -> None:
    """Keep tensors out of transformers' report of those that a checkpoint holds in vain, for this instance."""
    model._keys_to_ignore_on_load_unexpected = {*unexpected_patterns(model), *patterns}


def kept_in_float32(model: Any) -> set[str]:
    """Parts of the names of parameters that a model keeps in float32 whatever dtype is asked for."""
    return {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}


def unsplit_classes(model: Any) -> list[str]:
    """Names of the classes of modules that have to be on one device."""
    return list(model._no_split_modules or ())


def unmoved_arguments(model: Any) -> Any:
    """Names of the arguments that accelerate must not move to the device of a module, for `dispatch_model`."""
    return model._skip_keys_device_placement


def has_adapters(model: Any) -> bool:
    """Whether transformers itself loaded adapters into a model, after which it saves only these."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def parallel_size(model: Any) -> int:
    """Over how many devices tensor parallelism splits a model; 1 without."""
    return getattr(model, "_tp_size", None) or 1


def model_types(auto_class: str) -> frozenset[str]:
    """The types of models that "AutoModelForCausalLM", or another auto class, loads."""
    table = {
        "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    }[auto_class]
    return frozenset(private(f"transformers.models.auto.modeling_auto.{table}", SEEN))


def upright_image(image: Any) -> Any:
    """The RGB image of a path or a PIL image, turned as its file says: what processors compute from."""
    return private("transformers.image_utils.load_image", SEEN)(image)


_ADJUST = "adjust_generation_fn"


def watch_options(model: Any, note: Callable[[Mapping[str, Any]], None]) -> None:
    """Have `note` called with the options of `from_pretrained` that say how it reaches the Hub.

    No hook of quantizers is told; the model's own method for its generation files is, before the quantizer is asked
    last. A stand-in on the instance notes what it is given, removes itself and calls that method. It is never called of
    models that cannot generate.
    """
    method = getattr(model, _ADJUST, None)
    if method is None:
        return

    def adjust(*args: Any, **kwargs: Any) -> Any:
        unwatch_options(model)
        note(kwargs)
        return method(*args, **kwargs)

    setattr(model, _ADJUST, adjust)


def unwatch_options(model: Any) -> None:
    """Undo `watch_options`."""
    vars(model).pop(_ADJUST, None)
