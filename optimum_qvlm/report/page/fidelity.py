"""Closeness to full precision, and answers side by side."""

import re

from markupsafe import Markup

from optimum_qvlm.report.figures import fidelity_figures, generation_figures
from optimum_qvlm.report.page.charts import Chart, Column, bars
from optimum_qvlm.report.page.markup import element, joined, void
from optimum_qvlm.report.page.numbers import percent, readable
from optimum_qvlm.report.page.reading import Reading, SampleRow
from optimum_qvlm.report.page.tables import Section, figure, panel, table

IMAGE = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}")
LARGEST_IMAGE = 150_000
"""Characters of an image's address: a small picture has some ten thousand."""

MOST_IMAGES = 8
"""Of the whole page, so that it stays below 2 MB."""

MOST_SAMPLES = 64


def fidelity(reading: Reading) -> Section | None:
    """KL and first choices, at once and token by token, and greedy answers."""
    figures, generated = fidelity_figures(reading.report), generation_figures(reading.report)
    if not figures and not generated:
        return None
    rows = [
        [name, f"{entry['tokens']:.0f}" if "tokens" in entry else "", readable(entry["mean_kl"]),
         percent(entry["top1_agreement"]) if "top1_agreement" in entry else ""]
        for name, entry in figures.items()
    ]  # fmt: skip
    divergences = [
        Column(label=name, hint=f"{name}, mean KL: {readable(entry['mean_kl'])}", value=float(max(entry["mean_kl"], 0)))
        for name, entry in figures.items()
    ]
    shares = [
        Column(label=f"{name} tokens", hint=f"{name}, same first choice: {percent(entry['top1_agreement'])}",
               value=_share(entry["top1_agreement"]))
        for name, entry in figures.items()
        if "top1_agreement" in entry
    ]  # fmt: skip
    tables = [table(["", "answer tokens", "mean KL", "same first choice"], rows, numbers=(1, 2, 3))]
    if generated:
        share = generated["exact_match"]
        shares.append(Column(label="whole answers", hint=f"same answers: {percent(share)}", value=_share(share)))
        names = ["greedy answers", "mean length", "before first difference", "same throughout"]
        row = [
            f"{generated['answers']:.0f}",
            readable(generated["tokens"]),
            readable(generated["agreed_tokens"]),
            percent(share),
        ]
        tables.append(table(names, [row], numbers=(0, 1, 2, 3)))
    panels = [panel("what is the same", bars(Chart(title="share of what is the same"), shares, 1.0))] if shares else []
    if divergences:
        chart = Chart(title="divergence from full precision, in nats per token")
        panels.insert(0, panel("mean KL, nats per token", bars(chart, divergences)))
    return Section(
        anchor="fidelity",
        title="Closeness to full precision",
        short="Fidelity",
        lead=(
            "On samples that were not calibrated on. Prefill: answers read at once. Decode: token by token, as they "
            "are generated. KL: how far the distribution of the next token moved; 0 is the same."
        ),
        body=figure("Held-out samples", *panels, numbers=joined(tables)),
    )


def answers(reading: Reading) -> Section | None:
    """Greedy answers of both models, as far as the user lets them be kept."""
    rows = reading.samples[:MOST_SAMPLES]
    if not rows:
        if not generation_figures(reading.report):
            return None
        note = (
            "Questions and answers were not kept: samples of one's own are nobody's business. "
            'report_samples="answers" keeps their texts, "images" small pictures too.'
        )
        return Section(
            anchor="answers",
            title="Answers side by side",
            short="Answers",
            lead="",
            body=element("p", note, class_="note"),
        )
    left = MOST_IMAGES
    cards = []
    for row in rows:
        images = [image for image in row.images if is_image(image)][:left]
        left -= len(images)
        cards.append(_card(row, images))
    same = sum(row.reference == row.answer for row in rows)
    return Section(
        anchor="answers",
        title="Answers side by side",
        short="Answers",
        lead="Greedy answers to held-out samples. Where they part is marked.",
        body=joined([element("p", f"{same} of {len(rows)} are the same."), element("div", *cards, class_="answers")]),
    )


def is_image(address: str) -> bool:
    """Whether it is a small picture in itself, and nothing that would be fetched or run."""
    return len(address) <= LARGEST_IMAGE and IMAGE.fullmatch(address) is not None


def _card(row: SampleRow, images: list[str]) -> Markup:
    common = 0
    while common < min(len(row.reference), len(row.answer)) and row.reference[common] == row.answer[common]:
        common += 1
    agreed = row.reference == row.answer
    return element(
        "article",
        # The address is checked to hold no character of markup, and is longer than other texts may be.
        *(void("img", src=Markup(image), alt="image of the sample") for image in images),
        element("p", row.prompt, class_="prompt"),
        element(
            "dl",
            element("dt", "full precision"),
            element("dd", *_parted(row.reference, common, marked=not agreed)),
            element("dt", "quantized"),
            element("dd", *_parted(row.answer, common, marked=not agreed)),
        ),
        class_="same" if agreed else "differs",
    )


def _parted(answer: str, common: int, *, marked: bool) -> tuple[Markup | str, ...]:
    if not marked:
        return (answer,)
    return answer[:common], element("mark", answer[common:] or "∅")


def _share(value: float) -> float:
    return min(max(float(value), 0.0), 1.0)
