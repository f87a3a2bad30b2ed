"""Checkpoints that somebody damaged or forged: refused with a typed error, or loaded as what they say they are.

Three places are mutated: `quantization_config`, the index of shards, and the headers of the tensor files. A forger
also renews the digest and the identity in the guard tensor, so that every later check is reached as well.
"""

import copy
import json
import random
import resource
import shutil
import struct
import traceback
from argparse import Namespace
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.quantizers.base import HfQuantizer

from optimum_qvlm import QVLMConfig
from optimum_qvlm.cli.info import as_text, as_values
from optimum_qvlm.cli.loading import load_model
from optimum_qvlm.errors import ConfigError, QVLMError
from optimum_qvlm.hf.format.inspection import inspect_checkpoint
from optimum_qvlm.hf.format.modules import GUARD, quantized_modules
from optimum_qvlm.hf.format.record import config_digest, config_identity
from optimum_qvlm.hf.saving.source import Source
from optimum_qvlm.hf.saving.weight_files import REPORT_FILE
from tests.jobs import forget_model_config, load, logits, make_batch, quantize

pytestmark = pytest.mark.integration

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TYPED = (QVLMError, SafetensorError, OSError, json.JSONDecodeError)
"""What may come out: ours, safetensors' own, and transformers' for files that are missing or no JSON."""

FIDELITY = {
    "prefill": {"tokens": 9, "mean_kl": 0.5, "top1_agreement": 1.0},
    "decode": {"tokens": 9, "mean_kl": 0.25, "top1_agreement": 1.0},
    "generate": {"answers": 8, "tokens": 14.25, "agreed_tokens": 9.5, "exact_match": 0.375},
}
MEGABYTES = 512
"""How much the process may grow over all examples; the model has a quarter of a megabyte."""

LEAVES = [None, True, False, -3, 0, 1, 7, 64, 300, 2**31 - 1, 2**31, 2**63, 10**30, -(10**30)]
LEAVES += [0.5, -1.5, 1e300, float("nan"), float("inf"), "", "auto", "w4a8", "w16a4", "float32", "int32", "load"]
LEAVES += ["__class__", "../x", "I32", "F64", "*", "\x00", "ä" * 1000, [], {}, [[]], {"": None}, [1, 2], {"scheme": 5}]
"""What takes the place of a value: every JSON type, and what a reader may trip over."""


@pytest.fixture(scope="module")
def original(llava_folder, tmp_path_factory):
    """A quantized folder in one file, and its logits on a batch."""
    folder = tmp_path_factory.mktemp("trust")
    model = quantize(llava_folder)
    model.save_pretrained(folder)
    batch = make_batch(folder)
    return folder, batch, logits(model, batch)


@pytest.fixture(scope="module")
def sharded(original, tmp_path_factory):
    """The same in shards."""
    folder = tmp_path_factory.mktemp("shards")
    load(original[0]).save_pretrained(folder, max_shard_size="60KB")
    return folder, original[1], original[2]


@pytest.fixture(scope="module")
def tally(request):
    """Counts outcomes, and prints them when the module is done."""
    counts: dict[str, Counter[str]] = {}
    yield counts
    report = request.config.pluginmanager.getplugin("terminalreporter")
    for name, outcomes in counts.items():
        shown = ", ".join(f"{what} {count}" for what, count in sorted(outcomes.items()))
        line = f"mutations of {name}: {sum(outcomes.values())} ({shown})"
        report.write_line(f"\n{line}")


def peak_megabytes() -> int:
    """Most memory that the process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, the root left out."""
    actual = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        actual += paths_in(inner, (*path, key))
    return actual


def mutated(value: Any, seed: int) -> Any:
    """A JSON value with one to three places replaced, removed, renamed or changed a little."""
    chance, value = random.Random(seed), copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        depth = chance.randint(1, 5)
        places = paths_in(value)
        if not places:
            break
        *parents, key = chance.choice([path for path in places if len(path) == depth] or places)
        holder = value
        for step in parents:
            holder = holder[step]
        action = chance.choice(["replace", "remove", "rename", "nudge"])
        if action == "remove":
            del holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[chance.choice(["", "x", f"{key}x", "weight", "../x"])] = holder.pop(key)
        elif action == "nudge" and isinstance(holder[key], int | float):
            holder[key] += chance.choice([-1, 1, 8, 2**20])
        elif action == "nudge" and isinstance(holder[key], str):
            holder[key] = holder[key][:-1] + chance.choice(["", "0", "1", "x"])
        else:
            holder[key] = copy.deepcopy(chance.choice(LEAVES))
    return value


def write_config(folder: Path, values: Any, *, forged: bool) -> None:
    """Put `quantization_config` into config.json; a forger renews digest and identity, which values that are no JSON do
    not have."""
    config = json.loads((folder / "config.json").read_text())
    if forged and isinstance(values, dict):
        values = json.loads(json.dumps(values))
        state = load_file(folder / WEIGHTS)
        with suppress(ConfigError):
            state[GUARD] = torch.tensor(list(bytes.fromhex(config_identity(values))), dtype=torch.uint8)
            save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
            values["digest"] = config_digest(values)
    config["quantization_config"] = values
    (folder / "config.json").write_text(json.dumps(config))


def outcome(folder: Path, batch: Any, expected: Any) -> str:
    """What loading does: `refused`, `same`, or `as it says`; anything else fails the test."""
    try:
        model = load(folder)
    except TYPED as error:
        return f"refused by {type(error).__name__}"
    except (KeyError, TypeError, AttributeError) as error:
        # older transformers ask a quantizer nothing before they read the index, and take its form for granted
        assert not hasattr(HfQuantizer, "update_attn_implementation")
        frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        assert "get_checkpoint_shard_files" in frames
        return f"refused by transformers' reader of the index ({type(error).__name__})"
    saved = json.loads((folder / "config.json").read_text())["quantization_config"]
    modules = quantized_modules(model)
    assert len(modules) == len(saved["modules"]), "a linear was left as it was initialised"
    actual = logits(model, batch)
    if torch.equal(actual, expected):
        return "loaded the same"
    record = model.config.quantization_config.record.modules
    formats = sorted((m.format.weight.bits, m.format.activation_clip) for m in modules.values())
    assert formats == sorted((entry.weight.bits, entry.format.activation_clip) for entry in record.values())
    return "loaded as it says"


def inspected(folder: Path) -> str:
    """What `info` does, text and JSON included: it raises nothing but ours."""
    try:
        actual = inspect_checkpoint(str(folder))
        assert as_text(actual).startswith(str(folder))
        json.dumps(as_values(actual))
    except QVLMError:
        return "info refused"
    return "info accepted"


def same_or_refused(results: list[str]) -> bool:
    return all(result == "loaded the same" or result.startswith(("refused", "info")) for result in results)


SEEDS = st.integers(0, 2**32)
COMMON: dict[str, Any] = {"phases": [Phase.generate], "deadline": None, "derandomize": True}
COMMON["suppress_health_check"] = list(HealthCheck)


def check(folder, batch, expected, tally, name):
    """One mutated folder through both ways of reading it; memory stays bounded."""
    before = peak_megabytes()
    results = [inspected(folder), outcome(folder, batch, expected)]
    assert peak_megabytes() - before < MEGABYTES
    tally.setdefault(name, Counter()).update(results[1:])
    tally.setdefault(f"{name}, info", Counter()).update(results[:1])
    return results


def fresh(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


@pytest.mark.parametrize("examples", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_a_changed_configuration_is_refused(original, tmp_path, tally, examples):
    """The digest sees every change, whatever it is; what stays equal after JSON is no change."""
    source, batch, expected = original
    values = json.loads((source / "config.json").read_text())["quantization_config"]

    @settings(max_examples=examples, **COMMON)
    @given(SEEDS)
    def run(seed):
        changed = mutated(values, seed)
        folder = fresh(source, tmp_path / "copy")
        write_config(folder, changed, forged=False)
        if changed.get("quant_method") == "qvlm":
            assert same_or_refused(check(folder, batch, expected, tally, "quantization_config"))
        else:  # transformers asks another quantizer, or none
            assert inspected(folder) == "info refused"

    run()


@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_a_forged_configuration_is_refused_or_means_what_it_says(original, tmp_path, tally, examples):
    """Digest and identity are renewed, so types, ranges, shapes and names have to be checked one by one."""
    source, batch, expected = original
    values = json.loads((source / "config.json").read_text())["quantization_config"]

    @settings(max_examples=examples, **COMMON)
    @given(SEEDS)
    def run(seed):
        changed = mutated(values, seed)
        folder = fresh(source, tmp_path / "copy")
        if changed.get("quant_method") != "qvlm":
            return
        write_config(folder, changed, forged=True)
        check(folder, batch, expected, tally, "quantization_config, forged")

    run()


@pytest.mark.parametrize("examples", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_a_changed_index_is_refused(sharded, tmp_path, tally, examples):
    """Also one that names files elsewhere, or leaves some out."""
    source, batch, expected = sharded
    index = json.loads((source / INDEX).read_text())

    @settings(max_examples=examples, **COMMON)
    @given(SEEDS)
    def run(seed):
        changed = mutated(index, seed)
        folder = fresh(source, tmp_path / "copy")
        (folder / INDEX).write_text(json.dumps(changed))
        results = check(folder, batch, expected, tally, "the index")
        assert same_or_refused(results)

    run()


@pytest.mark.parametrize("examples", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_a_changed_tensor_header_is_refused(original, tmp_path, tally, examples):
    """Names, dtypes, shapes, offsets, and the length that stands before the header."""
    source, batch, expected = original
    data = (source / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

    @settings(max_examples=examples, **COMMON)
    @given(SEEDS, st.sampled_from([0, 0, 0, 0, 1, -1, 2**20, 2**40, 2**63]), st.sampled_from([0, 0, 0, 8]))
    def run(seed, longer, cut):
        changed = mutated(header, seed)
        folder = fresh(source, tmp_path / "copy")
        text = json.dumps(changed).encode()
        said = struct.pack("<Q", (len(text) + longer) % 2**64)
        (folder / WEIGHTS).write_bytes(said + text + body[: len(body) - cut])
        results = check(folder, batch, expected, tally, "tensor headers")
        assert same_or_refused(results)

    run()


@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_a_changed_report_is_no_obstacle(original, tmp_path, tally, examples):
    """It is there to be read: neither `info` nor the card that a save writes may stumble over it."""
    source, batch, expected = original
    report = json.loads((source / REPORT_FILE).read_text()) | {"fidelity": FIDELITY}
    model = load(source)

    @settings(max_examples=examples, **COMMON)
    @given(SEEDS)
    def run(seed):
        folder = fresh(source, tmp_path / "copy")
        (folder / REPORT_FILE).write_text(json.dumps(mutated(report, seed)))
        actual = inspected(folder)
        model.hf_quantizer.source = Source(folder=folder)
        model.save_pretrained(tmp_path / "out")
        tally.setdefault("the report, info and save", Counter()).update([actual])

    run()
    assert torch.equal(logits(load(tmp_path / "out"), batch), expected)


@pytest.mark.parametrize("examples", [40, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", ["chat", "export"])
def test_commands_say_of_a_changed_index_what_is_wrong(sharded, llava_folder, tmp_path, tally, examples, command):
    """Whatever transformers makes of an index, they raise our errors only, for quantized and for plain models."""
    source, options = sharded[0], {}
    if command == "export":
        source = tmp_path / "plain"
        load(llava_folder).save_pretrained(source, max_shard_size="200KB")
        options["quantization_config"] = QVLMConfig(method="rtn")
    index = json.loads((source / INDEX).read_text())
    args = Namespace(model=str(source), revision="main", device="cpu", dtype="auto", trust_remote_code=False)
    args.subfolder, args.cache_dir, args.variant = None, None, None
    expected = load_model(args, **options).state_dict()

    @settings(max_examples=examples, **COMMON)
    @given(SEEDS)
    def run(seed):
        folder = fresh(source, tmp_path / "copy")
        (folder / INDEX).write_text(json.dumps(mutated(index, seed)))
        args.model = str(folder)
        try:
            state = load_model(args, **options).state_dict()
        except QVLMError:
            actual = "refused"
        else:
            actual = "loaded the same"
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in expected)
        tally.setdefault(f"the index, {command}", Counter()).update([actual])

    run()


@pytest.mark.parametrize("where", ["link", "parent", "absolute"])
def test_weights_outside_the_folder_are_refused(sharded, tmp_path, where):
    """An index may hold any path, and a folder from an archive may hold links."""
    folder = fresh(sharded[0], tmp_path / "model")
    index = json.loads((folder / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    outside = tmp_path / "outside.safetensors"
    shutil.move(folder / first, outside)
    if where == "link":
        (folder / first).symlink_to(outside)
    else:
        name = "../outside.safetensors" if where == "parent" else str(outside)
        index["weight_map"] = {k: name if v == first else v for k, v in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))

    message = "is a link that leaves" if where == "link" else "index.* names .*, which is outside"
    with pytest.raises(QVLMError, match=message):
        load(folder)


def test_a_configuration_of_a_huge_model_is_refused_before_memory_is_taken(original, tmp_path):
    """A vocabulary of 2**30 would take a quarter of a terabyte for tensors that the files do not hold."""
    folder = fresh(original[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 2**30
    forget_model_config(config)
    (folder / "config.json").write_text(json.dumps(config))
    before = peak_megabytes()

    with pytest.raises(QVLMError, match=r"config.json describes a model of .* GB, but the files hold .* kB"):
        load(folder)

    assert peak_megabytes() - before < MEGABYTES


def test_code_beside_the_weights_is_not_run(original, tmp_path):
    """Without trust_remote_code nothing of a checkpoint is executed."""
    folder = fresh(original[0], tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForImageTextToText": "evil.Model", "AutoConfig": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))

    load(folder)
    inspect_checkpoint(str(folder))

    assert not (tmp_path / "ran").exists()


def test_pickles_beside_or_instead_of_the_weights_are_never_opened(original, tmp_path):
    folder = fresh(original[0], tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    load(folder)
    (folder / WEIGHTS).unlink()

    with pytest.raises(QVLMError, match="pickled weights are not read"):
        load(folder)
