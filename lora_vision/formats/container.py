"""The safetensors container: eight bytes of header length, a JSON header, the tensors' bytes. Read without torch.

Stricter than JSON readers are by themselves: every entry is checked before a byte of data is touched, so that a file
that lies about sizes, offsets, types or names is refused and never half read.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_vision.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 16 << 20
MAX_TENSORS = 65_536
_REMEMBERED = 1 << 20  # longest header, without its strings, to be remembered
# Bytes of one element, in the order in which safetensors sorts tensors when it writes (last first).
ITEM = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "F16": 2, "BF16": 2}
ITEM |= {"I32": 4, "F32": 4, "F64": 8, "I64": 8}
_TORCH = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn"}
_TORCH |= {"I16": "int16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "F32": "float32", "F64": "float64"}
_TORCH |= {"I64": "int64"}
_NAMES = {torch_name: name for name, torch_name in _TORCH.items()}
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000


class Entry(NamedTuple):
    """One tensor as the header describes it: type, shape, and its bytes counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A file's header: tensors by key, the strings beside them, and where the data starts in the file."""

    entries: Mapping[str, Entry]
    metadata: dict[str, str]
    start: int


def header_length(first: bytes, size: int) -> int:
    """Returns the length of the header in bytes.

    Args:
        first: the first bytes of the file, at least 200 of them if it has so many.
        size: of the whole file in bytes.

    Raises:
        AdapterError: this is no safetensors file, or it is cut short; says what it is instead if that can be told.
    """
    length = struct.unpack("<Q", first[:8])[0] if size >= 8 else 0
    if first[8:9] != b"{" or length < 2:
        raise AdapterError(_what_else(first))
    if length > MAX_HEADER:
        raise AdapterError(f"the header claims {length} bytes; at most {MAX_HEADER} are accepted")
    if 8 + length > size:
        raise AdapterError(
            f"the file is cut short: its header claims {length} bytes, the file has {size}; download it again"
        )
    return int(length)


def _what_else(first: bytes) -> str:
    """Returns what a file that does not start like a safetensors file probably is."""
    if first.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if first.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return (
            "this is a torch pickle (.pt, .bin, .ckpt); if you trust it, `lora-vision convert --allow-pickle` makes a "
            "safetensors file of it (in Python allow_pickle=True opens it)"
        )
    if first.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "this is a web page, not an adapter; download the file itself"
    return "this is no safetensors file: no header follows its first eight bytes; download it again"


def parse(text: bytes, size: int) -> Header:
    """Returns the checked header.

    Args:
        text: the header's bytes.
        size: of the whole file in bytes.

    Raises:
        AdapterError: anything in the header is wrong, is missing or does not fill the file exactly.
    """
    if text.count(b'"data_offsets"') > MAX_TENSORS or text.count(b"[") > 4 * MAX_TENSORS:
        raise AdapterError(f"the header lists more than {MAX_TENSORS} tensors; that is no adapter")
    ahead, rest = _apart(text)
    entries, inside, end = _entries(rest) if len(rest) < _REMEMBERED else _entries.__wrapped__(rest)
    if ahead is not None and inside is not None:
        raise AdapterError("the header names '__metadata__' twice")
    metadata = ahead or inside or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError("the header's __metadata__ holds something else than strings")
    _check_end(end, size - 8 - len(text))
    return Header(entries, metadata, 8 + len(text))


def _apart(text: bytes) -> tuple[Any, str]:
    """Returns (strings, JSON of the entries) of a header with its strings in front, as writers put them; else None."""
    try:
        decoded = text.decode()
        if decoded.startswith(_FRONT):
            strings, end = _JSON.raw_decode(decoded, len(_FRONT) - 1)
            if decoded.startswith(',"', end):
                return strings, "{" + decoded[end + 1 :]
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"the header is no valid JSON: {str(error)[:200]!a}") from None
    return None, decoded


@lru_cache(4)  # files of one trainer differ in their strings and numbers only
def _entries(text: str) -> tuple[Mapping[str, Entry], Any, int]:
    """Returns (checked entries, strings if they stand here, bytes of data) of a header in JSON.

    Raises:
        AdapterError: it is no JSON object, or an entry is wrong.
    """
    try:
        content = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"the header is no valid JSON: {str(error)[:200]!a}") from None
    if not isinstance(content, dict):
        raise AdapterError(f"the header is a JSON {type(content).__name__}; expected an object")
    strings = content.pop("__metadata__", None)
    entries = {key: _entry(key, value) for key, value in content.items()}
    return entries, strings, _end(entries)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object, refusing a key given twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise AdapterError(f"the header names {twice[:200]!a} twice")
    return found


def _refuse_constant(constant: str) -> Any:
    raise AdapterError(f"the header holds {constant}, which is no JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_FRONT = '{"__metadata__":{'


def _entry(key: str, value: Any) -> Entry:
    """Returns one checked entry."""
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = (*shape, begin, end)
        whole = all(type(number) is int and number >= 0 for number in numbers)
    except (TypeError, KeyError, ValueError):
        raise AdapterError(f"the header's entry for {key[:200]!a} is not a dtype, a shape and two offsets") from None
    if not isinstance(dtype, str) or dtype not in ITEM:
        raise AdapterError(f"{key[:200]!a} has the type {str(dtype)[:50]!a}; expected one of {', '.join(ITEM)}")
    fits = whole and len(shape) <= 8 and math.prod(shape) * ITEM[dtype] == end - begin
    if not fits or (begin == end and math.prod(size or 1 for size in shape) >> 40):  # 0 by more than torch can count
        raise AdapterError(
            f"{key[:200]!a} claims the shape {str(shape)[:100]} in bytes {str((begin, end))[:100]}, which do not agree"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _end(entries: Mapping[str, Entry]) -> int:
    """Returns where the data ends; raises AdapterError where tensors leave gaps or overlap."""
    position = 0
    for begin, end, key in sorted((entry.begin, entry.end, key) for key, entry in entries.items()):
        if begin != position:
            raise AdapterError(f"{key[:200]!a} starts at byte {begin} of the data, where byte {position} is next")
        position = end
    return position


def _check_end(position: int, available: int) -> None:
    """Raises AdapterError unless the tensors fill the data."""
    if position > available:
        raise AdapterError(
            f"the file is cut short: its tensors take {position} bytes, it has {available}; download it again"
        )
    if position < available:
        raise AdapterError(f"the file has {available - position} bytes after its last tensor that nothing explains")


def tensors(header: Header, data: Any) -> dict[str, Tensor]:
    """Returns the tensors as views of the file's bytes, in the types they are stored in.

    Args:
        header: of the file.
        data: the whole file as a writable buffer (a private memory map).
    """
    import torch

    flat = torch.frombuffer(data, dtype=torch.uint8)
    whole: dict[str, Tensor] = {}  # all of the file as numbers of one type, up to the last that is complete
    shapes = {entry.shape for entry in header.entries.values()}
    strides = {shape: tuple(math.prod(shape[at:]) for at in range(1, len(shape) + 1)) for shape in shapes}
    found: dict[str, Tensor] = {}
    for key, (dtype, shape, begin, end) in header.entries.items():
        width = ITEM[dtype]
        first, odd = divmod(header.start + begin, width)
        if odd:  # a header of odd length: torch views need aligned bytes
            piece = flat[header.start + begin : header.start + end].clone()
            found[key] = piece.view(getattr(torch, _TORCH[dtype])).view(shape)
            continue
        if dtype not in whole:
            whole[dtype] = flat[: len(flat) // width * width].view(getattr(torch, _TORCH[dtype]))
        found[key] = whole[dtype].as_strided(shape, strides[shape], first)
    return found


def scalar(entry: Entry, raw: bytes) -> float | None:
    """Returns a one-element tensor's number without torch, or None for types that need it."""
    code = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}.get(
        entry.dtype
    )
    if entry.dtype == "BF16":
        code, raw = "f", b"\0\0" + raw
    return float(struct.unpack("<" + code, raw)[0]) if code and entry.end > entry.begin else None


def serialise(found: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[memoryview]]:
    """Returns (header, data pieces) of a file, byte for byte the same for the same content.

    Tensors lie in the order safetensors itself writes (widest type first, then by name), keys are sorted. For files
    with `ss_*` metadata the two hashes kohya's tools look for are added.
    """
    import torch

    order = list(ITEM)
    named = {key: _NAMES.get(str(tensor.dtype).removeprefix("torch."), "") for key, tensor in found.items()}
    if bad := next((key for key, dtype in named.items() if not dtype), None):
        raise AdapterError(f"{bad} holds {found[bad].dtype}, which safetensors cannot store")
    keys = sorted(found, key=lambda key: (-order.index(named[key]), key))
    entries: dict[str, Any] = {}
    pieces: list[memoryview] = []
    position = 0
    for key in keys:
        flat = found[key].detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        pieces.append(memoryview(flat.numpy().data))
        entries[key] = {
            "dtype": named[key],
            "shape": list(found[key].shape),
            "data_offsets": [position, position + flat.numel()],
        }
        position += flat.numel()
    if any(key.startswith("ss_") for key in metadata):
        metadata = {**metadata, **_hashes(entries, metadata, pieces)}
    return _header_bytes(entries, metadata), pieces


def _header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Returns the length and the JSON header, padded with spaces so that the data starts at a multiple of 8."""
    content = {"__metadata__": dict(sorted(metadata.items())), **entries} if metadata else entries
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _hashes(entries: Mapping[str, Any], metadata: Mapping[str, str], pieces: Iterable[memoryview]) -> dict[str, str]:
    """Returns `sshs_model_hash` and `sshs_legacy_hash` as kohya's `precalculate_safetensors_hashes` computes them.

    The first is the sha256 of all tensor bytes; the second eight digits of the sha256 of 64 KiB at offset 1 MiB of a
    file that holds only the `ss_*` metadata.
    """
    whole, legacy = hashlib.sha256(), hashlib.sha256()
    header = _header_bytes(entries, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    position = 0
    for piece in (memoryview(header), *pieces):
        if position:
            whole.update(piece)
        begin, end = _LEGACY_START - position, _LEGACY_START + _LEGACY_BYTES - position
        legacy.update(piece[max(begin, 0) : max(end, 0)])
        position += len(piece)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}
