"""Texts of unlike kinds that methods are compared on, cut in chunks of tokens.

Of every text a quarter of the chunks is kept apart: it alone may settle how the method works (`tuning`), and what is
reported comes from the rest. That rest is two halves, one to calibrate on and one to compare on. `topics` alone has one
pool for both, from which a seed draws chunks that are not shared: it is short, and its older tables were drawn so.

Debian's packages are looked for as files (`manpages_6.03-2_all.deb`) in a folder, and downloaded into it by `apt-get`
where they are missing. Another release of a package or of Python is another text: `described` says which one it is.
"""

import gzip
import io
import platform
import pydoc_data.topics
import re
import shutil
import subprocess
import sysconfig
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from optimum_qvlm.data.loader import Batch
from optimum_qvlm.errors import DataError

FOLDER = Path(".texts")
TUNING_SEED = 100
"""Which quarter of a text is for tuning."""

PROSE_CHARACTERS = 200
"""Shorter paragraphs are headings, lists of names and tables."""

MODULES = (
    "argparse ast bdb calendar codecs configparser csv dataclasses difflib enum fractions functools heapq inspect "
    "ipaddress locale mailbox pdb pickle random shutil statistics subprocess textwrap threading tokenize traceback "
    "typing uuid"
).split()
"""Of the standard library, in every Python that is supported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a text comes from.

    Attributes:
        what: what it is, for tables.
        package: the Debian package that holds it; None where every Python does.
        path: the files of the package that hold it, a regular expression.
        text: the text of files by their names, of which there are none without a package.
        halves: whether calibration and comparison have halves of their own.
    """

    what: str
    package: str | None = None
    path: str = ""
    text: Callable[[Mapping[str, str]], str]
    halves: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Batches of one chunk each, with `input_ids` [1, tokens]; no chunk is in both. `held_out` has `labels` too.

    Attributes:
        numbers: which chunks of the text `held_out` are, [chunks].
    """

    calibration: list[Batch]
    held_out: list[Batch]
    numbers: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunked:
    """A text as token ids [chunks, tokens], and the numbers of the chunks that may be drawn for each purpose."""

    chunks: Tensor
    tuning: Tensor
    calibration: Tensor
    held_out: Tensor

    def draw(
        self,
        calibration: int = 16,
        held_out: int = 16,
        *,
        seed: int = 0,
        tuning: bool = False,
        held_out_first: bool = False,
    ) -> Text:
        """Chunks to calibrate and to compare on, drawn with the seed; with `tuning` both from the tuning quarter.

        With `held_out_first` the number of calibration chunks does not change which are held out.

        Raises:
            DataError: the text has fewer chunks.
        """
        pools = (self.tuning, self.tuning) if tuning else (self.calibration, self.held_out)
        first, second = (shuffled(pool, seed) for pool in pools)
        if held_out_first:
            compared = second[:held_out]
            calibrated = [number for number in first if number not in compared][:calibration]
        else:
            calibrated = first[:calibration]
            compared = [number for number in second if number not in calibrated][:held_out]
        if len(calibrated) < calibration or len(compared) < held_out:
            raise DataError(
                f"{calibration} chunks to calibrate on and {held_out} others are more than the text has: "
                f"{len(first)} and {len(second)} of {self.chunks.shape[1]} tokens may be drawn; ask for fewer"
            )
        return Text(
            calibration=[batch_of(self.chunks[[number]]) for number in calibrated],
            held_out=[batch_of(ids) | {"labels": ids} for ids in (self.chunks[[number]] for number in compared)],
            numbers=torch.tensor(compared),
        )


def chunked(tokenizer: Path, name: str = "topics", *, folder: Path = FOLDER, tokens: int = 512) -> Chunked:
    """A text in chunks of so many tokens of a checkpoint's tokenizer, with its fixed parts."""
    encoded = AutoTokenizer.from_pretrained(tokenizer)(read(name, folder), return_tensors="pt").input_ids[0]
    chunks = encoded[: len(encoded) // tokens * tokens].reshape(-1, tokens)
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(TUNING_SEED))
    apart, rest = order[: len(chunks) // 4], order[len(chunks) // 4 :]
    halves = (rest[::2], rest[1::2]) if TEXTS[name].halves else (rest, rest)
    return Chunked(chunks=chunks, tuning=apart, calibration=halves[0], held_out=halves[1])


def shuffled(pool: Tensor, seed: int) -> list[int]:
    """The numbers of a pool in an order of the seed's."""
    numbers: list[int] = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))].tolist()
    return numbers


def batch_of(ids: Tensor) -> Batch:
    """Model inputs for token ids [rows, tokens] without padding."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def read(name: str, folder: Path = FOLDER) -> str:
    """The whole text.

    Raises:
        DataError: its Debian package is not in the folder and cannot be downloaded, or holds no such file.
    """
    source = TEXTS[name]
    return source.text({} if source.package is None else files_of(archive_of(source.package, folder), source.path))


def described(name: str, folder: Path = FOLDER) -> str:
    """What a text is, which release it comes from, and the start of its SHA-256."""
    source = TEXTS[name]
    release = f"Python {platform.python_version()}"
    if source.package is not None:
        release = " ".join(archive_of(source.package, folder).stem.replace("%3a", ":").split("_")[:2])
    return f"{name}: {source.what}; {release}, sha256 {sha256(read(name, folder).encode()).hexdigest()[:12]}"


def archive_of(package: str, folder: Path) -> Path:
    """The file of a Debian package in the folder, downloaded where it is missing.

    Raises:
        DataError: it cannot be downloaded.
    """
    there = sorted(folder.glob(f"{package}_*.deb"))
    if there:
        return there[-1]
    reason = "there is no apt-get here"
    if shutil.which("apt-get") is not None:
        folder.mkdir(parents=True, exist_ok=True)
        ran = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
        there = sorted(folder.glob(f"{package}_*.deb"))
        if there:
            return there[-1]
        reason = (ran.stderr.strip().splitlines() or ["apt-get left no file"])[-1]
    raise DataError(
        f"the Debian package {package} is not in {folder} and cannot be downloaded ({reason}); run "
        f"`apt-get download {package}` on a machine with Debian's archive, put the file there, or choose another text"
    )


def files_of(archive: Path, path: str) -> dict[str, str]:
    """Files of a Debian package whose whole path matches, unpacked and sorted by path.

    Raises:
        DataError: there is none.
    """
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(member(archive, b"data.tar"))) as tar:
        for entry in tar:
            if entry.isfile() and re.fullmatch(path, entry.name.removeprefix("./")):
                stream = tar.extractfile(entry)
                assert stream is not None
                content = stream.read()
                plain = gzip.decompress(content) if entry.name.endswith(".gz") else content
                texts[entry.name] = plain.decode("utf-8", errors="replace")
    if not texts:
        raise DataError(f"{archive} has no file {path}; another release of the package is needed")
    return dict(sorted(texts.items()))


def member(archive: Path, start: bytes) -> bytes:
    """The first member of an `ar` archive whose name starts so.

    Raises:
        DataError: there is none.
    """
    content, place = archive.read_bytes(), 8  # behind b"!<arch>\n"
    while content[:8] == b"!<arch>\n" and place + 60 <= len(content):
        name, size = content[place : place + 16], int(content[place + 48 : place + 58])
        if name.startswith(start):
            return content[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise DataError(f"{archive} is no Debian package; delete it to have it downloaded anew")


def python_source(_: Mapping[str, str]) -> str:
    """Modules of the standard library, one after another."""
    library = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join((library / f"{module}.py").read_text(encoding="utf-8") for module in MODULES)


def manual_pages(files: Mapping[str, str]) -> str:
    """The source of manual pages, with its markup and without comments, which hold licences."""
    lines = (line for page in files.values() for line in page.splitlines())
    return "\n".join(line for line in lines if not line.startswith(('.\\"', "'\\\"")))


def paragraphs(files: Mapping[str, str]) -> str:
    """Paragraphs of plain text, each on a line of its own."""
    cut = (" ".join(block.split()) for text in files.values() for block in re.split(r"\n\s*\n", text))
    return "\n\n".join(block for block in cut if len(block) >= PROSE_CHARACTERS)


TEXTS: dict[str, Source] = {
    "topics": Source(
        what="Python's own help, technical English",
        text=lambda _: "\n\n".join(pydoc_data.topics.topics.values()),
        halves=False,
    ),
    "manuals": Source(
        what="manual pages of section 7 in roff, technical prose full of markup",
        package="manpages",
        path=r"usr/share/man/man7/.*\.gz",
        text=manual_pages,
    ),
    "prose": Source(
        what="the Jargon File, paragraphs of everyday English about people and machines",
        package="jargon-text",
        path=r"usr/share/doc/jargon-text/jargon\.txt\.gz",
        text=paragraphs,
    ),
    "python": Source(what="modules of Python's standard library, source code", text=python_source),
}
