"""The GPU layout of weights: lossless, for what it claims and nothing else. No kernel runs here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_qvlm.errors import SpecError
from optimum_qvlm.kernels import LinearGrid, QuantizedWeight, dispatch
from optimum_qvlm.kernels.triton import layout as triton_layout
from optimum_qvlm.kernels.triton import linear as triton_linear
from optimum_qvlm.kernels.triton.layout import is_packable, pack, unpack
from optimum_qvlm.spec import ActivationSpec, WeightSpec


def codes(rows, channels, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, channels), generator=generator).to(torch.int8)


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 16, 32, 64, 128, 256]),
    rows=st.integers(1, 9),
    groups=st.integers(1, 6),
    zero_point=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_packing_is_undone_bit_for_bit(bits, group, rows, groups, zero_point, dtype, seed):
    """A model that is saved after it ran must hold what was loaded."""
    group = group if bits <= 6 else None
    channels = 29 * groups if group is None else group * groups
    extent = 1 if group is None else groups
    weight = codes(rows, channels, bits, seed)
    scale = torch.rand(rows, extent, generator=torch.Generator().manual_seed(seed)).to(dtype)
    zero = codes(rows, extent, bits, seed + 1) if zero_point else None

    packed = pack(QuantizedWeight(weight, scale, zero), WeightSpec(bits=bits, group=group, symmetric=zero is None))
    again = unpack(packed)

    assert torch.equal(again.codes, weight) and again.codes.is_contiguous()
    assert torch.equal(again.scale, scale) and again.scale.dtype == dtype
    assert (zero is None and again.zero_point is None) or torch.equal(again.zero_point, zero)
    assert packed.codes.shape == (rows, packed.width * packed.bits // 8)
    assert packed.width - channels in range(triton_layout.BLOCK)


@given(
    bits=st.integers(2, 4),
    group=st.sampled_from([16, 32, 64, 128, 256]),
    rows=st.integers(1, 9),
    groups=st.integers(2, 6),
    seed=st.integers(0, 2**16),
)
def test_the_steps_behind_two_levels_are_found_at_load_and_leave_no_trace(bits, group, rows, groups, seed):
    """They are a row of the layout that no checkpoint has."""
    generator = torch.Generator().manual_seed(seed)
    multiples = torch.randint(1, 16, (rows, groups), generator=generator)
    step = torch.randint(8, 16, (rows, 1), generator=generator) / 2**9
    scale = (step * multiples * (torch.randint(2, multiples.shape, generator=generator) * 2 - 1)).bfloat16()
    weight = codes(rows, group * groups, bits, seed)

    packed = pack(QuantizedWeight(weight, scale), WeightSpec(bits=bits, group=group, two_level=True))
    again = unpack(packed)

    assert packed.scale.shape == (packed.groups + 1, rows)
    found = scale.float() / packed.scale[-1].float().unsqueeze(1)
    assert torch.equal(found, found.round()) and float(found.abs().max()) <= 15
    assert torch.equal(again.codes, weight)
    assert torch.equal(again.scale, scale) and again.scale.is_contiguous()


def test_scales_that_are_no_multiples_have_no_steps():
    """The kernel would round them."""
    weight = QuantizedWeight(codes(2, 256, 4), torch.tensor([[1.0, 2.0], [1.0, 0.3]]))

    with pytest.raises(SpecError, match="scales of row 1 are not multiples of one step"):
        pack(weight, WeightSpec(bits=4, group=128, two_level=True))


@pytest.mark.parametrize("bits, size", [(2, 4), (3, 4), (4, 4), (5, 6), (6, 6), (7, 8), (8, 8)])
def test_a_weight_takes_its_bits(bits, size):
    """The point of the exercise is memory."""
    packed = pack(QuantizedWeight(codes(8, 1024, bits), torch.ones(8, 1)), WeightSpec(bits=bits))

    assert packed.codes.numel() == 8 * 1024 * size // 8


def test_nibbles_lie_half_a_block_apart():
    """Kernels read this order; another one would still be lossless."""
    weight = torch.zeros(1, 128, dtype=torch.int8)
    weight[0, 3], weight[0, 67] = -2, 5

    packed = pack(QuantizedWeight(weight, torch.ones(1, 1)), WeightSpec(bits=4))

    assert packed.codes[0, 3].item() == (5 << 4 | 0xE)
    assert int(packed.codes.count_nonzero()) == 1


def test_padding_groups_have_scale_zero():
    """What is multiplied with padding counts nothing."""
    packed = pack(QuantizedWeight(codes(4, 96, 4), torch.ones(4, 3)), WeightSpec(bits=4, group=32))

    assert packed.scale.shape == (4, 4)
    assert packed.scale[3].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("bits, group", [(4, 48), (4, 8), (8, 128), (7, 32), (4, 192)])
def test_what_kernels_cannot_read_is_refused(bits, group):
    assert not is_packable(bits, group)
    with pytest.raises(SpecError, match=f"{bits} bits with group={group} have no GPU layout; use 16, 32, 64"):
        pack(QuantizedWeight(codes(2, 4 * group, bits), torch.ones(2, 4)), WeightSpec(bits=bits, group=group))


@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("zero_point", [False, True])
def test_dispatch_stores_and_restores_the_layout(zero_point, bits, group):
    """What a module does when it is prepared for a GPU and when it is saved."""
    channels, groups = 256, 1 if group is None else 256 // group
    spec = WeightSpec(bits=bits, group=group, symmetric=not zero_point)
    grid = LinearGrid(in_features=channels, out_features=7, weight=spec)
    weight = QuantizedWeight(
        codes(7, channels, bits), torch.rand(7, groups), codes(7, groups, bits, 1) if zero_point else None
    )

    stored = dispatch.store(weight, grid, triton_linear.LAYOUT)
    again = dispatch.restore(stored, grid)

    assert stored.layout == triton_linear.LAYOUT
    assert torch.equal(again.codes, weight.codes) and torch.equal(again.scale, weight.scale)
    assert (weight.zero_point is None and again.zero_point is None) or torch.equal(again.zero_point, weight.zero_point)


@pytest.mark.parametrize(
    "in_features, bits, group, activation, accepted",
    [
        (128, 4, 32, None, True),
        (128, 4, 32, ActivationSpec(bits=4, group=32), True),
        (128, 4, 32, ActivationSpec(bits=4, group=64), False),
        (128, 8, 32, None, False),
        (96, 4, 48, None, False),
        (96, 4, 96, None, True),
        (128, 8, None, ActivationSpec(bits=8), True),
    ],
    ids=["plain", "same groups", "other groups", "eight bits in groups", "odd group", "the whole row", "rows"],
)
def test_only_weights_with_kernels_are_accepted(in_features, bits, group, activation, accepted):
    """The definition runs the others, in the layout of the checkpoint."""
    weight = WeightSpec(bits=bits, group=group)
    grid = LinearGrid(in_features=in_features, out_features=8, weight=weight, activation=activation)

    assert triton_linear.accepts(grid, torch.device("cpu")) is accepted
