"""Calibrate on your own samples: a folder with pictures and a .jsonl file, as the command line takes it too.

    python examples/own_dataset.py samples quantized

makes such a folder from questions about handwritten digits, and quantizes the bundled model on it. With samples of
your own, write one object a line: image (relative to the file), question, and an answer if you have one.
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText

from optimum_qvlm import QVLMConfig

BUNDLED = Path(__file__).parent / "tiny_vlm"
sys.path.insert(0, str(BUNDLED))

from questions import make_samples  # noqa: E402  needs scikit-learn

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "samples")
out = sys.argv[2] if len(sys.argv) > 2 else "quantized"

(folder / "images").mkdir(parents=True, exist_ok=True)
with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
    for number, sample in enumerate(make_samples("train", 16, seed=0)):
        name = f"images/{number:04}.png"
        sample["image"].save(folder / name)
        file.write(json.dumps({"image": name, "question": sample["question"], "answer": sample["answer"]}) + "\n")

records = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
dataset = [record | {"image": str(folder / record["image"])} for record in records]
config = QVLMConfig("w4a8", dataset=dataset, num_samples=len(dataset))
model = AutoModelForImageTextToText.from_pretrained(BUNDLED, quantization_config=config)
model.save_pretrained(out)

calibration = model.config.quantization_config.record.calibration
print(f"Calibrated on {calibration['samples']} samples, fingerprint {calibration['fingerprint'][:12]}; saved in {out}")
