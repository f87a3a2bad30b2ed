"""The job itself: quantize while loading, save, load again anywhere."""

import copy
import json
import math
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from optimum_qvlm import QVLMConfig
from optimum_qvlm.evaluation.fidelity import answer_logits, compare
from optimum_qvlm.hf.format.modules import GUARD, packed_bytes, quantized_modules
from optimum_qvlm.modules.qlinear import QuantLinear
from tests.configs import make_config
from tests.integration.conftest import SCHEMES
from tests.jobs import contents, load, logits, make_batch, model_type, quantize, run_python
from tests.tiny_models import IMAGE_TOKEN

pytestmark = pytest.mark.integration

GRIDS = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero point"])
FAMILIES = pytest.mark.parametrize("family", ["llava", "llama"])

LOAD_AND_COMPARE = """
import sys
import torch
from safetensors.torch import load_file
from transformers import {auto_class}
import optimum_qvlm
folder, stored, threads = sys.argv[1], load_file(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
wanted = stored.pop("logits")
model = {auto_class}.from_pretrained(folder)
with torch.no_grad():
    found = model(**stored).logits
print("equal" if torch.equal(found, wanted) else (found - wanted).abs().max())
"""


def red_square():
    return Image.new("RGB", (32, 32), "red")


def record(number=0):
    return {"image": red_square(), "question": f"what colour is {number}?", "answer": "red"}


def bits_of(scheme):
    weight, _, activation = scheme[1:].partition("a")
    return int(weight), None if activation == "16" else int(activation)


@pytest.fixture(scope="module")
def bundled(bundled_folder, tmp_path_factory):
    """The bundled model quantized on a few records of a user, and the folder that it was saved in. Read only."""
    folder = tmp_path_factory.mktemp("bundled")
    model = load(bundled_folder, quantization_config=QVLMConfig(dataset=[record(n) for n in range(3)]))
    model.save_pretrained(folder)
    return model, folder


@FAMILIES
@GRIDS
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_saved_model_reloads_bit_for_bit(job, family, scheme, symmetric):
    """What was calibrated is what is used later."""
    done = job(family, scheme, symmetric=symmetric)

    assert torch.equal(logits(load(done.folder), done.batch), done.logits)
    assert not torch.equal(logits(load(done.source), done.batch), done.logits)


@FAMILIES
def test_a_fresh_process_gets_the_same_logits(job, family, tmp_path):
    """With nothing but the import of this package, as on another machine."""
    done = job(family, "w4a8", symmetric=True)
    save_file({**done.batch, "logits": done.logits}, tmp_path / "wanted.safetensors")
    auto_class = "AutoModelForCausalLM" if family == "llama" else "AutoModelForImageTextToText"

    ran = run_python(
        LOAD_AND_COMPARE.format(auto_class=auto_class),
        done.folder,
        tmp_path / "wanted.safetensors",
        torch.get_num_threads(),
    )

    assert ran.stdout.strip() == "equal", ran.stderr


@FAMILIES
@GRIDS
@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_linears_take_the_bytes_that_their_bits_promise(job, family, scheme, symmetric):
    """codes: rows of whole words; scales: per row and group; zero points: packed by rows; a factor per channel."""
    for module in quantized_modules(job(family, scheme, symmetric=symmetric).model).values():
        bits, groups = module.format.weight.bits, module.format.weight.groups(module.in_features)
        expected = 4 * module.out_features * math.ceil(module.in_features * bits / 32)
        expected += 4 * module.out_features * groups
        if not symmetric:
            expected += 4 * math.ceil(module.out_features * bits / 32) * groups
        if module.format.equalized:
            expected += 4 * module.in_features
        assert packed_bytes(copy.deepcopy(module).pack()) == expected + (
            0 if module.bias is None else 4 * module.out_features
        )


@FAMILIES
@GRIDS
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_effective_precision_of_every_linear_is_in_the_configuration(job, family, scheme, symmetric):
    """Decoder as asked for, tower and projector at w8a8, nothing in between."""
    done = job(family, scheme, symmetric=symmetric)

    modules = load(done.folder).config.quantization_config.to_dict()["modules"]

    weight, activation = bits_of(scheme)
    for name, entry in modules.items():
        vision = "vision_tower" in name or "projector" in name
        wanted = (8, 8) if vision else (weight, activation)
        assert (entry["weight_bits"], entry["activation_bits"], entry["symmetric"]) == (*wanted, symmetric), name
        assert entry["weight_group"] == (None if entry["weight_bits"] == 8 else {64: 64, 96: 32}[entry["in_features"]])
    counts = {"llava": 34, "llama": 14}
    assert len(modules) == counts[family] == len(quantized_modules(done.model))
    on_disk = load_file(done.folder / "model.safetensors")
    assert {name.removesuffix(".weight_packed") for name in on_disk if name.endswith("_packed")} == set(modules)
    assert GUARD in on_disk


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_reloads_bit_for_bit(job, family, dtype):
    done = job(family, "w4a8", dtype=dtype)

    again = load(done.folder)

    assert done.logits.dtype == again.dtype == dtype
    assert torch.equal(logits(again, done.batch), done.logits)
    assert {module.weight_scale.dtype for module in quantized_modules(again).values()} == {dtype}


@FAMILIES
@pytest.mark.parametrize(
    "saved, loaded",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
    ids=["bf16 as fp32", "fp32 as bf16", "fp16 as bf16"],
)
def test_scales_keep_their_dtype_whatever_the_model_is_loaded_in(job, family, saved, loaded):
    """A rounded scale is another weight; the rest of the model follows the user."""
    done = job(family, "w4a8", dtype=saved)

    again = load(done.folder, dtype=loaded)

    wanted = quantized_modules(done.model)
    for path, module in quantized_modules(again).items():
        assert module.weight_scale.dtype == saved
        assert torch.equal(module.weight_scale, wanted[path].weight_scale)
    assert logits(again, done.batch).dtype == loaded
    assert (logits(again, done.batch).float() - done.logits.float()).abs().max() < 0.1


@FAMILIES
def test_a_report_lies_beside_the_weights(job, family):
    done = job(family, "w4a8", symmetric=True)

    report = json.loads((done.folder / "qvlm_report.json").read_text())

    assert report == done.model.hf_quantizer.report
    stored = {name: tensor for name, tensor in load_file(done.folder / "model.safetensors").items() if name != GUARD}
    shapes = [tensor for name, tensor in stored.items() if name.endswith(".weight_shape")]
    on_disk = sum(tensor.nbytes for tensor in stored.values()) - sum(tensor.nbytes for tensor in shapes)
    buffers = sum(buffer.nbytes for buffer in done.model.buffers())
    assert report["bytes"]["after"] == on_disk + buffers
    assert report["bytes"]["before"] == packed_bytes(load(done.source))
    assert report["bytes"]["before"] > 2 * report["bytes"]["after"]
    assert all(math.isfinite(layer["error"]) for layer in report["layers"])


def test_fidelity_is_measured_on_what_was_left_out(llava_folder):
    """A figure on calibration samples would flatter; without others there is none."""
    data = [make_batch(llava_folder, seed=seed, rows=1) for seed in range(6)]

    model = quantize(llava_folder, "w4a4", dataset=data, num_samples=4, decode_tokens=0)

    found = model.hf_quantizer.report["fidelity"]
    taken = random.Random(0).sample(range(6), 4)
    left = [data[place] for place in range(6) if place not in taken]
    labels = [{**b, "labels": torch.where(b["input_ids"] == IMAGE_TOKEN, -100, b["input_ids"])} for b in left]
    wanted = compare(answer_logits(load(llava_folder), labels), answer_logits(model, labels))
    prefill, decode = found["prefill"], found["decode"]
    assert prefill == pytest.approx(asdict(wanted), rel=1e-5)
    assert 0 < prefill["mean_kl"] and prefill["tokens"] == sum(int((b["labels"][:, 1:] != -100).sum()) for b in labels)
    assert decode["tokens"] == prefill["tokens"] - 2, "what follows an image at once is no step of decoding"
    assert 0 < decode["mean_kl"] and found["generate"]["answers"] == 2
    assert quantize(llava_folder, "w4a4", dataset=data).hf_quantizer.report["fidelity"] is None


def test_decoding_without_rounded_activations_is_closer_and_said_to_be(bundled_folder):
    """What a report says of decoding must be what `decode_tokens` does: `w4a4` rounds there only if it is exact."""
    answer = "left, red and 3 or 5 on the square, not blue, is it?"
    data, found = [record(number) | {"answer": answer} for number in range(24)], {}
    for exact in (False, True):
        config = QVLMConfig("w4a4", dataset=data, num_samples=16, exact_decode=exact, effort="fast")
        model = load(bundled_folder, quantization_config=config)
        found[exact] = model.hf_quantizer.report["fidelity"]

    assert all(entry["decode"]["tokens"] == entry["prefill"]["tokens"] for entry in found.values())
    assert found[True]["decode"]["mean_kl"] == pytest.approx(found[True]["prefill"]["mean_kl"], rel=1e-3)
    assert found[False]["decode"]["mean_kl"] < 0.9 * found[False]["prefill"]["mean_kl"]
    assert 0 <= found[False]["generate"]["exact_match"] <= 1 and found[False]["generate"]["answers"] == 8


def test_the_folder_of_a_whole_model_is_whole(bundled, bundled_folder):
    """Processor, template and generation settings travel, so that the folder can be used alone."""
    _, folder = bundled

    processor = AutoProcessor.from_pretrained(folder)

    original = AutoProcessor.from_pretrained(bundled_folder)
    assert type(processor) is type(original)
    assert processor.chat_template == original.chat_template
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json", "processor_config.json"):
        assert (folder / name).exists(), name
    assert (folder / "chat_template.jinja").read_bytes() == (bundled_folder / "chat_template.jinja").read_bytes()


def test_a_quantized_model_generates(bundled):
    """With a cache, from its own folder alone."""
    model, folder = bundled
    processor, again = AutoProcessor.from_pretrained(folder), load(folder)
    content = [{"type": "image", "image": red_square()}, {"type": "text", "text": "what colour?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )

    answers = [m.generate(**inputs, do_sample=False, max_new_tokens=6) for m in (model, again)]

    assert answers[0].shape[1] > inputs["input_ids"].shape[1]
    assert torch.equal(*answers)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()


def messages(number):
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": red_square()}, {"type": "text", "text": f"what? {number}"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]


def as_dataset(records):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    return Dataset.from_list(records, features=features)


@pytest.mark.parametrize(
    "dataset, source",
    [
        ([messages(n) for n in range(3)], "user"),
        ([{"messages": messages(n)} for n in range(3)], "user"),
        ([{k: v for k, v in record(n).items() if k != "answer"} for n in range(3)], "user"),
        ([record(0), {"question": "and without?", "answer": "no"}, {"text": "a text"}], "user"),
        (as_dataset([record(n) for n in range(3)]), "datasets.Dataset"),
    ],
    ids=["messages", "dicts of messages", "no answers", "some without image", "datasets.Dataset"],
)
def test_data_is_taken_in_every_form_that_users_have(bundled_folder, dataset, source):
    model = load(
        bundled_folder, quantization_config=make_config("w4a16", dataset=dataset, batch_size=2, search_tokens=64)
    )

    calibration = model.config.quantization_config.to_dict()["calibration"]
    assert (calibration["source"], calibration["samples"]) == (source, 3)
    assert len(quantized_modules(model)) == 60


def test_the_packaged_data_is_used_where_none_is_given(bundled_folder):
    model = load(bundled_folder, quantization_config=make_config(num_samples=3, batch_size=2, search_tokens=64))

    calibration = model.config.quantization_config.to_dict()["calibration"]
    assert (calibration["source"], calibration["samples"]) == ("packaged", 3)


@FAMILIES
def test_a_dequantized_model_is_a_plain_one(job, family, tmp_path):
    """The way back: stock transformers saves and loads it."""
    done = job(family, "w4a16", symmetric=True)
    model = load(done.folder).dequantize()

    assert not [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    model.save_pretrained(tmp_path / "plain")

    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "qvlm_report.json" not in contents(tmp_path / "plain")
    again = load(tmp_path / "plain")
    assert set(again.state_dict()) == set(load(done.source).state_dict())
    assert torch.equal(logits(again, done.batch), logits(model, done.batch))


def test_a_dequantized_model_loads_without_the_plugin(job, tmp_path):
    load(job("llama", "w4a8", symmetric=True).folder).dequantize().save_pretrained(tmp_path / "plain")

    ran = run_python(
        "import sys; from transformers import AutoModelForCausalLM;"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1]); print('optimum_qvlm' in sys.modules)",
        tmp_path / "plain",
    )

    assert ran.stdout.strip() == "False", ran.stderr


def test_dequantizing_changes_weights_only_by_rounding_to_their_dtype(job):
    """Weights are those that the quantized linear computes with."""
    done = job("llava", "w4a16", vision_scheme="w8a16")

    plain = load(done.folder).dequantize()

    assert torch.allclose(logits(plain, done.batch), done.logits, atol=1e-5)


def test_settings_of_the_checkpoint_win_with_a_warning(job):
    """Those of the calibration say nothing of a model that is loaded."""
    done = job("llava", "w4a8", symmetric=True)

    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        again = load(done.folder, quantization_config=QVLMConfig("w4a8", dataset=[make_batch(done.source)]))

    assert again.config.quantization_config.scheme == "w4a8"
    assert torch.equal(logits(again, done.batch), done.logits)


def test_a_raw_dict_is_a_configuration(llava_folder):
    """Settings often come from JSON files."""
    values = {"quant_method": "qvlm", "scheme": "w4a8", "method": "rtn"}

    model = load(llava_folder, quantization_config=values)

    assert model.config.quantization_config.scheme == "w4a8"
    assert quantized_modules(model)
    assert values == {"quant_method": "qvlm", "scheme": "w4a8", "method": "rtn"}


def test_a_configuration_can_be_used_again(llava_folder, llama_folder):
    """For a second model, or in a loop over seeds."""
    config = QVLMConfig("w4a8", dataset=[make_batch(llava_folder)])
    before, dataset = copy.deepcopy(config.__dict__), config.dataset

    first, second = (load(llava_folder, quantization_config=config) for _ in range(2))

    assert config.dataset is dataset and config.record is None
    assert {k: v for k, v in config.__dict__.items() if k != "dataset"} == {
        k: v for k, v in before.items() if k != "dataset"
    }
    batch = make_batch(llava_folder)
    assert torch.equal(logits(first, batch), logits(second, batch))
    assert first.config.quantization_config.dataset is None


def test_overrides_decide_per_module(llama_folder, tmp_path):
    overrides = {"layers.0.mlp": None, "*.q_proj": "w8a8", "*.down_proj": {"scheme": "w6a16", "group_size": 16}}
    model = quantize(llama_folder, "w4a8", overrides=overrides, modules_to_not_convert=["layers.1.self_attn.o_proj"])
    model.save_pretrained(tmp_path / "out")

    again = load(tmp_path / "out")

    layers = again.model.layers
    assert type(layers[0].mlp.up_proj) is type(layers[0].mlp.down_proj) is nn.Linear
    assert type(layers[1].self_attn.o_proj) is nn.Linear
    assert layers[0].self_attn.q_proj.format.weight.bits == 8
    assert layers[0].self_attn.k_proj.format.weight.bits == 4
    down = layers[1].mlp.down_proj.format
    assert (down.weight.bits, down.weight.group, down.activation) == (6, 16, None)
    assert torch.equal(logits(again, make_batch(llama_folder)), logits(model, make_batch(llama_folder)))


def test_a_quantized_output_embedding_reloads_bit_for_bit(llava_folder, tmp_path):
    model = quantize(llava_folder, overrides={"lm_head": "w8a8"})
    model.save_pretrained(tmp_path / "out")

    again = load(tmp_path / "out")

    assert isinstance(again.lm_head, QuantLinear)
    assert torch.equal(logits(again, make_batch(llava_folder)), logits(model, make_batch(llava_folder)))


def test_the_concrete_class_works_as_the_auto_class_does(job):
    from transformers import LlavaForConditionalGeneration

    done = job("llava", "w4a8", symmetric=True)

    assert torch.equal(logits(LlavaForConditionalGeneration.from_pretrained(done.folder), done.batch), done.logits)
    assert model_type(done.folder) == "llava"


HUB_JOB = """
import sys
import optimum_qvlm
from transformers import AutoModelForImageTextToText
config = optimum_qvlm.QVLMConfig("w4a8", method="rtn")
model = AutoModelForImageTextToText.from_pretrained("me/model", quantization_config=config)
model.save_pretrained(sys.argv[1])
"""


def test_a_repository_in_the_cache_is_quantized_without_network(bundled_folder, tmp_path):
    """The files beside the weights are found in the snapshot that the weights came from."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "home" / "hub" / "models--me--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(bundled_folder, repo / "snapshots" / commit)

    ran = run_python(HUB_JOB, tmp_path / "out", HF_HOME=str(tmp_path / "home"))

    assert ran.returncode == 0, ran.stderr
    assert {"tokenizer.json", "processor_config.json", "chat_template.jinja"} <= set(contents(tmp_path / "out"))
    assert quantized_modules(AutoModelForImageTextToText.from_pretrained(Path(tmp_path / "out")))


@pytest.mark.parametrize("exact", [False, True])
def test_the_token_threshold_is_saved_with_the_model(llama_folder, tmp_path, exact):
    """What is decoded must not depend on where the model was loaded."""
    model = quantize(llama_folder, "w4a4", exact_decode=exact, decode_tokens=5)
    model.save_pretrained(tmp_path / "out")

    again = load(tmp_path / "out")

    assert {module.decode_tokens for module in quantized_modules(again).values()} == {0 if exact else 5}
    few = {"input_ids": torch.tensor([[3, 4, 5]])}
    assert torch.equal(logits(again, few), logits(model, few))
