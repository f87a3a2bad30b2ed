"""Whether the method does what it claims: its proxy, its partition, its encoder step. Prints tables, saves figures.

    python -m benchmarks.method.evidence proxy --models plain outlier smollm2 --output method
    python -m benchmarks.method.evidence partitions --models plain outlier smollm2 --output method
    python -m benchmarks.method.evidence ablation --models plain outlier --schemes w4a4 w6a6 --output method

proxy: the gain of searching two layers together (the discretization error difference of the paper's figure 2) against
the entropy that stands in for it, over samples and layers. Intervals draw whole samples.
partitions: final error, divergence and cost at depths 1 to 4, and at depth 3 for blocks by entropy, by error, at random
with the same sizes, and fixed.
ablation: dependency and the encoder step, alone and together, against neither.

`--quick` is a check that everything runs, not a measurement. Seconds are processor seconds on a CPU: run on one thread,
or share the work among `--workers`, which have one each. Of SmolLM2 the first 7 layers and short texts take minutes on
a CPU, all layers on a GPU.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from benchmarks.method.subjects import NAMES, Sizes, Subject
from benchmarks.method.tables import Record, ablation_table, partition_table, proxy_table

TABLES = ("proxy", "partitions", "ablation")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=TABLES)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["plain", "outlier"])
    parser.add_argument("--schemes", nargs="+", default=["w4a4"])
    parser.add_argument("--samples", type=int, default=32, help="calibration samples; of the proxy, samples searched")
    parser.add_argument("--questions", type=int, default=1000, help="held out")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds 0..N-1")
    parser.add_argument("--draws", type=int, default=3, help="random partitions per seed")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a sample of SmolLM2")
    parser.add_argument("--layers", type=int, help="quantize only the first so many of SmolLM2; default: all")
    parser.add_argument("--epochs", type=int, default=10, help="of the encoder step")
    parser.add_argument("--lr", type=float, help="of the encoder step; default: that of QVLMConfig")
    parser.add_argument("--device", default="cpu", help="where layers are searched")
    parser.add_argument("--workers", type=int, default=1, help="processes that share seeds, or samples of the proxy")
    parser.add_argument("--output", type=Path, help="folder for records and scatter plots")
    parser.add_argument("--quick", action="store_true", help="2 samples, 8 questions, 2 seeds at most, 1 epoch")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.samples, chosen.questions, chosen.seeds, chosen.draws, chosen.epochs = 2, 8, min(chosen.seeds, 2), 1, 1
        chosen.chunk = min(chosen.chunk, 32)
    logging.disable_progress_bar()
    sizes = Sizes(samples=chosen.samples, questions=chosen.questions, chunk=chosen.chunk, layers=chosen.layers)
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen.models:
            subject = Subject(name, Path(scratch), sizes, chosen.device)
            for table in chosen.tables:
                for scheme in chosen.schemes:
                    record: Record = {}
                    for line in lines_of(table, subject, scheme, chosen, record):
                        print(line, flush=True)
                    print(flush=True)
                    if chosen.output is not None:
                        save(record, chosen.output, f"{table}-{name}-{scheme}")


def lines_of(table: str, subject: Subject, scheme: str, chosen: Any, record: Record) -> Iterator[str]:
    """The lines of one table for one model and scheme."""
    if table == "proxy":
        return proxy_table(subject, scheme, chosen.samples, chosen.workers, record)
    if table == "partitions":
        return partition_table(subject, scheme, chosen.seeds, chosen.draws, chosen.workers, record)
    if subject.name == "smollm2":
        raise SystemExit("the ablation needs a model with a vision tower; choose --models plain outlier")
    encoder = {"epochs": chosen.epochs} | ({} if chosen.lr is None else {"learning_rate": chosen.lr})
    return ablation_table(subject, scheme, chosen.seeds, encoder, record)


def save(record: Record, folder: Path, name: str) -> None:
    """The numbers as JSON, and of pairs a scatter plot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    if "pairs" not in record:
        return
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for key in sorted({(p["part"], p["layer"]) for p in record["pairs"]}):
        members = [p for p in record["pairs"] if (p["part"], p["layer"]) == key]
        axes.scatter(
            [p["H(next | layer)"] for p in members], [p["gain"] for p in members], s=14, label=f"{key[0]} {key[1]}"
        )
    axes.set_xlabel("conditional entropy of the pair, nats")
    axes.set_ylabel("error before minus after the joint search")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(folder / f"{name}.svg", bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
