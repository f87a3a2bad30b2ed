"""What only a device shows: compiled graphs, CUDA graphs, equal bits in every run, sizes past 2**31, the whole job."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from optimum_qvlm import QVLMConfig
from optimum_qvlm.kernels import Rounding, reference
from optimum_qvlm.kernels.triton import linear as triton_linear
from optimum_qvlm.kernels.triton import quantize as triton_quantize
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.quant.affine import quantize_weight
from optimum_qvlm.spec import Scheme
from tests.kernels.triton.launched.grid import assert_product, make_activations, make_weight
from tests.tiny_models import llava_batch

pytestmark = pytest.mark.gpu

SCHEMES = ["w4a16", "w4a8", "w4a4", "w6a6", "w8a8"]
LEVELS = "w4a8 on two levels"
DTYPES = [torch.float16, torch.bfloat16]
TOKENS = [1, 16, 33, 600]


def linear_for(scheme, dtype, *, channels=512, rows=384):
    """A quantized linear on the device, in the layout of its kernels."""
    parsed = Scheme.parse(scheme.split()[0])
    spec = replace(parsed.weight_spec(channels, "auto", symmetric=True), two_level=scheme == LEVELS)
    dense = nn.Linear(channels, rows).to(dtype)
    format = LinearFormat(weight=spec, activation=parsed.activation_spec(spec), rotation=64)
    module = QuantLinear.from_quantized(quantize_weight(dense.weight.detach(), spec), dense.bias.detach(), format)
    return module.cuda().prepare()


@pytest.mark.parametrize("tokens", [33, 600])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [*SCHEMES, LEVELS])
def test_a_module_on_a_device_runs_the_kernels_and_goes_back(scheme, dtype, tokens):
    """The layout is made once, and undone where a model is saved or moved away."""
    torch.manual_seed(0)
    module = linear_for(scheme, dtype)
    x = torch.randn(tokens, 512, dtype=dtype, device="cuda")
    y = module(x).float()
    assert module.layout == triton_linear.LAYOUT

    away = module.cpu()

    assert away.layout != triton_linear.LAYOUT
    expected = away(x.cpu()).float().cuda()
    assert float((y - expected).norm()) < 0.02 * float(expected.norm())


@pytest.mark.parametrize("tokens", [40, 64, 200])
@pytest.mark.parametrize("bits, group", [(4, None), (6, None), (8, None), (4, 128), (4, 64), (4, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_reductions_are_right_and_the_same_in_every_run(dtype, bits, group, tokens):
    """Hundreds of steps, of which none may begin before the products of the last have read their operands."""
    weight, grid = make_weight(2048, 8192, bits, group)
    weight = replace(weight, scale=weight.scale.to(dtype))
    grid = replace(grid, scale_dtype=dtype)
    x = make_activations(tokens, 8192, dtype) / 8
    stored = triton_linear.store(weight, grid)

    runs = [triton_linear.linear(x, stored, None, Rounding(), grid) for _ in range(5)]

    assert all(torch.equal(run, runs[0]) for run in runs)
    assert_product(runs[0], x, weight, dense=dtype)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scheme", [*SCHEMES, LEVELS])
def test_compiled_whole_and_captured_gives_the_same(scheme, tokens):
    """Decoding is bound by launches unless a CUDA graph replays them."""
    torch.compiler.reset()  # otherwise the cases count as recompilations of one function
    module = linear_for(scheme, torch.float16)
    x = torch.randn(tokens, 512, dtype=torch.float16, device="cuda")
    with torch.inference_mode():
        eager = module(x)

        compiled = torch.compile(module, fullgraph=True)(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(x)
        graph.replay()

    assert torch.equal(compiled, eager)
    assert torch.equal(captured, eager)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scheme", [*SCHEMES, LEVELS])
def test_every_run_gives_the_same_bits(scheme, tokens):
    module = linear_for(scheme, torch.bfloat16)
    x = torch.randn(tokens, 512, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        first = module(x)

        assert all(torch.equal(module(x), first) for _ in range(50))


def test_activations_past_two_to_the_31_elements():
    """A long batch: the last tokens are rounded as if they were alone."""
    x = torch.randn(2**19 + 3, 4096, dtype=torch.float16, device="cuda")

    codes, scale = triton_quantize.quantize(x, Rounding(bits=8))

    expected = reference.quantize_tokens(x[-5:], 8, None, 1.0)
    assert torch.equal(codes[-5:], expected[0])
    assert torch.equal(scale[-5:], expected[1])


def test_weights_past_two_to_the_31_bytes():
    """The last rows of a weight that is that large."""
    rows = 2**19 + 5
    weight, grid = make_weight(rows, 4096, 8, None)
    x = make_activations(3, 4096, torch.float16)
    stored = triton_linear.store(weight, grid)

    y = triton_linear.linear(x, stored, None, Rounding(), grid)

    last = type(weight)(weight.codes[-5:], weight.scale[-5:])
    assert_product(y[:, -5:], x, last)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_whole_job_gives_the_logits_of_the_definition(llava_folder, tmp_path, scheme):
    """Calibrate on the device, save, reload there and on the CPU: the same model."""
    config = QVLMConfig(scheme, dataset=[llava_batch(rows=2, seed=n) for n in range(2)])
    model = AutoModelForImageTextToText.from_pretrained(llava_folder, quantization_config=config, device_map="cuda")
    model.save_pretrained(tmp_path / "out")
    batch = llava_batch(rows=2, seed=9)

    with torch.no_grad():
        on_device = model(**{name: tensor.cuda() for name, tensor in batch.items()}).logits.float().cpu()
        on_cpu = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")(**batch).logits.float()

    assert float((on_device - on_cpu).norm()) < 0.02 * float(on_cpu.norm())
