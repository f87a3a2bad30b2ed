"""The comparison of schemes and methods, from the command to its table, with a tiny model in place of the small one."""

import gzip
import json
import random
import sys

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import smollm2
from benchmarks.quality import schemes
from benchmarks.shapes import llama, model_of
from tests.benchmarks.quality.packages import write_package


@pytest.fixture
def tiny(monkeypatch, bundled_folder):
    """What is written where the weights of a package would be."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)

    def write(folder):
        model_of(llama(64, 128, 2, 2, 1, len(tokenizer)), None, torch.float32, "cpu").save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    monkeypatch.setattr(smollm2, "write_checkpoint", write)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["schemes", "--model", "smollm2", *arguments])
    schemes.main()


def test_a_table_on_another_text(tiny, monkeypatch, capsys, tmp_path):
    """Both methods on the same chunks, each figure with an interval, the second beside the first."""
    file, words = tmp_path / "results.json", random.Random(0)
    story = "\n\n".join(" ".join(words.choices(["red", "circle", "left", "of", "blue"], k=60)) for _ in range(500))
    content = {"usr/share/doc/jargon-text/jargon.txt.gz": gzip.compress(story.encode())}
    write_package(tmp_path / "jargon-text_9-1_all.deb", content)
    asked = "--text prose --schemes w4a8 --methods rtn qvlm-effort --seeds 2 --held-out 3".split()

    run(monkeypatch, *asked, "--texts", str(tmp_path), "--json", str(file))

    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("w4a8 ") and ".." in line]
    assert lines[0].startswith("prose: the Jargon File, ") and "; jargon-text 9-1, sha256 " in lines[0]
    assert [line.split()[1] for line in table] == ["rtn", "qvlm-effort"]
    assert [line.count("..") for line in table] == [2, 3]
    single = json.loads(file.read_text())
    assert len(single) == 4 and all(len(one["rows"]["kl"]) == 3 for one in single)
    assert all(one["rows"]["number"] == single[2 * (n // 2)]["rows"]["number"] for n, one in enumerate(single))
    kl = [sum(one["rows"]["kl"]) for one in single]
    first, second = (sum(kl[number::2]) / (6 * 511) for number in (0, 1))
    assert f"{first:.5f} (" in table[0] and f"{second:.5f} (" in table[1] and f"{second / first:.3f} (" in table[1]


def test_an_unknown_ingredient_is_refused(tiny, monkeypatch):
    with pytest.raises(SystemExit, match="'lattice' is no ingredient; use one of transforms"):
        run(monkeypatch, "--methods", "qvlm-lattice")


def test_without_data_of_its_own_a_method_gets_the_packaged_samples(tmp_path):
    """Round-to-nearest gets none, and is not told how many."""
    batches = [{"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.ones(2, 4)}]
    case = schemes.Case("smollm2", tmp_path, None, batches, [], torch.arange(0), 2, batches, {"group_size": 64})

    own, packaged, none = (
        schemes.configure("w4a8", schemes.method_settings(name), case, 3) for name in ("qvlm", "qvlm-data", "rtn")
    )

    assert (own.dataset, own.num_samples, own.seed, own.group_size) == (batches, 2, 3, 64)
    assert (packaged.dataset, none.dataset) == (None, None)
    assert none.num_samples == type(none)("w4a8", method="rtn").num_samples
