"""Load a quantized model and ask it about an image.

python examples/quantize_and_push.py --out quantized
python examples/load_and_chat.py quantized
python examples/load_and_chat.py me/llava-w4a8 --image street.jpg --question "How many bicycles are there?"
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

import optimum_qvlm  # noqa: F401  registers the format with transformers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="folder or Hub id of a quantized model")
parser.add_argument("--image", type=Path, help="picture to ask about (default: one that is drawn here)")
parser.add_argument("--question", default="how many digits are there?")
arguments = parser.parse_args()

if arguments.image is None:
    image = Image.new("RGB", (48, 48), (20, 20, 28))
    ImageDraw.Draw(image).text((6, 4), "7", fill="white")
else:
    image = Image.open(arguments.image).convert("RGB")

model = AutoModelForImageTextToText.from_pretrained(arguments.model, device_map="auto")
processor = AutoProcessor.from_pretrained(arguments.model)

content = [{"type": "image", "image": image}, {"type": "text", "text": arguments.question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, dtype=model.dtype)
with torch.inference_mode():
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(f"{arguments.question} {answer.strip()}")
