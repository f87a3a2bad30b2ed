"""The private parts of transformers that we touch are as we take them to be."""

import inspect
from typing import ClassVar

import pytest
import torch
from accelerate import init_empty_weights
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.quantizers import HfQuantizer, auto
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_qvlm import QVLMConfig
from optimum_qvlm.compat import transformers as compat
from optimum_qvlm.compat.transformers import loaded_keys, saved_keys, take_loading_attributes
from optimum_qvlm.hf.quantizer import QVLMQuantizer
from tests.compat.contract import contract
from tests.tiny_models import tiny_llama, tiny_llava

pytestmark = pytest.mark.integration


@contract(take_loading_attributes, "transformers.quantizers.auto.LOADING_ATTRIBUTES_CONFIG_TYPES")
def test_the_classes_with_loading_attributes_are_a_tuple_that_is_read_at_each_load():
    before = auto.LOADING_ATTRIBUTES_CONFIG_TYPES

    take_loading_attributes(QVLMConfig)

    assert isinstance(before, tuple) and before.count(QVLMConfig) == 1
    assert before == auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    source = inspect.getsource(AutoHfQuantizer.merge_quantization_configs)
    assert source.count("LOADING_ATTRIBUTES_CONFIG_TYPES") == 2 and "get_loading_attributes()" in source


@contract(take_loading_attributes, "transformers.quantizers.auto.AutoHfQuantizer.merge_quantization_configs")
def test_loading_attributes_are_set_on_the_configuration_of_the_checkpoint():
    merged = AutoHfQuantizer.merge_quantization_configs(QVLMConfig("w4a4").to_dict(), QVLMConfig(decode_tokens=0))

    assert merged.decode_tokens == 0
    assert merged.scheme == "w4a4"


@contract(saved_keys, "transformers.core_model_loading.revert_weight_conversion")
@pytest.mark.parametrize("build", [tiny_llama, tiny_llava], ids=["llama", "llava"])
def test_names_lead_to_files_and_back(build):
    model = build()
    state = model.state_dict()

    names = saved_keys(model, state)

    keys = loaded_keys(model, names, state)
    assert [keys[name] for name in names] == [(key, False) for key in state]


@contract(loaded_keys, "transformers.core_model_loading.rename_source_key")
def test_a_tensor_without_place_keeps_a_name_that_the_state_lacks():
    state = tiny_llama().state_dict()

    keys = loaded_keys(tiny_llama(), ["model.layers.7.mlp.up_proj.weight", "lm_head.weight"], state)

    assert keys["lm_head.weight"][0] in state
    assert keys["model.layers.7.mlp.up_proj.weight"][0] not in state
    assert torch.is_tensor(state["lm_head.weight"])


class Method(QuantizationConfigMixin):
    """Of a quantizer that only notes."""

    def __init__(self, quant_method="noting"):
        self.quant_method = quant_method


class Noting(compat.QuantizerBase):
    """Notes which step is taken, and what is known at it."""

    steps: ClassVar[list[tuple]] = []
    requires_calibration = False

    def before_building(self, config):
        self.steps.append(("before building", config.name_or_path, config.num_hidden_layers))

    def before_loading(self, model, files):
        on_meta = next(model.parameters()).is_meta
        self.steps.append(("before loading", on_meta, [file.rpartition("/")[2] for file in files]))

    def after_loading(self, model):
        self.steps.append(("after loading", next(model.parameters()).is_meta))
        return model

    def to_plain(self, model, dtype=None):
        self.steps.append(("to plain", dtype))
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


@pytest.fixture
def noting(monkeypatch):
    """Its tables are as before afterwards."""
    for table in ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"):
        monkeypatch.setattr(auto, table, dict(getattr(auto, table)))
    Noting.steps = []
    compat.private.cache_clear()
    compat.register_method("noting", Method, Noting)
    yield
    compat.private.cache_clear()


@contract(compat.QuantizerBase, "transformers.quantizers.HfQuantizer")
def test_a_quantizer_takes_its_steps_in_order(noting, llama_folder):
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=Method())
    model.dequantize(torch.float16)

    assert Noting.steps == [
        ("before building", str(llama_folder), 2),
        ("before loading", True, ["model.safetensors"]),
        ("after loading", False),
        ("to plain", torch.float16),
    ]


@contract(compat.QuantizerBase, "transformers.quantizers.HfQuantizer")
def test_every_hook_of_ours_is_one_of_a_quantizer():
    """A hook that transformers renamed would be called no more."""
    ours = {*vars(QVLMQuantizer), *vars(compat.QuantizerBase)}
    hooks = {name for name in ours if hasattr(HfQuantizer, name)}

    assert hooks >= {
        "_dequantize",
        "_process_model_after_weight_loading",
        "_process_model_before_weight_loading",
        "adjust_max_memory",
        "get_state_dict_and_metadata",
        "is_compileable",
        "is_serializable",
        "is_trainable",
        "update_device_map",
    }
    assert hooks & {"update_attn_implementation", "update_tp_plan"}


@contract(compat.register_method, "transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING")
def test_a_method_is_found_by_its_name_and_entered_twice(noting):
    compat.register_method("noting", Method, Noting)

    assert type(AutoHfQuantizer.from_config({"quant_method": "noting"})) is Noting


@contract(compat.spared_by_initialisation, "transformers.PreTrainedModel._is_hf_initialized")
def test_initialisation_passes_over_what_is_spared(llama_folder):
    """Parameters are initialised through modules, and tensors one by one."""

    @compat.spared_by_initialisation
    class Spared(torch.nn.Linear):
        pass

    model = tiny_llama()
    plain, spared = torch.nn.Linear(4, 4), Spared(4, 4)
    for linear in (plain, spared):
        torch.nn.init.constant_(linear.weight, 7.0)
        model._initialize_weights(linear)

    assert bool((spared.weight == 7).all()) and not bool((plain.weight == 7).all())


@contract(compat.was_loaded, "torch.Tensor._is_hf_initialized")
def test_what_a_checkpoint_held_was_loaded_and_a_new_head_was_not(llama_folder):
    model = AutoModelForSequenceClassification.from_pretrained(llama_folder, num_labels=2)
    state = model.state_dict(keep_vars=True)

    assert {name for name, tensor in state.items() if not compat.was_loaded(tensor)} <= {"score.weight"}
    assert compat.was_loaded(state["model.norm.weight"])
    assert not compat.was_loaded(torch.ones(1))


@contract(compat.tied_keys, "transformers.PreTrainedModel.all_tied_weights_keys")
def test_tied_embeddings_are_told_by_their_keys():
    config = tiny_llama().config
    config.tie_word_embeddings = True
    with init_empty_weights():
        tied = AutoModelForCausalLM.from_config(config)

    assert compat.tied_keys(tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert compat.tied_keys(tiny_llama()) == {} == compat.tied_keys(torch.nn.Linear(2, 2))


@contract(compat.missing_patterns, "transformers.PreTrainedModel._keys_to_ignore_on_load_missing")
def test_patterns_of_keys_that_may_be_missing_spare_them_the_report(llama_folder):
    """What we read is what `from_pretrained` reads."""
    model = type("Lenient", (AutoModelForSequenceClassification._model_mapping[type(tiny_llama().config)],), {})
    model._keys_to_ignore_on_load_missing = ["score"]

    loaded, info = model.from_pretrained(llama_folder, output_loading_info=True)

    assert info["missing_keys"] == set()
    assert "score" in compat.missing_patterns(loaded)
    assert compat.missing_patterns(tiny_llama()) == ()


@contract(compat.unexpected_patterns, "transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected")
def test_patterns_of_a_class_are_told():
    model = tiny_llama()
    kind = type("Lenient", (type(model),), {"_keys_to_ignore_on_load_unexpected": ["extra"]})

    assert compat.unexpected_patterns(kind(model.config)) == ("extra",)


@contract(compat.expect_more, "transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected")
def test_tensors_that_are_expected_are_not_reported(noting, llama_folder, monkeypatch):
    """They are said before the weights are loaded."""
    kind = type("Smaller", (type(tiny_llama()),), {})
    monkeypatch.setattr(Noting, "before_loading", lambda self, model, _: compat.expect_more(model, [r"layers\.1\."]))
    config = AutoConfig.from_pretrained(llama_folder, num_hidden_layers=1)

    _, info = kind.from_pretrained(llama_folder, config=config, quantization_config=Method(), output_loading_info=True)

    assert info["unexpected_keys"] == set()


@contract(compat.kept_in_float32, "transformers.PreTrainedModel._keep_in_fp32_modules")
@pytest.mark.parametrize("name", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_modules_that_stay_in_float32_are_told(llama_folder, name):
    kind = type("Careful", (type(tiny_llama()),), {name: ["norm"]})

    model = kind.from_pretrained(llama_folder, dtype=torch.float16)

    assert "norm" in compat.kept_in_float32(model)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16


@contract(compat.unsplit_classes, "transformers.PreTrainedModel._no_split_modules")
def test_layers_are_on_one_device_each():
    assert "LlamaDecoderLayer" in compat.unsplit_classes(tiny_llama())
    assert "LlamaDecoderLayer" in compat.unsplit_classes(tiny_llava())


@contract(compat.unmoved_arguments, "transformers.PreTrainedModel._skip_keys_device_placement")
def test_caches_are_not_moved():
    """The name of the argument, or of a family of them, differs between releases."""
    assert any("cache" in name or "past_key_values" in name for name in compat.unmoved_arguments(tiny_llama()))


@contract(compat.has_adapters, "transformers.PreTrainedModel._hf_peft_config_loaded")
def test_adapters_that_transformers_added_are_told():
    """Adding one takes a release of PEFT as new as that of transformers, so this looks at what does."""
    assert not compat.has_adapters(tiny_llama())
    assert "self._hf_peft_config_loaded = True" in inspect.getsource(type(tiny_llama()).add_adapter)
    assert "_hf_peft_config_loaded" in inspect.getsource(type(tiny_llama()).save_pretrained)


@contract(compat.parallel_size, "transformers.PreTrainedModel._tp_size")
def test_a_model_of_one_device_is_not_split():
    model = tiny_llama()

    assert compat.parallel_size(model) == 1
    assert "_tp_size" in inspect.getsource(inspect.getmodule(type(model).tp_size.fget))


@contract(compat.model_types, "transformers.models.auto.modeling_auto")
def test_types_of_models_by_auto_class():
    assert "llava" in compat.model_types("AutoModelForImageTextToText")
    assert "llama" in compat.model_types("AutoModelForCausalLM")
    assert "vit" not in compat.model_types("AutoModelForCausalLM")


@contract(compat.upright_image, "transformers.image_utils.load_image")
def test_an_image_is_turned_as_its_file_says_and_has_three_channels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("L", (4, 2)).save(tmp_path / "image.jpg", exif=exif)

    for given in (str(tmp_path / "image.jpg"), Image.open(tmp_path / "image.jpg")):
        found = compat.upright_image(given)
        assert (found.size, found.mode) == ((2, 4), "RGB")


@contract(compat.watch_options, "transformers.PreTrainedModel.adjust_generation_fn")
def test_options_are_told_before_the_last_step(noting, llama_folder, monkeypatch):
    told = []
    monkeypatch.setattr(Noting, "before_loading", lambda self, model, _: compat.watch_options(model, told.append))
    monkeypatch.setattr(Noting, "after_loading", lambda self, model: told.append("after loading") or model)

    AutoModelForCausalLM.from_pretrained(
        llama_folder, quantization_config=Method(), local_files_only=True, token="hf_secret", trust_remote_code=True
    )

    options, last = told
    assert last == "after loading"
    assert (options["local_files_only"], options["token"], options["trust_remote_code"]) == (True, "hf_secret", True)
    assert "cache_dir" in options


@contract(compat.unwatch_options, "transformers.PreTrainedModel.adjust_generation_fn")
def test_a_watched_model_is_as_before_when_nobody_watches():
    model = tiny_llama()
    before = dict(vars(model))

    compat.watch_options(model, print)
    assert vars(model) != before
    compat.unwatch_options(model)

    assert vars(model) == before
