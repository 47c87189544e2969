"""The model card of an adapter (README.md in the Hub's format), and the upload of both to the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_vision import __version__, files, lineage
from lora_vision.errors import AdapterError, LoraVisionError

CARD = "README.md"
LICENCES = {
    "apache-2.0": ("apache license", "version 2.0"),
    "mit": ("mit license",),
    "cc0-1.0": ("cc0 1.0",),
    "cc-by-sa-4.0": ("attribution-sharealike 4.0",),
    "cc-by-nc-4.0": ("attribution-noncommercial 4.0",),
    "cc-by-4.0": ("attribution 4.0",),
}
"""The Hub's word for a licence, and what its text says near the beginning."""

_SHOWN = ("rank", "alpha", "targets", "steps", "batch_size", "learning_rate", "resolution", "snr_gamma", "train_text")


def training_folder(file: str | Path) -> Path:
    """The folder that training leaves beside an adapter file."""
    file = Path(file)
    return file.with_name(f"{file.stem}-training")


def write_card(file: str | Path, licence: str | None = None, output: str | Path | None = None) -> Path:
    """The card's path: by default README.md in the training folder beside the adapter, where its pictures lie.

    Args:
        file: The adapter file.
        licence: Of the pictures it was trained on, in the Hub's words; None: not known.
        output: Where to write instead.

    Raises:
        AdapterError: There is no such adapter, or a README.md that is no card of ours is in the way.
    """
    file = files.member(file)
    folder = training_folder(file)
    path = Path(output) if output is not None else (folder if folder.is_dir() else file.parent) / CARD
    if output is None and path.is_file() and "lora_vision" not in path.read_text(encoding="utf-8"):
        raise AdapterError(f"{path} is there and no model card; name another file with --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(card(file, licence), encoding="utf-8")
    return path


def card(file: str | Path, licence: str | None = None) -> str:
    """The text of an adapter's model card; its pictures are named as they lie in the training folder."""
    header, metadata = files.header(file)
    file, folder = files.member(file), training_folder(file)
    sees = any(name.startswith("vit.") for name in files.understood(header.entries, metadata)[1].layers)
    base, trigger = metadata.get("lora_vision.base", "an unknown base"), metadata.get("lora_vision.trigger", "")
    task, family = ("image-classification", "vision-transformer") if sees else ("text-to-image", "stable-diffusion")
    front = {
        "library_name": "lora_vision" if sees else "diffusers",
        "pipeline_tag": task,
        "tags": ["lora", task, family, "lora_vision"],
        "license": licence or "unknown",
        **({"base_model": base} if base.count("/") == 1 else {}),
        **({"instance_prompt": trigger} if trigger else {}),
    }
    sheets = {"samples.png": "Samples over the training steps", "loss.png": "Training and held-out loss"}
    shown = [f"![{about}]({name})\n\n*{about}.*" for name, about in sheets.items() if (folder / name).is_file()]
    how = f" Put `{trigger}` into the prompt." if trigger else "" if sees else " No trigger word is needed."
    what = "a vision transformer" if sees else base
    parts = [
        "---\n" + "\n".join(f"{key}: {_yaml(value)}" for key, value in front.items()) + "\n---",
        f"# {file.stem}",
        f"A LoRA adapter for {what}, made with lora_vision {metadata.get('lora_vision.version', __version__)}.{how}",
        *shown,
        "## Use",
        f"```\nlora-vision classify picture.png --adapter {file.name}\n```" if sees else _use(file, base, trigger),
        "## How it was made",
        _table(_facts(file, metadata)),
        "## Licence of the training pictures",
        f"`{licence}`" if licence else "Not stated. Whoever publishes this file should find out and say so here.",
    ]
    return "\n\n".join(parts) + "\n"


def licence_of(folder: str | Path) -> str | None:
    """The Hub's word for the licence whose text lies in a folder of pictures, or None where none is recognised."""
    for file in sorted(Path(folder).glob("*")):
        if file.is_file() and file.stem.lower() in ("license", "licence", "copying"):
            text = " ".join(file.read_text(encoding="utf-8", errors="replace")[:2000].lower().split())
            return next((word for word, signs in LICENCES.items() if all(sign in text for sign in signs)), None)
    return None


def bundle(file: str | Path, licence: str | None = None) -> dict[str, Path | bytes]:
    """What is uploaded: name in the repository to a file, or to the card's bytes."""
    file = files.member(file)
    folder = training_folder(file)
    found: dict[str, Path | bytes] = {file.name: file}
    found |= {name: folder / name for name in ("samples.png", "loss.png") if (folder / name).is_file()}
    written = folder / CARD
    kept = written.is_file() and licence is None
    return {CARD: written if kept else card(file, licence).encode(), **found}


def check_repo(repo: str) -> None:
    """Nothing, if a repository can be called that.

    Raises:
        LoraVisionError: It cannot.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise LoraVisionError(f"{repo!r} is no USER/NAME: {error}") from error
    if repo.count("/") != 1:
        raise LoraVisionError(f"{repo!r} is no repository; expected USER/NAME")


def push(file: str | Path, repo: str, *, licence: str | None = None, private: bool = False) -> str:
    """The address of the commit by which an adapter, its card and its pictures were uploaded.

    The token is that of the user's own `hf auth login` or HF_TOKEN.

    Args:
        file: The adapter file.
        repo: USER/NAME, made if there is none.
        licence: Of the training pictures.
        private: Whether a new repository is private.

    Raises:
        AdapterError: There is no such adapter.
        LoraVisionError: The Hub cannot be reached, or refuses.
    """
    check_repo(repo)
    found = bundle(file, licence)
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise LoraVisionError(f"to upload to {repo} you have to be logged in: `hf auth login` once, or set HF_TOKEN")
    operations = [CommitOperationAdd(name, content) for name, content in found.items()]
    api = HfApi(library_name="lora_vision", library_version=__version__)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.create_commit(repo, operations, commit_message=f"Upload {Path(file).name} with lora_vision")
    except Exception as error:  # the client raises what its HTTP library of the day raises
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoraVisionError(
            f"the Hub did not take {repo}: {told}; is there a network, and may you write there?"
        ) from error
    return str(done.commit_url)


def _facts(file: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """What the header tells of how a file came about."""
    try:
        settings = dict(json.loads(metadata["lora_vision.config"]))
    except (KeyError, ValueError, TypeError):
        settings = {}
    told = lineage.read(metadata)
    facts: dict[str, Any] = {name.replace("_", " "): settings.get(name) for name in _SHOWN}
    facts |= {
        "pictures": metadata.get("lora_vision.pictures"),
        "fingerprint of the pictures": metadata.get("lora_vision.data_fingerprint", "")[:16],
        "fingerprint of the base": metadata.get("lora_vision.base_fingerprint", "")[:16],
        "made by": told and f"{told.how} of {', '.join(str(parent.get('file')) for parent in told.parents)}",
        "size": f"{file.stat().st_size / 1e6:.2f} MB",
        "sha256": lineage.sha256_of(file),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _use(file: Path, base: str, trigger: str) -> str:
    prompt = json.dumps(f"{trigger}, a fox" if trigger else "a fox")
    return (
        f"```\nlora-vision generate {prompt} --base {base} --adapter {file.name}\n```\n\n"
        f'or in diffusers `pipe.load_lora_weights("{file.name}")`; A1111 and ComfyUI load the file as it is.'
    )


def _table(facts: Mapping[str, str]) -> str:
    rows = [f"| {name} | {' '.join(value.replace('|', ' ').split())} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _yaml(value: Any) -> str:
    """A value as YAML, of which JSON is a part; plain words stay bare, as people write them."""
    plain = isinstance(value, str) and value.replace("-", "").replace("_", "").replace(".", "").isalnum()
    return value if plain and not value[0].isdigit() else json.dumps(value, ensure_ascii=False)
