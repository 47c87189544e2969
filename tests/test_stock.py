"""Stock pipelines under a Blend: what diffusers lets one do with a pipeline goes on working, or is refused clearly."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from kinds import adapter, linear_and_conv, same_state, snapshot
from models import tiny_sd
from torch import Tensor
from transformers import ViTConfig, ViTModel

import lora_vision as lv
from lora_vision import names
from lora_vision.errors import AdapterError, BaseModelError
from lora_vision.regions import Region
from lora_vision.schedules import Moment, constant

TASKS: dict[str, tuple[type, type]] = {
    "text": (StableDiffusionPipeline, StableDiffusionXLPipeline),
    "img2img": (StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline),
    "inpaint": (StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline),
    "controlnet": (StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, sd1_folder: Path, sdxl_folder: Path) -> dict[str, Path]:
    """A random base of each family; sd2's predicts v."""
    return {"sd1": sd1_folder, "sd2": tiny_sd(tmp_path_factory.mktemp("sd2"), "sd2"), "sdxl": sdxl_folder}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def stock(folder: Path, task: str = "text", family: str = "sd1") -> Any:
    """The task's pipeline on a base."""
    kind: Any = TASKS[task][family == "sdxl"]
    more: dict[str, Any] = {}
    if task == "controlnet":
        torch.manual_seed(0)
        plain = stock(folder, "text", family)
        more["controlnet"] = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(4, 8))
        for parameter in more["controlnet"].parameters():  # the zero convolutions too: it shall be heard
            parameter.data += 0.02 * torch.randn_like(parameter)
    pipe = kind.from_pretrained(folder, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, task: str = "text", prompts: tuple[str, ...] = ("dot",), **more: Any) -> Tensor:
    """Latents [pictures, 4, 16, 16] of two steps under guidance, always from the same noise."""
    picture = torch.linspace(0, 1, 32).expand(len(prompts), 3, 32, 32)
    given: dict[str, Any] = {
        "text": {"height": 32, "width": 32},
        "img2img": {"image": picture, "strength": 0.6},
        "inpaint": {"image": picture, "mask_image": picture[:, :1], "strength": 0.9, "height": 32, "width": 32},
        "controlnet": {"image": picture, "height": 32, "width": 32},
    }[task]
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    options = {"num_inference_steps": 4 if task == "img2img" else 2, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe(list(prompts), generator=generators, **{**given, **options, **more}).images  # type: ignore[no-any-return]


def loaded(pipe: Any, kind: str = "lora", scale: float = 0.5, name: str = "ink", seed: int = 0) -> lv.Adapter:
    """A random adapter over everything, loaded into a new blend of the pipeline, which is kept as ``pipe.mix``."""
    if "mix" not in vars(pipe):
        vars(pipe)["mix"] = lv.Blend(pipe)
    layers = linear_and_conv(names.index(pipe.mix.parts))
    found = adapter(layers, kind, seed=seed)
    pipe.mix.load(found, name, scale=scale)
    return found


def close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    return float((one.float() - other.float()).norm() / other.float().norm()) < tolerance


@pytest.mark.parametrize(
    ("family", "task"),
    [*(("sd1", task) for task in TASKS), ("sd2", "text"), ("sd2", "inpaint"), *(("sdxl", task) for task in TASKS)],
)
def test_every_pipeline_draws_the_sum(folders: dict[str, Path], family: str, task: str) -> None:
    """Live is what the same pipeline draws with the weighted change written into its weights; zero is the base."""
    pipe = stock(folders[family], task, family)
    assert pipe.scheduler.config.prediction_type == ("v_prediction" if family == "sd2" else "epsilon")
    base = draw(pipe, task)
    found = loaded(pipe)
    assert set(pipe.mix.parts) == {"unet", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])}
    live = draw(pipe, task)
    pipe.mix.set({"ink": 0.0})
    assert torch.equal(draw(pipe, task), base)
    parts = pipe.mix.parts
    pipe.mix.detach()
    for name, layer in names.index(parts).items():
        if name in found.layers:
            layer.weight.data += 0.5 * found.layers[name].delta()
    assert close(live, draw(pipe, task), 1e-3) and not close(live, base, 1e-2)


def test_regions_hold_under_a_controlnet(folders: dict[str, Path]) -> None:
    pipe = stock(folders["sd1"], "controlnet")
    loaded(pipe)
    pipe.mix.set({"ink": {"unet": 0.5, "text_encoder": 0}})
    plain = draw(pipe, "controlnet")
    pipe.mix.set({}, regions=[Region({"ink": 0.5}, torch.ones(2, 2))])
    assert close(draw(pipe, "controlnet"), plain)


def test_the_pipeline_that_calls_decides(folders: dict[str, Path]) -> None:
    """``from_pipe`` shares the models: rows follow the caller's guidance, schedules the caller's scheduler."""
    pipe = stock(folders["sd1"])
    loaded(pipe, scale=0)
    draw(pipe, guidance_scale=1.0)
    other: Any = StableDiffusionImg2ImgPipeline.from_pipe(
        pipe, scheduler=DDIMScheduler.from_config(pipe.scheduler.config)
    )
    other.set_progress_bar_config(disable=True)
    ones = []
    for scale in (0.5, -0.3):
        pipe.mix.set({"ink": {"*": scale, "text_encoder": 0}})
        ones.append(draw(other, "img2img"))
    pipe.mix.set({"ink": [{"*": scale, "text_encoder": 0} for scale in (0.5, -0.3)]})
    both = draw(other, "img2img", ("dot", "dot"))
    assert close(both[:1], ones[0]) and close(both[1:], ones[1]) and not close(ones[0], ones[1], 1e-2)
    seen: list[Moment] = []
    pipe.mix.set({"ink": 0.5}, schedule=lambda moment: seen.append(moment) or 1.0)  # type: ignore[func-returns-value]
    draw(other, "img2img", num_inference_steps=5, strength=0.4)
    assert seen == [Moment(3, 5), Moment(4, 5)]


@pytest.mark.parametrize("how", ["plain", "sdpa", "sliced", "xformers"])
def test_attention_is_anybodys(folders: dict[str, Path], how: str) -> None:
    """Lesson 4 (diffusers#7519, #3348, #2129): whatever computes attention, the adapter's scale counts."""
    pipe = stock(folders["sd1"])
    base = draw(pipe)
    loaded(pipe)
    live = draw(pipe)
    change: dict[str, Callable[[], None]] = {
        "plain": lambda: pipe.unet.set_attn_processor(AttnProcessor()),
        "sdpa": lambda: pipe.unet.set_attn_processor(AttnProcessor2_0()),
        "sliced": lambda: pipe.enable_attention_slicing(1),
        "xformers": lambda: pipe.enable_xformers_memory_efficient_attention(),
    }
    if how == "xformers":
        pytest.importorskip("xformers", reason="xformers is not installed")
        if not torch.cuda.is_available():
            pytest.skip("xformers computes on a GPU only")
        pipe.to("cuda")
    change[how]()
    assert close(draw(pipe).cpu(), live, 1e-3)
    pipe.mix.set({"ink": 0.0})
    assert close(draw(pipe).cpu(), base, 1e-3)
    pipe.mix.set({"ink": 0.5})
    assert close(draw(pipe).cpu(), live, 1e-3) and not close(live, base, 1e-2)


def test_casting_the_pipeline_casts_the_blend(folders: dict[str, Path]) -> None:
    pipe = stock(folders["sd1"])
    loaded(pipe)
    loaded(pipe, "dora-output", name="dora", seed=1)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = draw(pipe, latents=noise)
    pipe.to(torch.float64)
    assert close(draw(pipe, latents=noise.double()), exact, 1e-3)
    pipe.mix.set({"ink": 0.1, "dora": 0.2})
    pipe.mix.set({"ink": 0.5, "dora": 0.5})
    pipe.to(torch.bfloat16)
    half = draw(pipe, latents=noise.bfloat16())
    assert half.dtype == torch.bfloat16 and close(half, exact, 0.15)


@pytest.mark.parametrize("offload_first", [False, True])
@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offload_goes_on(folders: dict[str, Path], how: str, offload_first: bool) -> None:
    """Lesson 26 (diffusers#10914, #7539): loading changes no offload hook, and what is parked stays parked.

    The hooks are accelerate's own, told to compute on the CPU: a machine without a GPU has only their mechanics. There
    they fail on CLIP's embeddings with or without adapters, so the sequential ones are put on the UNet alone.
    """
    reference = stock(folders["sd1"])
    loaded(reference)
    pipe = stock(folders["sd1"])

    def turn_on() -> None:
        if how == "model":
            pipe.enable_model_cpu_offload(device="cpu")
        else:
            accelerate.cpu_offload(pipe.unet, torch.device("cpu"))

    def hooks() -> list[Any]:
        return [getattr(module, "_hf_hook", None) for module in pipe.unet.modules()]

    if offload_first:
        turn_on()
    before = hooks()
    loaded(pipe)
    assert hooks() == before
    if not offload_first:
        turn_on()
    parked = {parameter.device.type for parameter in pipe.unet.parameters()}
    assert parked == ({"meta"} if how == "sequential" else {"cpu"})
    assert close(draw(pipe), draw(reference))
    pipe.mix.set({"ink": -0.3}, schedule=constant(1))
    reference.mix.set({"ink": -0.3})
    assert close(draw(pipe), draw(reference))
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == parked
    if how == "sequential":
        pipe.mix.set({"ink": -0.3})
        with pytest.raises(BaseModelError, match="parked by CPU offload"):
            pipe.mix.merge()
        assert close(draw(pipe), draw(reference))
    pipe.mix.detach()
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    reference.mix.detach()
    assert same_state(pipe.unet.state_dict(), reference.unet.state_dict())


def test_what_is_saved_is_the_base(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = stock(folders["sd1"])
    base = draw(pipe)
    states = snapshot([pipe.unet, pipe.text_encoder])
    loaded(pipe)
    loaded(pipe, "lokr", name="lokr", seed=1)
    assert not close(draw(pipe), base, 1e-2)
    pipe.save_pretrained(tmp_path / "saved")
    back = stock(tmp_path / "saved")
    assert torch.equal(draw(back), base)
    assert all(same_state(s, m.state_dict()) for s, m in zip(states, (back.unet, back.text_encoder), strict=True))


@pytest.mark.parametrize("varying", [False, True])
def test_copies_and_pickles_go_on_as_they_were(folders: dict[str, Path], varying: bool) -> None:
    """A copy holds what sounds at that moment, and listens to no blend any more."""
    pipe = stock(folders["sd1"])
    loaded(pipe)
    loaded(pipe, "dora-output", name="dora", seed=1)
    if varying:
        pipe.mix.set({"ink": 0.5, "dora": 0.3}, schedule=constant(0.5))
    x, t, states = torch.randn(2, 4, 16, 16), torch.tensor(1), torch.randn(2, 16, 16)
    live = pipe.unet(x, t, states).sample
    copies = [copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))]
    pipe.mix.set({"ink": -2.0})
    assert not close(pipe.unet(x, t, states).sample, live, 1e-2)
    for each in copies:
        assert close(each(x, t, states).sample, live, 1e-6)
        assert list(each.state_dict()) == list(pipe.unet.state_dict())
    pipe.mix.detach()
    assert close(copies[0](x, t, states).sample, live, 1e-6)


def test_a_vision_transformer_blends_row_by_row() -> None:
    """Sixteen pictures of one batch under sixteen adapters are what each would be alone."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTModel(ViTConfig(**shape, image_size=16, patch_size=8)).eval()
    blend = lv.Blend({"vit": model})
    layers = {name: layer for name, layer in names.index(blend.parts).items() if "attention" in name}
    pictures = torch.randn(16, 3, 16, 16)
    for number in range(16):
        found = adapter(linear_and_conv(layers), "lokr" if number == 3 else "lora", rank=1 + number % 3, seed=number)
        blend.load(found, f"a{number}", scale=0)
    ones = []
    for number in range(16):
        blend.set({f"a{number}": 0.5})
        ones.append(model(pictures[number : number + 1]).last_hidden_state)
    blend.set({f"a{number}": [0.5 * (row == number) for row in range(16)] for number in range(16)})
    assert close(model(pictures).last_hidden_state, torch.cat(ones))
    blend.set({"a1": 0.5})
    assert close(model(pictures[:1]).last_hidden_state, model(pictures[:2]).last_hidden_state[:1])


def test_thousands_are_registered_by_path(folders: dict[str, Path], tmp_path: Path) -> None:
    """Names cost nothing: only what sounds is read, and what is pushed out of the budget is read again."""
    pipe = stock(folders["sd1"])
    blend = lv.Blend(pipe, budget=1)
    layers = names.index(blend.parts)
    some = {name: layer for name, layer in layers.items() if "attn1.to_q" in name}
    for seed in range(2):
        lv.save_adapter(adapter(some, seed=seed), tmp_path / f"{seed}.safetensors")
    blend.register({f"a{number}": tmp_path / f"{number % 2}.safetensors" for number in range(4000)})
    assert blend.adapters == () and blend.nbytes == 0
    looks = {}
    for name in ("a0", "a3999", "a2000"):
        blend.set({name: 1.0})
        assert blend.adapters == (name,)
        looks[name] = draw(pipe)
    assert torch.equal(looks["a0"], looks["a2000"]) and not close(looks["a0"], looks["a3999"], 1e-5)
    with pytest.raises(AdapterError, match="no adapter called 'a4000'"):
        blend.set({"a4000": 1.0})
