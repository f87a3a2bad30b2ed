"""What must be in order before a calibration starts: weights, processor, data."""

import math
import time
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from transformers import AutoProcessor

from optimum_qvlm.compat.transformers import tied_keys, was_loaded
from optimum_qvlm.data.inputs import stands_for_image
from optimum_qvlm.data.loader import (
    Batch,
    LoaderOptions,
    fingerprint,
    make_batches,
    make_labelled_batches,
    read_dataset,
    read_held_out,
    tokenizer_of,
)
from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.data.sample import Sample
from optimum_qvlm.errors import CheckpointError, DataError
from optimum_qvlm.evaluation.fidelity import IGNORED
from optimum_qvlm.hf.access import Access
from optimum_qvlm.hf.config import QVLMConfig
from optimum_qvlm.hf.format.coverage import without_new_heads
from optimum_qvlm.hf.saving.source import Source
from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.pipeline.answers import fill_answers
from optimum_qvlm.pipeline.calibrate import CalibrationData
from optimum_qvlm.pipeline.rehearsal import Workload
from optimum_qvlm.plan import QuantPlan

HELD_OUT = 8
"""Samples beyond those of the calibration that fidelity is measured on."""

LABELS_PER_SAMPLE = 32
"""Tokens of each of them at most."""


def require_all_loaded(model: Any) -> None:
    """Refuse a checkpoint that lacks tensors: transformers fills them at random with no more than a warning.

    Raises:
        CheckpointError: names the tensors. Tied ones are exempt, those that the model says may be missing, and those of
            a head that this class adds to the saved one, which stays in full precision: not an output embedding,
            without which no fidelity could be measured.
    """
    tied = tied_keys(model).keys()
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}
    given = {name for name, tensor in state.items() if was_loaded(tensor)}
    random = [name for name in state if name not in given]
    missing = without_new_heads(model, random, given | _output_parameters(model))
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(
            f"the checkpoint {model.config.name_or_path} lacks {shown}, so these weights are random; fetch it again, "
            "or load it with the class that its config.json names under architectures"
        )


def _output_parameters(model: Any) -> set[str]:
    """Names of the parameters of the output embedding."""
    head = model.get_output_embeddings()
    held = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}


def prepare_data(
    model: Any, plan: QuantPlan, config: QVLMConfig, source: Source, device: torch.device
) -> CalibrationData:
    """Batches of model inputs from whatever dataset the user passed, and some of what it holds beyond them.

    Raises:
        DataError: data or processor are missing or do not fit the model.
    """
    loaded = _Loaded(model, config, source)
    batches = loaded.ready
    if loaded.conversations:
        answered = loaded.answered(loaded.conversations, plan, device, batch=config.batch_size)
        batches = loaded.render(answered)
    held_out = _held_out(loaded, plan, device)
    return replace(
        loaded.data(batches),
        held_out=[batch for batch, _ in held_out],
        held_out_samples=[rows for _, rows in held_out],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedData:
    """The data of a dry run: all of it rendered, answers that are missing left out, and one sample of it."""

    workload: Workload
    recipe: Recipe
    missing_answers: int


def try_data(model: Any, plan: QuantPlan, config: QVLMConfig, source: Source, device: torch.device) -> TriedData:
    """As `prepare_data`, but of the missing answers only one is written, to see how long it takes.

    Raises:
        DataError: as `prepare_data`.
    """
    loaded = _Loaded(model, config, source)
    unanswered = [sample for sample in loaded.conversations if sample.answer is None and sample.text is None]
    batches = loaded.render(loaded.conversations) if loaded.conversations else loaded.ready
    data = loaded.data(batches)
    answer_seconds = 0.0
    if unanswered:
        started = time.perf_counter()
        loaded.answered(unanswered[:1], plan, device, batch=1)
        answer_seconds = (time.perf_counter() - started) * math.ceil(len(unanswered) / config.batch_size)
    with_image = [sample for sample in loaded.conversations if sample.has_image]
    if loaded.conversations:
        (sample,) = loaded.render((with_image or loaded.conversations)[:1])
    else:
        sample = next((batch for batch in batches if loaded.holds_image(batch)), batches[0])
    (labels,) = loaded.data([sample]).labels
    return TriedData(
        workload=Workload(sample=sample, labels=labels, batches=batches, answer_seconds=answer_seconds),
        recipe=data.recipe,
        missing_answers=len(unanswered),
    )


class _Loaded:
    """Samples as the user's dataset holds them, with what renders them."""

    def __init__(self, model: Any, config: QVLMConfig, source: Source) -> None:
        self.model, self.config = model, config
        self.options = LoaderOptions(
            num_samples=config.num_samples,
            batch_size=config.batch_size,
            max_length=config.max_length,
            seed=config.seed,
            vocabulary=getattr(model.get_input_embeddings(), "num_embeddings", None),
        )
        self.image_tokens = adapter_for(model).image_tokens()
        images: Any = {"wants_images": bool(self.image_tokens), "image_tokens": self.image_tokens}
        self.origin, samples = read_dataset(config.dataset, self.options, **images)
        self.held_out = read_held_out(config.dataset, self.options, count=HELD_OUT, **images)
        self.conversations = [sample for sample in samples if isinstance(sample, Sample)]
        self.ready = [sample for sample in samples if not isinstance(sample, Sample)]
        _require_answers(model, [*self.conversations, *(s for s in self.held_out if isinstance(s, Sample))])
        own = users_processor(config, source.access) if self.conversations else None
        self.processor = source.load_processor() if self.conversations and own is None else own

    def answered(self, samples: list[Sample], plan: QuantPlan, device: torch.device, *, batch: int) -> list[Sample]:
        """The samples with the model's own answers where they have none."""
        layers = [layer.path for part in plan.parts for layer in part.layers]
        options = replace(self.options, batch_size=batch)
        tokens = self.image_tokens
        return fill_answers(
            self.model, samples, self.processor, options, layers=layers, device=device, image_tokens=tokens
        )

    def render(self, samples: list[Sample]) -> list[Batch]:
        """Batches of model inputs, with labels where the encoder step will want them and all answers are known."""
        labelled = self.config.encoder.epochs > 0 and all(s.answer is not None or s.text is not None for s in samples)
        make = make_labelled_batches if labelled else make_batches
        return make(samples, self.processor, self.options, self.image_tokens)

    def holds_image(self, batch: Batch) -> bool:
        """Whether a token of the batch stands for an image."""
        return bool(stands_for_image(batch["input_ids"], self.image_tokens).any())

    def data(self, batches: list[Batch]) -> CalibrationData:
        """The batches with their record; a processor that drops images would leave the tower without data."""
        if self.image_tokens and not any(self.holds_image(batch) for batch in batches):
            raise DataError(
                f"no calibration input holds an image token ({', '.join(map(str, self.image_tokens))}); the "
                "processor's chat template must place one for each image"
            )
        labels = [batch.pop("labels") if "labels" in batch else self.text_labels(batch) for batch in batches]
        recipe = Recipe(
            source=self.origin,
            samples=sum(batch["input_ids"].shape[0] for batch in batches),
            seed=self.config.seed,
            fingerprint=fingerprint(batches),
        )
        return CalibrationData(batches=batches, recipe=recipe, labels=labels)

    def text_labels(self, batch: Batch) -> torch.Tensor:
        """Labels of a batch that does not say which tokens are the answer: all that are text."""
        ids = batch["input_ids"]
        text = ~stands_for_image(ids, self.image_tokens)
        if "attention_mask" in batch and batch["attention_mask"].shape == ids.shape:
            text &= batch["attention_mask"].bool()
        return torch.where(text, ids, -100)


def _require_answers(model: Any, samples: list[Sample]) -> None:
    """Refuse samples without answers for a model that cannot write any.

    Raises:
        DataError: says how many.
    """
    missing = sum(sample.answer is None and sample.text is None for sample in samples)
    if missing > 0 and not model.can_generate():
        raise DataError(
            f"{missing} of {len(samples)} samples have no answer, and {type(model).__name__} cannot write one, as it "
            "generates nothing; give samples with answers, or load a class with a language model head"
        )


Rows = list[Sample | None]
"""What the rows of a batch were rendered from."""


def _held_out(loaded: _Loaded, plan: QuantPlan, device: torch.device) -> list[tuple[Batch, Rows]]:
    """Batches with labels, `LABELS_PER_SAMPLE` of each sample at most, since logits are kept for each: the first of an
    answer, the last of a text. What is rendered here has few enough rows to decode as few sequences do."""
    samples = [sample for sample in loaded.held_out if isinstance(sample, Sample)]
    batches = [sample for sample in loaded.held_out if not isinstance(sample, Sample)]
    rows = loaded.config.weight_only_tokens() or HELD_OUT
    options = replace(loaded.options, batch_size=min(rows, loaded.options.batch_size))
    sources: Rows = [None for batch in batches for _ in batch["input_ids"]]
    if samples:
        answered = loaded.answered(samples, plan, device, batch=options.batch_size)
        plain = [sample for sample in answered if sample.text is not None]
        talks = [sample for sample in answered if sample.text is None]
        batches += make_batches(plain, loaded.processor, options, loaded.image_tokens)
        batches += make_labelled_batches(talks, loaded.processor, options, loaded.image_tokens)
        sources += [*plain, *talks]
    rest = iter(sources)
    labelled: list[tuple[Batch, Rows]] = []
    for batch in batches:
        answers = batch.get("labels")
        kept = _some_labels(loaded.text_labels(batch), last=True) if answers is None else _some_labels(answers)
        labelled.append(({**batch, "labels": kept}, list(islice(rest, len(kept)))))
    return [entry for entry in labelled if bool((entry[0]["labels"] != IGNORED).any())]


def _some_labels(labels: torch.Tensor, *, last: bool = False) -> torch.Tensor:
    """The first or last labels of each row; the first token of a row is predicted by nothing."""
    targets = labels[:, 1:]
    counts = (targets != IGNORED).long()
    number = counts.flip(1).cumsum(1).flip(1) if last else counts.cumsum(1)
    kept = torch.where(number <= LABELS_PER_SAMPLE, targets, IGNORED)
    return torch.nn.functional.pad(kept, (1, 0), value=IGNORED)


def reader_of_answers(config: QVLMConfig, source: Source, origin: str) -> Any:
    """The tokenizer that turns answers into texts for the report; None where it shall keep none, or there is none.

    Of samples that are the user's own, only what `report_samples` allows is kept. `origin` is what `read_dataset` says
    of them.
    """
    public = origin == "packaged" or origin.startswith("preset:")
    if config.report_samples == "none" or (config.report_samples == "auto" and not public):
        return None
    try:
        own = users_processor(config, source.access)
        return tokenizer_of(source.load_processor() if own is None else own)
    except DataError:  # ready model inputs need no processor
        return None


def users_processor(config: QVLMConfig, access: Access) -> Any:
    """The processor that the user gave, loaded where it is a name or path; None where there is none.

    Raises:
        DataError: it cannot be loaded.
    """
    if not isinstance(config.processor, str):
        return config.processor
    access.say_what_is_unknown()
    try:
        return AutoProcessor.from_pretrained(config.processor, **access.options())
    except (OSError, ValueError) as error:
        raise DataError(f"processor={config.processor!r} could not be loaded: {error}") from error
