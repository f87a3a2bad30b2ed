"""Requests per second of vLLM's OpenAI server on a CPU: quantized models by our plugin, and by vLLM's own kernels where
it has some, against the same model in bf16, at several numbers of requests at once.

Servers run one after the other, each in a process of its own. Beside requests per second stand those per second of
processor time that the server took, which other work on the machine changes less. Run it in the environment of
`make test-serving`.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.texts import chunked
from benchmarks.smollm2 import write_checkpoint
from optimum_qvlm import QVLMConfig, export_compressed_tensors

PROMPT_TOKENS = 64
STOCK = "stock vLLM"
PLUGIN = "plugin"
START_SECONDS = 600


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["w4a16", "w4a8", "w8a8"])
    parser.add_argument("--exported", nargs="*", default=["w4a16", "w8a8"], help="schemes that stock vLLM serves too")
    parser.add_argument("--concurrent", nargs="+", type=int, default=[1, 8, 32], help="requests at once")
    parser.add_argument("--requests", type=int, default=32, help="of each measurement; 8 where one is sent at a time")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of each answer")
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    parser.add_argument("--eager", action="store_true", help="do not let vLLM compile")
    parser.add_argument("--folder", type=Path, help="where models are kept for the next run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        prompts = make_prompts(make_full(folder), max(arguments.requests, *arguments.concurrent))
        print(f"| model | served by | {' | '.join(f'{n} at once' for n in arguments.concurrent)} |", flush=True)
        print(f"|---|---|{'---|' * len(arguments.concurrent)}", flush=True)
        for name, served_by, model in variants(folder, arguments.schemes, arguments.exported):
            rates = measure(model, prompts, arguments)
            print(f"| {name} | {served_by} | {' | '.join(rates)} |", flush=True)


def make_full(folder: Path) -> Path:
    """SmolLM2-135M in full precision."""
    full = folder / "full"
    return full if (full / "config.json").exists() else write_checkpoint(full)


def make_prompts(full: Path, count: int) -> list[list[int]]:
    """Token ids of different pieces of text, so that no prefix is cached."""
    return chunked(full, tokens=PROMPT_TOKENS).chunks[:count].tolist()


def variants(folder: Path, schemes: list[str], exported: list[str]) -> Iterator[tuple[str, str, Path]]:
    """Name, what serves it, and folder of each model. They are rounded to nearest, which is as fast as any other."""
    full = folder / "full"
    yield "bf16", STOCK, full
    for scheme in schemes:
        ours, theirs = folder / scheme, folder / f"{scheme}-exported"
        if not (ours / "config.json").exists():
            config = QVLMConfig(scheme, method="rtn", servable=True)
            model = AutoModelForCausalLM.from_pretrained(full, dtype=torch.bfloat16, quantization_config=config)
            model.save_pretrained(ours)
            if scheme in exported:
                export_compressed_tensors(model, theirs)
        yield scheme, PLUGIN, ours
        if scheme in exported:
            yield scheme, STOCK, theirs


def measure(model: Path, prompts: list[list[int]], arguments: argparse.Namespace) -> list[str]:
    """Requests per second, and per second of processor time, at each number of requests at once."""
    with server(model, arguments) as (url, session):
        rates = []
        for concurrent in arguments.concurrent:
            count = 8 if concurrent == 1 else max(arguments.requests, concurrent)
            send_all(url, prompts[:concurrent], concurrent, arguments.new_tokens)
            started, worked = time.perf_counter(), processor_seconds(session)
            send_all(url, prompts[:count], concurrent, arguments.new_tokens)
            rate = count / (time.perf_counter() - started)
            rates.append(f"{rate:.2f} ({count / (processor_seconds(session) - worked):.2f})")
        return rates


def processor_seconds(session: int) -> float:
    """What all processes of a session have taken so far."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12]) if int(fields[3]) == session else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def send_all(url: str, prompts: list[list[int]], concurrent: int, new_tokens: int) -> None:
    """Completions of all prompts, so many at once."""

    def send(prompt: list[int]) -> None:
        body = {"model": "it", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            json.load(response)

    with ThreadPoolExecutor(concurrent) as pool:
        list(pool.map(send, prompts))


@contextmanager
def server(model: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """vLLM's server while a block lasts; gives its address and its session."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    most = max(arguments.concurrent)
    options = ["--served-model-name", "it", "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    options += ["--max-model-len", "256", "--max-num-seqs", str(most), "--no-enable-prefix-caching"]
    options += ["--enforce-eager"] if arguments.eager else []
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    own |= {"OMP_NUM_THREADS": str(arguments.threads), "PYTHONPATH": str(Path(__file__).parents[2])}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_until_healthy(process, port)
            yield f"http://127.0.0.1:{port}", process.pid
        except ServerEnded as error:
            log.seek(0)
            raise SystemExit(f"{error}:\n{log.read()[-4000:]}") from error
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


class ServerEnded(Exception):
    """A server did not start."""


def wait_until_healthy(process: "subprocess.Popen[bytes]", port: int) -> None:
    """Until the server answers."""
    for _ in range(2 * START_SECONDS):
        if process.poll() is not None:
            raise ServerEnded(f"vLLM ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise ServerEnded(f"vLLM did not start in {START_SECONDS} s")


if __name__ == "__main__":
    main()
