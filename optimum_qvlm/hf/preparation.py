"""What must be in order before a calibration starts: weights, processor, data."""

import re
from typing import Any

import torch
from transformers import AutoProcessor

from optimum_qvlm.data.loader import LoaderOptions, fingerprint, make_batches, make_labelled_batches, read_dataset
from optimum_qvlm.data.recipe import Recipe
from optimum_qvlm.data.sample import Sample
from optimum_qvlm.errors import CheckpointError, DataError
from optimum_qvlm.hf.config import QVLMConfig
from optimum_qvlm.hf.source import Source
from optimum_qvlm.models.registry import adapter_for
from optimum_qvlm.pipeline.answers import fill_answers
from optimum_qvlm.pipeline.calibrate import CalibrationData
from optimum_qvlm.search.plan import QuantPlan


def require_all_loaded(model: Any) -> None:
    """Refuse a checkpoint that lacks tensors: transformers fills them at random with no more than a warning.

    Raises:
        CheckpointError: names the tensors. Tied ones are exempt, and those that the model says may be missing.
    """
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not getattr(tensor, "_is_hf_initialized", False)
        and name not in tied
        and not any(pattern.search(name) for pattern in optional)
    ]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(
            f"the checkpoint {model.config.name_or_path} lacks {shown}, so these weights are random; fetch it again, "
            "or load it with the class that its config.json names under architectures"
        )


def prepare_data(
    model: Any, plan: QuantPlan, config: QVLMConfig, source: Source, device: torch.device
) -> CalibrationData:
    """Batches of model inputs from whatever dataset the user passed.

    Raises:
        DataError: data or processor are missing or do not fit the model.
    """
    options = LoaderOptions(
        num_samples=config.num_samples,
        batch_size=config.batch_size,
        max_length=config.max_length,
        seed=config.seed,
    )
    image_tokens = adapter_for(model).image_tokens()
    origin, samples = read_dataset(config.dataset, options, wants_images=bool(image_tokens))
    conversations = [sample for sample in samples if isinstance(sample, Sample)]
    batches = [sample for sample in samples if not isinstance(sample, Sample)]
    if conversations:
        own = users_processor(config)
        processor = source.load_processor() if own is None else own
        layers = [layer.path for part in plan.parts for layer in part.layers]
        answered = fill_answers(model, conversations, processor, layers=layers, device=device, batch=config.batch_size)
        make = make_labelled_batches if config.encoder_epochs > 0 else make_batches
        batches = make(answered, processor, options, image_tokens)
    _require_images(batches, image_tokens)
    labels = [batch.pop("labels") if "labels" in batch else _text_labels(batch, image_tokens) for batch in batches]
    recipe = Recipe(
        source=origin,
        samples=sum(batch["input_ids"].shape[0] for batch in batches),
        seed=config.seed,
        fingerprint=fingerprint(batches),
    )
    return CalibrationData(batches=batches, recipe=recipe, labels=labels)


def users_processor(config: QVLMConfig) -> Any:
    """The processor that the user gave, loaded where it is a name or path; None where there is none.

    Raises:
        DataError: it cannot be loaded.
    """
    if not isinstance(config.processor, str):
        return config.processor
    try:
        return AutoProcessor.from_pretrained(config.processor)
    except (OSError, ValueError) as error:
        raise DataError(f"processor={config.processor!r} could not be loaded: {error}") from error


def _text_labels(batch: dict[str, torch.Tensor], image_tokens: tuple[int, ...]) -> torch.Tensor:
    """Ready model inputs do not say which tokens are the answer: all that are text then."""
    ids = batch["input_ids"]
    text = ~torch.isin(ids, torch.tensor(image_tokens, dtype=ids.dtype))
    if "attention_mask" in batch and batch["attention_mask"].shape == ids.shape:
        text &= batch["attention_mask"].bool()
    return torch.where(text, ids, -100)


def _require_images(batches: list[dict[str, torch.Tensor]], image_tokens: tuple[int, ...]) -> None:
    """A processor that drops images would leave the vision tower without data."""
    wanted = torch.tensor(image_tokens)
    if image_tokens and not any(bool(torch.isin(batch["input_ids"], wanted).any()) for batch in batches):
        raise DataError(
            f"no calibration input holds an image token ({', '.join(map(str, image_tokens))}); the processor's chat "
            "template must place one for each image"
        )
