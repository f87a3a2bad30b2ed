"""Accuracy on ScienceQA as the Q-VLM paper measures it, for any model on local data.

    python -m benchmarks.quality.scienceqa --model FOLDER --data SCIENCEQA --scheme w4a4 --device cuda

SCIENCEQA holds what the data set's authors distribute: `problems.json`, `pid_splits.json` and
`images/<split>/<problem>/image.png`. Answers are generated greedily and read off the text; one that names no choice is
wrong. Accuracy is split by subject (NAT, SOC, LAN), by what stands beside the question (TXT: a hint, IMG: a picture,
NO: neither) and by grade. Rows: full precision, round to nearest, the paper's settings, and the default engine; below
them what the paper printed. Calibration takes samples of the train split.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from benchmarks.intervals import of_mean
from optimum_qvlm import QVLMConfig
from optimum_qvlm.data.loader import make_prompts, tokenizer_of
from optimum_qvlm.data.picture import read_picture
from optimum_qvlm.data.sample import Sample
from optimum_qvlm.errors import DataError

LETTERS = "ABCDE"
COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
ROWS = ("fp", "rtn", "paper", "qvlm")
ANSWER = re.compile(r"(?:answer is|answer:)\s*\(?([A-E])\b", re.IGNORECASE)
LETTER = re.compile(r"\(?([A-E])\)?(?:[.:,\n]|$)")
INSTRUCTION = "Answer with the option's letter from the given choices directly."

PUBLISHED: dict[str, tuple[tuple[str, float], ...]] = {
    "7b": (
        ("full precision", 89.81),
        ("w6a6 AWQ", 86.23),
        ("w6a6 QLoRA", 88.43),
        ("w6a6 Q-VLM", 89.34),
        ("w4a4 AWQ", 74.02),
        ("w4a4 QLoRA", 77.53),
        ("w4a4 Q-VLM", 79.79),
    ),
    "13b": (
        ("full precision", 90.00),
        ("w6a6 AWQ", 87.57),
        ("w6a6 QLoRA", 88.87),
        ("w6a6 Q-VLM", 89.70),
        ("w4a4 AWQ", 77.91),
        ("w4a4 QLoRA", 78.64),
        ("w4a4 Q-VLM", 80.78),
    ),
}
"""Averages for LLaVA-v1.3, fine-tuned on ScienceQA, as printed in arXiv 2410.08119."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One multiple-choice question. `answer` counts the choices from 0; `image` is None where there is none."""

    number: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    subject: str
    grade: int
    image: Path | None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the table that the problem counts in."""
        beside = [name for name, there in (("TXT", self.hint != ""), ("IMG", self.image is not None)) if there]
        return (SUBJECTS[self.subject], *(beside or ["NO"]), "G1-6" if self.grade <= 6 else "G7-12", "Avg")

    @property
    def prompt(self) -> str:
        """Hint, question and lettered choices."""
        context = [f"Context: {self.hint}"] if self.hint else []
        choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([*context, self.question, *choices, INSTRUCTION])

    def sample(self, *, answered: bool) -> Sample:
        """As calibration and prompts take it."""
        content: list[dict[str, Any]] = []
        if self.image is not None:
            content.append({"type": "image", "image": read_picture(self.image, f"problem {self.number}")})
        content.append({"type": "text", "text": self.prompt})
        answer = LETTERS[self.answer] if answered else None
        return Sample(messages=({"role": "user", "content": content},), answer=answer)


def read_problems(folder: Path, split: str) -> list[Problem]:
    """The problems of one split, in its order.

    Raises:
        DataError: a file is missing, or a problem lacks a field or its picture.
    """
    problems, splits = _read_json(folder / "problems.json"), _read_json(folder / "pid_splits.json")
    if split not in splits:
        raise DataError(f"{folder / 'pid_splits.json'} has no split {split!r}; it has {', '.join(sorted(splits))}")
    return [_problem(folder, number, problems) for number in splits[split]]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); ScienceQA's own files are expected") from error
    assert isinstance(values, dict)
    return values


def _problem(folder: Path, number: str, problems: Mapping[str, Any]) -> Problem:
    try:
        entry = problems[number]
        grade = int(entry["grade"].removeprefix("grade"))
        image = None if not entry["image"] else folder / "images" / entry["split"] / number / entry["image"]
        problem = Problem(
            number=number,
            question=entry["question"],
            choices=tuple(entry["choices"]),
            answer=int(entry["answer"]),
            hint=entry["hint"] or "",
            subject=entry["subject"],
            grade=grade,
            image=image,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"problem {number} of {folder / 'problems.json'} is not whole: {error!r}") from error
    if problem.subject not in SUBJECTS or not 0 <= problem.answer < len(problem.choices) <= len(LETTERS):
        raise DataError(
            f"problem {number}: subject {problem.subject!r}, answer {problem.answer} of {len(problem.choices)} "
            f"choices; expected one of {', '.join(SUBJECTS)} and at most {len(LETTERS)} choices"
        )
    if image is not None and not image.exists():
        raise DataError(f"problem {number}: {image} is missing; unpack the images of its split")
    return problem


def read_answer(text: str, choices: Sequence[str]) -> int | None:
    """The choice that a generated text names, None where it names none."""
    same = [index for index, choice in enumerate(choices) if choice.strip(" .").lower() == text.strip(" .\n").lower()]
    if len(same) == 1:
        return same[0]
    found = ANSWER.search(text) or LETTER.match(text.strip())
    if found is None:
        return None
    index = LETTERS.index(found[1].upper())
    return index if index < len(choices) else None


@torch.inference_mode()
def answer_problems(
    model: Any, processor: Any, problems: Sequence[Problem], *, batch_size: int, max_new_tokens: int
) -> list[str]:
    """Greedy answers. Problems with and without a picture go in separate batches."""
    tokenizer = tokenizer_of(processor)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    texts: dict[str, str] = {}
    for kind in (True, False):
        members = [problem for problem in problems if (problem.image is not None) is kind]
        for start in range(0, len(members), batch_size):
            group = members[start : start + batch_size]
            prompt = make_prompts([problem.sample(answered=False) for problem in group], processor)
            placed = {name: tensor.to(model.device) for name, tensor in prompt.items()}
            output = model.generate(**placed, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad)
            new = tokenizer.batch_decode(output[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
            texts |= {problem.number: text for problem, text in zip(group, new, strict=True)}
    return [texts[problem.number] for problem in problems]


def grade(texts: Sequence[str], problems: Sequence[Problem]) -> list[bool]:
    """Whether each text names the right choice."""
    return [read_answer(t, problem.choices) == problem.answer for t, problem in zip(texts, problems, strict=True)]


def accuracies(right: Sequence[bool], problems: Sequence[Problem]) -> dict[str, float | None]:
    """Share of right answers per column in percent, None where no problem counts."""
    shares: dict[str, float | None] = {}
    for column in COLUMNS:
        members = [r for r, problem in zip(right, problems, strict=True) if column in problem.columns]
        shares[column] = 100 * sum(members) / len(members) if members else None
    return shares


def table(rows: Mapping[str, Sequence[bool]], problems: Sequence[Problem], size: str) -> str:
    """The whole table: our rows with the paired difference of their average to the first, then the published ones."""
    lines = [f"{'':16}" + "".join(f"{column:>8}" for column in COLUMNS) + "   average to full precision, 95 %"]
    base: torch.Tensor | None = None
    for name, right in rows.items():
        shares = accuracies(right, problems).values()
        values = torch.tensor(list(right)).double() * 100
        gain = "" if base is None else of_mean(values - base).text()
        base = values if base is None else base
        cells = "".join(f"{'-':>8}" if share is None else f"{share:8.2f}" for share in shares)
        lines.append(f"{name:16}{cells}   {gain}".rstrip())
    lines.append(f"published, LLaVA-v1.3-{size.upper()}:")
    lines += [f"{name:16}" + " " * 64 + f"{average:8.2f}" for name, average in PUBLISHED[size]]
    return "\n".join(lines)


def configurations(scheme: str, calibration: list[dict[str, Any]], seed: int) -> dict[str, Callable[[], QVLMConfig]]:
    """The quantized rows. The paper's settings take the weight bits of the scheme for everything."""
    bits = int(scheme.split("a")[0].removeprefix("w"))
    return {
        "rtn": lambda: QVLMConfig(scheme, method="rtn"),
        "paper": lambda: QVLMConfig.paper(bits=bits, dataset=calibration, seed=seed),
        "qvlm": lambda: QVLMConfig(scheme, dataset=calibration, seed=seed),
    }


def calibration_records(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Image samples of the train split, drawn with the seed, in the form that `dataset` takes."""
    pictured = [problem for problem in read_problems(folder, "train") if problem.image is not None]
    chosen = random.Random(seed).sample(pictured, min(count, len(pictured)))
    return [{"image": str(p.image), "question": p.prompt, "answer": LETTERS[p.answer]} for p in chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or name on the Hub")
    parser.add_argument("--data", required=True, type=Path, help="folder with problems.json, pid_splits.json, images/")
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="only the first problems of the split")
    parser.add_argument("--calibration", type=int, default=64, help="samples of the train split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--published", choices=sorted(PUBLISHED), default="7b", help="which published rows to print")
    parser.add_argument("--output", type=Path, help="JSON file for accuracies and every answer")
    chosen = parser.parse_args(arguments)
    logging.disable_progress_bar()

    problems = read_problems(chosen.data, chosen.split)[: chosen.limit]
    processor = AutoProcessor.from_pretrained(chosen.model)
    configs = configurations(
        chosen.scheme, calibration_records(chosen.data, chosen.calibration, chosen.seed), chosen.seed
    )
    texts: dict[str, list[str]] = {}
    for row in chosen.rows:
        config = None if row == "fp" else configs[row]()
        model = AutoModelForImageTextToText.from_pretrained(
            chosen.model, quantization_config=config, device_map=chosen.device
        )
        texts[row] = answer_problems(
            model, processor, problems, batch_size=chosen.batch_size, max_new_tokens=chosen.max_new_tokens
        )
        del model
    right = {row: grade(found, problems) for row, found in texts.items()}
    print(f"{chosen.model}, {chosen.scheme}, {len(problems)} problems of {chosen.split}")
    print(table(right, problems, chosen.published))
    if chosen.output is not None:
        numbers = [problem.number for problem in problems]
        content = {
            row: {"accuracy": accuracies(right[row], problems), "answers": dict(zip(numbers, found, strict=True))}
            for row, found in texts.items()
        }
        chosen.output.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
