"""Stable Diffusion whose call also takes adapters.

``DiffusionPipeline.from_pretrained(base, custom_pipeline="…/lora_vision_sd.py", trust_remote_code=True)``, then
``pipe("a fox", adapters={"ink.safetensors": 0.8}, schedule=linear(1, 0), regions=[…])``.
"""

from diffusers import StableDiffusionPipeline

from lora_vision.blending import Blending


class LoraVisionSDPipeline(Blending, StableDiffusionPipeline):
    """The stock StableDiffusionPipeline with ``blend`` and the further arguments of ``Blending.__call__``."""
