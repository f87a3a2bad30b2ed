"""Norms that take up equalizers: which are found, and that nothing moves but rounding."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from optimum_qvlm.pipeline.folding import FoldingNorm, folding_norms
from optimum_qvlm.plan import PlannedLayer, PlannedLinear, Site
from optimum_qvlm.spec import WeightSpec

CHANNELS = 32


class Layer(nn.Module):
    """A norm, linears that read it, and what a test adds to that."""

    def __init__(self, norm: nn.Module, *, residual: bool = False, router: bool = False, shift: bool = False) -> None:
        super().__init__()
        self.norm, self.residual, self.shift = norm, residual, shift
        self.first, self.second = nn.Linear(CHANNELS, 16), nn.Linear(CHANNELS, 16, bias=False)
        self.router = nn.Linear(CHANNELS, 16) if router else None

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        read = normed + 1 if self.shift else normed
        actual = self.first(read) * self.second(read)
        if self.router is not None:
            actual = actual + self.router(read)
        return actual + normed[..., :16] if self.residual else actual


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def layer_norm() -> nn.Module:
    return nn.LayerNorm(CHANNELS)


def moved(norm: nn.Module) -> nn.Module:
    """Away from the values of a fresh module."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return norm


def plan() -> PlannedLayer:
    """The first two linears as one site."""
    linears = tuple(
        PlannedLinear(
            path=f"layer.{name}",
            name=f"layer.{name}",
            in_features=CHANNELS,
            out_features=16,
            bias=False,
            weight=WeightSpec(bits=4),
        )
        for name in ("first", "second")
    )
    return PlannedLayer(path="layer", name="layer", sites=(Site(linears=linears, activation=None),))


def find(model: Model, dtype: torch.dtype = torch.float32) -> dict[str, FoldingNorm]:
    tokens = torch.randn(7, CHANNELS).to(dtype)
    with torch.no_grad():
        return folding_norms(model, plan(), lambda: model.layer(tokens))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("norm", "offset"),
    [
        (layer_norm, 0.0),
        (lambda: LlamaRMSNorm(CHANNELS), 0.0),
        (lambda: nn.RMSNorm(CHANNELS), 0.0),
        (lambda: GemmaRMSNorm(CHANNELS), 1.0),
    ],
    ids=["layer norm", "llama", "torch", "gemma"],
)
def test_a_norm_takes_up_an_equalizer(norm: Callable[[], nn.Module], offset: float, dtype: torch.dtype):
    """The linears read what they would read behind the equalizer, to the last bits of the dtype."""
    model = Model(Layer(moved(norm()))).to(dtype)
    before = copy.deepcopy(model.state_dict())

    actual = find(model, dtype)["layer.first"]

    assert actual.offset == offset
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tokens = torch.randn(5, CHANNELS).to(dtype)
    equalizer = actual.snap(torch.rand(CHANNELS) * 4 + 0.1)
    with torch.no_grad():
        plain = model.layer.norm(tokens).float()
        actual.take_up(equalizer)
        scaled = model.layer.norm(tokens).float()
    torch.testing.assert_close(scaled, plain * equalizer, rtol=8 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_a_snapped_equalizer_is_what_the_norm_can_hold():
    """So weights are folded with what the norm really does, not with what it was asked to do."""
    norm = moved(nn.RMSNorm(CHANNELS)).to(torch.bfloat16)
    before = norm.weight.detach().float()
    actual = FoldingNorm("norm", norm, 0.0)

    equalizer = actual.snap(torch.rand(CHANNELS) + 0.5)
    actual.take_up(equalizer)

    torch.testing.assert_close(norm.weight.detach().float(), before * equalizer, rtol=1e-6, atol=0)


def test_a_weight_of_zero_leaves_the_equalizer_as_it_is():
    """Nothing comes out of that channel, and no factor may become zero or infinite."""
    norm = nn.RMSNorm(CHANNELS)
    with torch.no_grad():
        norm.weight[3] = 0

    equalizer = FoldingNorm("norm", norm, 0.0).snap(torch.full((CHANNELS,), 0.7))

    torch.testing.assert_close(equalizer, torch.full((CHANNELS,), 0.7))


@pytest.mark.parametrize("also", ["residual", "router", "shift"])
def test_a_norm_that_something_else_reads_is_left_alone(also):
    """A residual that is taken behind the norm, a linear outside the site, or a change on the way to the site."""
    assert find(Model(Layer(moved(layer_norm()), **{also: True}))) == {}


def test_a_norm_that_two_layers_share_is_left_alone():
    model = Model(Layer(moved(layer_norm())))
    model.other = nn.LayerNorm(CHANNELS)
    model.other.weight = model.layer.norm.weight

    assert find(model) == {}


def test_what_is_no_norm_is_left_alone():
    """An activation function, and a module whose weight does something else."""

    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(CHANNELS))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.weight

    assert find(Model(Layer(nn.GELU()))) == {}
    assert find(Model(Layer(Adding()))) == {}
