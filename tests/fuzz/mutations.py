"""Damage to a saved checkpoint: what a disk, an editor or somebody with bad intentions does to its small text parts."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from optimum_qvlm.hf.format.modules import GUARD
from optimum_qvlm.hf.format.record import config_digest, config_identity

Damage = Callable[[Path, Random], str]
"""Changes a folder, and says what was changed."""

DEEP = 100_000
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 10_001, 2**31, 2**53 + 1, 2**63, -(2**63), 2**70, 10**400),
    *(0.0, -0.0, 0.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "a", "0", "None", "auto", "../../etc/passwd", "/dev/zero", "\x1b[31m", "\ud800", "x" * 5000),
    *("float16", "torch.float64", "int8", "gelu", "relu", "llama", "llava", "clip", "qwen2", "gptq", "eager"),
    *([], {}, [[]], [None], [0] * 50, [1, "a"], {"a": {"b": [1]}}, {"": None}, {"rope_type": "linear", "factor": 2.0}),
)
ODD_KEYS = ("", "a", "x" * 300, "__class__", "\x1b]0;x\x07", "quant_method", "weight", "\ud800")
DTYPES = ("BOOL", "U8", "I8", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64", "C64", "F4", "Q9", "")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def change_one(value: Any, random: Random) -> str:
    """Damage one entry inside of a JSON value, in place; each part of an object as often as the others."""
    if not value:
        return "nothing to change"
    part = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    path = (part, *random.choice([(), *places(value[part])]))
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    return f"{'.'.join(map(str, path))}: {random.choice(_CHANGES)(holder, path[-1], random)}"


def _replace(holder: Any, key: Any, random: Random) -> str:
    holder[key] = copy.deepcopy(random.choice(ODD_VALUES))
    return f"is {holder[key]!r:.60}"


def _nudge(holder: Any, key: Any, random: Random) -> str:
    """A value that is likely to pass where only types are looked at."""
    old = holder[key]
    if isinstance(old, bool):
        holder[key] = not old
    elif isinstance(old, int | float):
        holder[key] = random.choice([old + 1, old - 1, old * 2, -old, old / 2, float(old), str(old), old + 1e-4])
    elif isinstance(old, str):
        holder[key] = random.choice([old + "x", old[:-1], old.upper(), old[::-1], [old]])
    elif isinstance(old, list):
        holder[key] = random.choice([old[::-1], old[:-1], old * 2, {str(n): item for n, item in enumerate(old)}])
    elif isinstance(old, dict):
        holder[key] = random.choice([list(old), list(old.values()), {}, [old]])
    else:
        holder[key] = random.choice(ODD_VALUES)
    return f"{old!r:.40} became {holder[key]!r:.60}"


def _drop(holder: Any, key: Any, random: Random) -> str:
    del holder[key]
    return "dropped"


def _rename(holder: Any, key: Any, random: Random) -> str:
    if isinstance(holder, list):
        return _drop(holder, key, random)
    other = random.choice([*ODD_KEYS, f"{key}x", key[:-1], key.upper()])
    holder[other] = holder.pop(key)
    return f"renamed {other!r:.40}"


def _add(holder: Any, key: Any, random: Random) -> str:
    value = copy.deepcopy(random.choice([holder[key], *ODD_VALUES]))
    if isinstance(holder, list):
        holder.append(value)
        return f"{value!r:.40} added behind"
    other = random.choice([*ODD_KEYS, f"{key}_2", "rope_scaling", "sliding_window", "load_in_8bit"])
    holder[other] = value
    return f"{other!r:.40}={value!r:.40} added beside"


def _exchange(holder: Any, key: Any, random: Random) -> str:
    other = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]
    return f"exchanged with {other!r:.40}"


_CHANGES = (_replace, _replace, _nudge, _nudge, _nudge, _drop, _rename, _add, _exchange)


def damage_text(data: bytes, random: Random) -> tuple[bytes, str]:
    """JSON that is cut, doubled, too deep, or hit by stray bytes."""
    place, kind = random.randrange(len(data)), random.randrange(7)
    if kind == 0:
        return data[:place], f"cut at {place}"
    if kind == 1:
        byte = random.randrange(256)
        return data[:place] + bytes([byte]) + data[place + 1 :], f"byte {place} is {byte}"
    if kind == 2:
        return data * 2, "twice"
    if kind == 3:
        depth = random.choice([100, 990, 2_000, DEEP])
        inner = b"[" * depth + b"]" * depth
        return data.rstrip()[:-1] + b', "deep": ' + inner + b"}", f"{depth} lists deep"
    if kind == 4:
        return random.choice([b"", b"null", b"[]", b"1", b'"a"', b"{}", b"\xff\xfe", b"\0" * 100]), "other content"
    if kind == 5:
        return b"\xef\xbb\xbf" + data, "byte order mark"
    return _double_a_key(data, random)


def _double_a_key(data: bytes, random: Random) -> tuple[bytes, str]:
    """A key that an object has twice: which of the two counts is the reader's choice."""
    value = json.loads(data)
    key = random.choice(list(value)) if isinstance(value, dict) and value else "a"
    other = random.choice([value.get(key), *ODD_VALUES]) if isinstance(value, dict) else 0
    extra = f", {json.dumps(key)}: {json.dumps(other)}}}".encode()
    return data.rstrip()[:-1] + extra, f"{key!r:.40} twice, the second {other!r:.40}"


def config_outside(folder: Path, random: Random) -> str:
    """A field of the model's own configuration."""
    with _Json(folder / "config.json") as config:
        record = config.pop("quantization_config")
        said = change_one(config, random)
        config.setdefault("quantization_config", record)
    return said


def config_text(folder: Path, random: Random) -> str:
    """The text of config.json."""
    return _damage_file(folder / "config.json", random)


def record_settings(folder: Path, random: Random) -> str:
    """Settings and results in `quantization_config`."""
    return _change_record(folder, random, lambda name: name not in ("manifest", "model_config"))


def record_seals(folder: Path, random: Random) -> str:
    """The manifest and the other parts of the record that say what was written."""
    return _change_record(folder, random, lambda name: name in ("manifest", "model_config", "digest"))


def seals_digested(folder: Path, random: Random) -> str:
    """The same, with the digest computed again, so that nothing but the check of each value finds it."""
    said = _change_record(folder, random, lambda name: name in ("manifest", "model_config"))
    _digest_again(folder)
    return said


def forged(folder: Path, random: Random) -> str:
    """Settings and results, with digest and identity computed again. What fits is another sound checkpoint."""
    said = _change_record(folder, random, lambda name: name not in ("manifest", "model_config", "digest"))
    identity = _digest_again(folder)
    for path in folder.glob("*.safetensors"):
        header, data = read_header(path)
        if identity is not None and GUARD in header:
            start = path.stat().st_size - len(data) + header[GUARD]["data_offsets"][0]
            content = path.read_bytes()
            path.write_bytes(content[:start] + bytes.fromhex(identity) + content[start + 32 :])
    return said


def index_entry(folder: Path, random: Random) -> str:
    """Entries of the index of shards: files that are missing, elsewhere, exchanged, of another type."""
    with _Json(folder / "model.safetensors.index.json") as index:
        weights = index["weight_map"]
        if random.random() < 0.5:
            return change_one(index, random)
        name = random.choice(list(weights))
        weights[name] = random.choice(
            [
                *weights.values(),
                "../x.safetensors",
                "/dev/zero",
                "config.json",
                "no.safetensors",
                ".safetensors",
                "a\0b",
            ]
        )
        return f"{name} in {weights[name]!r}"


def index_text(folder: Path, random: Random) -> str:
    """The text of the index."""
    return _damage_file(folder / "model.safetensors.index.json", random)


def shard_names(folder: Path, random: Random) -> str:
    """Shards under each other's names, or one in place of another."""
    first, second = random.sample(sorted(folder.glob("*.safetensors")), 2)
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    if random.random() < 0.6:
        second.write_bytes(content[0])
        return f"{first.name} and {second.name} exchanged"
    return f"{second.name} in place of {first.name}"


def header_entry(folder: Path, random: Random) -> str:
    """Dtype, shape, place or name of a tensor."""
    path = _some_weights(folder, random)
    header, data = read_header(path)
    names = [name for name in header if name != "__metadata__"]
    entry = header[random.choice(names)]
    kind = random.randrange(5)
    if kind == 0:
        entry["dtype"] = random.choice(DTYPES)
        said = f"dtype {entry['dtype']}"
    elif kind == 1:
        shape = entry["shape"]
        entry["shape"] = random.choice([shape[::-1], [*shape, 1], shape[:-1], [2**63], [-1], [2**40, 2**40], "a", None])
        said = f"shape {entry['shape']}"
    elif kind == 2:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = random.choice(
            [[end, start], [start + 4, end + 4], [0, end], [start, 2**62], [-4, end], [start], [start, len(data) + 8]]
        )
        said = f"offsets {entry['data_offsets']}"
    else:
        said = change_one(header, random)
    path.write_bytes(_with_header(header, data))
    return said


def tensors_exchanged(folder: Path, random: Random) -> str:
    """Two tensors of the same form in each other's place: every name, dtype and shape is still there."""
    path = _some_weights(folder, random)
    header, data = read_header(path)
    forms: dict[str, list[str]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            forms.setdefault(json.dumps([entry["dtype"], entry["shape"]]), []).append(name)
    alike = [names for names in forms.values() if len(names) > 1]
    if not alike:
        return "no two are alike"
    first, second = random.sample(random.choice(alike), 2)
    header[first], header[second] = header[second], header[first]
    path.write_bytes(_with_header(header, data))
    return f"{first} and {second}"


def shards_exchange_tensors(folder: Path, random: Random) -> str:
    """Two tensors of the same form under each other's names, in two shards."""
    paths = random.sample(sorted(folder.glob("*.safetensors")), 2)
    (one, first), (other, second) = (read_header(path) for path in paths)
    forms = {name: (entry["dtype"], entry["shape"]) for name, entry in (one | other).items() if "dtype" in entry}
    alike = [(a, b) for a in one for b in other if a in forms and b in forms and forms[a] == forms[b]]
    a, b = random.choice([pair for pair in alike if 0 not in forms[pair[0]][1]] or alike or [("", "")])
    if not a:
        return "no two are alike"
    one[b], other[a] = one.pop(a), other.pop(b)
    paths[0].write_bytes(_with_header(one, first))
    paths[1].write_bytes(_with_header(other, second))
    return f"{a} and {b}"


def header_text(folder: Path, random: Random) -> str:
    """The length of a header, its text, and where the file ends."""
    path = _some_weights(folder, random)
    content = path.read_bytes()
    length, kind = int.from_bytes(content[:8], "little"), random.randrange(4)
    if kind == 0:
        other = random.choice([0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1, len(content)])
        path.write_bytes(other.to_bytes(8, "little") + content[8:])
        return f"length {other}"
    if kind == 1:
        end = random.choice([0, 4, 8, 8 + length // 2, 8 + length, len(content) - 1])
        path.write_bytes(content[:end])
        return f"cut at {end}"
    if kind == 2:
        path.write_bytes(content + bytes(random.choice([1, 8, 1000])))
        return "bytes behind the end"
    text, said = damage_text(content[8 : 8 + length], random)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return said


TEXT_DAMAGE: dict[str, Damage] = {
    "config.json, outside the record": config_outside,
    "config.json, text": config_text,
    "record, settings and results": record_settings,
    "record, manifest and seals": record_seals,
    "seals, digest computed again": seals_digested,
    "record forged whole": forged,
    "header, entries": header_entry,
    "header, tensors exchanged": tensors_exchanged,
    "header, text and length": header_text,
}
"""What any checkpoint can suffer."""

SHARD_DAMAGE: dict[str, Damage] = {
    "index, entries": index_entry,
    "index, text": index_text,
    "shards exchanged": shard_names,
    "shards exchange tensors": shards_exchange_tensors,
}
"""What those in shards can suffer besides."""


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a sound safetensors file, and the bytes behind it."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


class _Json:
    """The value in a JSON file, written back at the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.value = path, json.loads(path.read_text())

    def __enter__(self) -> Any:
        return self.value

    def __exit__(self, *_: object) -> None:
        self.path.write_text(json.dumps(self.value))


def _change_record(folder: Path, random: Random, is_meant: Callable[[str], bool]) -> str:
    with _Json(folder / "config.json") as config:
        record = config["quantization_config"]
        part = {name: value for name, value in record.items() if is_meant(name)}
        said = change_one(part, random)
        config["quantization_config"] = {name: value for name, value in record.items() if not is_meant(name)} | part
    return said


def _digest_again(folder: Path) -> str | None:
    """Returns the identity that the weights need, None where the record is not whole any more."""
    with _Json(folder / "config.json") as config:
        record = config["quantization_config"]
        try:
            record["digest"] = config_digest(record)
            return config_identity(record)
        except ValueError:
            return None


def _damage_file(path: Path, random: Random) -> str:
    content, said = damage_text(path.read_bytes(), random)
    path.write_bytes(content)
    return said


def _some_weights(folder: Path, random: Random) -> Path:
    return random.choice(sorted(folder.glob("*.safetensors")))


def _with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
