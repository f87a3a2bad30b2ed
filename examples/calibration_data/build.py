"""Build the packaged calibration set: 72 pictures with questions and answers, and 72 passages.

What it needs: Pillow, NumPy and matplotlib; a font with Chinese and Japanese characters (made with Debian's
fonts-droid-fallback); and the packages with the original photographs, unpacked into one folder:

    pip download --no-deps scikit-image==0.26.0 scikit-learn==1.9.1
    apt-get download lomiri-wallpapers-16.04 palapeli-data
    for wheel in *.whl; do unzip -q -d originals "$wheel"; done
    for deb in *.deb; do dpkg-deb -x "$deb" originals; done
    python examples/calibration_data/build.py --photographs originals

Questions, answers, texts and data are in the JSON files beside this one, the passages in passages.txt. The same
inputs give the same files.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from charts import draw_chart
from pages import Fonts, draw_page
from photographs import prepare
from PIL import Image

HERE = Path(__file__).resolve().parent
TARGET = HERE.parents[1] / "optimum_qvlm" / "data" / "default"
CJK_FONT = Path("/usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf")
DRAWN = {"source": "optimum-qvlm, drawn by examples/calibration_data/build.py", "license": "Apache-2.0"}
DRAWN_KINDS = {"chart": "charts.json", "text": "texts.json", "document": "documents.json"}
PALETTE_COLOURS = 64
PHOTOGRAPH_QUALITY = 80
SCAN_QUALITY = 60

Spec = dict[str, Any]


def read(name: str) -> list[Spec]:
    """The entries of one of the JSON files."""
    entries: list[Spec] = json.loads((HERE / name).read_text(encoding="utf-8"))
    return entries


def save(image: Image.Image, spec: Spec, kind: str, folder: Path) -> str:
    """Write JPEG where there is texture, else a PNG with a palette; returns the name relative to the set."""
    if kind == "photo" or "grain" in spec:
        name = f"images/{kind}_{spec['name']}.jpg"
        quality = PHOTOGRAPH_QUALITY if kind == "photo" else SCAN_QUALITY
        image.save(folder / name, quality=quality, optimize=True, progressive=True)
    else:
        name = f"images/{kind}_{spec['name']}.png"
        image.quantize(PALETTE_COLOURS, dither=Image.Dither.NONE).save(folder / name, optimize=True)
    return name


def make_records(kind: str, photographs: Path, fonts: Fonts, folder: Path) -> list[Spec]:
    """Draw all pictures of one kind and say what belongs to each."""
    records = []
    for number, spec in enumerate(read(DRAWN_KINDS.get(kind, "photographs.json"))):
        if kind == "photo":
            image, origin = prepare(spec, photographs), {key: spec[key] for key in ("source", "license")}
        else:
            image, origin = draw_chart(spec) if kind == "chart" else draw_page(spec, fonts, number), DRAWN
        name = save(image, spec, kind, folder)
        records.append({"image": name, "question": spec["question"], "answer": spec["answer"], "kind": kind, **origin})
    return records


def read_passages() -> list[Spec]:
    """The passages of passages.txt, where each begins with a line "=== kind", with the kinds spread evenly."""
    groups: dict[str, list[str]] = {}
    pieces = re.split(r"^=== (\w+)\n", (HERE / "passages.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for kind, text in zip(pieces[1::2], pieces[2::2], strict=True):
        groups.setdefault(kind, []).append(text.strip())
    places = [
        ((i + 0.5) / len(texts), {"text": t, "kind": k}) for k, texts in groups.items() for i, t in enumerate(texts)
    ]
    return [record for _, record in sorted(places, key=lambda place: place[0])]


def describe_licenses() -> str:
    """LICENSES.md: where every picture and passage comes from."""
    lines = [
        "# Licences of the packaged calibration set",
        "",
        f"Charts, rendered texts, documents, all questions and answers, and all passages: {DRAWN['source']}; "
        f"{DRAWN['license']}, like the rest of this project. People, companies, places and figures in them are "
        "made up.",
        "",
        "Photographs: by the people below, who allow their redistribution. Each was scaled down and compressed "
        "again, some were cropped.",
    ]
    for spec in read("photographs.json"):
        lines += [
            "",
            f"## photo_{spec['name']}.jpg",
            "",
            f"- Source: {spec['source']}",
            f"- Author: {spec['author']}",
            f"- Licence: {spec['license']}, <{spec['license_link']}>",
            f"- Link: <{spec['link']}>",
            f"- As the source says: {spec['statement']}",
        ]
    return "\n".join(lines) + "\n"


def write_lines(path: Path, records: list[Spec]) -> None:
    """One JSON record a line."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def main() -> None:
    """Draw, convert and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="folder with the unpacked packages")
    parser.add_argument("--cjk-font", type=Path, default=CJK_FONT, help=f"default: {CJK_FONT}")
    parser.add_argument("--out", type=Path, default=TARGET, help=f"default: {TARGET}")
    arguments = parser.parse_args()
    (arguments.out / "images").mkdir(parents=True, exist_ok=True)
    fonts = Fonts(cjk=arguments.cjk_font)
    kinds = [make_records(k, arguments.photographs, fonts, arguments.out) for k in ("photo", *DRAWN_KINDS)]
    records = [record for turn in zip(*kinds, strict=True) for record in turn]
    for stale in set((arguments.out / "images").iterdir()) - {arguments.out / record["image"] for record in records}:
        stale.unlink()
    write_lines(arguments.out / "samples.jsonl", records)
    passages = read_passages()
    write_lines(arguments.out / "passages.jsonl", passages)
    (arguments.out / "LICENSES.md").write_text(describe_licenses(), encoding="utf-8")
    megabytes = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file()) / 1e6
    print(f"{len(records)} samples and {len(passages)} passages, {megabytes:.2f} MB, in {arguments.out}")


if __name__ == "__main__":
    main()
