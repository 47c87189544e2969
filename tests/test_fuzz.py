"""Mutated files end in AdapterError or a correct load: no other exception, no crash, not much memory, not much time.

The long run is a command: `python tests/test_fuzz.py 20000 [SEED]`.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import every_kind

from lora_vision.errors import AdapterError
from lora_vision.files import load_adapter, save_adapter
from lora_vision.report import inspect

SECONDS, MEMORY = 2.0, 64 << 20  # beyond three times the file, what the allocator may round up to
Pairs = list[tuple[str, Any]]


class Mutator:
    """Draws one broken file after another from good ones."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.samples = [path.read_bytes() for path in _samples(folder)]
        self.ways = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("do_")]

    def draw(self) -> tuple[str, bytes]:
        """Returns (what was done, the file)."""
        whole = self.random.choice(self.samples)
        ways = self.random.choices(self.ways, k=self.random.choice((1, 1, 1, 2, 3)))
        for way in ways:
            whole = way(whole)
        return " + ".join(way.__name__ for way in ways), whole

    def _split(self, whole: bytes) -> tuple[Pairs, bytes]:
        """Returns (header as pairs, data), or ([], all of it) where an earlier mutation left no header."""
        try:
            (length,) = struct.unpack("<Q", whole[:8])
            return json.loads(whole[8 : 8 + length], object_pairs_hook=list), whole[8 + length :]
        except (ValueError, struct.error, OverflowError, RecursionError):
            return [], whole

    def _join(self, pairs: Pairs, data: bytes) -> bytes:
        def write(value: Any) -> str:
            if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
                return "{" + ",".join(f"{json.dumps(key)}:{write(item)}" for key, item in value) + "}"
            return json.dumps(value, default=str)

        text = write(pairs).encode()
        return struct.pack("<Q", len(text)) + text + data

    def _entry(self, pairs: Pairs) -> tuple[int, dict[str, Any]]:
        places = [n for n, (key, value) in enumerate(pairs) if key != "__metadata__" and isinstance(value, list)]
        place = self.random.choice(places)
        return place, dict(pairs[place][1])

    def _edit(self, whole: bytes, field: str, value: Any) -> bytes:
        pairs, data = self._split(whole)
        try:
            place, entry = self._entry(pairs)
            entry[field] = value(entry[field]) if callable(value) else value
        except (IndexError, KeyError, TypeError, ValueError):
            return whole
        pairs[place] = (pairs[place][0], list(entry.items()))
        return self._join(pairs, data)

    def _rename(self, whole: bytes, change: Any) -> bytes:
        pairs, data = self._split(whole)
        if not pairs or not all(isinstance(pair, tuple) for pair in pairs):
            return whole
        place = self.random.randrange(len(pairs))
        pairs[place] = (change(pairs[place][0]), pairs[place][1])
        return self._join(pairs, data)

    def do_cut(self, whole: bytes) -> bytes:
        return whole[: self.random.randrange(len(whole) + 1)]

    def do_flip_bytes(self, whole: bytes) -> bytes:
        changed = bytearray(whole)
        for _ in range(self.random.choice((1, 4, 64)) if changed else 0):
            changed[self.random.randrange(len(changed))] = self.random.randrange(256)
        return bytes(changed)

    def do_flip_header(self, whole: bytes) -> bytes:
        changed = bytearray(whole)
        for _ in range(self.random.choice((1, 3)) if len(changed) > 9 else 0):
            changed[8 + self.random.randrange(min(2000, len(changed) - 8))] = self.random.choice(
                b'{}[]",:0919-eE\\\x00\xff'
            )
        return bytes(changed)

    def do_header_length(self, whole: bytes) -> bytes:
        length = self.random.choice((0, 1, 2, len(whole), len(whole) - 8, 2**31, 2**63, 2**64 - 1, 100_000_000))
        return struct.pack("<Q", length & (2**64 - 1)) + whole[8:]

    def do_append(self, whole: bytes) -> bytes:
        return whole + self.random.randbytes(self.random.choice((1, 8, 4096)))

    def do_offsets(self, whole: bytes) -> bytes:
        lies = ([0, 0], [0, 2**63], [-4, 4], [8, 4], [0, 1.5], [0], "0", None, [2**70, 2**70], [True, False])
        shift = lambda old: [old[0] + 4, old[1] + 4]  # noqa: E731
        return self._edit(whole, "data_offsets", self.random.choice((*lies, shift)))

    def do_shape(self, whole: bytes) -> bytes:
        lies = ([], [0], [-1, -4], [2**32, 2**32], [1] * 9, [1] * 1000, "4", None, [4.0, 4], [[4], 4], [2**64])
        turn = lambda old: list(reversed(old))  # noqa: E731
        return self._edit(
            whole, "shape", self.random.choice((*lies, turn, lambda old: [*old, 1], lambda old: [1, *old]))
        )

    def do_dtype(self, whole: bytes) -> bytes:
        return self._edit(
            whole,
            "dtype",
            self.random.choice(("F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "X", "", 3, None, "I64")),
        )

    def do_twin(self, whole: bytes) -> bytes:
        pairs, data = self._split(whole)
        return self._join([*pairs, self.random.choice(pairs)], data) if pairs else whole

    def do_overlap(self, whole: bytes) -> bytes:
        pairs, data = self._split(whole)
        try:
            (_, first), (two, second) = self._entry(pairs), self._entry(pairs)
            second["data_offsets"] = first["data_offsets"]
        except (IndexError, KeyError, TypeError, ValueError):
            return whole
        pairs[two] = (pairs[two][0], list(second.items()))
        return self._join(pairs, data)

    def do_drop(self, whole: bytes) -> bytes:
        pairs, data = self._split(whole)
        if pairs:
            pairs.pop(self.random.randrange(len(pairs)))
        return self._join(pairs, data)

    def do_names(self, whole: bytes) -> bytes:
        names = (
            "../../etc/passwd",
            "/abs.lora_A.weight",
            "\u202eunet.x.alpha",
            "",
            ".",
            "unet.",
            "a" * 70_000,
            "\0",
            "unet:9:up",
        )
        names += (
            "lora_unet_.alpha",
            "base_model.model.x.lora_A.weight",
            "bundle_emb.x.clip_g",
            "text_encoder.x.weight",
            "\ud800",
        )
        return self._rename(whole, lambda old: self.random.choice(names))

    def do_leaf(self, whole: bytes) -> bytes:
        leaves = "alpha lora_mid.weight dora_scale diff hada_w1_a lokr_w1 lokr_t2 weight on_input w_norm lora_B.bias"
        return self._rename(whole, lambda old: old.rpartition(".lora_")[0] + "." + self.random.choice(leaves.split()))

    def do_metadata(self, whole: bytes) -> bytes:
        deep = "[" * 100_000
        strings = {
            "lora_adapter_metadata": ("{", "[]", "3", '{"unet.r": "x"}', '{"unet.r": {}, "unet.lora_alpha": []}', deep)
        }
        strings["lora_vision.alpha"] = ("{", "[]", '{"unet.x": 1}', deep)
        strings["unet"] = ("[", '["CLIPAttention"]', "3")
        strings["adapter_config"] = (
            "{}",
            '{"peft_type": "LORA", "r": 0}',
            '{"peft_type": "LORA", "alpha_pattern": {"(": 1}}',
        )
        key = self.random.choice(list(strings))
        pairs, data = self._split(whole)
        pairs = [pair for pair in pairs if isinstance(pair, tuple) and pair[0] != "__metadata__"]
        value: Any = self.random.choice(([(key, self.random.choice(strings[key]))], [("x", 3)], 4, None, "s"))
        return self._join([("__metadata__", value), *pairs], data)

    def do_numbers(self, whole: bytes) -> bytes:
        """NaN, infinities, zeros, huge and negative numbers: alphas among them."""
        pairs, data = self._split(whole)
        changed = bytearray(data)
        value = self.random.choice((float("nan"), float("inf"), 0.0, -3.0, 3e38, -1e-40))
        for _ in range(20 if len(changed) > 4 else 0):
            place = 4 * self.random.randrange(len(changed) // 4)
            changed[place : place + 4] = struct.pack("<f", value)
        return self._join(pairs, bytes(changed)) if pairs else whole

    def do_many(self, whole: bytes) -> bytes:
        entry = [("dtype", "F32"), ("shape", [0]), ("data_offsets", [0, 0])]
        pairs, data = self._split(whole)
        return self._join([*pairs, *((f"k{n}", entry) for n in range(self.random.choice((10, 3000))))], data)

    def do_nest(self, whole: bytes) -> bytes:
        text = b'{"a":' * 50_000
        return struct.pack("<Q", len(text)) + text + whole

    def do_other_file(self, whole: bytes) -> bytes:
        heads = (
            b"",
            b"{}",
            b"PK\x03\x04",
            b"\x80\x02}q",
            b"<!DOCTYPE html>",
            b"version https://git-lfs.github.com/spec/v1\n",
        )
        return self.random.choice(heads)


def _samples(folder: Path) -> list[Path]:
    kinds = every_kind()
    chosen = ["lora", "locon", "tucker", "loha", "lokr", "dora-input", "ia3", "full", "norm", "embedding", "sdxl"]
    paths = [save_adapter(kinds[kind], folder / f"{kind}.safetensors") for kind in chosen]
    paths.append(save_adapter(kinds["lora-ranks"], folder / "diffusers.safetensors", "diffusers"))
    paths.append(save_adapter(kinds["vit"], folder / "vit" / "peft.safetensors", "peft"))
    return paths


def check(whole: bytes, path: Path) -> str:
    """Returns how a file ended; fails on any other exception, on much memory or on much time."""
    path.write_bytes(whole)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        adapter = load_adapter(path)
        assert adapter.layers or adapter.extras
        for factors in adapter.layers.values():
            if not factors.needs_base and getattr(factors, "diff", factors) is not None:
                assert factors.delta().dtype == torch.float32
        end = "loaded"
    except AdapterError as error:
        assert str(error).isprintable() or "\n" in str(error)
        end = "refused"
    try:
        str(inspect(path))
    except AdapterError:
        assert end == "refused"
    assert time.process_time() - start < SECONDS, "slow"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 3 * len(whole) + MEMORY, f"{grown} bytes for a file of {len(whole)}"
    return end


def run(count: int, seed: int, folder: Path) -> Counter[str]:
    mutator = Mutator(seed, folder)
    ends: Counter[str] = Counter()
    for number in range(count):
        what, whole = mutator.draw()
        path = folder / "broken.safetensors"
        try:
            ends[check(whole, path)] += 1
        except BaseException:
            sys.stderr.write(f"file {number} of seed {seed}: {what}, kept as {path}\n")
            raise
    return ends


@pytest.mark.parametrize("seed", [0])
def test_mutated_files_are_refused_or_loaded(seed: int, tmp_path: Path) -> None:
    ends = run(400, seed, tmp_path)
    assert ends["refused"] > 100 and ends["loaded"] > 10


if __name__ == "__main__":
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    begin = time.process_time()
    outcome = run(count, seed, Path(tempfile.mkdtemp()))
    sys.stdout.write(f"{dict(outcome)} in {time.process_time() - begin:.0f} s of CPU\n")
