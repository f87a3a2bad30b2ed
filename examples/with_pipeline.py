"""Use a quantized model through transformers' pipeline.

python examples/quantize_and_push.py --out quantized
python examples/with_pipeline.py quantized
"""

import sys

from PIL import Image
from transformers import pipeline

import optimum_qvlm  # noqa: F401  registers the format with transformers

name = sys.argv[1] if len(sys.argv) > 1 else "quantized"
ask = pipeline("image-text-to-text", model=name)

image = Image.new("RGB", (48, 48), "white")
content = [{"type": "image", "image": image}, {"type": "text", "text": "how many digits are there?"}]
(result,) = ask(text=[{"role": "user", "content": content}], max_new_tokens=16, return_full_text=False)
print(result["generated_text"])
