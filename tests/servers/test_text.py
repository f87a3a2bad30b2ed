"""Text models in vLLM against transformers, by the log probabilities of given tokens and by greedy tokens."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality.texts import chunked
from benchmarks.smollm2 import write_checkpoint
from optimum_qvlm import QVLMConfig
from tests.jobs import load, quantize
from tests.tiny_families import FAMILIES

NEW_TOKENS = 8
OVERRIDES = {"layers.0.self_attn.k_proj": "w8a8", "layers.1.mlp.up_proj": None, "layers.0.mlp.down_proj": "w6a16"}


def save_family(name, folder):
    """A tiny model with heads of 32 channels: vLLM's attention on a processor has none of 16."""
    config = FAMILIES[name].config()
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 32
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def exactly(folder, **options):
    """The model in transformers, with activations rounded at every number of tokens."""
    return load(folder, dtype=torch.float32, quantization_config=QVLMConfig(decode_tokens=0), **options)


def scores_of(model, rows):
    """Log probability of each token after those before it."""
    with torch.no_grad():
        logits = torch.cat([model(row[None]).logits for row in rows])
    return logits[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_families_with_exceptions_compute_what_transformers_computes(run_engine, family, tmp_path):
    """Parts of fused linears have formats of their own here, one none at all."""
    save_family(family, tmp_path / "full")
    quantize(tmp_path / "full", "w4a8", overrides=OVERRIDES, effort="fast").save_pretrained(tmp_path / "quantized")
    model = exactly(tmp_path / "quantized")
    rows = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    generate = partial(model.generate, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0)

    scores, tokens = run_engine(tmp_path / "quantized", rows.tolist(), NEW_TOKENS)

    assert (scores - scores_of(model, rows)).abs().max() < 1e-3
    assert tokens == [generate(row[None])[0, rows.shape[1] :].tolist() for row in rows]


def test_compiled_by_vllm_it_computes_the_same(run_engine, tmp_path):
    save_family("llama", tmp_path / "full")
    quantize(tmp_path / "full", "w4a8", effort="fast").save_pretrained(tmp_path / "quantized")
    rows = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(0))

    scores, _ = run_engine(tmp_path / "quantized", rows.tolist(), NEW_TOKENS, enforce_eager=False)

    assert (scores - scores_of(exactly(tmp_path / "quantized"), rows)).abs().max() < 1e-3


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Real weights."""
    pytest.importorskip("gguf")
    return write_checkpoint(tmp_path_factory.mktemp("smollm2") / "full")


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_a_real_model_differs_no_more_than_transformers_from_itself(run_engine, smollm2, scheme, tmp_path):
    """Rounding to 8 bits turns differences in the last bit into whole steps, so that another order of summation in
    attention changes log probabilities by more than 16-bit weights would. That is the measure."""
    quantize_smollm2(smollm2, scheme).save_pretrained(tmp_path / "quantized")
    rows = chunked(smollm2, tokens=64).chunks[:4]
    expected, other = (
        scores_of(exactly(tmp_path / "quantized", attn_implementation=attention), rows)
        for attention in ("sdpa", "eager")
    )

    scores, _ = run_engine(tmp_path / "quantized", rows.tolist(), 1)

    assert (scores - expected).abs().mean() < 1e-4 + 1.5 * (other - expected).abs().mean()


def quantize_smollm2(folder, scheme):
    return load(folder, dtype=torch.float32, quantization_config=QVLMConfig(scheme, method="rtn"))


def test_the_server_completes_text_as_transformers_does(serve, smollm2, tmp_path):
    quantize_smollm2(smollm2, "w4a16").save_pretrained(tmp_path / "quantized")
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), exactly(tmp_path / "quantized")
    prompts = ["The capital of France is", "Water boils at", "def fibonacci(n):\n", "Once upon a time there was"]
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        tokens = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(tokens, skip_special_tokens=True))

    with serve(tmp_path / "quantized") as client:
        done = [client.completions.create(model="it", prompt=p, max_tokens=NEW_TOKENS, temperature=0) for p in prompts]

    assert [answer.choices[0].text for answer in done] == expected
