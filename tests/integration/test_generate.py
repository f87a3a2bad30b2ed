"""What `generate` does with a quantized model: a static cache compiles its decoding step, as that of any model."""

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

from tests.jobs import load, make_batch, quantize

pytestmark = pytest.mark.integration

TOKENS = 5


class Counter:
    """A backend that runs graphs as they are, and counts them and the quantized products in them."""

    def __init__(self) -> None:
        self.graphs, self.products = 0, 0

    def __call__(self, graph, inputs, **options):
        self.graphs += 1
        self.products += sum("optimum_qvlm.linear" in str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def __deepcopy__(self, memo):
        return self


def answer(model, batch, **options) -> Tensor:
    """Greedy tokens."""
    model.generation_config.pad_token_id = 0
    return model.generate(**batch, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, **options)


def answer_compiled(model, batch) -> tuple[Tensor, Counter]:
    """As `answer`, with a static cache, which transformers compiles on a GPU and here where it is told to."""
    torch._dynamo.reset()
    backend = Counter()
    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    return answer(model, batch, cache_implementation="static", compile_config=config), backend


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_a_model_is_compiled_after_calibration_and_after_reloading(name, request, tmp_path):
    """The step has every linear of the decoder, and answers as without a cache of fixed size."""
    folder = request.getfixturevalue(f"{name}_folder")
    model, batch = quantize(folder), make_batch(folder)
    model.save_pretrained(tmp_path)

    for one in (model, load(tmp_path)):
        tokens, backend = answer_compiled(one, batch)

        assert backend.graphs == 1
        assert backend.products == 7 * one.config.get_text_config().num_hidden_layers
        assert torch.equal(tokens, answer(one, batch))
