"""Fused linears on a device: the kernels, CUDA graphs, compiled graphs, moves, and a whole model."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from optimum_qvlm import QVLMConfig, fuse_linears, unfuse_linears
from optimum_qvlm.kernels.triton import linear as triton_linear
from optimum_qvlm.modules.fused import FusedLinear, fuse, why_apart
from optimum_qvlm.modules.qlinear import LinearFormat, QuantLinear
from optimum_qvlm.quant.affine import quantize_weight
from optimum_qvlm.spec import Scheme
from tests.tiny_models import llava_batch

pytestmark = pytest.mark.gpu

SCHEMES = ["w4a16", "w4a8", "w4a4", "w6a6", "w8a8"]
DTYPES = [torch.float16, torch.bfloat16]
TOKENS = [1, 16, 33, 600]
CHANNELS = 512
ROWS = (384, 128, 128)
EXACT = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative steps: a kernel may take sums in another order for another number of rows, and rounds them to the dtype."""


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Every test compiles `Site.forward`, which torch does only so often in a process."""
    torch._dynamo.reset()


class Site(nn.Module):
    """Query, key and value."""

    def __init__(self, linears):
        super().__init__()
        self.query, self.key, self.value = linears

    def forward(self, x):
        return self.query(x), self.key(x), self.value(x)


def make_sites(scheme, dtype, *, symmetric=True):
    """The same linears alone and fused, in the layout of the kernels."""
    parsed = Scheme.parse(scheme)
    spec = parsed.weight_spec(CHANNELS, "auto", symmetric=symmetric)
    format = LinearFormat(weight=spec, activation=parsed.activation_spec(spec), rotation=64)
    linears = []
    for seed, rows in enumerate(ROWS):
        torch.manual_seed(seed)
        dense = nn.Linear(CHANNELS, rows).to(dtype)
        rounded = quantize_weight(dense.weight.detach(), spec)
        linears.append(QuantLinear.from_quantized(rounded, dense.bias.detach(), format).cuda().prepare())
    assert why_apart(linears) is None
    return Site(linears), Site(fuse(linears))


def inputs(tokens, dtype):
    torch.manual_seed(9)
    return torch.randn(tokens, CHANNELS, dtype=dtype, device="cuda")


def require_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        step = EXACT[one.dtype]
        torch.testing.assert_close(one, other, rtol=step, atol=step * float(other.abs().max()) / 4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_give_the_same_but_for_the_order_of_sums(scheme, dtype, tokens, symmetric):
    """Which of them are equal bit for bit is printed."""
    alone, fused = make_sites(scheme, dtype, symmetric=symmetric)
    assert fused.query.joint.layout == triton_linear.LAYOUT
    x = inputs(tokens, dtype)
    with torch.inference_mode():
        actual, expected = fused(x), alone(x)

    print(
        f"{scheme} {dtype} {tokens} tokens: equal {[torch.equal(*pair) for pair in zip(actual, expected, strict=True)]}"
    )
    require_close(actual, expected)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_whole_and_captured_gives_the_same(scheme, tokens):
    """A CUDA graph holds one product; what lies between the modules is gone when the capture ends."""
    _, fused = make_sites(scheme, torch.float16)
    x = inputs(tokens, torch.float16)
    with torch.inference_mode():
        eager = fused(x)

        compiled = torch.compile(fused, fullgraph=True)(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fused(x)
        x.copy_(inputs(tokens, torch.float16).flip(0))
        graph.replay()
        expected = fused(x)

    assert all(torch.equal(*pair) for pair in zip(compiled, eager, strict=True))
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))
    assert fused.query.joint.handover.kept is None


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w8a8"])
def test_gradients_are_those_of_linears_alone(scheme):
    alone, fused = make_sites(scheme, torch.float16)
    actual = []
    for site in (alone, fused):
        x = inputs(5, torch.float16).requires_grad_()
        sum(y.float().square().mean() for y in site(x)).backward()
        actual.append(x.grad)

    step = EXACT[torch.float16]
    torch.testing.assert_close(*actual, rtol=step, atol=step * float(actual[1].abs().max()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_group_goes_to_the_device_and_back(scheme):
    """Its layout is that of each device, and its state everywhere that of linears alone."""
    alone, fused = make_sites(scheme, torch.float16)
    expected = {
        name: tensor.cpu()
        for name, tensor in Site([copy.deepcopy(m).pack() for m in alone.children()]).state_dict().items()
    }
    x = inputs(33, torch.float16)
    with torch.inference_mode():
        before = fused(x)
        fused.cpu()
        assert fused.query.joint.layout != triton_linear.LAYOUT
        on_cpu = fused.state_dict()
        fused.cuda()
        after = fused(x)

    assert list(on_cpu) == list(expected)
    assert all(torch.equal(on_cpu[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_whole_model_computes_generates_and_saves_the_same(llava_folder, tmp_path, scheme):
    """Quantized on the device, fused, saved, and undone."""
    config = QVLMConfig(scheme, method="rtn")
    model = AutoModelForImageTextToText.from_pretrained(llava_folder, quantization_config=config, device_map="cuda")
    assert any(isinstance(module, FusedLinear) for module in model.modules())
    unfuse_linears(model)
    batch = {name: tensor.cuda() for name, tensor in llava_batch(rows=2, seed=9).items()}
    model.save_pretrained(tmp_path / "alone")
    with torch.inference_mode():
        expected = model(**batch).logits
        before = torch.cuda.memory_allocated()

        outcome = fuse_linears(model)

        torch.cuda.synchronize()
        assert outcome.groups and not outcome.apart
        assert torch.cuda.memory_allocated() <= before + 2**20
        actual = model(**batch).logits
        assert float((actual - expected).norm()) < 0.01 * float(expected.norm())
        assert model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] >= 4
    model.save_pretrained(tmp_path / "fused")
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("alone", "fused")]
    assert files[0] == files[1]

    unfuse_linears(model)

    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, expected)
