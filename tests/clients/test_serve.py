"""`transformers serve` with a quantized model: it answers as the model does in a script of one's own."""

import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import optimum_qvlm  # noqa: F401  registers the method
from tests.jobs import load

pytestmark = pytest.mark.slow

QUESTION = "how many digits are there?"
NEW_TOKENS = 6


def wait_until_healthy(process, port, log):
    """Until the server answers, or has ended."""
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def ask(vision_folder, environment, tmp_path_factory):
    """Sends a question to a server that runs for the module; returns the open response."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    words = ["transformers", "serve", vision_folder, "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    command = [sys.executable, "-m", "optimum_qvlm", *map(str, words)]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until_healthy(process, port, log)

        def send(content, **options):
            body = {"model": str(vision_folder), "messages": [{"role": "user", "content": content}]}
            body |= {"max_tokens": NEW_TOKENS, "temperature": 0} | options
            return urllib.request.urlopen(
                urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/chat/completions",
                    json.dumps(body).encode(),
                    {"Content-Type": "application/json"},
                ),
                timeout=120,
            )

        yield send
    finally:
        process.terminate()
        process.wait(30)


def picture():
    """Something with structure."""
    image = Image.new("RGB", (32, 32), "black")
    image.paste((255, 255, 255), (8, 4, 20, 28))
    return image


def answer_of_the_model(folder, image=None, question=QUESTION):
    """What a script gets that imports the package."""
    model, processor = load(folder), AutoProcessor.from_pretrained(folder)
    content = [{"type": "text", "text": question}]
    if image is not None:
        content = [{"type": "image", "image": image}, *content]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def image_url(image):
    """As a browser would send it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()},
    }


def test_chat(ask, vision_folder):
    with ask(QUESTION) as response:
        said = json.load(response)

    assert said["choices"][0]["message"]["content"] == answer_of_the_model(vision_folder)


def test_an_image(ask, vision_folder):
    image = picture()

    with ask([image_url(image), {"type": "text", "text": QUESTION}]) as response:
        said = json.load(response)

    assert said["choices"][0]["message"]["content"] == answer_of_the_model(vision_folder, image)


def test_a_stream_says_the_same_in_pieces(ask, vision_folder):
    image, question = picture(), "Where do you see the digit 4?"
    content = [image_url(image), {"type": "text", "text": question}]

    with ask(content, stream=True) as response:
        events = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: {")]

    pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(pieces).strip() == answer_of_the_model(vision_folder, image, question).strip()
    assert sum(piece != "" for piece in pieces) > 1


def test_without_us_the_server_ends_and_says_what_to_do(python, vision_folder):
    """What its users see is what `docs/how-to/other-programs.md` quotes."""
    done = python("-m", "transformers.cli.transformers", "serve", vision_folder, "--port", "1", "--device", "cpu")

    assert done.returncode != 0
    assert "Unknown quantization type, got qvlm" in done.stdout + done.stderr
    assert "`import optimum_qvlm` before loading, or `python -m optimum_qvlm PROGRAM`" in done.stdout + done.stderr
