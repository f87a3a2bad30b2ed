"""Classes, configurations and settings at load that differ from those of the save: works, or refused with a way out."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from optimum_qvlm import QVLMConfig, dry_run
from optimum_qvlm.errors import CheckpointError, ConfigError, DataError
from tests.configs import make_config
from tests.jobs import forget_model_config, load, logits, make_batch, quantize
from tests.tiny_families import FAMILIES
from tests.tiny_models import tiny_llama, tiny_llava

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def saved(llama_folder, llava_folder, tmp_path_factory) -> dict[str, Path]:
    """A text and a vision-language model as saved. Read only."""
    folders = {}
    for name, source in {"llama": llama_folder, "llava": llava_folder}.items():
        folders[name] = tmp_path_factory.mktemp(f"quantized_{name}")
        quantize(source, method="rtn").save_pretrained(folders[name])
    return folders


def edited(folder: Path, target: Path, part: str | None = None, **changes: object) -> Path:
    """A copy whose config.json, or a part of it, differs outside `quantization_config`, and says nothing of it."""
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text())
    (values if part is None else values[part]).update(changes)
    forget_model_config(values)
    (target / "config.json").write_text(json.dumps(values))
    return target


def first_output(model, folder):
    with torch.no_grad():
        return model(**make_batch(folder))[0]


@pytest.mark.parametrize(
    "family, part, changes, message",
    [
        ("llama", None, {"num_hidden_layers": 3}, r"with model.layers.2.*which the checkpoint's files do not hold"),
        ("llama", None, {"num_hidden_layers": 1}, r"model.layers.1.* is quantized in the checkpoint, but"),
        ("llama", None, {"mlp_bias": True}, r"mlp.* has no bias in the checkpoint, a bias in the model"),
        ("llama", None, {"attention_bias": True}, r"self_attn.* has no bias in the checkpoint, a bias in the model"),
        ("llama", None, {"vocab_size": 60}, r"has shape \[50, 64\] in the checkpoint, \[60, 64\] in the model"),
        ("llama", None, {"model_type": "qwen2"}, r"has no bias in the checkpoint, a bias in the model"),
        ("llama", None, {"model_type": "qwen3"}, r"Qwen3ForCausalLM with .*q_norm.* do not hold"),
        ("llava", "text_config", {"num_hidden_layers": 3}, r"layers.2.*which the checkpoint's files do not hold"),
        ("llava", "vision_config", {"num_hidden_layers": 4}, r"layers.3.*which the checkpoint's files do not hold"),
        ("llava", None, {"multimodal_projector_bias": False}, r"has a bias in the checkpoint, no bias in the model"),
    ],
    ids=lambda value: next(iter(value.items())).__str__() if isinstance(value, dict) else None,
)
def test_a_config_that_does_not_fit_the_files_is_refused(saved, tmp_path, family, part, changes, message):
    """Parameters that no file holds were random, biases raw memory."""
    folder = edited(saved[family], tmp_path / "edited", part, **changes)

    with pytest.raises(CheckpointError, match=message):
        (AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText).from_pretrained(folder)


def test_an_untied_head_that_the_file_lacks_is_refused(tmp_path):
    """The class is the one that was saved, so the head is no new one."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    quantize(tmp_path / "tied", method="rtn").save_pretrained(tmp_path / "saved")

    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM with lm_head.weight, which .* do not hold"):
        load(edited(tmp_path / "saved", tmp_path / "untied", tie_word_embeddings=False))


@pytest.mark.parametrize("family", ["llama", "llava"])
@pytest.mark.parametrize("options", [{}, {"save_original_format": False}], ids=["original", "run-time names"])
@pytest.mark.parametrize("auto_class", [AutoModel, None], ids=["base", "whole"])
def test_what_another_class_or_format_saves_loads_the_same(saved, tmp_path, family, options, auto_class):
    auto_class = auto_class or (AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText)
    model = auto_class.from_pretrained(saved[family])

    model.save_pretrained(tmp_path / "again", **options)

    again = auto_class.from_pretrained(tmp_path / "again")
    assert torch.equal(first_output(model, saved[family]), first_output(again, saved[family]))


@pytest.mark.parametrize("method", ["rtn", "qvlm"])
@pytest.mark.parametrize(
    "family, auto_class",
    [("llama", AutoModel), ("llava", AutoModel), ("llama", AutoModelForSequenceClassification)],
    ids=["text", "images", "classes"],
)
def test_models_without_language_head_are_quantized(request, tmp_path, family, auto_class, method):
    folder = request.getfixturevalue(f"{family}_folder")
    dataset = [make_batch(folder, seed=0), make_batch(folder, seed=1)]

    model = auto_class.from_pretrained(folder, quantization_config=QVLMConfig(dataset=dataset, method=method))
    model.save_pretrained(tmp_path)

    again = auto_class.from_pretrained(tmp_path)
    assert torch.equal(first_output(model, folder), first_output(again, folder))
    if hasattr(again, "score"):
        assert type(again.score) is torch.nn.Linear


def test_a_classifier_of_images_is_quantized(tmp_path):
    """Its new head stays as it is, and reloads."""
    source, saved = tmp_path / "source", tmp_path / "saved"
    FAMILIES["gemma3"].build().save_pretrained(source)
    config = QVLMConfig("w4a8", dataset=[make_batch(source, seed=0), make_batch(source, seed=1)])

    model = AutoModelForSequenceClassification.from_pretrained(source, quantization_config=config, num_labels=3)
    model.save_pretrained(saved)

    again, batch = AutoModelForSequenceClassification.from_pretrained(saved), make_batch(source)
    assert type(model.score) is torch.nn.Linear and model.score.out_features == 3
    for each in (model, again):
        each.config.text_config.pad_token_id = 0
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


@pytest.mark.parametrize(
    "family, auto_class",
    [("llama", AutoModel), ("llava", AutoModel), ("llama", AutoModelForSequenceClassification)],
    ids=["text", "images", "classes"],
)
def test_without_logits_fidelity_is_that_of_hidden_states(request, tmp_path, family, auto_class):
    """Held-out samples, which the packaged set has too, ended in AttributeError or IndexError."""
    folder = request.getfixturevalue(f"{family}_folder")
    dataset = [make_batch(folder, seed=seed) for seed in range(5)]

    errors = {}
    for scheme in ("w4a8", "w8a16"):
        config = QVLMConfig(scheme, dataset=dataset, num_samples=4)
        model = auto_class.from_pretrained(folder, quantization_config=config)
        fidelity = model.hf_quantizer.report["fidelity"]
        assert fidelity["prefill"] is None and fidelity["decode"] is None and fidelity["generate"] is None
        assert fidelity["states"]["tokens"] > 0
        errors[scheme] = fidelity["states"]["relative_error"]
    assert 0 < errors["w8a16"] < errors["w4a8"] < 0.1
    model.save_pretrained(tmp_path)
    assert "Last hidden states: squared error" in (tmp_path / "README.md").read_text()


def test_the_encoder_step_without_a_head_is_refused_before_weights_are_read(llava_folder):
    """It ended in "'NoneType' object is not callable" after the search of the tower."""
    config = QVLMConfig.paper(4, dataset=[make_batch(llava_folder, seed=0)])

    with pytest.raises(ConfigError, match=r"encoder_epochs=10 .* LlavaModel has no output embedding.*encoder_epochs=0"):
        AutoModel.from_pretrained(llava_folder, quantization_config=config)


@pytest.mark.parametrize("try_it", [True, False], ids=["dry run", "calibration"])
def test_samples_without_answers_need_a_model_that_writes_them(bundled_folder, try_it):
    """`LlavaModel` has no `generate`."""
    rows = [{"image": Image.new("RGB", (32, 32)), "question": "Which?"}, {"text": "Plain text needs no answer."}]

    with pytest.raises(DataError, match=r"1 of 2 samples have no answer, and LlavaModel cannot write one"):
        if try_it:
            dry_run(bundled_folder, QVLMConfig(dataset=rows), model_class=AutoModel)
        else:
            AutoModel.from_pretrained(bundled_folder, quantization_config=QVLMConfig(dataset=rows))


def changed_config(folder: Path, target: Path, change) -> Path:
    """A copy whose config.json is what `change` makes of it, as an editor would leave it."""
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text())
    change(values)
    (target / "config.json").write_text(json.dumps(values))
    return target


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("llama", lambda v: v.update(rms_norm_eps=1.0), r"says rms_norm_eps=1.0, .* saved with 1e-06"),
        ("llama", lambda v: v.update(hidden_act="gelu"), r"says hidden_act='gelu', .* saved with 'silu'"),
        ("llama", lambda v: v.update(hidden_act="none such"), r"says hidden_act='none such'"),
        ("llama", lambda v: v.pop("num_key_value_heads"), r"says num_key_value_heads=4, .* saved with 2"),
        ("llama", lambda v: v["rope_parameters"].update(rope_theta=1.0), r"says rope_parameters.rope_theta=1.0"),
        ("llama", lambda v: v.update(dtype="bfloat16"), r"says dtype='bfloat16', .* saved with 'float32'"),
        ("llama", lambda v: v.update(sliding_window=2), r"says sliding_window=2, .* saved with nothing"),
        ("llama", lambda v: v.update(num_hidden_layers=9999), r"says num_hidden_layers=9999, .* saved with 2"),
        ("llava", lambda v: v.update(vision_feature_layer=-1), r"says vision_feature_layer=-1, .* saved with -2"),
        ("llava", lambda v: v["vision_config"].update(layer_norm_eps=0.5), r"says vision_config.layer_norm_eps=0.5"),
    ],
)
def test_a_config_that_computes_something_else_is_refused(saved, tmp_path, family, change, message):
    """All tensors fit, so nothing else tells; these loaded to other outputs, or to a KeyError."""
    folder = changed_config(saved[family], tmp_path / "changed", change)

    with pytest.raises(CheckpointError, match=message + ".*restore config.json.*given to from_pretrained"):
        load(folder)


def test_a_config_that_means_the_same_loads_the_same(saved, tmp_path):
    """Other releases leave other defaults out, and what only generation reads may change."""

    def change(values):
        del values["mlp_bias"], values["transformers_version"]
        values.update(use_cache=False, eos_token_id=[2, 3], rope_theta=10000.0)

    folder = changed_config(saved["llama"], tmp_path / "changed", change)

    batch = make_batch(folder)
    assert torch.equal(logits(load(folder), batch), logits(load(saved["llama"]), batch))


def test_a_change_that_is_given_to_from_pretrained_holds_and_is_saved(saved, tmp_path):
    model = load(saved["llama"], rms_norm_eps=0.5)
    model.save_pretrained(tmp_path)

    again, batch = load(tmp_path), make_batch(tmp_path)
    assert again.config.rms_norm_eps == 0.5
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert not torch.equal(logits(again, batch), logits(load(saved["llama"]), batch))


@contextmanager
def redirected_headers(folder: Path):
    """The headers of the safetensors files, written back as they are at the end; the tensors stay."""
    contents = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    ends = {path: 8 + int.from_bytes(content[:8], "little") for path, content in contents.items()}
    headers = {path: json.loads(content[8 : ends[path]]) for path, content in contents.items()}
    yield headers
    for path, header in headers.items():
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + contents[path][ends[path] :])


def test_tensors_that_change_places_are_refused(saved, tmp_path):
    """Name, dtype and shape of every tensor stay."""
    shutil.copytree(saved["llama"], tmp_path / "changed")
    with redirected_headers(tmp_path / "changed") as headers:
        header = headers[tmp_path / "changed" / "model.safetensors"]
        first, second = (f"model.layers.{layer}.self_attn.q_proj.weight_packed" for layer in (0, 1))
        header[first], header[second] = header[second], header[first]

    with pytest.raises(CheckpointError, match="where safetensors writes it before: their values may be exchanged"):
        load(tmp_path / "changed")


def test_tensors_that_change_shards_are_refused(saved, tmp_path):
    """Each may lie where the order of names has it: only the index tells."""
    load(saved["llama"]).save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    with redirected_headers(tmp_path / "shards") as headers:
        holders = [(path, name) for path, header in headers.items() for name in header if name.endswith("norm.weight")]
        (one, first), (other, second) = holders[0], next(h for h in holders if h[0] != holders[0][0])
        headers[one][second], headers[other][first] = headers[one].pop(first), headers[other].pop(second)

    with pytest.raises(CheckpointError, match="values may be exchanged"):
        load(tmp_path / "shards")


def test_run_time_settings_hold_at_reload(saved):
    def tokens(**settings):
        return (
            load(saved["llama"], quantization_config=make_config(**settings)).model.layers[0].mlp.up_proj.decode_tokens
        )

    assert tokens(decode_tokens=0) == 0
    assert tokens(decode_tokens=3) == 3
    assert tokens(scheme="w4a8") == 16


def test_defaults_overwrite_nothing_that_was_saved(saved, tmp_path):
    load(saved["llama"], quantization_config=QVLMConfig(decode_tokens=0)).save_pretrained(tmp_path)

    assert load(tmp_path, quantization_config=QVLMConfig(decode_tokens=3)).hf_quantizer.config.exact_decode
    assert not load(tmp_path, quantization_config=QVLMConfig(exact_decode=False)).hf_quantizer.config.exact_decode


@pytest.mark.parametrize("settings", [{"scheme": "w8a8"}, {"group_size": 16}, {"vision_scheme": None}], ids=str)
def test_another_precision_at_reload_is_refused(saved, settings):
    name = next(iter(settings))
    with pytest.raises(ConfigError, match=rf"asks for {name}=.*checkpoint is quantized with {name}=.*leave it out"):
        load(saved["llava"], quantization_config=make_config(**settings))


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_a_checkpoint_loads_dequantized_and_saves_plain(saved, tmp_path, family):
    batch = make_batch(saved[family])

    plain = load(saved[family], quantization_config=QVLMConfig(dequantize=True))
    plain.save_pretrained(tmp_path)

    assert {type(m) for m in plain.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
    assert torch.equal(logits(plain, batch), logits(load(saved[family]).dequantize(), batch))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(plain, batch), logits(load(tmp_path), batch))


def test_dequantizing_a_plain_model_is_refused(llama_folder):
    with pytest.raises(ConfigError, match="this one is not quantized; leave it out"):
        load(llama_folder, quantization_config=QVLMConfig(dequantize=True))


@pytest.mark.parametrize("family, build", [("llama", tiny_llama), ("llava", tiny_llava)])
def test_parameters_are_counted_as_in_full_precision(saved, family, build):
    model = load(saved[family])

    assert model.num_parameters() == build().num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == build().num_parameters(exclude_embeddings=True)


def test_a_quantized_head_is_not_resized(llama_folder):
    """It was replaced by a plain one in silence, and could not be saved."""
    model = quantize(llama_folder, method="rtn", overrides={"lm_head": "w8a8"})

    with pytest.raises(ConfigError, match=r"quantized with 50 tokens and cannot be resized to 64; .*dequantize"):
        model.resize_token_embeddings(pad_to_multiple_of=64)

    assert model.get_input_embeddings().num_embeddings == 50, "nothing has changed"
    assert model.resize_token_embeddings(50) is model.get_input_embeddings()


def test_a_plain_head_is_resized_and_saved(saved, tmp_path):
    model = load(saved["llama"])
    model.resize_token_embeddings(56)

    model.save_pretrained(tmp_path)

    batch = make_batch(tmp_path)
    assert torch.equal(logits(model, batch), logits(load(tmp_path), batch))


@pytest.mark.parametrize("cast", ["kbit", "to"])
def test_a_model_that_was_cast_saves_and_reloads(llama_folder, tmp_path, cast):
    """`prepare_model_for_kbit_training` of PEFT sets `.data` of every 16-bit parameter to float32."""
    model = quantize(llama_folder, method="rtn", options={"dtype": torch.bfloat16})
    if cast == "kbit":
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(torch.float32)
    else:
        assert model.to(torch.float32) is model

    model.save_pretrained(tmp_path)

    batch = make_batch(tmp_path)
    assert torch.equal(logits(model, batch), logits(load(tmp_path), batch))


def test_a_replaced_linear_is_refused_at_save(saved, tmp_path):
    model = load(saved["llama"])
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 96)

    with pytest.raises(CheckpointError, match=r"up_proj was quantized, but the model has another module .*dequantize"):
        model.save_pretrained(tmp_path)
