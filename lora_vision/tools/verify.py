"""verify: is an adapter file whole, sane, made for this base, and as it was when somebody signed it off?

A sign-off is a digest of everything else in the file, in its header. Without a key it tells accidents and careless
edits; with a key (HMAC-SHA256, RFC 2104) nobody without that key can renew it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_vision import files, names
from lora_vision.errors import AdapterError
from lora_vision.report import inspect

if TYPE_CHECKING:
    from lora_vision.base import Base

KEY = "lora_vision.signed_off"
"""The header string of the sign-off: JSON with by, digest and, made with a key, hmac."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        ok: Whether it is well; None where the file says nothing that could be checked.
        detail: What was found.
    """

    name: str
    ok: bool | None
    detail: str

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "-   "}[self.ok]
        return f"{mark} {self.name}: {self.detail}"


@dataclass(frozen=True)
class Verdict:
    """All checks of a file."""

    file: str
    checks: Sequence[Check]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.ok is not False for check in self.checks)

    @property
    def problem(self) -> str:
        """The failed checks in one line, or nothing."""
        return "; ".join(f"{check.name}: {check.detail}" for check in self.checks if check.ok is False)

    def to_dict(self) -> dict[str, Any]:
        """The checks as plain values, for JSON."""
        why = {} if self.ok else {"problem": f"{self.file}: {self.problem}"}
        return {"file": self.file, "ok": self.ok, **why, "checks": [asdict(check) for check in self.checks]}

    def __str__(self) -> str:
        return "\n".join([f"{self.file}: {'all is well' if self.ok else 'something is wrong'}", *map(str, self.checks)])


def verify(path: str | Path, base: Base | None = None, key: bytes | None = None) -> Verdict:
    """The verdict on an adapter file.

    Args:
        path: A .safetensors file, or a folder with one.
        base: Check against this base too.
        key: The secret that the sign-off should have been made with.

    Raises:
        AdapterError: There is no such file.
    """
    found = files.member(path)
    try:
        adapter = files.load_adapter(path)
        layers = f"{len(adapter.layers)} layers, every key explained"
        checks = [Check("readable", True, layers)]
    except AdapterError as error:
        return Verdict(str(found), [Check("readable", False, str(error).removeprefix(f"{found}: "))])
    seen = inspect(path, scan=True)
    checks.append(Check("finite", not seen.broken, _some(seen.broken, "NaN or infinity in", "every number is finite")))
    alive = "every layer changes something" if adapter.layers else "it changes no layer"
    told = _some(seen.silent, "nothing but zeros in", alive)
    checks.append(Check("alive", True if adapter.layers and not seen.silent else None, told))
    checks.append(_tensors_hash(seen.hashes))
    if base is not None:
        checks += _against(adapter, base)
    checks.append(_signature(found, key))
    return Verdict(str(found), checks)


def sign_off(path: str | Path, by: str, key: bytes | None = None) -> Path:
    """The file, now with a sign-off in its header; its tensors are not touched.

    Args:
        path: A .safetensors file.
        by: Who signs.
        key: A secret; without it anybody can sign in any name.

    Raises:
        AdapterError: There is no such file.
    """
    path = files.member(path)
    header, data = _split(path)
    metadata = header.setdefault("__metadata__", {})
    digest = _digest(header, data)
    signed = {"by": by, "digest": digest} | ({"hmac": _hmac(key, by, digest)} if key else {})
    metadata[KEY] = json.dumps(signed, sort_keys=True)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(struct.pack("<Q", len(text)) + text + data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _some(names_: Sequence[str], bad: str, good: str) -> str:
    more = f" and {len(names_) - 3} more" if len(names_) > 3 else ""
    return f"{bad} {', '.join(names_[:3])}{more}" if names_ else good


def _tensors_hash(hashes: dict[str, str]) -> Check:
    stated, computed = hashes.get("sshs_model_hash"), hashes["model_hash"]
    if stated is None:
        return Check("hash", None, f"the file states none; its tensors' is {computed[:16]}")
    same = stated == computed
    told = f"the tensors are those that were saved ({computed[:16]})"
    return Check("hash", same, told if same else f"the file states {stated[:16]}, its tensors have {computed[:16]}")


def _against(adapter: Any, base: Base) -> list[Check]:
    """Whether an adapter fits a base, and was made for it."""
    from lora_vision.inject import compare

    try:
        report = compare(adapter, names.index(base.parts))
        fit = Check("shapes", True, f"all {len(report.matched)} layers fit {base.source}")
    except AdapterError as error:
        fit = Check("shapes", False, str(error).splitlines()[0])
    stated = adapter.metadata.get("lora_vision.base_fingerprint")
    if stated is None:
        return [fit, Check("base", None, "the file does not say which base it was made for")]
    told = adapter.metadata.get("lora_vision.base", "a base")
    if stated == base.fingerprint:
        return [fit, Check("base", True, f"made for exactly this base ({stated[:16]})")]
    return [fit, Check("base", False, f"made for {told} {stated[:16]}, this is {base.source} {base.fingerprint[:16]}")]


def _signature(path: Path, key: bytes | None) -> Check:
    try:
        header, data = _split(path)
        signed = json.loads(header.get("__metadata__", {}).get(KEY, "null"))
    except ValueError:
        signed = None
    if not isinstance(signed, dict):
        return Check("sign-off", False if key else None, "not signed off")
    by, digest = str(signed.get("by")), _digest(header, data)
    if signed.get("digest") != digest:
        return Check("sign-off", False, f"changed since {by} signed it off")
    if key is None:
        sealed = "sealed with a key, which was not checked" if "hmac" in signed else "without a key"
        return Check("sign-off", True, f"unchanged since {by} signed it off ({sealed})")
    if not hmac.compare_digest(str(signed.get("hmac", "")), _hmac(key, by, digest)):
        return Check("sign-off", False, f"signed off in the name of {by}, but not with this key")
    return Check("sign-off", True, f"signed off by {by} with this key")


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and the bytes after it."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return header, raw[8 + length :]


def _digest(header: dict[str, Any], data: bytes) -> str:
    """Hash (hex) of everything in a file but the sign-off itself."""
    metadata = {k: v for k, v in header.get("__metadata__", {}).items() if k != KEY}
    text = json.dumps({**header, "__metadata__": metadata}, sort_keys=True)
    return hashlib.sha256(text.encode() + hashlib.sha256(data).digest()).hexdigest()


def _hmac(key: bytes, by: str, digest: str) -> str:
    return hmac.new(key, f"{by}\n{digest}".encode(), "sha256").hexdigest()
