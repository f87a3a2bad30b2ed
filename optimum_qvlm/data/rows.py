"""Records of a dataset, read one at a time, and which of them are drawn."""

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

from optimum_qvlm.data.recipe import Preset
from optimum_qvlm.errors import DataError


class LazyRows(Sequence[Any]):
    """Rows that are made when they are asked for."""

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[dict[str, Any]]: ...
    def __getitem__(self, place: int | slice) -> Any:
        """The row at `place`, or those of a slice."""
        if isinstance(place, slice):
            return [self._row(number) for number in range(*place.indices(len(self)))]
        return self._row(place)

    @abstractmethod
    def _row(self, place: int) -> dict[str, Any]:
        """The row at `place`."""


class Rows(LazyRows):
    """Rows of a `datasets.Dataset`; images are left as the file's bytes or path, to be decoded when they are used."""

    def __init__(self, dataset: Any) -> None:
        self._rows = dataset
        self._features: Any = None
        if dataset.format["type"] is None:
            self._rows = dataset.with_format("arrow", columns=dataset.format["columns"])
            self._features = _without_decoding(dataset.features)

    def __len__(self) -> int:
        return len(self._rows)

    def _row(self, place: int) -> dict[str, Any]:
        """A format that the user chose, as torch tensors or a transform, stays."""
        row = self._rows[place]
        record: dict[str, Any] = row if self._features is None else self._features.decode_example(row.to_pylist()[0])
        return record


class PresetRows(LazyRows):
    """Rows of a preset's dataset as records with question, answer and image; those without image are left out."""

    def __init__(self, dataset: Any, preset: Preset) -> None:
        self._preset = preset
        self._rows = Rows(dataset)
        self._places: Sequence[int] = range(len(dataset))
        if preset.image is not None:
            absent = dataset.data.column(preset.image).is_null().to_pylist()
            self._places = [place for place, is_absent in enumerate(absent) if not is_absent]

    def __len__(self) -> int:
        return len(self._places)

    def _row(self, place: int) -> dict[str, Any]:
        row, preset = self._rows[self._places[place]], self._preset
        answer = row[preset.answer]
        record = {
            "question": row[preset.question],
            "answer": answer if preset.choices is None else row[preset.choices][answer],
        }
        return record if preset.image is None else record | {"image": row[preset.image]}


def download(preset: Preset) -> PresetRows:
    """The records of a preset.

    Raises:
        DataError: the library is missing, or the dataset cannot be loaded or has other columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("a preset needs the datasets library: pip install 'optimum-qvlm[datasets]'") from error
    try:
        rows = datasets.load_dataset(preset.path, preset.name, split=preset.split, revision=preset.revision)
        columns = {preset.question, preset.answer, preset.image, preset.choices} - {None}
        missing = columns - set(rows.column_names)
        if missing:
            raise ValueError(f"it has no column {', '.join(sorted(map(str, missing)))}")
    except (OSError, ValueError) as error:
        raise DataError(
            f"the preset's dataset {preset.path} could not be loaded ({error}); check the connection, or pass your own "
            "samples as dataset"
        ) from error
    return PresetRows(rows, preset)


def draw(count: int, taken: int, seed: int) -> list[int]:
    """The places of `taken` of `count` records, in order; all where there are no more."""
    if count <= taken:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), taken))


def draw_others(count: int, drawn: Sequence[int], taken: int, seed: int) -> list[int]:
    """The places of at most `taken` of those records that are not in `drawn`, which is in order."""
    left = count - len(drawn)
    return [_without(place, drawn) for place in draw(left, min(taken, left), seed)]


def _without(number: int, drawn: Sequence[int]) -> int:
    """The place of the record that is number `number` among those not in `drawn`."""
    for place in drawn:
        if place > number:
            break
        number += 1
    return number


def _without_decoding(feature: Any) -> Any:
    """A feature of the datasets library, or several, whose images stay files. Images of one mode are converted by the
    library when it decodes them, so they still are."""
    import datasets

    if isinstance(feature, datasets.Image):
        return replace(feature, decode=False) if feature.mode is None else feature
    if isinstance(feature, dict):
        return type(feature)({name: _without_decoding(inner) for name, inner in feature.items()})
    if isinstance(feature, list | tuple):
        return type(feature)(_without_decoding(inner) for inner in feature)
    inner = getattr(feature, "feature", None)
    return feature if inner is None else replace(feature, feature=_without_decoding(inner))
