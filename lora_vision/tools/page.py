"""report: the account of an adapter as one self-contained HTML page, with its pictures beside it as PNGs."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lora_vision.arguments import as_json
from lora_vision.sheet import sheet
from lora_vision.tools import places, plots
from lora_vision.tools.account import Account

if TYPE_CHECKING:
    from lora_vision.report import Inspection
    from lora_vision.tools.trials import Trials

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #5c5c5c; --paper: #fff; --line: #ddd; --stripe: #f6f6f6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --soft: #a8a8a8; --paper: #17191d; --line: #3a3d44; --stripe: #20232a }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; overflow-wrap: anywhere } p, ul { max-width: 46rem }
h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line) }
figure { margin: .8rem 0 1.6rem } figcaption { color: var(--soft); max-width: 46rem; margin-top: .3rem }
.wide { overflow-x: auto } img { display: block; background: #fff; border-radius: 4px; max-width: 100% }
@media (max-width: 50rem) { .wide img { max-width: none } }
table { border-collapse: collapse; font-size: .85rem } td, th { padding: .15rem .6rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: var(--stripe) }
.facts td { text-align: left; overflow-wrap: anywhere; vertical-align: top } .facts td:first-child { min-width: 7rem }
summary { cursor: pointer }
"""

_CAPTIONS = {
    "size": "How much each kind of layer is changed in each block; the mean where a block has several.",
    "effective-rank": "1: all of the change points one way. The file's rank is the most there can be.",
    "spectrum": "Mean of each block's layers. A curve that falls fast needs a low rank.",
    "effects": "How much of the way from the base's look to the adapter's is lost without a block, and how much of it "
    "that block goes alone. Below 0: it leads away.",
    "carriers": "The fewest blocks without which the look is gone: left out, and alone.",
    "leave-one-out": "Each block left out in turn.",
    "one-only": "Each block alone.",
    "steps": "1: the change is as large as the base's own prediction.",
    "where": "Dark red: where the adapter changes the prediction most; pale: where least.",
}


_NARROW = 700
"""Wider pictures (pixels) are not shrunk on a phone: they are pushed along."""


def write(
    folder: str | Path, inspection: Inspection, account: Account, found: Trials | None = None, base: str | None = None
) -> Path:
    """The page's path: FOLDER/index.html, with every picture also as a PNG and the numbers in report.json.

    Args:
        folder: Where to; made if it is missing.
        inspection: What the file says of itself.
        account: What its numbers say.
        found: What its blocks do to pictures, where a base was at hand.
        base: What that base is called.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {**account_pictures(account, base), **({} if found is None else trial_pictures(found))}
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    told = {"file": inspection.to_dict(), "account": account.to_dict()}
    told |= {} if found is None else {"trials": found.to_dict()}
    (folder / "report.json").write_text(as_json(told) + "\n")
    page = folder / "index.html"
    page.write_text(_page(inspection, account, found, base, pictures), encoding="utf-8")
    return page


def account_pictures(account: Account, base: str | None) -> dict[str, Image.Image]:
    """Heat maps and curves of the numbers, by file name."""
    rows, columns = places.blocks(account.layers), places.kinds(account.layers)
    unit = (
        f"percent of the weights of {Path(base or '').name}"
        if account.measured
        else "1000 x root mean square (no base given)"
    )
    energy = [(float(rank), account.energy(rank)) for rank in account.ranks]
    return {
        "size": plots.heat_map(account.cells(account.size), rows, columns, f"size of the change: {unit}"),
        "effective-rank": plots.heat_map(
            account.cells(lambda layer: layer.effective_rank),
            rows,
            columns,
            "effective rank: directions it is spread over",
        ),
        "spectrum": plots.lines(
            account.curves(), "singular values, relative to the first", "number", most=1.0, log=True
        ),
        "energy": plots.lines({"kept": energy}, "share of the squared norm that a lower rank keeps", "rank", most=1.0),
    }


def trial_pictures(found: Trials) -> dict[str, Image.Image]:
    """Contact sheets, effects, steps and maps, by file name."""
    prompts = found.prompts
    without = {f"without {block}": found.without[block] for block in found.blocks}
    only = {f"only {block}": found.only[block] for block in found.blocks}
    told = " + ".join(found.carriers)
    carried = {f"without {told}": found.gone, f"only {told}": found.carried}
    effects = {block: [found.lost(found.without[block]), 1 - found.lost(found.only[block])] for block in found.blocks}
    maps = [
        [plain, full, plots.over(full, where)]
        for plain, full, where in zip(found.base, found.full, found.maps, strict=True)
    ]
    names = ("lost when left out", "reached alone")
    return {
        "leave-one-out": _sheet(found, without),
        "one-only": _sheet(found, only),
        "carriers": _sheet(found, carried),
        "effects": plots.bars(effects, names, "share of the look that each block carries"),
        "steps": plots.lines(
            {"adapter": list(enumerate(found.steps.values(), 1))},
            "difference to the base's prediction, relative to it",
            "denoising step",
        ),
        "where": sheet(maps, prompts, ["base", "with the adapter", "where it acts"]),
    }


def _sheet(found: Trials, columns: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Prompts down; the base, the whole adapter and these columns across."""
    every = {"base": found.base, "whole adapter": found.full, **columns}
    lines = [[pictures[row] for pictures in every.values()] for row in range(len(found.prompts))]
    return sheet(lines, found.prompts, list(every))


def _page(
    inspection: Inspection,
    account: Account,
    found: Trials | None,
    base: str | None,
    pictures: Mapping[str, Image.Image],
) -> str:
    shown = {name: _embedded(name, picture) for name, picture in pictures.items()}
    parts = [f"<h1>{_text(Path(inspection.file).name)}</h1>"]
    parts += ["<ul>", *(f"<li>{_text(line)}</li>" for line in summary(account, found)), "</ul>"]
    parts += ["<h2>The file</h2>", _facts(inspection, base)]
    parts += ["<h2>Where the change lies</h2>", shown["size"], shown["effective-rank"]]
    parts += ["<h2>Singular values, and what a lower rank would have done</h2>", shown["spectrum"], shown["energy"]]
    parts.append(_energy_table(account))
    if found is not None:
        parts += [
            "<h2>What each block does to the picture</h2>",
            "<p>The same prompts and noise throughout. The look of a picture is the distribution of its colours and "
            "edges, wherever they are.</p>",
            *(shown[name] for name in ("effects", "carriers", "leave-one-out", "one-only")),
            "<h2>When and where it acts</h2>",
            "<p>At every denoising step the UNet is asked twice, with and without the adapter, for the same noisy "
            "picture.</p>",
            shown["steps"],
            shown["where"],
        ]
    parts += ["<h2>Every layer</h2>", _layers(account)]
    title = _text(Path(inspection.file).name)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{title}</title>"
    head = f"<head>{head}<style>{_STYLE}</style></head>"
    return f'<!doctype html>\n<html lang="en">{head}\n<body>{"".join(parts)}</body></html>\n'


def summary(account: Account, found: Trials | None) -> list[str]:
    """What the account comes down to, in sentences."""
    shares = {row: account.share(lambda n, row=row: places.block(n) == row) for row in places.blocks(account.layers)}  # type: ignore[misc]
    top = sorted(shares, key=lambda row: -shares[row])[:3]
    lines = [
        f"{len(account.layers)} layers; the text encoders hold {account.text_share:.0%} of the change.",
        f"Most of its squared norm lies in {', '.join(f'{row} ({shares[row]:.0%})' for row in top)}.",
        f"Rank {account.enough(0.95)} in every layer would have kept 95% of it, rank {account.enough(0.99)} would have "
        "kept 99%.",
    ]
    if found is not None:
        carriers = " and ".join(found.carriers)
        lines.append(
            f"The look lives in {carriers}: without, {found.lost(found.gone):.0%} of it is gone; "
            f"alone, they reach {max(0.0, 1 - found.lost(found.carried)):.0%} of it."
        )
        steps = list(found.steps.values())
        third = max(1, len(steps) // 3)
        early, late = (sum(part) / len(part) for part in (steps[:third], steps[-third:]))
        lines.append(
            f"It changes the prediction by {early:.0%} in the first third of the steps, {late:.0%} in the last."
        )
    if account.skipped:
        lines.append(f"{len(account.skipped)} layers are not counted ({next(iter(account.skipped.values()))}).")
    return lines


def _facts(inspection: Inspection, base: str | None) -> str:
    facts = {
        "file": f"{inspection.bytes / 1e6:.2f} MB, {inspection.format or 'unknown'} format",
        "algorithm": ", ".join(f"{name} ({count} layers)" for name, count in inspection.algorithms.items()),
        "made for": inspection.family or "unknown",
        "measured on": base or "no base",
        "trigger": ", ".join(inspection.trigger_words[:5]),
        **{name.removeprefix("ss_").replace("_", " "): value for name, value in inspection.settings.items()},
        "sha256": inspection.hashes.get("sha256", ""),
    }
    rows = (f"<tr><td>{_text(k)}</td><td>{_text(str(v)[:200])}</td></tr>" for k, v in facts.items() if v)
    return f'<table class="facts">{"".join(rows)}</table>'


def _energy_table(account: Account) -> str:
    head = "".join(f"<th>rank {rank}</th>" for rank in account.ranks)
    body = "".join(f"<td>{account.energy(rank):.1%}</td>" for rank in account.ranks)
    return f"<table><tr>{head}</tr><tr>{body}</tr></table>"


def _layers(account: Account) -> str:
    head = "<tr><th>layer</th><th>norm</th><th>of the weight</th><th>rank</th><th>effective rank</th></tr>"
    rows = []
    for name, layer in account.layers.items():
        relative = "" if layer.relative is None else f"{layer.relative:.2%}"
        cells = (f"{layer.norm:.3g}", relative, str(layer.rank or ""), f"{layer.effective_rank:.1f}")
        rows.append(f"<tr><td>{_text(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    table = f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'
    return f"<details><summary>{len(rows)} layers</summary>{table}</details>"


def _embedded(name: str, picture: Image.Image) -> str:
    """An HTML picture that holds its own bytes, with what it shows below it."""
    raw = io.BytesIO()
    picture.save(raw, "PNG", optimize=True)
    data = base64.b64encode(raw.getvalue()).decode()
    told = f"<figcaption>{_text(_CAPTIONS[name])}</figcaption>" if name in _CAPTIONS else ""
    shown = f'<img alt="{_text(name)}" src="data:image/png;base64,{data}">'
    shown = f'<div class="wide">{shown}</div>' if picture.width > _NARROW else shown
    return f"<figure>{shown}{told}</figure>"


def _text(words: Any) -> str:
    """Words as HTML text: an adapter's header is a stranger's."""
    return html.escape(str(words))
