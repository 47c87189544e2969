"""What a caption says each time its picture is shown: tags in a new order, some of them left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_vision.config import DataConfig


@dataclass(frozen=True)
class Wording:
    """How captions change from sample to sample.

    Attributes:
        shuffle: Whether tags, the parts between commas, change places.
        keep: Tags at the beginning that stay there and are never left out.
        drop: Chance of each other tag to be left out.
        silence: Chance of the whole caption to be left out, so that the adapter learns the unprompted picture too.
        trigger: Words that stay first where the caption begins with them.
    """

    shuffle: bool = False
    keep: int = 0
    drop: float = 0.0
    silence: float = 0.0
    trigger: str = ""

    @classmethod
    def of(cls, config: DataConfig, trigger: str | None) -> Wording | None:
        """What these settings ask for; None where captions stay as they are."""
        if not (config.shuffle_tags or config.drop_tags or config.drop_captions):
            return None
        return cls(config.shuffle_tags, config.keep_tags, config.drop_tags, config.drop_captions, trigger or "")

    def __call__(self, caption: str, generator: torch.Generator) -> str:
        """The caption for one sample, drawn by the generator."""
        if torch.rand((), generator=generator) < self.silence:
            return ""
        tags = [tag.strip() for tag in caption.split(",")]
        keep = self.keep + bool(self.trigger and tags[0].lower() == self.trigger.lower())
        head, rest = tags[:keep], tags[keep:]
        chances = torch.rand(len(rest), generator=generator).tolist()
        rest = [tag for tag, chance in zip(rest, chances, strict=True) if chance >= self.drop]
        if self.shuffle:
            rest = [rest[i] for i in torch.randperm(len(rest), generator=generator).tolist()]
        return ", ".join([*head, *rest])


def without(caption: str, trigger: str | None) -> str:
    """The caption of the same thing in no particular style: the trigger taken out."""
    if not trigger:
        return caption
    place = caption.lower().find(trigger.lower())
    if place < 0:
        return caption
    rest = caption[:place] + caption[place + len(trigger) :]
    return ", ".join(part.strip() for part in rest.split(",") if part.strip())
