"""The model card of a quantized model: README.md, rendered from what is saved beside it."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from optimum_qvlm.report.figures import (
    fidelity_figures,
    folded_norms,
    generation_figures,
    kept_names,
    memory_bytes,
    state_figures,
)
from optimum_qvlm.report.page.document import PAGE_FILE
from optimum_qvlm.report.page.picture import PICTURE_FILE
from optimum_qvlm.report.precision import (
    PartRow,
    bytes_of_modules,
    readable_activation,
    readable_bytes,
    readable_scales,
    tensor_bytes,
)

CARD_FILE = "README.md"
SEAL = re.compile(r"\n<!-- written by optimum-qvlm, replaced on the next save unless edited: ([0-9a-f]{64}) -->\n\Z")
AUTO_CLASSES = {True: "AutoModelForImageTextToText", False: "AutoModelForCausalLM"}
IMAGE_PROMPT = """\
content = [{"type": "image", "path": "street.jpg"}, {"type": "text", "text": "What is in the picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, dtype=model.dtype)
"""
TEXT_PROMPT = 'inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)\n'
"""A question in the card's code: chat templates are usual for models that see images, and not for others."""

KEPT_METADATA = ("license", "license_name", "license_link", "language")
"""What a card takes over from that of the model which was quantized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a card says.

    Attributes:
        values: `quantization_config` as saved.
        rows: precision per part.
        report: content of `qvlm_report.json`, empty where there is none.
        sees_images: whether the model takes images.
        repo: name on the Hub, None for a folder.
        files: bytes of each weight file by name.
        inherited: metadata of the source's own card.
        tags: more tags, from the user.
    """

    values: Mapping[str, Any]
    rows: list[PartRow]
    report: Mapping[str, Any] = field(default_factory=dict)
    sees_images: bool = True
    repo: str | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    inherited: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()


def render_card(facts: CardFacts) -> str:
    """The whole text, sealed with its own hash so that a later edit shows."""
    sections = [_heading(facts), _loading(facts), _precision(facts), _fidelity(facts.report), _calibration(facts)]
    metadata = yaml.safe_dump(_metadata(facts), sort_keys=False, allow_unicode=True)
    return seal(f"---\n{metadata}---\n\n" + "\n".join(section for section in sections if section))


def seal(text: str) -> str:
    """`text` with a last line by which `is_ours` knows it."""
    return f"{text}\n<!-- written by optimum-qvlm, replaced on the next save unless edited: {_digest(text)} -->\n"


def is_ours(text: str) -> bool:
    """Whether a card was rendered here and not touched since; any other belongs to its author."""
    text = text.replace("\r\n", "\n")
    found = SEAL.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def read_metadata(text: str) -> dict[str, Any]:
    """The YAML block at the top of a card; empty where there is none that can be read."""
    found = re.match(r"---\n(.*?)\n---\s*(\n|\Z)", text.replace("\r\n", "\n"), flags=re.DOTALL)
    if found is None:
        return {}
    try:
        values = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _base(facts: CardFacts) -> str | None:
    found = facts.values.get("calibration", {}).get("base_model")
    return None if found is None else str(found)


def _scheme(facts: CardFacts) -> str:
    return str(facts.values["scheme"])


def _metadata(facts: CardFacts) -> dict[str, Any]:
    base = _base(facts)
    found: dict[str, Any] = {name: facts.inherited[name] for name in KEPT_METADATA if name in facts.inherited}
    if base is not None:
        found |= {"base_model": base, "base_model_relation": "quantized"}
    bits = facts.values["scheme"].partition("a")[0].removeprefix("w")
    own = ["qvlm", "optimum-qvlm", "quantized", _scheme(facts), f"{bits}-bit"]
    return found | {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if facts.sees_images else "text-generation",
        "tags": list(dict.fromkeys([*own, *facts.tags])),
    }


def title_of(facts: CardFacts) -> str:
    """What the model is called: its repository, or its source and scheme."""
    if facts.repo is not None and facts.repo.rpartition("/")[2]:
        return facts.repo.rpartition("/")[2]
    base = _base(facts)
    return f"{base.rpartition('/')[2] if base else 'Quantized model'}, {_scheme(facts)}"


def _heading(facts: CardFacts) -> str:
    base = _base(facts)
    source = f"[{base}](https://huggingface.co/{base})" if base else "A model"
    vision = facts.values.get("vision_scheme")
    if facts.sees_images:
        tower = "kept in full precision" if vision is None else f"at {vision}"
        parts = f"the language model at {_scheme(facts)}, vision tower and projector {tower}"
    else:
        parts = f"at {_scheme(facts)}"
    package = "[optimum-qvlm](https://pypi.org/project/optimum-qvlm/)"
    return (
        f"# {title_of(facts)}\n\n{source} quantized with {package}: {parts}. "
        "`w4a8` reads: weights in 4 bits, activations in 8.\n" + _picture(facts)
    )


def _picture(facts: CardFacts) -> str:
    """Of the report that is saved beside the card; none without a report."""
    if not facts.report:
        return ""
    return (
        f"\n![Sizes, closeness to full precision, and precision of every linear]({PICTURE_FILE})\n\n"
        f"All figures: [`{PAGE_FILE}`]({PAGE_FILE}), a page to download and open in a browser.\n"
    )


def _loading(facts: CardFacts) -> str:
    auto_class, where = AUTO_CLASSES[facts.sees_images], facts.repo or "PATH"
    reader = "AutoProcessor" if facts.sees_images else "AutoTokenizer"
    variable = "processor" if facts.sees_images else "tokenizer"
    asked = IMAGE_PROMPT if facts.sees_images else TEXT_PROMPT
    return (
        "## How to use\n\n```bash\npip install optimum-qvlm\n```\n\n```python\n"
        "import optimum_qvlm  # first: registers the format with transformers\n"
        f"from transformers import {auto_class}, {reader}\n\n"
        f'model = {auto_class}.from_pretrained("{where}", device_map="auto")\n'
        f'{variable} = {reader}.from_pretrained("{where}")\n\n'
        f"{asked}"
        "# On a GPU the first call compiles the decoding step; later ones are fast.\n"
        'options = {"cache_implementation": "static"} if model.device.type == "cuda" else {}\n'
        "tokens = model.generate(**inputs, **options, max_new_tokens=256)\n"
        f'print({variable}.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n```\n\n'
        "Without the import transformers refuses to load the weights, and says so.\n"
    )


def _precision(facts: CardFacts) -> str:
    lines = [
        "| part | linears | precision | weight scale per | activation scale per | weights | on disk | output error |",
        "|---|---:|---|---|---|---:|---:|---:|",
    ]
    for row in facts.rows:
        error = "" if row.error is None else f"{row.error:.2e}"
        lines.append(
            f"| `{row.part}` | {row.linears} | {row.scheme} | {readable_scales(row.weight)} "
            f"| {readable_activation(row.activation)} | {row.weights:,} | {readable_bytes(row.bytes)} | {error} |"
        )
    manifest = facts.values.get("manifest", {})
    modules = bytes_of_modules(manifest)
    rest = sum(map(tensor_bytes, manifest.values())) - sum(modules.get(name, 0) for name in facts.values["modules"])
    lines.append(f"| everything else | | as in the source | | | | {readable_bytes(rest)} | |")
    shared = "A scale is shared by so many input channels, by a row of the weight, or by a token's channels."
    kept = kept_names(facts.report)
    text = "## Precision of each part\n\n" + "\n".join(lines) + f"\n\n{shared}\n"
    if kept:
        text += f"\nLinears kept in full precision: {', '.join(f'`{name}`' for name in kept[:8])}"
        text += f" and {len(kept) - 8} more.\n" if len(kept) > 8 else ".\n"
    if folded := len(folded_norms(facts.report)):
        text += f"\nNorms that differ from the source, since they scale what the linears behind them read: {folded}.\n"
    if any(row.error is not None for row in facts.rows):
        text += (
            "\nOutput error: squared difference of the part's last output from full precision, over the latter's "
            "squared norm, on the calibration samples.\n"
        )
    return text + _sizes(facts)


def _sizes(facts: CardFacts) -> str:
    count, total = len(facts.files), sum(facts.files.values())
    said = []
    if count:
        said.append(f"{readable_bytes(total)} of weights in {count} file{'s' if count > 1 else ''}")
    memory = memory_bytes(facts.report)
    if memory is not None:
        before, after = memory
        said.append(f"{readable_bytes(after)} in memory in place of {readable_bytes(before)} ({before / after:.2f}x)")
    return f"\nSize: {'; '.join(said)}.\n" if said else ""


def _fidelity(report: Mapping[str, Any]) -> str:
    figures, generated = fidelity_figures(report), generation_figures(report)
    text = ""
    if figures:
        lines = ["| | answer tokens | mean KL | same first choice |", "|---|---:|---:|---:|"]
        for name, entry in figures.items():
            tokens, agreement = entry.get("tokens", ""), entry.get("top1_agreement")
            shown = "" if agreement is None else f"{100 * agreement:.1f} %"
            lines.append(f"| {name} | {tokens} | {entry['mean_kl']:.4f} | {shown} |")
        text += "\n" + "\n".join(lines) + "\n"
        text += (
            "\nMean KL: divergence from full precision's distribution per answer token, in nats. Same first choice: "
            "tokens for which both models prefer the same one.\n"
        )
        if {"prefill", "decode"} <= figures.keys():
            text += "Prefill: answers read at once. Decode: read one token at a time, as they are generated.\n"
    if generated:
        agreed = f"the first difference comes after {generated['agreed_tokens']:.1f} of "
        agreed = "they have " if generated["exact_match"] == 1 else agreed
        text += (
            f"\nGreedy answers: {100 * generated['exact_match']:.1f} % of {generated['answers']} are those of full "
            f"precision throughout; {agreed}{generated['tokens']:.1f} tokens on average.\n"
        )
    if states := state_figures(report):
        text += (
            f"\nLast hidden states: squared error {states['relative_error']:.2e} of their square, on "
            f"{states['tokens']} tokens.\n"
        )
    return f"## Fidelity to full precision\n{text}" if text else ""


def _calibration(facts: CardFacts) -> str:
    found = facts.values.get("calibration", {})
    lines = [f"- method: {found.get('method', facts.values.get('method'))}"]
    if _base(facts):
        lines.append(f"- source: {_base(facts)} at commit {found.get('base_revision')}")
    if "fingerprint" in found:
        lines += [
            f"- data: {found['source']}, {found['samples']} samples, seed {found['seed']}",
            f"- fingerprint of the data (SHA-256): `{found['fingerprint']}`",
        ]
    versions = found.get("versions", {})
    if versions:
        lines.append("- versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    lines.append(f"- format: qvlm {facts.values.get('format_version')}")
    lines.append("- details: `qvlm_report.json` beside the weights")
    return "## Calibration\n\n" + "\n".join(lines) + "\n"
