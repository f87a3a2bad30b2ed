"""How much each calibration token matters at each site: by the gradient of the model's own predictions.

The search minimises squared errors of sites. What such an error does to the model's output differs between tokens by
orders of magnitude: an error on a token that later predictions hardly read costs next to nothing. To second order, the
divergence from full precision is the error weighed with the Fisher information of the outputs (GuidedQuant, Kim et al.,
arXiv 2505.07004), whose diagonal over tokens is measured here in one backward pass: labels are drawn from the model,
so that no data decides what is right, and the gradient of their likelihood is taken at the output of every linear.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optimum_qvlm.errors import CalibrationError
from optimum_qvlm.pipeline.capture import hidden_of, hooking
from optimum_qvlm.pipeline.captured import Bench
from optimum_qvlm.pipeline.layer_recomputation import frozen, recomputed
from optimum_qvlm.plan import PlannedPart, QuantPlan, Site

IGNORED = -100

POSITIONS_AT_ONCE = 512
"""Positions whose probabilities over the vocabulary are held in fp32 at a time."""

FLOOR = 0.1
"""Share of the mean weight that every token has at least, so that none is left out of a second moment."""

CEILING = 0.999
"""Quantile of a site's weights above which they count as equal: single tokens do not decide."""

Batch = Mapping[str, Tensor]
SiteWeights = dict[str, list[Tensor]]


def token_weights(bench: Bench, plan: QuantPlan, batches: Sequence[Batch], labels: Sequence[Tensor]) -> SiteWeights:
    """Weights of the tokens of every site, from one forward and one backward pass of the full-precision model.

    Args:
        bench: with the model on the CPU in full precision, whose layers are on the device one at a time, and the seed
            of the labels that are drawn.
        plan: which linears are sites.
        batches: model inputs.
        labels: int64 [rows, tokens] per batch, -100 where a token is not predicted (images, padding).

    Returns:
        By site name, for each of its runs in the order of the forwards, fp32 [rows, tokens, 1] on the CPU, with mean 1
        over all runs. Sites that no gradient reaches are missing, and so are all sites of a model that predicts no
        tokens.

    Raises:
        CalibrationError: gradients leave the range of the model's dtype.
    """
    model: Any = bench.model
    if model.get_output_embeddings() is None:
        return {}
    sites = [site for part in plan.parts for layer in part.layers for site in layer.sites]
    squares: SiteWeights = {site.name: [] for site in sites}
    layers = [layer.path for part in plan.parts for layer in part.layers]
    generator = torch.Generator().manual_seed(bench.options.seed)
    with frozen(model), recomputed(model, layers, bench.device), _differentiable(model, plan.parts):
        for batch, targets in zip(batches, labels, strict=True):
            with _noting(model, sites) as seen:
                inputs = {name: tensor.to(bench.device) for name, tensor in batch.items()}
                logits = model(**inputs, use_cache=False).logits
                logits.backward(_slope(logits.detach(), targets[:, 1:] != IGNORED, generator))
            for name, runs in seen.items():
                squares[name] += runs
    return {name: _normalised(runs, name) for name, runs in squares.items() if runs}


def _slope(logits: Tensor, predicted: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the negative log-likelihood of labels drawn from `logits` [rows, tokens, vocabulary].

    `predicted` [rows, tokens - 1] are the positions that count.
    """
    slope = torch.zeros_like(logits)
    places = predicted.nonzero().to(logits.device)
    for some in places.split(POSITIONS_AT_ONCE):
        at = some[:, 0], some[:, 1]
        probabilities = logits[at].float().softmax(-1)
        # Drawn on the CPU by inverting the distribution, so that the labels are the same whatever the device.
        draw = torch.rand(len(some), 1, generator=generator, device="cpu").to(logits.device)
        label = torch.searchsorted(probabilities.cumsum(-1), draw).clamp_(max=probabilities.shape[-1] - 1)
        slope[at] = probabilities.scatter_add_(1, label, torch.full_like(draw, -1.0)).to(slope.dtype)
    return slope


def _normalised(squares: Sequence[Tensor], site: str) -> list[Tensor]:
    """Norms of gradients as weights: cut at the ceiling, raised to the floor, with mean 1."""
    norms = torch.cat([run.flatten() for run in squares]).sqrt()
    if not bool(torch.isfinite(norms).all()):
        raise CalibrationError(
            f"the gradients at {site} are NaN or infinite, so its tokens cannot be weighed; load the model in a wider "
            "dtype (bfloat16 or float32 in place of float16), or leave search.token_weights False"
        )
    ceiling = norms.kthvalue(max(1, int(CEILING * len(norms)))).values
    mean = norms.clamp(max=ceiling).mean()
    if not bool(mean > 0):
        return [torch.ones_like(run) for run in squares]
    return [FLOOR + (1 - FLOOR) * run.sqrt().clamp(max=ceiling) / mean for run in squares]


@contextmanager
def _differentiable(model: nn.Module, parts: Sequence[PlannedPart]) -> Iterator[None]:
    """Inside, gradients reach back to what enters the first layer of each part."""

    def start(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, hidden = hidden_of(args, kwargs, "the first layer")
        if hidden.requires_grad or not hidden.is_floating_point():
            return None
        hidden = hidden.detach().requires_grad_()
        return ((hidden, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: hidden})

    with hooking() as hooks:
        for part in parts:
            first = model.get_submodule(part.layers[0].path)
            hooks.append(first.register_forward_pre_hook(start, with_kwargs=True))
        yield


@contextmanager
def _noting(model: nn.Module, sites: Sequence[Site]) -> Iterator[SiteWeights]:
    """Inside, a backward pass fills in squared norms of gradients per token, one tensor for each run of a site."""
    seen: SiteWeights = {}

    def watch(site: Site, number: int) -> Any:
        def note(gradient: Tensor) -> None:
            square = gradient.float().square().sum(-1, keepdim=True).cpu()
            passes.setdefault((site.name, number), []).append(square)

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(note)

        return after

    passes: dict[tuple[str, int], list[Tensor]] = {}
    with hooking() as hooks:
        for site in sites:
            for number, linear in enumerate(site.linears):
                module = model.get_submodule(linear.path)
                hooks.append(module.register_forward_hook(watch(site, number)))
        yield seen
    for (name, _), runs in passes.items():
        in_order = list(reversed(runs))  # the backward pass meets the last run first
        seen[name] = in_order if name not in seen else [a + b for a, b in zip(seen[name], in_order, strict=True)]
