"""The adapted transformer for programs that know nothing of adapters: a transformers folder, or ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_vision import names
from lora_vision.adapter import Adapter
from lora_vision.errors import BaseModelError, LoraVisionError
from lora_vision.vit.backbone import Backbone, join_qkv, load_backbone
from lora_vision.vit.classifier import Domain, check_backbone, label_names, open_domain
from lora_vision.vit.preprocessing import Preprocessing

TOLERANCE = 1e-4
"""How far the logits of an ONNX file may be from the live ones."""


class Whole(nn.Module):
    """A backbone and its head as one: pixel_values [B, 3, H, W], normalised, to logits [B, C]."""

    def __init__(self, backbone: Backbone, head: nn.Linear) -> None:
        super().__init__()
        self.body, self.head = backbone.model, head

    def forward(self, pixel_values: Tensor) -> Tensor:
        found = self.body(pixel_values)
        features = found if isinstance(found, Tensor) else found.logits
        return cast(Tensor, self.head(features))


def merged(source: str | Path, base: str | None = None) -> tuple[Backbone, nn.Linear, Domain]:
    """A backbone with an adapter written into its weights, its head, and what that means.

    Raises:
        LoraVisionError: The adapter or its backbone cannot be used.
    """
    adapter, domain, weight, bias = open_domain(source)
    backbone = load_backbone(base or domain.base)
    check_backbone(backbone, domain, weight)
    merge(adapter, backbone)
    head = nn.Linear(weight.shape[1], len(weight))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return backbone, head.requires_grad_(False), domain


@torch.no_grad()
def merge(adapter: Adapter, backbone: Backbone) -> None:
    """Writes an adapter into a backbone's weights: summed in float32, rounded once."""
    from lora_vision.inject import compare

    layers = names.index(backbone.parts)
    if adapter.layers:
        compare(adapter, layers)
    for name, factors in adapter.layers.items():
        layer: Any = layers[name]
        shift = factors.bias_delta(layer.bias) if getattr(layer, "bias", None) is not None else None
        layer.weight.copy_((layer.weight.float() + factors.delta(layer.weight)).to(layer.weight.dtype))
        if shift is not None:
            layer.bias.copy_((layer.bias.float() + shift).to(layer.bias.dtype))
    join_qkv(backbone.model)


def export_folder(source: str | Path, output: str | Path, base: str | None = None) -> Path:
    """The folder written: a model that plain transformers opens, with its labels and preprocessing.

    Raises:
        LoraVisionError: The adapter or its backbone cannot be used, or the backbone is timm's.
    """
    backbone, head, domain = merged(source, base)
    model: Any = backbone.model
    if not hasattr(model, "save_pretrained"):
        raise BaseModelError(f"{backbone.source} is no transformers model and has no such folder; export to .onnx")
    model.classifier = head
    model.num_labels = len(domain.labels)
    model.config.num_labels = len(domain.labels)
    model.config.update(label_names(domain.labels))
    folder = Path(output)
    model.save_pretrained(folder)
    text = json.dumps(processor(domain.preprocessing), indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text)
    return folder


def processor(how: Preprocessing) -> dict[str, Any]:
    """The content of a ``preprocessor_config.json`` that does the same."""
    height, width = how.size
    content: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": how.resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
    }
    if how.resize == how.size:
        return {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}, **content}
    size = how.resize
    sides = {"shortest_edge": size} if isinstance(size, int) else {"height": size[0], "width": size[1]}
    cropped = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    return {"image_processor_type": "CLIPImageProcessor", "size": sides, **cropped, **content}


def export_onnx(source: str | Path, output: str | Path, base: str | None = None) -> tuple[Path, float]:
    """The ONNX file written, and how far its logits are from torch's on noise.

    One input, ``pixel_values`` [B, 3, H, W], normalised; one output, ``logits`` [B, C]; any B. The labels and the
    preprocessing stand in the file's metadata.

    Raises:
        LoraVisionError: The extra onnx is not installed, the adapter or its backbone cannot be used, or the logits
            differ by more than 1e-4.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise LoraVisionError(f"ONNX needs more packages ({error}): pip install 'lora-vision[onnx]'") from error
    backbone, head, domain = merged(source, base)
    whole = Whole(backbone, head).eval()
    pixels = torch.randn(2, 3, *domain.preprocessing.size, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        whole,
        (pixels,),
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: batch}},
        verbose=False,
    )
    if program is None:
        raise LoraVisionError(f"torch cannot export {backbone.source} to ONNX")
    model = program.model_proto
    told = {"labels": json.dumps(domain.labels), "preprocessing": json.dumps(domain.preprocessing.to_dict())}
    onnx.helper.set_model_props(model, {**told, "temperature": f"{domain.temperature:g}"})
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    more = torch.cat([pixels, pixels.flip(0)[:1]])
    with torch.no_grad():
        there = torch.from_numpy(session.run(["logits"], {"pixel_values": more.numpy()})[0])
        away = float((there - whole(more)).abs().max())
    if not away <= TOLERANCE:
        raise LoraVisionError(f"{path}: logits differ by {away:.2g} from torch's; expected at most {TOLERANCE:g}")
    return path, away
