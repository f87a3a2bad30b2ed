"""What the processes of a tensor-parallel group hold of a linear, without vLLM."""

import pytest
import torch

from optimum_qvlm.errors import SpecError
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.plan import ModuleRecord
from optimum_qvlm.quant.affine import quantize_weight
from optimum_qvlm.serving.shards import Shard, require_divisible, take
from optimum_qvlm.spec import ActivationSpec, WeightSpec

ROWS, COLUMNS = 24, 96
FORMATS = {
    "4 bits in groups": WeightSpec(bits=4, group=16),
    "4 bits in groups with zero points": WeightSpec(bits=4, group=16, symmetric=False),
    "3 bits, whose groups start within words": WeightSpec(bits=3, group=16, symmetric=False),
    "8 bits per row": WeightSpec(bits=8),
    "6 bits per row with zero points": WeightSpec(bits=6, symmetric=False),
}


def record(spec: WeightSpec, **values) -> ModuleRecord:
    return ModuleRecord(
        in_features=COLUMNS,
        out_features=ROWS,
        bias=False,
        format=LinearFormat(weight=spec, **values),
        scale_dtype="float32",
        weight_clip=1.0,
        site="x",
    )


def stored(spec: WeightSpec) -> QuantLinear:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    return QuantLinear.from_quantized(quantize_weight(weight, spec), None, LinearFormat(weight=spec))


def part_of(whole: QuantLinear, entry: ModuleRecord, shard: Shard) -> QuantLinear:
    """A linear made of what a shard takes of the tensors on disk."""
    part = QuantLinear(len(shard.columns), shard.out_features, whole.format, bias=False, device="meta")
    for kind, parameter in list(part.named_parameters()):
        tensor = take(kind, whole.get_parameter(kind), entry, shard)
        assert (tensor.shape, tensor.dtype) == (parameter.shape, parameter.dtype), kind
        part.register_parameter(kind, torch.nn.Parameter(tensor, requires_grad=False))
    return part


@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS.keys())
def test_columns_of_all_processes_make_the_whole_weight(spec):
    whole, entry, size = stored(spec), record(spec), COLUMNS // 2
    shards = [Shard((range(ROWS),), range(start, start + size)) for start in (0, size)]

    parts = [part_of(whole, entry, shard).weight[:] for shard in shards]

    assert torch.equal(torch.cat(parts, 1), whole.weight[:])


@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS.keys())
def test_rows_of_a_linear_that_is_fused_on_disk(spec):
    """The second of two processes holds the second half of each of three parts."""
    whole, entry = stored(spec), record(spec)
    rows = (range(6, 12), range(15, 18), range(21, 24))

    part = part_of(whole, entry, Shard(rows, range(COLUMNS)))

    assert torch.equal(part.weight[:], whole.weight[:][[row for span in rows for row in span]])


def test_an_equalizer_is_split_with_the_columns_and_a_fixed_scale_is_not():
    entry, shard = record(WeightSpec(bits=8)), Shard((range(ROWS),), range(32, 64))
    equalizer, scale = torch.arange(COLUMNS).float(), torch.tensor([0.5])

    assert torch.equal(take("input_equalizer", equalizer, entry, shard), equalizer[32:64])
    assert torch.equal(take("input_scale", scale, entry, shard), scale)


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        (record(WeightSpec(bits=4, group=96)), "weights in groups of 96"),
        (record(WeightSpec(bits=8), activation=ActivationSpec(bits=4, group=32)), "activations in groups of 32"),
        (record(WeightSpec(bits=8), rotation=32), "rotations in blocks of 32"),
    ],
)
def test_a_group_that_processes_would_share_is_refused_by_name(entry, what):
    half = Shard((range(ROWS),), range(COLUMNS // 2))
    with pytest.raises(SpecError, match=rf"model\.o_proj cannot be split over 2 processes: .* 48 of its 96 .*{what}"):
        require_divisible("model.o_proj", entry, half, 2)

    require_divisible("model.o_proj", entry, Shard((range(12),), range(COLUMNS)), 2)  # rows can always be split
