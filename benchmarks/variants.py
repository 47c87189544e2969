"""What each variant, loss weighting and optimizer makes of the same pictures in the same number of steps.

    python benchmarks/variants.py --work DIR [--style blueprint] [--steps 100] [--nouns 24] [--seeds 0] [ROW ...]

DIR is the folder of ``train_tiny_base.py`` (see ``style_quality.py``). Each row is ``lora-vision train style`` on one
bundled picture set with nothing set but what the row names, its rate the base's own, in fewer steps than the default,
so that what learns faster shows. Each adapter then draws held-out nouns, which the judges name. Rows that are done lie
in DIR/variants.jsonl and are not trained again; rows share nothing but the encoded pictures. Prints each row as it
comes, then a table of their means over the seeds, the best first: by style times subject, then by colour distance.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from base_quality import as_pixels, draw_prompts
from judges import judges, through
from style_quality import HELD_OUT, measure

import lora_vision as lv
from lora_vision.base import load_base
from lora_vision.config import StyleConfig
from lora_vision.tiny.dataset import packages
from lora_vision.tiny.render import draw
from lora_vision.tiny.subjects import caption
from train_scripts import train_style

ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "debiased": {"weighting": "debiased"},
    "all noise levels alike": {"weighting": "none"},
    "huber, snr": {"huber": "snr"},
    "dora": {"variant": "dora"},
    "pissa": {"variant": "pissa"},
    "lora+, 16": {"up_rate": 16.0},
    "lora+, 4": {"up_rate": 4.0},
    "a third of the rate": {"learning_rate": 1e-3},
    "twice the rate": {"learning_rate": 6e-3},
    "rslora": {"variant": "rslora"},
    "loha": {"variant": "loha"},
    "lokr": {"variant": "lokr"},
    "noise offset 0.1": {"noise_offset": 0.1},
    "input perturbation 0.1": {"input_perturbation": 0.1},
    "rank dropout 0.1": {"rank_dropout": 0.1},
    "ema 0.95": {"ema": 0.95},
    "huber, exponential": {"huber": "exponential"},
    "adafactor": {"optimizer": "adafactor"},
    "lion": {"optimizer": "lion"},
    "schedulefree": {"optimizer": "schedulefree"},
    "prodigy": {"optimizer": "prodigy"},
    "adamw8bit": {"optimizer": "adamw8bit"},
}
COLUMNS = ("style", "subject", "subject5", "colour distance", "held-out", "seconds")


def trained(row: str, style: str, steps: int, seed: int, work: Path) -> tuple[lv.Adapter, dict[str, float]]:
    """The adapter of a row, its loss on held-out pictures as the default weighs it, and its training's CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"steps": steps, "seed": seed, "validate_every": 0, "sample_every": 0, "checkpoint_every": 0}
        data = Path(lv.__file__).parent / "pictures" / style
        places = {"data": str(data), "output": f"{folder}/row.safetensors", "cache": str(work / "encoded")}
        began = time.process_time()
        path = train_style.run(StyleConfig(**places, **settings, tracker="none", **ROWS[row]))
        seconds = time.process_time() - began
        return lv.load_adapter(path), {"held-out": held_out(path, places, seed), "seconds": seconds}


def held_out(path: Path, places: dict[str, str], seed: int) -> float:
    """The default's loss of an adapter on the pictures that were held out."""
    config = StyleConfig(**places, seed=seed, tracker="none")
    accelerator = train_style.make_accelerator(config)
    base = load_base("tiny")
    config = config.filled(base.recipe)
    schedule = train_style.NoiseSchedule(base.scheduler)
    pictures = train_style.to_learn_from(config)
    _, batches = train_style.encoded(config, base, pictures, schedule, accelerator)
    loss = train_style.DiffusionLoss(base.unet, schedule, objective=config)
    lv.attach(base.parts, lv.load_adapter(path))
    with train_style.torch.no_grad():
        return sum(len(batch) * float(loss(batch)) for batch in batches) / sum(map(len, batches))


def main() -> None:
    """Train and judge what is not there yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}", metavar="ROW")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--style", default="blueprint")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--nouns", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    record = given.work / "variants.jsonl"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    pipe = load_base("tiny").pipeline()
    folder, judge = packages(given.work), judges(given.work, pipe.vae)
    nouns = [HELD_OUT[i * len(HELD_OUT) // given.nouns] for i in range(given.nouns)]
    truth = through(pipe.vae, as_pixels([p for n in nouns if (p := draw(folder, n, given.style)) is not None]))
    rows = []
    for seed in given.seeds:
        for row in given.rows or ROWS:
            key = {"row": row, "learnt": given.style, "steps": given.steps, "nouns": given.nouns, "seed": seed}
            found = next((each for each in done if key.items() <= each.items()), None)
            if found is None:
                adapter, told = trained(row, given.style, given.steps, seed, given.work)
                blend = lv.Blend(pipe)
                blend.load(adapter, name="row")
                made = draw_prompts(pipe, [caption(noun) for noun in nouns], 7 + seed)
                blend.detach()
                found = {**key, **measure(made, truth, judge, given.style, nouns), **told}
                with record.open("a") as file:
                    file.write(json.dumps(found) + "\n")
            rows.append(found)
            print(" | ".join([f"{row:<24} {seed}", *(f"{found[name]:.3f}" for name in COLUMNS)]), flush=True)
    print("\n".join(table(rows)))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: the mean of each row over its seeds, and of its score and colours the spread too."""
    names = list(dict.fromkeys(each["row"] for each in rows))
    found = {name: [each for each in rows if each["row"] == name] for name in names}
    mean = {name: {c: fmean(each[c] for each in found[name]) for c in COLUMNS} for name in names}
    scores = {name: [each["style"] * each["subject"] for each in found[name]] for name in names}
    names.sort(key=lambda name: (-round(fmean(scores[name]), 6), mean[name]["colour distance"]))
    lines = [f"| | score | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 2)}"]
    for name in names:
        distances = [each["colour distance"] for each in found[name]]
        cells = {c: f"{mean[name][c]:.3f}" for c in COLUMNS} | {"seconds": f"{mean[name]['seconds']:.0f}"}
        cells["colour distance"] += f" ± {pstdev(distances):.3f}"
        score = f"{fmean(scores[name]):.3f} ± {pstdev(scores[name]):.3f}"
        lines.append(f"| {name} | {score} | {' | '.join(cells.values())} |")
    return lines


if __name__ == "__main__":
    main()
