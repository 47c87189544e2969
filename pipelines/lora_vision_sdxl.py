"""Stable Diffusion XL whose call also takes adapters.

``DiffusionPipeline.from_pretrained(base, custom_pipeline="…/lora_vision_sdxl.py", trust_remote_code=True)``, then
``pipe("a fox", adapters={"ink.safetensors": 0.8}, schedule=linear(1, 0), regions=[…])``.
"""

from diffusers import StableDiffusionXLPipeline

from lora_vision.blending import Blending


class LoraVisionSDXLPipeline(Blending, StableDiffusionXLPipeline):
    """The stock StableDiffusionXLPipeline with ``blend`` and the further arguments of ``Blending.__call__``."""
