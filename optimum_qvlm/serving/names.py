"""Names of modules as servers have them."""

import re

NESTED_TOWER = re.compile(r"^((?:model\.)?(?:vision_tower|vision_model|vpm)\.)(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.")
"""Tensors of CLIP and SigLIP towers as transformers 5.17 and later write them for new models."""
