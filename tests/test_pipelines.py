"""The custom pipelines load as diffusers loads any local one, and their call draws what a Blend draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from kinds import adapter, same_state, snapshot
from models import tiny_sd
from safetensors.torch import load_file
from torch import Tensor

import lora_vision as lv
from lora_vision import names
from lora_vision.errors import AdapterError
from lora_vision.regions import Region
from lora_vision.schedules import constant
from lora_vision.targets import select

FOLDER = Path(__file__).parent.parent / "pipelines"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_call_takes_adapters(family: Any, tmp_path: Path) -> None:
    base = tiny_sd(tmp_path / "base", family)
    file = FOLDER / ("lora_vision_sdxl.py" if family == "sdxl" else "lora_vision_sd.py")
    pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=str(file), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: str = "dot", **more: Any) -> Tensor:
        noise = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", "generator": noise}
        return pipe(prompt, height=32, width=32, **options, **more).images  # type: ignore[no-any-return]

    parts = {part: getattr(pipe, part) for part in names.PARTS if getattr(pipe, part, None) is not None}
    states, layers = snapshot(parts.values()), names.index(parts)
    found = adapter({name: layers[name] for name in select("unet.*.to_q", layers)})
    lv.save_adapter(found, tmp_path / "ink.safetensors", format="kohya")
    ink = str(tmp_path / "ink.safetensors")
    plain = draw()
    drawn = draw(adapters={ink: 0.5})
    assert torch.equal(draw(), plain) and not torch.allclose(drawn, plain, atol=1e-2)
    assert torch.allclose(draw(adapters={ink: 1.0}, schedule=constant(0.5)), drawn, atol=1e-3) or parts.keys() > {
        "unet"
    }
    pipe.blend.set({ink: 0.5})
    assert torch.allclose(draw(), drawn, atol=1e-5)
    assert torch.allclose(draw(adapters={}), plain)
    own = draw(adapters={}, regions=[Region({ink: 0.5}, torch.ones(4, 4), "dot")])
    assert torch.allclose(own, drawn, atol=1e-3)
    with pytest.raises(AdapterError, match="no adapter called 'gold'"):
        draw(adapters={"gold": 1.0})
    pipe.unet.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in states[0].items()) and saved.keys() == states[0].keys()
    pipe.blend.detach()
    assert torch.equal(draw(), plain)
    assert all(same_state(s, m.state_dict()) for s, m in zip(states, parts.values(), strict=True))
