"""`lm_eval` on a quantized text model: the likelihoods are those of the model."""

import json

import pytest
import torch
from transformers import AutoTokenizer

import optimum_qvlm  # noqa: F401  registers the method
from tests.jobs import load

pytestmark = pytest.mark.slow

TASK = """
task: digits
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""
QUESTIONS = [
    {"question": "how many digits are there?", "choices": ["two", "four"], "label": 0},
    {"question": "which digit is the largest?", "choices": ["nine", "one"], "label": 1},
    {"question": "what is the sum of the top row?", "choices": ["three", "red"], "label": 0},
]


@pytest.fixture
def words(tmp_path, text_folder):
    """Arguments of lm_eval for three questions of its own task, samples written to a folder."""
    questions = tmp_path / "tasks" / "questions.jsonl"
    questions.parent.mkdir()
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (questions.parent / "digits.yaml").write_text(TASK.format(file=questions))
    return [
        *("--model", "hf", "--model_args", f"pretrained={text_folder},dtype=float32", "--device", "cpu"),
        *("--tasks", "digits", "--include_path", questions.parent, "--batch_size", 1),
        *("--output_path", tmp_path / "out", "--log_samples"),
    ]


def likelihood(model, tokenizer, question, choice):
    """Log-likelihood of ` choice` behind the question."""
    prompt, whole = (
        tokenizer(text, return_tensors="pt", return_token_type_ids=False).input_ids
        for text in (question, f"{question} {choice}")
    )
    with torch.inference_mode():
        logits = model(input_ids=whole[:, :-1]).logits[0]
    logits = logits[prompt.shape[1] - 1 :].log_softmax(-1)
    return logits.gather(1, whole[0, prompt.shape[1] :, None]).sum().item()


@pytest.mark.parametrize("program", [["lm_eval"], ["-m", "lm_eval"]], ids=["command", "module"])
def test_likelihoods_are_those_of_the_model(python, words, program, text_folder, tmp_path):
    done = python("-m", "optimum_qvlm", *program, *words)

    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("samples_digits*.jsonl")
    model, tokenizer = load(text_folder), AutoTokenizer.from_pretrained(text_folder)
    for line in file.read_text().splitlines():
        sample = json.loads(line)
        question = QUESTIONS[sample["doc_id"]]
        measured = [float(response[0][0]) for response in sample["resps"]]
        expected = [likelihood(model, tokenizer, question["question"], choice) for choice in question["choices"]]
        assert measured == pytest.approx(expected, abs=1e-3)


def test_without_us_it_ends_and_names_the_method(python, words):
    """It ends before it looks at the weights; what its users see is what `docs/how-to/other-programs.md` quotes."""
    done = python("-m", "lm_eval", *words)

    assert done.returncode != 0
    assert "ValueError: Unknown quantization type, got qvlm" in done.stderr
