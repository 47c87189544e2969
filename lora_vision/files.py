"""Adapter files in and out: the only file that opens them. Every dialect is in `formats`; here are disk and policy."""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lora_vision import formats, names
from lora_vision.errors import AdapterError
from lora_vision.formats import container
from lora_vision.formats import leaves as vocabulary
from lora_vision.formats.reading import Reading

if TYPE_CHECKING:
    from torch import Tensor

    from lora_vision.adapter import Adapter
    from lora_vision.factors import Factors

log = logging.getLogger(__name__)

_PICKLES = (".pt", ".bin", ".ckpt", ".pth")
_MEMBERS = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)
_DERIVED = (
    "format",
    "sshs_model_hash",
    "sshs_legacy_hash",
    formats.diffusers.HEADER,
    formats.diffusers.FOLDED,
    formats.peft.CONFIG,
)


def load_adapter(path: str | Path, *, strict: bool = True, allow_pickle: bool = False) -> Adapter:
    """Returns the adapter in a file or folder of any known format; no model is needed.

    Tensors keep their stored types and stay on disk until used (a private memory map): while they are, put another
    file in its place by renaming, as `save_adapter` does, instead of writing into it.

    Args:
        path: a `.safetensors` file, or a folder that PEFT or diffusers wrote.
        strict: refuse keys that no layer or algorithm explains. Otherwise they are left out and logged.
        allow_pickle: also open `.pt` and `.bin` files, through torch's `weights_only` loader.

    Raises:
        AdapterError: the file is missing, damaged, of an unsupported algorithm or model, or holds unknown keys.
    """
    found = _locate(Path(path))
    if isinstance(found, list):
        return _joined([load_adapter(folder, strict=strict, allow_pickle=allow_pickle) for folder in found], found)
    try:
        keyed, metadata = _open(found, allow_pickle)
        _, reading = understood(keyed, metadata)
        if reading.unknown:
            _refuse_or_log(reading, strict)
        return _built(reading, metadata)
    except AdapterError as error:
        raise AdapterError(f"{found}: {error}") from None


def _locate(path: Path) -> Path | list[Path]:
    """Returns the file to open, or the folders of a pipeline's parts."""
    try:
        file, folder = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!a}: cannot be opened ({error})") from None
    if file:
        return path
    if not folder:
        raise AdapterError(f"{path}: no such file; expected a .safetensors file or a folder with an adapter")
    if member := next((path / name for name in _MEMBERS if (path / name).is_file()), None):
        return member
    if parts := [path / part for part in names.PARTS if (path / part / _MEMBERS[0]).is_file()]:
        return parts
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise AdapterError(f"{path}: {len(files)} .safetensors files in this folder; name the one to load")
    return files[0]


def _joined(adapters: list[Adapter], folders: list[Path]) -> Adapter:
    """Returns one adapter of several PEFT folders, each named for the part it is for."""
    from lora_vision.adapter import Adapter

    layers: dict[str, Factors] = {}
    extras: dict[str, Tensor] = {}
    for adapter, folder in zip(adapters, folders, strict=True):
        layers.update({f"{folder.name}.{name.partition('.')[2]}": value for name, value in adapter.layers.items()})
        extras.update(adapter.extras)
    return Adapter(layers, extras, adapters[0].metadata)


def _open(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns (tensors by key, header strings) of one file; PEFT's configuration joins the header."""
    if path.suffix.lower() in _PICKLES and allow_pickle:
        keyed, metadata = _unpickle(path), {}
    else:
        try:
            with path.open("rb") as file:
                header = _header(file)
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise AdapterError(f"cannot be read: {error.strerror or error}") from None
        keyed, metadata = container.tensors(header, data), header.metadata
    return keyed, _with_config(path, metadata)


def _header(file: IO[bytes]) -> container.Header:
    """Returns the checked header of an open safetensors file."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(256)
    length = container.header_length(first, size)
    return container.parse((first[8:] + file.read(max(0, 8 + length - len(first))))[:length], size)


def _with_config(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    """Returns the header strings with the text of `adapter_config.json`, if one lies beside the file."""
    beside = path.parent / "adapter_config.json"
    if formats.peft.CONFIG in metadata or not beside.is_file():
        return metadata
    if beside.stat().st_size > container.MAX_HEADER:
        raise AdapterError("adapter_config.json beside it is far too large")
    try:
        return {**metadata, formats.peft.CONFIG: beside.read_text(encoding="utf-8")}
    except (OSError, UnicodeError):
        raise AdapterError("adapter_config.json beside it is no text file") from None


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a torch pickle, loaded without running any code from it."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader meets a damaged file with whatever its parts happen to raise
        raise AdapterError(f"torch cannot load it without running code from it: {str(error)[:200]!a}") from None
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if isinstance(content, list):
        return formats.cloneofsimo.positional(content)
    keyed = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(key, str) and key.endswith("alpha") and isinstance(value, int | float):
            value = torch.tensor(float(value) if abs(value) < 1e300 else float("nan"), dtype=torch.float64)
        if isinstance(key, str) and torch.is_tensor(value):
            if value.layout != torch.strided or value.device.type != "cpu":
                raise AdapterError(
                    f"{key[:120]!a} is a {value.layout} tensor on {value.device}; expected plain numbers"
                )
            keyed[key] = value
    if not keyed:
        raise AdapterError("this pickle holds no tensors by name; expected an adapter's state dict")
    return keyed


def member(path: str | Path) -> Path:
    """Returns the one file to open for a path that may be a folder.

    Raises:
        AdapterError: there is no such file, or the folder holds several adapters.
    """
    found = _locate(Path(path))
    if isinstance(found, list):
        raise AdapterError(
            f"{path}: several adapters, in {', '.join(f.name for f in found)}; name one of these folders"
        )
    return found


def repack(path: Path, folder: Path) -> Path | None:
    """Returns a safetensors file, made in `folder`, of a torch pickle and its configuration; None for other files.

    Raises:
        AdapterError: torch cannot load the pickle without running code from it.
    """
    if path.suffix.lower() not in _PICKLES:
        return None
    try:
        head, pieces = container.serialise(_unpickle(path), _with_config(path, {}))
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    made = folder / "repacked.safetensors"
    _write(made, [head, *pieces])
    return made


def header(path: str | Path) -> tuple[container.Header, dict[str, str]]:
    """Returns (checked header, its strings with PEFT's configuration) of a safetensors file, without torch.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    found = member(path)
    try:
        with found.open("rb") as file:
            parsed = _header(file)
        return parsed, _with_config(found, parsed.metadata)
    except AdapterError as error:
        raise AdapterError(f"{found}: {error}") from None
    except OSError as error:
        raise AdapterError(f"{found}: cannot be read: {error.strerror or error}") from None


def understood(keyed: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[str | None, Reading]:
    """Returns (format, reading) of tensors or header entries.

    Raises:
        AdapterError: the algorithm, or the model it is for, is known and not supported; or nothing here is an adapter.
    """
    kind, reading = formats.read(keyed, metadata)
    if what := vocabulary.refusal(reading.unknown):
        raise AdapterError(
            f"this is {what}, which is not supported; expected an adapter for Stable Diffusion 1, 2, XL or a ViT"
        )
    if not reading.layers and not reading.extras:
        sample = ", ".join(ascii(key[:80]) for key in list(keyed)[:3]) or "no tensors at all"
        raise AdapterError(f"no key of a known adapter format; found {sample}")
    return kind, reading


def _refuse_or_log(reading: Reading, strict: bool) -> None:
    """Raises AdapterError naming the unknown keys, or logs them when the user asked for less."""
    listed = ", ".join(ascii(key[:120]) for key in reading.unknown[:5])
    more = f" and {len(reading.unknown) - 5} more" if len(reading.unknown) > 5 else ""
    message = f"{len(reading.unknown)} keys name no known layer or algorithm: {listed}{more}"
    if strict:
        raise AdapterError(message + "; strict=False leaves them out")
    log.warning("%s; left out", message)


def _built(reading: Reading, metadata: Mapping[str, str]) -> Adapter:
    """Returns the adapter of a reading."""
    from lora_vision.adapter import Adapter

    layers = {name: vocabulary.assemble(name, leaves) for name, leaves in reading.layers.items()}
    return Adapter(layers, reading.extras, {k: v for k, v in metadata.items() if k not in _DERIVED})


def save_adapter(adapter: Adapter, path: str | Path, format: str = "kohya") -> Path:
    """Returns the path written: an adapter in one of the formats other tools read, complete or not at all.

    The file appears under its name only when it is whole, and the same adapter gives the same bytes.

    Args:
        adapter: what to write.
        path: a name ending in `.safetensors`. For `peft` also a folder: one part fills it, several parts get a folder
            each inside.
        format: `kohya` (also ComfyUI, A1111, LyCORIS), `diffusers` or `peft`.

    Raises:
        AdapterError: the format cannot hold this adapter exactly, or the name does not fit.
    """
    path = Path(path)
    if format not in formats.WRITERS:
        raise AdapterError(f"format {format!a}: expected one of {', '.join(formats.WRITERS)}")
    if not adapter.layers and not adapter.extras:
        raise AdapterError("this adapter changes no layer; there is nothing to save")
    if format == "peft" and path.suffix != ".safetensors":
        return _save_folder(adapter, path)
    if path.suffix != ".safetensors" or path.is_dir():
        raise AdapterError(f"{path}: the name of a file ending in .safetensors is needed")
    found, metadata = formats.CODECS[format].write(adapter)
    if format == "peft":
        _write_config(path, metadata[formats.peft.CONFIG])
    head, pieces = container.serialise(found, metadata)
    _write(path, [head, *pieces])
    return path


def _save_folder(adapter: Adapter, folder: Path) -> Path:
    """Returns the folder written: PEFT's two files, or one such folder for each part of a pipeline."""
    import dataclasses

    parts = adapter.parts
    if len(parts) < 2:
        save_adapter(adapter, folder / _MEMBERS[0], "peft")
        return folder
    shares = []
    for part in parts:  # check all of them before the first is written
        layers = {name: value for name, value in adapter.layers.items() if name.startswith(part + ".")}
        share = dataclasses.replace(adapter, layers=layers, extras=adapter.extras if part == "vit" else {})
        formats.peft.write(share)
        shares.append((folder / part / _MEMBERS[0], share))
    if adapter.extras and "vit" not in parts:
        raise AdapterError(
            f"{next(iter(adapter.extras))} is no module; a PEFT folder cannot hold it, use format='kohya'"
        )
    for path, share in shares:
        save_adapter(share, path, "peft")
    return folder


def _write_config(path: Path, config: str) -> None:
    """Writes `adapter_config.json` beside a PEFT file, unless it would replace that of another adapter."""
    beside = path.parent / "adapter_config.json"
    if beside.is_file() and not path.is_file() and beside.read_text(encoding="utf-8") != config:
        raise AdapterError(f"{beside} belongs to another adapter; save into a folder of its own")
    _write(beside, [config.encode()])


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Writes a file in one go: under a temporary name, flushed, then renamed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise AdapterError(f"{path}: cannot be written: {error.strerror or error}") from None


def _umask() -> int:
    """Returns the process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@dataclass(frozen=True)
class Conversion:
    """What became of an adapter on its way into another format.

    Attributes:
        output: the file or folder written.
        format: its format.
        layers: how many layers it has.
        errors: relative error of each layer that was approximated; empty when nothing was lost.
    """

    output: Path
    format: str
    layers: int
    errors: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain values, for JSON."""
        return {"output": str(self.output), "format": self.format, "layers": self.layers, "errors": self.errors}

    def __str__(self) -> str:
        text = f"wrote {self.output}: {self.layers} layers, {self.format} format"
        if not self.errors:
            return f"{text}, without loss"
        worst = max(self.errors, key=self.errors.__getitem__)
        mean = sum(self.errors.values()) / len(self.errors)
        return (
            f"{text}; {len(self.errors)} layers approximated, mean relative error {mean:.3g}, "
            f"largest {self.errors[worst]:.3g} ({worst})"
        )


def convert(
    source: str | Path,
    output: str | Path,
    *,
    format: str = "kohya",
    approximate: int | None = None,
    base: Mapping[str, Tensor] | None = None,
    allow_pickle: bool = False,
) -> Conversion:
    """Returns what was written: an adapter in another format, without loss or not at all.

    Args:
        source: file or folder to read.
        output: file (for `peft` also a folder) to write.
        format: `kohya`, `diffusers` or `peft`.
        approximate: turn whatever is not plain LoRA into pairs of at most this rank first.
        base: true layer name -> untouched weight, for approximating changes that multiply the base.
        allow_pickle: also read `.pt` and `.bin` files.

    Raises:
        AdapterError: the source cannot be read, or the format cannot hold it and no rank was given.
    """
    adapter = load_adapter(source, allow_pickle=allow_pickle)
    errors: dict[str, float] = {}
    if approximate is not None:
        from lora_vision.approximate import approximate as to_pairs

        adapter, errors = to_pairs(adapter, approximate, base)
    return Conversion(save_adapter(adapter, output, format), format, len(adapter.layers), errors)
