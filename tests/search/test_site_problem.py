"""What the search looks at: the sample, all tokens, and what the site will compute on them."""

import pytest
import torch

from optimum_qvlm.kernels import fake_quantize_tokens
from optimum_qvlm.quant.transform import SiteTransform
from optimum_qvlm.search.site_problem import FEW_TOKENS, SiteProblem
from optimum_qvlm.spec import ActivationSpec, WeightSpec


def make_problem(tokens: int = 10, dtype: torch.dtype = torch.float32, **changes) -> SiteProblem:
    inputs = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = {
        "inputs": inputs,
        "weights": {"q": torch.ones(4, 32, dtype=dtype)},
        "specs": {"q": WeightSpec(bits=4)},
        "activation": ActivationSpec(bits=4, group=16),
        "scale_dtype": dtype,
    }
    return SiteProblem(**(values | changes))


def test_without_references_the_inputs_are_wanted():
    problem = make_problem()

    assert problem.wanted_inputs is problem.inputs
    assert [(a is problem.inputs, b is problem.inputs, w) for a, b, w in problem.pieces()] == [(True, True, None)]


def test_references_go_with_the_sample_where_that_is_all():
    references = torch.ones(10, 32)
    problem = make_problem(references=references)

    assert problem.wanted_inputs is references
    assert [b is references for _, b, _ in problem.pieces()] == [True]


def test_all_tokens_come_in_their_pieces():
    found, wanted = [torch.ones(3, 32), torch.ones(5, 32)], [torch.zeros(3, 32), torch.zeros(5, 32)]

    pieces = list(make_problem(all_inputs=found, all_references=wanted).pieces())

    assert [len(a) for a, _, _ in pieces] == [3, 5]
    assert all(bool((a == 1).all()) and bool((b == 0).all()) for a, b, _ in pieces)
    assert all(a is b for a, b, _ in make_problem(all_inputs=found).pieces())


def test_weights_come_with_their_pieces():
    pieces = make_problem(all_inputs=[torch.ones(3, 32), torch.ones(5, 32)], token_weights=[torch.ones(3, 1)] * 2)

    assert [len(weight) for _, _, weight in list(pieces.pieces())] == [3, 3]


def test_pieces_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        list(make_problem(all_inputs=[torch.ones(1, 32)] * 2, all_references=[torch.ones(1, 32)]).pieces())


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS - 1, FEW_TOKENS, FEW_TOKENS + 1, 3 * FEW_TOKENS + 1])
def test_few_tokens_are_few_and_spread(tokens):
    few = make_problem(tokens).few()

    assert 0.3 * min(tokens, FEW_TOKENS) <= len(few) <= FEW_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transform", [SiteTransform(), SiteTransform(torch.full((32,), 0.5), 16)], ids=["off", "both"])
def test_rounded_tokens_are_what_the_linear_multiplies(dtype, transform):
    problem = make_problem(dtype=dtype)

    found = problem.rounding(0.9, transform)(problem.inputs)

    assert found.dtype == torch.float32
    assert torch.equal(found, fake_quantize_tokens(transform.tokens(problem.inputs).float(), 4, 16, 0.9))


def test_without_an_activation_grid_tokens_are_only_transformed():
    problem = make_problem(activation=None)

    assert torch.equal(problem.rounding(0.5, SiteTransform())(problem.inputs), problem.inputs)
