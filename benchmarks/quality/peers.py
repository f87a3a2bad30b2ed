"""Weight-only 4 bits by other libraries and by this one: the same model, the same samples, the same evaluation.

    python -m benchmarks.quality.peers --json peers.json

The peers are installed into an environment of their own (`--environment`, made where it is missing), since they ask
for other releases of transformers than this project. The model is SmolLM2-135M as `smollm2.py` writes it, calibrated
on 16 chunks of 512 tokens and compared on 16 others. Everything runs on one thread unless told otherwise; AutoRound
takes hours then, the rest minutes. Our own rows share a process with full precision, so their peak memory is at least
that of its logits, and their time holds the loading of the model, which that of the peers does not.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks import smollm2
from benchmarks.measures import perplexity
from benchmarks.quality import texts
from optimum_qvlm import QVLMConfig, __version__
from optimum_qvlm.evaluation.fidelity import answer_logits

RUNNER = Path(__file__).parent / "peer_runner.py"
PEERS = ("hqq", "awq", "gptq", "autoround-light", "autoround")
PACKAGES = ("llmcompressor", "auto-round", "hqq")
OURS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "qvlm fast": {"effort": "fast"},
    "qvlm": {},
    "qvlm zero point": {"symmetric": False},
}
HEADER = f"{'method':16} {'perplexity':>10} {'ratio':>8} {'seconds':>9} {'processor':>9} {'peak GiB':>8}  version"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--ours", nargs="*", choices=tuple(OURS), default=list(OURS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--text", choices=list(texts.TEXTS), default="topics")
    parser.add_argument("--texts", type=Path, default=texts.FOLDER, help="folder with the Debian packages of texts")
    parser.add_argument("--seed", type=int, default=0, help="of the chunks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where the work is done")
    parser.add_argument("--environment", type=Path, default=Path(".venv-peers"))
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    results: dict[str, dict[str, Any]] = {}
    print(HEADER)
    with tempfile.TemporaryDirectory() as scratch:
        for name, result in rows(arguments, Path(scratch)):
            results[name] = result | {"ratio": result["perplexity"] / results.get("full", result)["perplexity"]}
            print(line(name, results[name]), flush=True)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(results, indent=1))


def rows(arguments: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Full precision, ours, then the peers, each as soon as it is known."""
    folder = smollm2.write_checkpoint(scratch / "model")
    text = texts.chunked(folder, arguments.text, folder=arguments.texts).draw(seed=arguments.seed)
    full = AutoModelForCausalLM.from_pretrained(folder, device_map=arguments.device)
    yield "full", {"perplexity": perplexity(answer_logits(full, text.held_out), text.held_out)}
    del full
    for name in arguments.ours:
        yield name, own_result(folder, text, OURS[name], arguments)
    if not arguments.peers:
        return
    written = scratch / "text.safetensors"
    chunks = {"calibration": text.calibration, "held_out": text.held_out}
    save_file({part: torch.cat([batch["input_ids"] for batch in batches]) for part, batches in chunks.items()}, written)
    python = peer_environment(arguments.environment)
    for name in arguments.peers:
        yield name, peer_result(python, name, folder, written, arguments)


def own_result(
    folder: Path, text: texts.Text, settings: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One run of this library."""
    config = QVLMConfig(
        f"w{arguments.bits}a16",
        group_size=arguments.group,
        dataset=None if settings.get("method") == "rtn" else text.calibration,
        num_samples=len(text.calibration),
        **settings,
    )
    started, processor = time.perf_counter(), time.process_time()
    options = {"quantization_config": config, "device_map": arguments.device}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - processor,
        "perplexity": perplexity(answer_logits(model, text.held_out), text.held_out),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "version": f"optimum-qvlm {__version__}",
    }


def peer_environment(folder: Path) -> Path:
    """The interpreter of the peers' environment, which is made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for packages in ([f"torch=={torch.__version__.partition('+')[0]}"], PACKAGES):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def peer_result(python: Path, name: str, folder: Path, text: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of a peer, in a process of its own.

    Raises:
        SystemExit: the peer failed, with the end of what it printed, or left linears as they were.
    """
    command = [python, "-P", RUNNER, name, folder, text, "--device", arguments.device]
    command += ["--bits", str(arguments.bits), "--group", str(arguments.group)]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if result["unchanged"]:
        raise SystemExit(f"{name} left {result['unchanged']} linears as they were")
    return result


def line(name: str, result: dict[str, Any]) -> str:
    """One row of the table."""
    seconds, processor = result.get("seconds"), result.get("processor_seconds")
    times = " " * 28 if seconds is None else f"{seconds:9.0f} {processor:9.0f} {result['peak_bytes'] / 2**30:8.2f}"
    return f"{name:16} {result['perplexity']:10.4f} {result['ratio']:8.4f} {times}  {result.get('version', '')}"


if __name__ == "__main__":
    main()
