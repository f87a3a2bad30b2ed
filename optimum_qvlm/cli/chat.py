"""What `optimum-cli qvlm chat` does: load a model and answer one question, token by token."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from optimum_qvlm.cli.loading import choose_auto_class, load_model, read_model_config
from optimum_qvlm.cli.outcome import finish
from optimum_qvlm.data.sample import open_image
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

    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
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
    inputs = render(processor, images, question).to(model.device)
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


def render(processor: Any, images: list[Any], question: str) -> Any:
    """Model inputs for the question, through the chat template where there is one."""
    if getattr(processor, "chat_template", None) is None:
        return processor(text=question, return_tensors="pt")
    content: Any = question
    if hasattr(processor, "image_processor"):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
