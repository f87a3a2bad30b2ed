"""Rows of parts, and sizes from the manifest alone."""

import pytest

from optimum_qvlm.plan import ModuleRecord
from optimum_qvlm.report import precision as parts


def record(**changes) -> ModuleRecord:
    values = {
        "in_features": 64,
        "out_features": 32,
        "bias": False,
        "weight_bits": 4,
        "weight_group": 16,
        "symmetric": True,
        "scale_dtype": "float16",
        "activation_bits": 8,
        "activation_group": None,
        "activation_clip": 1.0,
        "weight_clip": 1.0,
        "site": "x",
    }
    return ModuleRecord.from_dict(values | changes)


@pytest.mark.parametrize(
    "name, part",
    [
        ("model.layers.3.mlp.up_proj", "model.layers"),
        ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", "vision_tower.vision_model.encoder.layers"),
        ("visual.merger.mlp.0", "visual.merger.mlp"),
        ("multi_modal_projector.linear_1", "multi_modal_projector"),
        ("lm_head", "lm_head"),
    ],
)
def test_a_part_is_what_stands_before_the_layer_number(name, part):
    assert parts.part_of(name) == part


@pytest.mark.parametrize("bits, scheme", [(8, "w4a8"), (None, "w4a16")])
def test_schemes_read_as_users_write_them(bits, scheme):
    assert parts.scheme_of(record(activation_bits=bits)) == scheme


def test_linears_of_one_part_and_precision_share_a_row():
    modules = {
        "layers.0.q": record(),
        "layers.1.q": record(),
        "layers.1.o": record(weight_bits=8, weight_group=None),
        "head": record(symmetric=False),
        "tail": record(two_level=True),
    }
    manifest = {
        "layers.0.q.weight_packed": ["I32", [32, 8]],
        "layers.1.q.weight_packed": ["I32", [32, 8]],
        "layers.1.q.weight_scale": ["F16", [32, 4]],
        "layers.1.o.weight_packed": ["I32", [32, 16]],
        "norm.weight": ["F32", [64]],
    }

    rows = parts.part_rows(modules, manifest)

    shown = [(row.part, row.scheme, row.linears, row.weights, row.bytes) for row in rows]
    assert shown == [
        ("layers", "w4a8", 2, 2 * 64 * 32, 2 * 1024 + 256),
        ("layers", "w8a8", 1, 64 * 32, 2048),
        ("head", "w4a8", 1, 64 * 32, 0),
        ("tail", "w4a8", 1, 64 * 32, 0),
    ]
    assert [parts.readable_scales(row.weight) for row in rows] == ["16", "row", "16, zero point", "16, two levels"]


def test_linears_whose_activations_differ_have_rows_of_their_own():
    """Layers that nothing reads have no fixed range, though all others have; two rows that look alike puzzle."""
    modules = {
        "layers.0.q": record(activation_static=True),
        "layers.1.q": record(),
        "layers.2.q": record(activation_group=16),
        "layers.3.q": record(activation_bits=None),
    }

    rows = parts.part_rows(modules, {})

    assert [parts.readable_activation(row.activation) for row in rows] == ["tensor, fixed", "token", "token, 16", ""]
    assert [row.to_dict()["activation_static"] for row in rows] == [True, False, False, False]


def test_the_error_is_that_of_the_last_layer():
    """It contains those of all layers before."""
    modules = {"m.layers.0.q": record(), "m.proj.linear": record(), "head": record()}
    layers = [
        {"part": "language", "layer": "m.layers.0", "error": 0.1},
        {"part": "language", "layer": "m.layers.1", "error": 0.2},
        {"part": "projector", "layer": "m.proj", "error": 0.3},
    ]

    assert [row.error for row in parts.part_rows(modules, {}, layers)] == [0.2, 0.3, None]


@pytest.mark.parametrize(
    "entry, size",
    [
        (["F32", [2, 3]], 24),
        (["BF16", []], 2),
        (["U8", [32]], 32),
        (["I64", [2]], 16),
        (["F32", [0]], 0),
        (["F4_UNKNOWN", [8]], 0),
    ],
)
def test_bytes_follow_from_dtype_and_shape(entry, size):
    assert parts.tensor_bytes(entry) == size


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (2_500_000, "2.50 MB"), (13 * 10**9, "13.00 GB")],
)
def test_sizes_are_readable(count, text):
    assert parts.readable_bytes(count) == text
