"""Qwen2.5-VL and Qwen3-VL: a tower that takes images of any size, mergers, a text decoder."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from optimum_qvlm.models.adapter import Adapter, Join, Part

DECODER = "model.language_model"


class Qwen25VLAdapter(Adapter):
    """Qwen2.5-VL: some blocks of the tower attend within windows, which their arguments say, others everywhere."""

    def parts(self) -> tuple[Part, ...]:
        """Tower, merger, decoder."""
        return (
            Part(name="vision", layers=self.numbered("model.visual.blocks"), vision=True),
            Part(name="projector", layers=(self.located("model.visual.merger"),), vision=True),
            Part(name="language", layers=self.numbered(f"{DECODER}.layers")),
        )


class Qwen3VLAdapter(Adapter):
    """Qwen3-VL: features of inner blocks of the tower go through mergers of their own into the first decoder layers."""

    def parts(self) -> tuple[Part, ...]:
        """Tower, each deepstack merger, the merger, and the decoder, which adds features between its layers."""
        mergers = self.numbered("model.visual.deepstack_merger_list")
        return (
            Part(name="vision", layers=self.numbered("model.visual.blocks"), vision=True),
            *(Part(name=f"deepstack {n}", layers=(path,), vision=True) for n, path in enumerate(mergers)),
            Part(name="projector", layers=(self.located("model.visual.merger"),), vision=True),
            Part(
                name="language",
                layers=self.numbered(f"{DECODER}.layers"),
                join=Join(owner=self.located(DECODER), apply=add_deepstack),
            ),
        )


def add_deepstack(number: int, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Add the features of one deepstack merger to the image tokens of `hidden` [rows, tokens, channels].

    What decoder layer n returned gets the features of merger n, where there are as many.
    """
    features = arguments.get("deepstack_visual_embeds")
    if features is None or number > len(features):
        return hidden
    places = arguments["visual_pos_masks"].to(hidden.device)
    added = hidden.clone()
    added[places] = hidden[places] + features[number - 1].to(hidden.device, hidden.dtype)
    return added
