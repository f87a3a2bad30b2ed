"""Names of the weight files that one save writes, and of those that it takes the place of."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from optimum_qvlm.files.atomic import NOTHING
from optimum_qvlm.report.page.document import PAGE_FILE
from optimum_qvlm.report.page.picture import PICTURE_FILE

REPORT_FILE = "qvlm_report.json"

REPORT_FILES = (REPORT_FILE, PAGE_FILE, PICTURE_FILE)
"""The report, and what is drawn from it on each save."""

SHARD = r"(?:-\d{5}-of-\d{5})?"
GENERATION = re.compile(
    rf"(?P<stem>model(?:\.[^/\\]+)?)\.qvlm-[0-9a-f]{{8}}(?P<rest>{SHARD}\.safetensors(\.index\.json)?)"
)
"""Names that weight files have as long as their usual ones may be another model's."""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Of a whole model, or of one of its variants."""

    variant: str | None = None

    @property
    def stem(self) -> str:
        """What all names begin with."""
        return "model" if self.variant is None else f"model.{self.variant}"

    @property
    def index(self) -> str:
        """Name of the index of shards."""
        return (
            "model.safetensors.index.json" if self.variant is None else f"model.safetensors.index.{self.variant}.json"
        )

    @property
    def pattern(self) -> re.Pattern[str]:
        """Names that any save of this kind may have written, whole or half."""
        weights = rf"{re.escape(self.stem)}(?:\.qvlm-[0-9a-f]{{8}})?{SHARD}\.safetensors"
        return re.compile(rf"{weights}|{re.escape(self.index)}|{weights}\.index\.json")

    def in_generation(self, name: str, mark: str) -> str:
        """The name that a usual one has in the generation `mark`, eight hexadecimal digits."""
        rest = ".safetensors.index.json" if name == self.index else name.removeprefix(self.stem)
        return f"{self.stem}.qvlm-{mark}{rest}"

    def usual(self, name: str) -> str:
        """The usual name for one of a generation."""
        match = GENERATION.fullmatch(name)
        assert match is not None
        return self.index if match["rest"].endswith(".json") else f"{self.stem}{match['rest']}"


def weight_files_of(name: object) -> WeightFiles | None:
    """The kind of save whose generation a file name is of; None where it is not such a name."""
    match = GENERATION.fullmatch(name) if isinstance(name, str) else None
    return None if match is None else WeightFiles(match["stem"][len("model.") :] or None)


def stale_files(names: Collection[str], variant: str | None) -> re.Pattern[str]:
    """As `stale_weights`, with the report and what is drawn from it: without a new one, the old is another model's."""
    weights = stale_weights(names, variant)
    if weights.pattern == NOTHING.pattern:
        return NOTHING
    return re.compile("|".join([weights.pattern, *map(re.escape, REPORT_FILES)]))


def stale_weights(names: Collection[str], variant: str | None) -> re.Pattern[str]:
    """Names of the weight files that a save which wrote `names` takes the place of, if they are not among them.

    Matches nothing where no whole model was written: an adapter takes no model's place.
    """
    pattern = WeightFiles(variant).pattern
    whole = "config.json" in names and any(pattern.fullmatch(name) for name in names)
    return pattern if whole else NOTHING
