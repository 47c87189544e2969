"""Writes Fashion-MNIST as class folders of PNG files; the bundled part is its first pictures of every class.

    apt-get install dataset-fashion-mnist
    python benchmarks/fashion.py --output DIR [--train 60 --test 100]

Debian's package (MIT, Zalando SE) holds 70,000 photographs of clothes, 28 x 28, grey, in ten classes.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()
FILES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """Returns the bytes of an idx file [N] or [N, 28, 28]."""
    with gzip.open(path, "rb") as file:
        content = file.read()
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def main() -> None:
    """Writes the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="the idx files")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=60, help="pictures of each class to learn from")
    parser.add_argument("--test", type=int, default=100, help="pictures of each class to measure on")
    options = parser.parse_args()
    for split, stem in FILES.items():
        images = read_idx(options.source / f"{stem}-images-idx3-ubyte.gz")
        labels = read_idx(options.source / f"{stem}-labels-idx1-ubyte.gz")
        for number, name in enumerate(CLASSES):
            folder = options.output / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for row in np.flatnonzero(labels == number)[: getattr(options, split)]:
                Image.fromarray(images[row]).save(folder / f"{row:05}.png", optimize=True)


if __name__ == "__main__":
    main()
