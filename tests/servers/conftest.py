"""vLLM's OpenAI server in processes of its own, and what transformers says of the same folders."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from optimum_qvlm import QVLMConfig
from tests.jobs import ROOT, load, quantize

sys.path.append(str(ROOT / "examples" / "tiny_vlm"))

QUESTIONS = 8
NEW_TOKENS = 12
SMALL = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8")
"""Options that let a server start in a minute: results are those of others."""


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def environment():
    """Of servers: no network, little memory for caches, one thread."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return os.environ | own | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def serve(environment, tmp_path_factory):
    """Runs `vllm serve` on a folder while a block lasts; gives a client of it."""
    openai = pytest.importorskip("openai")

    @contextmanager
    def serving(folder, *options, **variables):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("server") / "log.txt"
        words = [
            "--model",
            folder,
            "--served-model-name",
            "it",
            "--host",
            "127.0.0.1",
            "--port",
            port,
            *SMALL,
            *options,
        ]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)]
        with log.open("w") as file:
            process = subprocess.Popen(
                command, env=environment | variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            wait_until_healthy(process, port, log)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                with suppress(ProcessLookupError):  # its engine, where it did not end it itself
                    os.killpg(process.pid, signal.SIGKILL)

    return serving


def wait_until_healthy(process, port, log):
    """Until the server answers; a `ServerEnded` with its output if it does not start."""
    for _ in range(1800):
        if process.poll() is not None:
            raise ServerEnded(log.read_text())
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise AssertionError(log.read_text())


class ServerEnded(Exception):
    """A server that did not start, with what it printed."""


@pytest.fixture(scope="session")
def questions():
    """Pictures with questions that the bundled model was not trained on."""
    from questions import make_samples

    return make_samples("heldout", QUESTIONS, seed=0)


@pytest.fixture(scope="session")
def make_model(bundled_folder, tmp_path_factory):
    """Quantizes the bundled model with some settings and saves it; gives model and folder."""

    def made(**settings):
        folder = tmp_path_factory.mktemp("model") / "quantized"
        model = quantize(bundled_folder, **({"num_samples": 8, "effort": "fast", "dataset": None} | settings))
        model.save_pretrained(folder)
        return model, folder

    return made


def said_by_transformers(folder, questions):
    """Greedy answers with activations always rounded, one question after the other."""
    from evaluate import answer_questions

    model = load(folder, dtype=torch.float32, quantization_config=QVLMConfig(decode_tokens=0))
    return answer_questions(model, AutoProcessor.from_pretrained(folder), questions, batch_size=1)


def said_by_server(client, question):
    """Its greedy answer."""
    return choice_of_server(client, question).message.content.strip()


def choice_of_server(client, question):
    """The same with the log probability of each token."""
    file = io.BytesIO()
    question["image"].save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question["question"]}]
    answer = client.chat.completions.create(
        model="it", messages=[{"role": "user", "content": content}], max_tokens=NEW_TOKENS, temperature=0, logprobs=True
    )
    return answer.choices[0]


@pytest.fixture(scope="session")
def run_engine(environment):
    """Lets vLLM score and continue rows of token ids in a fresh process; gives (log probabilities, new tokens)."""

    def run(folder, rows, new_tokens, **options):
        words = [folder, json.dumps(rows), new_tokens, json.dumps(options)]
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("engine.py")), *map(str, words)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        result = json.loads(done.stdout.rsplit("RESULT ", 1)[1].splitlines()[0])
        return torch.tensor(result["scores"]), result["tokens"]

    return run
