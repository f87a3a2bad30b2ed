"""What `optimum-cli qvlm chat` does: load a model and answer one question, token by token."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from optimum_qvlm.cli.loading import load_model, source_of
from optimum_qvlm.cli.outcome import finish
from optimum_qvlm.data.picture import open_image
from optimum_qvlm.errors import DataError, QVLMError

LONG_ANSWER = 2048
"""Tokens from which compiling a step, about a minute, is made good by decoding: it saves some 20 to 30 ms of each."""


def main(args: Namespace) -> int:
    """Run the command; returns the exit code, see `finish`."""
    return finish("optimum-cli qvlm chat", lambda: chat(args))


def chat(args: Namespace) -> None:
    """Print the answer while it is written."""
    images = [read_image(path) for path in args.image or ()]
    processor = load_processor(args)
    try:
        model = load_model(args)
    except QVLMError:
        raise
    except ValueError as error:  # what transformers raises for configurations that it cannot use
        raise QVLMError(f"model {args.model} cannot be loaded: {error}") from error
    answer(model, processor, images, args.question, args.max_new_tokens)


def read_image(path: Path) -> Any:
    """A picture from a file.

    Raises:
        DataError: it is not there, or no picture.
    """
    return open_image(path, "--image")


def load_processor(args: Namespace) -> Any:
    """Processor of the model, or the tokenizer of a text model, which may name a processor that it does not have.

    Raises:
        QVLMError: there is none.
    """
    from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

    from optimum_qvlm.hf.model_class import choose_auto_class, read_model_config

    source = source_of(args)
    takes_text = choose_auto_class("auto", read_model_config(args.model, source)) is AutoModelForCausalLM
    try:
        return (AutoTokenizer if takes_text else AutoProcessor).from_pretrained(args.model, **source)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise DataError(
            f"no processor or tokenizer could be loaded from {args.model} ({error}); save the original model's there"
        ) from error


def answer(model: Any, processor: Any, images: list[Any], question: str, max_new_tokens: int) -> None:
    """Greedy generation to stdout.

    Raises:
        DataError: images for a model that takes none.
    """
    import torch
    from transformers import TextStreamer

    if images and not hasattr(processor, "image_processor"):
        raise DataError(f"{type(model).__name__} takes no images; ask without --image")
    inputs = {name: value.to(model.device) for name, value in render(processor, images, question).items()}
    if images:
        require_images(model, inputs)
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(model.dtype)
    tokenizer = getattr(processor, "tokenizer", processor)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        options = speed_options(model.device, max_new_tokens)
        model.generate(**inputs, **options, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)


def speed_options(device: Any, max_new_tokens: int) -> dict[str, Any]:
    """Options of `generate` for answers of up to so many tokens: on a GPU, long ones are decoded by a compiled step."""
    compiles = device.type == "cuda" and max_new_tokens >= LONG_ANSWER
    return {"cache_implementation": "static"} if compiles else {}


def render(processor: Any, images: list[Any], question: str) -> dict[str, Any]:
    """Model inputs for the question, through the chat template or in the form of a family that has none.

    Raises:
        DataError: the processor refuses it, as one that needs an image refuses a question without.
    """
    from optimum_qvlm.data.loader import make_prompts
    from optimum_qvlm.data.sample import Sample

    if question.strip() == "" and not images:
        raise DataError("the question is empty; ask something")
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    sample = Sample(messages=({"role": "user", "content": content},), where="the question")
    try:
        return make_prompts([sample], processor)
    except DataError as error:
        reason = error if error.__cause__ is None else error.__cause__
        raise DataError(f"the processor cannot take the question: {reason}") from error


def require_images(model: Any, inputs: dict[str, Any]) -> None:
    """Refuse inputs that the images did not get into.

    Raises:
        DataError: no token stands for an image, or there are no pixels.
    """
    from optimum_qvlm.data.inputs import stands_for_image
    from optimum_qvlm.models.adapter import Adapter

    tokens = Adapter(model).image_tokens()
    placed = not tokens or bool(stands_for_image(inputs["input_ids"], tokens).any())
    if not placed or not any(value.is_floating_point() for value in inputs.values()):
        raise DataError(
            "the processor left the images out: its chat template must place a token for each; save the model with a "
            "processor whose template does"
        )
