"""Quantize a text model: here the decoder inside the bundled vision-language model, taken out.

    python examples/text_only.py text-quantized

For any other, pass its folder or Hub id to AutoModelForCausalLM as below.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaForCausalLM,
)

from optimum_qvlm import QVLMConfig

BUNDLED = Path(__file__).parent / "tiny_vlm"
PASSAGES = ["how many digits are there?", "which digit is the largest?", "what is the sum of the top row?"]

out = sys.argv[1] if len(sys.argv) > 1 else "text-quantized"
with tempfile.TemporaryDirectory() as source:
    whole = AutoModelForImageTextToText.from_pretrained(BUNDLED)
    text = LlamaForCausalLM(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.save_pretrained(source)
    tokenizer = AutoProcessor.from_pretrained(BUNDLED).tokenizer

    # a checkpoint with its tokenizer beside it needs no `processor`
    config = QVLMConfig("w4a16", dataset=[{"text": passage} for passage in PASSAGES], processor=tokenizer)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(out)

model = AutoModelForCausalLM.from_pretrained(out)
tokenizer = AutoTokenizer.from_pretrained(out)
inputs = tokenizer(PASSAGES[0], return_tensors="pt", return_token_type_ids=False)
with torch.inference_mode():
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
