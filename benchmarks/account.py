"""Is the account of an adapter true? Blocks that carry the style, and fights foretold, against judges.

    python benchmarks/account.py --work DIR night=night.safetensors duotone=duotone.safetensors --subject NAME=FILE

DIR is the folder of ``train_tiny_base.py`` (the judges). For each style adapter: the blocks that the report says carry
the look, and the judges' share of pictures in that style with the whole adapter, without those blocks, with those
alone, and, for comparison, without each other set of as many blocks (the mean and the lowest).

For each pair, both at full weight: what ``compare`` foretells, and what the judge measures of each style in it: the
loss of style accuracy, from what the adapter reaches alone, on every second noun (two halves) and on all. A subject
adapter has no style: the pair's measured loss is the mean over its styles.

What is foretold: ``fight``, one number of a pair from the weights; ``foretold``, with the base, a number for each of
the two (``clash.py``, on other prompts and noise); for a pair the mean over its styles, as the measured loss is.

Then rank correlations of each with the measured loss: over styles with a partner, all pairs, pairs of two styles, and
every choice of two of the styles with the subject. Beside them the ceiling: the two halves of the measurement with each
other. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from base_quality import draw_prompts, sheet
from judges import KIN, STYLES, Judges, judges
from style_quality import HELD_OUT
from torch import Tensor

import lora_vision as lv
from lora_vision import names
from lora_vision.base import RECIPES, load_base
from lora_vision.report import inspect
from lora_vision.tiny.subjects import caption
from lora_vision.tools import page, places
from lora_vision.tools.account import account
from lora_vision.tools.clash import LEAST, lost
from lora_vision.tools.commands import prompts_of
from lora_vision.tools.compare import compare
from lora_vision.tools.trials import Trials, patterns, trials

LOSSES = ("loss", "first half", "second half")


class Studio:
    """The base with every adapter loaded, and the judges."""

    def __init__(self, base: str, work: Path, files: dict[str, str], count: int, seed: int, steps: int) -> None:
        self.adapters = {name: lv.load_adapter(file) for name, file in files.items()}
        self.base = base
        self.pipe = load_base(base).pipeline()
        self.judge: Judges = judges(work, self.pipe.vae)
        self.nouns = [HELD_OUT[i * len(HELD_OUT) // count] for i in range(count)]
        self.seed, self.steps = seed, steps
        self.blend = lv.Blend(self.pipe)
        for name, adapter in self.adapters.items():
            self.blend.load(adapter, name, scale=0.0)
        self.rows: dict[str, Tensor] = {}

    def draw(self, label: str, scales: dict[str, Any]) -> Tensor:
        """Pictures [B, 3, 64, 64] of the nouns with these adapters; kept for the sheet."""
        if label in self.rows:
            return self.rows[label]
        self.blend.set(scales)
        prompts = [caption(noun) for noun in self.nouns]
        self.rows[label] = draw_prompts(self.pipe, prompts, self.seed, self.steps)
        return self.rows[label]

    @torch.no_grad()
    def hits(self, label: str, scales: dict[str, Any], style: str) -> Tensor:
        """Whether the judge calls each picture this style: [B] of 0 and 1."""
        called = self.judge.style.rank(self.draw(label, scales))[:, 0]
        return (KIN[called] == KIN[STYLES.index(style)]).float()

    def called(self, label: str, scales: dict[str, Any], style: str) -> float:
        """The share of pictures that the judge calls this style."""
        return float(self.hits(label, scales, style).mean())

    def less(self, name: str, blocks: tuple[str, ...]) -> dict[str, Any]:
        """Scales: the adapter without these blocks."""
        layers = tuple(self.adapters[name].layers)
        silent = {pattern: 0.0 for block in blocks for pattern in patterns(block, layers)}
        return {name: {"*": 1.0, **silent}}


def told_by_report(file: str, base: str, pages: Path | None) -> Trials:
    """What the report finds; its page is written into a folder beside the others."""
    adapter, own = lv.load_adapter(file), load_base(base)
    found = trials(own, adapter, prompts_of(adapter.metadata))
    if pages is not None:
        weights = {name: layer.weight for name, layer in names.index(own.parts).items()}
        page.write(pages / f"{Path(file).stem}-report", inspect(file), account(adapter, weights), found, base)
    return found


def carriers(studio: Studio, style: str, found: Trials, most: int) -> dict[str, Any]:
    """What the report says of one style's blocks, and what the judge says of it."""
    chosen, every = found.carriers, found.blocks
    others = tuple(block for block in every if block not in chosen)
    same_size = [blocks for blocks in itertools.combinations(every, len(chosen)) if blocks != chosen]
    rivals = {
        " + ".join(blocks): studio.called(f"{style} without {' + '.join(blocks)}", studio.less(style, blocks), style)
        for blocks in same_size[:: -(-len(same_size) // most)]
    }
    return {
        "carriers": list(chosen),
        "look gone without them": found.lost(found.gone),
        "look lost when left out": {block: found.lost(found.without[block]) for block in every},
        "called the style: base": studio.called("base", {}, style),
        "whole": studio.called(f"{style} whole", {style: 1.0}, style),
        "without the carriers": studio.called(f"{style} without carriers", studio.less(style, chosen), style),
        "carriers alone, without all others": studio.called(f"{style} carriers", studio.less(style, others), style),
        "without other sets of as many": rivals,
        "mean of these": sum(rivals.values()) / max(1, len(rivals)),
        "without each block": {
            block: studio.called(f"{style} without {block}", studio.less(style, (block,)), style) for block in every
        },
    }


def pairs(studio: Studio, styles: list[str]) -> dict[str, dict[str, Any]]:
    """For each pair with a style in it: what is foretold, and what each style in it loses."""
    found: dict[str, dict[str, Any]] = {}
    for pair in itertools.combinations(studio.adapters, 2):
        judged = [name for name in pair if name in styles]
        if not judged:
            continue
        two = {name: studio.adapters[name] for name in pair}
        prompts = {name: prompts_of(adapter.metadata, LEAST) for name, adapter in two.items()}
        foretold = dict(zip(pair, lost(load_base(studio.base), two, prompts), strict=True))
        both = (" + ".join(pair), dict.fromkeys(pair, 1.0))
        measured = {}
        for name in judged:
            gone = studio.hits(f"{name} whole", {name: 1.0}, name) - studio.hits(*both, name)
            losses = (float(part.mean()) for part in (gone, gone[::2], gone[1::2]))
            alone = studio.called(f"{name} whole", {name: 1.0}, name)
            measured[name] = {"alone": alone, "foretold": foretold[name], **dict(zip(LOSSES, losses, strict=True))}
        found[both[0]] = {
            "fight": compare(*two.values()).fight,
            **{key: sum(e[key] for e in measured.values()) / len(measured) for key in ("foretold", *LOSSES)},
            "styles": measured,
        }
        print(json.dumps({both[0]: found[both[0]]}), file=sys.stderr, flush=True)
    return found


def correlations(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The rank correlation of each prediction with the measured loss, and of its halves with each other."""
    every = list(found.values())
    two = [pair for pair in every if len(pair["styles"]) == 2]
    each = [style for pair in every for style in pair["styles"].values()]
    sets = {"styles with a partner": each, "pairs": every, "pairs of two styles": two}
    for name, pair in found.items():
        three = [
            pair,
            *(other for other in every if len(other["styles"]) == 1 and other["styles"].keys() < pair["styles"].keys()),
        ]
        if len(three) == 3:
            sets[f"{name}, each with the subject"] = three
    return {
        f"{len(rows)} {name}": {
            "halves": rank_correlation(*([row[half] for row in rows] for half in LOSSES[1:])),
            **{
                key: rank_correlation([row[key] for row in rows], [row["loss"] for row in rows])
                for key in ("fight", "foretold")
                if key in rows[0]
            },
        }
        for name, rows in sets.items()
    }


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's rank correlation (equal values share their mean rank)."""

    def ranks(values: list[float]) -> Tensor:
        column = torch.tensor(values)
        return ((column[:, None] > column).sum(1) + ((column[:, None] == column).sum(1) - 1) / 2).float()

    a, b = ranks(one), ranks(other)
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-9))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", metavar="STYLE=FILE")
    parser.add_argument("--subject", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--in-pairs", action="append", default=[], metavar="STYLE=FILE", help="a style for pairs only")
    parser.add_argument("--only-pairs", action="store_true", help="leave the blocks out")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--nouns", type=int, default=24)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rivals", type=int, default=8, help="how many other sets of blocks to try, at most")
    parser.add_argument(
        "--picture", type=Path, help="also write a sheet, a row for each measurement, and beside it the report pages"
    )
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    RECIPES["tiny"] = replace(RECIPES["tiny"], sample_steps=options.steps)  # for the report's own pictures too
    styles, others, subjects = (
        dict(entry.split("=", 1) for entry in entries)
        for entries in (options.adapters, options.in_pairs, options.subject)
    )
    files = styles | others | subjects
    studio = Studio(options.base, options.work, files, options.nouns, options.seed, options.steps)
    report: dict[str, Any] = {"blocks": places.blocks(n for a in studio.adapters.values() for n in a.layers)}
    report["pairs"] = pairs(studio, [*styles, *others])
    report["rank correlations"] = correlations(report["pairs"])
    for style in () if options.only_pairs else styles:
        found = told_by_report(styles[style], options.base, options.picture and options.picture.parent)
        report[style] = carriers(studio, style, found, options.rivals)
        print(json.dumps({style: report[style]}), file=sys.stderr, flush=True)
    if options.picture:
        shown = torch.cat([row[:: max(1, len(row) // 12)][:12] for row in studio.rows.values()])
        sheet(shown, 12).save(options.picture)
        report["rows of the picture"] = list(studio.rows)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
