"""Questions about grids of handwritten digits, with pictures and answers.

The digits are scikit-learn's `load_digits` (1,797 scans of 8x8 pixels). They are split once, by class and
with a fixed seed, into a part for training and calibration and a held-out part: a held-out picture shows
no scan that a training picture shows.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SPLITS = ("train", "heldout")
IMAGE_SIZE = 48
LAYOUTS = ((2, 2), (2, 3), (3, 2), (3, 3))
EMPTY_SHARE = 0.2
HELDOUT_SHARE = 0.2
SPLIT_SEED = 2024

# Per palette: paper, ink, and the lines between the cells, as RGB.
PALETTES = np.array(
    [
        [[20, 20, 28], [240, 240, 235], [70, 70, 90]],
        [[245, 243, 235], [25, 25, 35], [190, 185, 170]],
        [[14, 42, 71], [255, 209, 102], [44, 82, 121]],
        [[255, 244, 214], [150, 28, 40], [214, 190, 150]],
        [[222, 240, 226], [12, 84, 56], [160, 196, 172]],
        [[58, 18, 66], [170, 235, 245], [102, 58, 112]],
    ],
    dtype=np.int64,
)

Cells = list[list[int | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which scans stand where: `scans` is row by row, -1 for an empty cell."""

    rows: int
    columns: int
    scans: tuple[int, ...]
    palette: int

    def cells(self, labels: np.ndarray) -> Cells:
        """The digits shown, row by row; None where the cell is empty."""
        digits = [int(labels[scan]) if scan >= 0 else None for scan in self.scans]
        return [digits[row * self.columns : (row + 1) * self.columns] for row in range(self.rows)]


@cache
def load_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Scans [count, 8, 8] with values 0..16, and their labels [count], of "train" or "heldout"."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} does not exist; use one of {', '.join(SPLITS)}")
    digits = load_digits()
    train, heldout = train_test_split(
        np.arange(len(digits.target)),
        test_size=HELDOUT_SHARE,
        random_state=SPLIT_SEED,
        stratify=digits.target,
    )
    chosen = np.sort(train if split == "train" else heldout)
    return digits.images[chosen].astype(np.uint8), digits.target[chosen].astype(np.int64)


def cell_side(rows: int, columns: int) -> int:
    """Pixels along one side of a cell, its one-pixel border included."""
    return IMAGE_SIZE // max(rows, columns)


@cache
def enlarged_scans(split: str, side: int) -> np.ndarray:
    """Ink share 0..255 of every scan, enlarged to [count, side, side] by bicubic interpolation."""
    scans, _ = load_split(split)
    ink = np.round(scans.astype(np.float64) * (255 / 16)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC)) for scan in ink])


def render(grid: Grid, split: str) -> Image.Image:
    """Draws the grid, centred, as an RGB picture of IMAGE_SIZE x IMAGE_SIZE pixels."""
    side = cell_side(grid.rows, grid.columns)
    table = enlarged_scans(split, side - 2)
    paper, ink, lines = PALETTES[grid.palette]
    picture = np.broadcast_to(lines, (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    top = (IMAGE_SIZE - grid.rows * side) // 2 + 1
    left = (IMAGE_SIZE - grid.columns * side) // 2 + 1
    for place, scan in enumerate(grid.scans):
        share = table[scan].astype(np.int64) if scan >= 0 else np.zeros((side - 2, side - 2), dtype=np.int64)
        row, column = divmod(place, grid.columns)
        y, x = top + row * side, left + column * side
        picture[y : y + side - 2, x : x + side - 2] = blend(paper, ink, share[..., None])
    return Image.fromarray(picture.astype(np.uint8))


def blend(paper: Any, ink: Any, share: Any) -> Any:
    """Integer mix of two colours; `share` of the ink is 0..255. Works on arrays and on tensors alike."""
    return (paper * (255 - share) + ink * share + 127) // 255


def draw_grid(scan_count: int, rng: random.Random, layout: tuple[int, int] | None = None) -> Grid:
    """Random scans in the layout (rows, columns), a random one if None; at least one cell is filled."""
    rows, columns = rng.choice(LAYOUTS) if layout is None else layout
    places = rows * columns
    scans = [rng.randrange(scan_count) if rng.random() >= EMPTY_SHARE else -1 for _ in range(places)]
    if max(scans) < 0:
        scans[rng.randrange(places)] = rng.randrange(scan_count)
    return Grid(rows=rows, columns=columns, scans=tuple(scans), palette=rng.randrange(len(PALETTES)))


def _digits(cells: Cells) -> list[int]:
    return [digit for row in cells for digit in row if digit is not None]


def _position(cells: Cells, rng: random.Random) -> tuple[int, int]:
    return rng.randrange(len(cells)), rng.randrange(len(cells[0]))


def _digit_at(cells: Cells, rng: random.Random) -> tuple[str, str]:
    row, column = _position(cells, rng)
    phrase = rng.choice(("What digit is at {}?", "Which digit do you see at {}?"))
    digit = cells[row][column]
    return phrase.format(f"row {row + 1} column {column + 1}"), "none" if digit is None else str(digit)


def _how_many(cells: Cells, rng: random.Random) -> tuple[str, str]:
    phrase = rng.choice(("How many digits are there?", "Count the digits."))
    return phrase, str(len(_digits(cells)))


def _asked_digit(cells: Cells, rng: random.Random) -> int:
    """Half the time a digit that is there, else any."""
    return rng.choice(_digits(cells)) if rng.random() < 0.5 else rng.randrange(10)


def _count_of(cells: Cells, rng: random.Random) -> tuple[str, str]:
    digit = _asked_digit(cells, rng)
    phrase = rng.choice(("How many times does {} occur?", "How often do you see the digit {}?"))
    return phrase.format(digit), str(_digits(cells).count(digit))


def _is_there(cells: Cells, rng: random.Random) -> tuple[str, str]:
    digit = _asked_digit(cells, rng)
    phrase = rng.choice(("Is there a {}?", "Does the digit {} occur?"))
    return phrase.format(digit), "yes" if digit in _digits(cells) else "no"


def _largest(cells: Cells, rng: random.Random) -> tuple[str, str]:
    phrase = rng.choice(("Which digit is the largest?", "What is the largest digit?"))
    return phrase, str(max(_digits(cells)))


def _smallest(cells: Cells, rng: random.Random) -> tuple[str, str]:
    phrase = rng.choice(("Which digit is the smallest?", "What is the smallest digit?"))
    return phrase, str(min(_digits(cells)))


def _row_sum(cells: Cells, rng: random.Random) -> tuple[str, str]:
    row = rng.randrange(len(cells))
    phrase = rng.choice(("What is the sum of row {}?", "Add up the digits of row {}."))
    return phrase.format(row + 1), str(sum(digit for digit in cells[row] if digit is not None))


def _pair_sum(cells: Cells, rng: random.Random) -> tuple[str, str]:
    places = [_position(cells, rng), _position(cells, rng)]
    words = [f"row {row + 1} column {column + 1}" for row, column in places]
    total = sum(cells[row][column] or 0 for row, column in places)
    return f"What is the sum of {words[0]} and {words[1]}?", str(total)


def _read_row(cells: Cells, rng: random.Random) -> tuple[str, str]:
    row = rng.randrange(len(cells))
    phrase = rng.choice(("Read row {}.", "Which digits are in row {}?"))
    digits = [str(digit) for digit in cells[row] if digit is not None]
    return phrase.format(row + 1), " ".join(digits) if digits else "none"


def _where(cells: Cells, rng: random.Random) -> tuple[str, str] | None:
    digits = _digits(cells)
    unique = [digit for digit in digits if digits.count(digit) == 1]
    if not unique:
        return None
    digit = rng.choice(unique)
    row, column = next((r, line.index(digit)) for r, line in enumerate(cells) if digit in line)
    phrase = rng.choice(("Where is the {}?", "Where do you see the digit {}?"))
    return phrase.format(digit), f"row {row + 1} column {column + 1}"


Ask = Callable[[Cells, random.Random], tuple[str, str] | None]
KINDS: dict[str, Ask] = {
    "digit_at": _digit_at,
    "how_many": _how_many,
    "count_of": _count_of,
    "is_there": _is_there,
    "largest": _largest,
    "smallest": _smallest,
    "row_sum": _row_sum,
    "pair_sum": _pair_sum,
    "read_row": _read_row,
    "where": _where,
}


def ask(cells: Cells, rng: random.Random) -> tuple[str, str, str]:
    """A random question about the cells, its answer, and its kind."""
    while True:
        kind = rng.choice(tuple(KINDS))
        asked = KINDS[kind](cells, rng)
        if asked is not None:
            return *asked, kind


def make_samples(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Samples with the keys image (PIL, RGB), question, answer and kind.

    The same arguments give the same samples. Use "train" to calibrate and "heldout" to evaluate.
    """
    _, labels = load_split(split)
    rng = random.Random(f"{split}-{seed}")
    samples = []
    for _ in range(count):
        grid = draw_grid(len(labels), rng)
        question, answer, kind = ask(grid.cells(labels), rng)
        samples.append({"image": render(grid, split), "question": question, "answer": answer, "kind": kind})
    return samples
