"""Launches that are repeated: the bits of the first call, whatever the activation looks like and where it lies."""

import threading

import pytest
import torch

from optimum_qvlm.kernels.triton import launching as recording
from optimum_qvlm.kernels.triton import linear as triton_linear
from optimum_qvlm.kernels.triton.decode import linear_decode
from optimum_qvlm.kernels.triton.layout import PackedWeight
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.quant.affine import quantize_weight
from optimum_qvlm.spec import ActivationSpec, Scheme
from tests.op_arguments import arguments_of

pytestmark = pytest.mark.gpu

CHANNELS, ROWS = 512, 384
SCHEMES = ["w4a16", "w4a8", "w4a4", "w6a6", "w8a8"]
TOKENS = [1, 16, 33, 300, 600]


def make_linear(scheme, dtype=torch.bfloat16, *, rotation=None, static=False, symmetric=True):
    parsed = Scheme.parse(scheme)
    spec = parsed.weight_spec(CHANNELS, "auto", symmetric=symmetric)
    activation = ActivationSpec(bits=8, static=True) if static else parsed.activation_spec(spec)
    format = LinearFormat(weight=spec, activation=activation, rotation=rotation, equalized=rotation is not None)
    torch.manual_seed(0)
    dense = torch.nn.Linear(CHANNELS, ROWS).to(dtype)
    linear = QuantLinear.from_quantized(
        quantize_weight(dense.weight.detach(), spec),
        dense.bias.detach(),
        format,
        input_equalizer=torch.rand(CHANNELS) + 0.5 if format.equalized else None,
        input_scale=torch.tensor([0.05]) if static else None,
    )
    return linear.cuda().prepare()


def inputs(*shape, dtype=torch.bfloat16, seed=1):
    return torch.randn(*shape, CHANNELS, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def expected_of(linear, x):
    """Without anything that was kept."""
    with torch.no_grad():
        linear.bound_linear = None
        return torch.ops.optimum_qvlm.linear.default(*arguments_of(linear, x))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("rotation", [None, 64, 512])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_repetition_is_the_operation(scheme, rotation, tokens):
    """A rotation of 512 is not done by the kernel, so nothing of it may be repeated from an old activation."""
    linear = make_linear(scheme, rotation=rotation)
    linear.decode_tokens = 16
    for seed in range(4):
        x = inputs(tokens, seed=seed)
        with torch.no_grad():
            found = linear(x)
        assert torch.equal(found, torch.ops.optimum_qvlm.linear.default(*arguments_of(linear, x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_dtypes_take_turns(dtype, symmetric):
    linear = make_linear("w4a8", symmetric=symmetric)
    with torch.no_grad():
        for kind in (torch.float16, dtype, torch.bfloat16, dtype):
            x = inputs(40, dtype=kind)
            assert torch.equal(linear(x), torch.ops.optimum_qvlm.linear.default(*arguments_of(linear, x)))


def test_static_scales_are_repeated():
    linear = make_linear("w8a8", static=True)
    with torch.no_grad():
        for seed in range(3):
            x = inputs(300, seed=seed)
            assert torch.equal(linear(x), torch.ops.optimum_qvlm.linear.default(*arguments_of(linear, x)))


def test_any_shape_and_place_of_the_activation():
    """Batches, transposed and unaligned views: kernels are compiled for alignment, and read rows by their stride."""
    linear = make_linear("w4a8")
    wide = inputs(64)
    cases = [
        inputs(40),
        inputs(5, 8),
        inputs(1, 40),
        wide.repeat(1, 2)[:40, :CHANNELS],
        inputs(40).T.contiguous().T,
        torch.cat([inputs(41).flatten(), inputs(1).flatten()])[1 : 1 + 40 * CHANNELS].view(40, CHANNELS),
        inputs(0),
        inputs(40),
    ]
    with torch.no_grad():
        for x in cases * 2:
            found = linear(x)
            assert found.shape == (*x.shape[:-1], ROWS)
            assert torch.equal(found, torch.ops.optimum_qvlm.linear.default(*arguments_of(linear, x)))


def test_results_do_not_share_memory():
    linear, x = make_linear("w4a16"), inputs(1)
    with torch.no_grad():
        kept = [linear(x) for _ in range(3)]
        linear(x * 2)

    assert len({y.data_ptr() for y in kept}) == 3
    assert torch.equal(kept[0], kept[2])


def test_only_a_few_counts_of_tokens_are_kept():
    linear = make_linear("w4a16")
    with torch.no_grad():
        for tokens in range(1, 12):
            linear(inputs(tokens))

    assert len(linear.bound_linear.many.recordings) == triton_linear.RECORDINGS


def test_repeated_launches_go_to_the_current_stream_and_into_graphs():
    """Somebody may capture a graph without compiling anything."""
    linear, x = make_linear("w4a8"), inputs(40)
    with torch.no_grad():
        linear(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            on_side = linear(x)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = linear(x)
        x.copy_(inputs(40, seed=7))
        graph.replay()
        torch.cuda.synchronize()

    assert torch.equal(captured, expected_of(linear, x))
    assert torch.equal(on_side, expected_of(linear, inputs(40)))


def test_threads_do_not_record_each_other():
    linears = [make_linear(scheme) for scheme in ("w4a16", "w4a8", "w8a8", "w4a4")]
    wrong = []

    def work(linear, seed):
        for turn in range(20):
            x = inputs(1 + turn % 3, seed=seed)
            with torch.no_grad():
                if not torch.equal(linear(x), torch.ops.optimum_qvlm.linear.default(*arguments_of(linear, x))):
                    wrong.append((seed, turn))

    threads = [threading.Thread(target=work, args=(linear, seed)) for seed, linear in enumerate(linears)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []


def test_nothing_that_is_not_a_launch_is_repeated():
    """A tensor that torch made between two launches would be stale the next time."""
    linear, x = make_linear("w4a16"), inputs(3)
    packed = PackedWeight(
        codes=linear.weight_packed, scale=linear.weight_scale, zero_point=None, bits=4, group=128,
        in_features=CHANNELS, two_level=False,
    )  # fmt: skip

    _, kept = recording.record(lambda x: linear_decode(x, packed, None), x, [packed.codes, packed.scale])
    _, stale = recording.record(lambda x: linear_decode(x + x, packed, None), x, [packed.codes, packed.scale])

    assert kept is not None and stale is None
