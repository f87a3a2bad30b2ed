"""Exact-answer accuracy of a model folder on held-out questions."""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from questions import make_samples
from transformers import AutoModelForImageTextToText, AutoProcessor

MAX_ANSWER_TOKENS = 12


def conversation(sample: dict[str, Any], *, with_answer: bool = False) -> list[dict[str, Any]]:
    """The sample as chat messages: the picture and the question, and the answer if asked for."""
    content = [{"type": "image", "image": sample["image"]}, {"type": "text", "text": sample["question"]}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if with_answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": sample["answer"]}]})
    return messages


@torch.inference_mode()
def answer_questions(model: Any, processor: Any, samples: list[dict[str, Any]], batch_size: int = 64) -> list[str]:
    """The model's greedy answers, stripped of surrounding blanks, in the order of the samples."""
    answers: list[str] = []
    for start in range(0, len(samples), batch_size):
        batch = processor.apply_chat_template(
            [conversation(sample) for sample in samples[start : start + batch_size]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device)
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
        texts = processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.extend(text.strip() for text in texts)
    return answers


def accuracy(answers: list[str], samples: list[dict[str, Any]]) -> float:
    """Share of samples in 0..1 whose answer is exactly right."""
    if len(answers) != len(samples):
        raise ValueError(f"{len(answers)} answers do not fit {len(samples)} samples; pass one answer per sample")
    if not samples:
        raise ValueError("0 samples have no accuracy; pass at least 1")
    right: list[bool] = [answer == sample["answer"] for answer, sample in zip(answers, samples, strict=True)]
    return sum(right) / len(right)


def accuracy_by_kind(answers: list[str], samples: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy per kind of question, sorted by name."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        groups[sample["kind"]].append(place)
    return {
        kind: accuracy([answers[place] for place in places], [samples[place] for place in places])
        for kind, places in sorted(groups.items())
    }


def print_accuracy(answers: list[str], samples: list[dict[str, Any]]) -> None:
    """One line per kind, then the whole."""
    for kind, share in accuracy_by_kind(answers, samples).items():
        print(f"{kind:10} {100 * share:6.2f} %")
    print(f"{'all':10} {100 * accuracy(answers, samples):6.2f} % of {len(samples)} questions")


def main() -> None:
    """Command line: a model folder in, accuracies out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(Path(__file__).parent), help="model folder (default: this one)")
    parser.add_argument("--count", type=int, default=4000, help="how many held-out questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(arguments.model).to(arguments.device).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    samples = make_samples("heldout", arguments.count, arguments.seed)
    print_accuracy(answer_questions(model, processor, samples, arguments.batch_size), samples)


if __name__ == "__main__":
    main()
