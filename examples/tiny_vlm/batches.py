"""Training batches of constant shape: questions drawn on the CPU, pictures painted on the device."""

import random
from typing import Any

import numpy as np
import torch
from distortion import distort
from questions import (
    IMAGE_SIZE,
    LAYOUTS,
    PALETTES,
    Grid,
    ask,
    blend,
    cell_side,
    draw_grid,
    enlarged_scans,
    load_split,
)
from torch import Tensor
from torch.utils.data import Dataset

TOKENS = 64
PLACES = max(rows * columns for rows, columns in LAYOUTS)
IGNORED = -100


class GridBatches(Dataset[dict[str, Tensor]]):
    """Batch `index` is the same whenever it is drawn: it has its own generator.

    A batch has as many grids of each layout, in the order of LAYOUTS: `scans` [batch, PLACES], -1 where
    there is none, `palettes` [batch], and `input_ids` and `labels` [batch, TOKENS], padded on the right.
    """

    def __init__(self, processor: Any, *, batch_size: int, batches: int, seed: int) -> None:
        if batch_size < 1 or batch_size % len(LAYOUTS):
            raise ValueError(f"batch_size must be a positive multiple of {len(LAYOUTS)}, got {batch_size}")
        self.processor = processor
        self.layouts = [layout for layout in LAYOUTS for _ in range(batch_size // len(LAYOUTS))]
        self.batches = batches
        self.seed = seed
        self.labels = load_split("train")[1]
        self._prompts: dict[str, list[int]] = {}
        self._answers: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = random.Random(f"{self.seed}-{index}")
        grids = [draw_grid(len(self.labels), rng, layout) for layout in self.layouts]
        texts = []
        for grid in grids:
            question, answer, _ = ask(grid.cells(self.labels), rng)
            texts.append((self._prompt(question), self._answer(answer)))
        return {**pack_grids(grids), **self._pack_texts(texts)}

    def _prompt(self, question: str) -> list[int]:
        if question not in self._prompts:
            self._prompts[question] = prompt_tokens(self.processor, question)
        return self._prompts[question]

    def _answer(self, answer: str) -> list[int]:
        if answer not in self._answers:
            tokenizer = self.processor.tokenizer
            encoded = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)
            self._answers[answer] = encoded["input_ids"]
        return self._answers[answer]

    def _pack_texts(self, texts: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        ids = np.full((len(texts), TOKENS), self.processor.tokenizer.pad_token_id, dtype=np.int64)
        labels = np.full_like(ids, IGNORED)
        for line, (prompt, answer) in enumerate(texts):
            end = len(prompt) + len(answer)
            ids[line, :end] = prompt + answer
            labels[line, len(prompt) : end] = answer
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def prompt_tokens(processor: Any, question: str) -> list[int]:
    """Tokens of the chat that asks `question` about one picture, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    places = (IMAGE_SIZE // processor.patch_size) ** 2
    text = text.replace(processor.image_token, processor.image_token * places)
    tokens: list[int] = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def pack_grids(grids: list[Grid]) -> dict[str, Tensor]:
    """Scans [batch, PLACES], -1 where there is none, and palette numbers [batch]."""
    scans = np.full((len(grids), PLACES), -1, dtype=np.int64)
    for line, grid in enumerate(grids):
        scans[line, : len(grid.scans)] = grid.scans
    return {"scans": torch.from_numpy(scans), "palettes": torch.tensor([grid.palette for grid in grids])}


class Painter:
    """Paints packed grids of training digits on a device, without ever waiting for it.

    Undistorted, it gives what the processor makes of `questions.render`, within fp32 rounding. Random
    numbers come from the device's global generator.
    """

    def __init__(self, processor: Any, device: torch.device) -> None:
        sides = sorted({cell_side(*layout) - 2 for layout in LAYOUTS})
        tables = {side: torch.from_numpy(enlarged_scans("train", side)) for side in sides}
        self.tables = {side: table.to(device).float() for side, table in tables.items()}
        self.palettes = torch.from_numpy(PALETTES).to(device)
        self.labels = torch.from_numpy(load_split("train")[1]).to(device)
        self.by_class = torch.argsort(self.labels, stable=True)
        self.class_size = torch.bincount(self.labels)
        self.class_start = self.class_size.cumsum(0) - self.class_size
        images = processor.image_processor
        self.mean = torch.tensor(images.image_mean, device=device)[:, None, None]
        self.std = torch.tensor(images.image_std, device=device)[:, None, None]

    def paint(self, scans: Tensor, palettes: Tensor, *, distorted: bool) -> Tensor:
        """Pixel values [batch, 3, height, width] of a batch with equal parts per layout."""
        parts = []
        chunks = zip(LAYOUTS, scans.chunk(len(LAYOUTS)), palettes.chunk(len(LAYOUTS)), strict=True)
        for (rows, columns), part, colours in chunks:
            side = cell_side(rows, columns) - 2
            shares = self._shares(part[:, : rows * columns], side, distorted=distorted)
            parts.append(self._compose(shares.unflatten(1, (rows, columns)), self.palettes[colours]))
        values = torch.cat(parts).float()
        if distorted:
            level = torch.rand(len(values), 1, 1, 1, device=values.device) ** 2 * 12
            values = (values + torch.randn_like(values) * level).clamp(0, 255)
        return (values / 255 - self.mean) / self.std

    def _shares(self, scans: Tensor, side: int, *, distorted: bool) -> Tensor:
        """Ink shares [batch, places, side, side], int64 in 0..255."""
        table, filled = self.tables[side], scans.clamp(min=0).flatten()
        ink = table[filled]
        if distorted:
            changed = distort(self._mixed(ink, filled, table))
            kept = torch.rand(len(ink), 1, 1, device=ink.device) < 0.2
            ink = torch.where(kept, ink, changed)
        ink = ink.unflatten(0, scans.shape) * (scans >= 0)[..., None, None]
        rounded: Tensor = ink.round().clamp(0, 255).long()
        return rounded

    def _mixed(self, ink: Tensor, scans: Tensor, table: Tensor) -> Tensor:
        """A third of the digits become a blend with another scan of the same digit."""
        draw = torch.rand(3, len(scans), device=ink.device)
        labels = self.labels[scans]
        other = self.by_class[self.class_start[labels] + (draw[0] * self.class_size[labels]).long()]
        share = torch.where(draw[1] < 1 / 3, draw[2] * 0.5, 0.0)[:, None, None]
        return ink + share * (table[other] - ink)

    def _compose(self, shares: Tensor, colours: Tensor) -> Tensor:
        """Pictures [batch, 3, height, width], int64 in 0..255, from colours [batch, 3 roles, 3]."""
        batch, rows, columns, side, _ = shares.shape
        paper, ink, lines = colours[..., None, None, None, None].unbind(1)
        cells = lines.expand(-1, -1, rows, columns, side + 2, side + 2).clone()
        cells[..., 1:-1, 1:-1] = blend(paper, ink, shares[:, None])
        height, width = rows * (side + 2), columns * (side + 2)
        top, left = (IMAGE_SIZE - height) // 2, (IMAGE_SIZE - width) // 2
        picture = lines[..., 0, 0].expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE).clone()
        grid = cells.transpose(3, 4).reshape(batch, 3, height, width)
        picture[:, :, top : top + height, left : left + width] = grid
        return picture
