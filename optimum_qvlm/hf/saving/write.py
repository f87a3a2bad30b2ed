"""All files of a quantized model, written into an empty folder."""

import json
import math
import stat
from pathlib import Path
from typing import Any

from optimum_qvlm.errors import CheckpointError
from optimum_qvlm.files import strict_json
from optimum_qvlm.hf.config import QVLMConfig
from optimum_qvlm.hf.format.model_config import model_config_of
from optimum_qvlm.hf.format.record import config_digest
from optimum_qvlm.hf.format.safetensors_files import read_headers
from optimum_qvlm.hf.saving.weight_files import REPORT_FILE
from optimum_qvlm.report.card import CARD_FILE, CardFacts, is_ours, render_card, title_of
from optimum_qvlm.report.figures import measured_layers, read_report
from optimum_qvlm.report.page.document import PAGE_FILE, render_page
from optimum_qvlm.report.page.picture import PICTURE_FILE, render_picture
from optimum_qvlm.report.page.reading import Reading
from optimum_qvlm.report.precision import part_rows


def write_model(
    model: Any, folder: Path, *, repo_id: str | None = None, tags: tuple[str, ...] = (), **options: Any
) -> None:
    """Weights, configuration, processor, report and card. `options` are those of transformers' saving.

    Of a model with adapters, transformers writes these alone, and so do we; in a process that is not the main one,
    it writes nothing.

    Raises:
        CheckpointError: a quantized linear was not written, a file beside the source has gone, or an adapter does not
            fit into one file.
    """
    model.hf_quantizer.name_as_written(model, original_format=options.get("save_original_format", True))
    type(model).save_pretrained(model, folder, **options)
    _open_to_readers(folder)
    if (folder / "adapter_config.json").exists() and len(list(folder.glob("*.safetensors*"))) > 1:
        raise CheckpointError(
            f"the adapter does not fit into max_shard_size={options.get('max_shard_size')!r}, and adapters are loaded "
            "from one file; give a larger one"
        )
    if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
        _add_sidecars(model, folder)
        values = _seal(folder)
        facts = _facts(model, folder, values, repo_id, (*(model.model_tags or ()), *tags))
        _draw_report(facts, folder)
        (folder / CARD_FILE).write_text(render_card(facts), encoding="utf-8")


def is_users_card(path: Path) -> bool:
    """Whether somebody wrote, or edited, the card at `path`; False where there is none."""
    if not path.is_file():
        return False
    try:
        return not is_ours(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return True


def _open_to_readers(folder: Path) -> None:
    """Give weight files the mode of any new file here: safetensors lets nobody but their owner read them."""
    usual = folder / ".mode"
    usual.touch()
    mode = stat.S_IMODE(usual.stat().st_mode)
    usual.unlink()
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _add_sidecars(model: Any, folder: Path) -> None:
    """Processor, tokenizer, templates, licence and report beside the weights, unless already written."""
    quantizer = model.hf_quantizer
    for name, sidecar in quantizer.source.sidecars().items():
        destination = folder / name
        if not destination.exists() and not (name == REPORT_FILE and quantizer.report is not None):
            destination.parent.mkdir(parents=True, exist_ok=True)
            sidecar.write(destination)
    for name, content in quantizer.processor_files.items():
        destination = folder / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(content)
    if quantizer.report is not None:
        (folder / REPORT_FILE).write_text(strict_json.dumps(quantizer.report, indent=2) + "\n", encoding="utf-8")


def _seal(folder: Path) -> dict[str, Any]:
    """Write the record of the files as they are on disk, and the digest, into config.json; returns its values.

    The index of shards gets their number of values: transformers counts those in memory, which depend on the device.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    values: dict[str, Any] = config["quantization_config"]
    values["manifest"] = read_headers(sorted(folder.glob("*.safetensors")))
    values["model_config"] = model_config_of(config)
    absent = [name for name in values["modules"] if f"{name}.weight_packed" not in values["manifest"]]
    if absent:
        raise CheckpointError(f"{absent[0]} was not written under the name that its record has")
    values["digest"] = config_digest(values)
    path.write_bytes(strict_json.as_file(config))
    for path in folder.glob("*.safetensors.index*.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["metadata"]["total_parameters"] = sum(math.prod(shape) for _, shape in values["manifest"].values())
        path.write_bytes(strict_json.as_file(index))
    return values


def _draw_report(facts: CardFacts, folder: Path) -> None:
    """The page and the picture, drawn anew on each save: nothing that somebody else drew is carried along."""
    if not facts.report:
        return
    reading = Reading(name=title_of(facts), report=facts.report, files=facts.files)
    (folder / PAGE_FILE).write_text(render_page(reading), encoding="utf-8")
    (folder / PICTURE_FILE).write_text(render_picture(reading), encoding="utf-8")


def _facts(model: Any, folder: Path, values: dict[str, Any], repo_id: str | None, tags: tuple[str, ...]) -> CardFacts:
    config = QVLMConfig.from_dict(values)
    assert isinstance(config, QVLMConfig) and config.record is not None
    path = folder / REPORT_FILE
    report = read_report(path.read_bytes()) if path.exists() else {}
    return CardFacts(
        values=values,
        rows=part_rows(config.record.modules, values["manifest"], measured_layers(report)),
        report=report,
        sees_images=hasattr(model.config, "vision_config"),
        repo=repo_id,
        files={file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))},
        inherited=model.hf_quantizer.source.card_metadata(),
        tags=tags,
    )
