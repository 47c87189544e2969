"""Settings of the tools' commands: the text below a field is its help line, as in config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stored = Literal["fp32", "bf16", "fp16"]
Format = Literal["kohya", "diffusers", "peft"]


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Get an adapter out of a fine-tuned checkpoint and the base it was tuned from."""

    tuned: str
    """The fine-tuned model: a diffusers folder, a single .safetensors checkpoint or a Hub id."""
    base: str
    """The model it was tuned from."""
    output: str = "extracted.safetensors"
    """The adapter file to write."""
    rank: str = "auto"
    """Rank of every layer, or auto: the directions that stand out of the noise, at most 128."""
    base_config: str | None = None
    """For two single checkpoints without network: a diffusers folder of the same kind of model."""
    clamp: float | None = None
    """Cut the factors' numbers at this quantile of their size, as kohya does at 0.99 (default: nothing is cut)."""
    vectors: bool = False
    """Also store changes of biases and norms, whole; not every tool reads these."""
    precision: Stored = "fp32"
    """Type of the stored numbers."""
    format: Format = "kohya"
    """Spelling of the adapter file."""

    def __post_init__(self) -> None:
        if self.rank != "auto" and not (self.rank.isdecimal() and int(self.rank) > 0):
            raise ValueError(f"--rank {self.rank}: auto or a number of at least 1 is needed")


@dataclass(frozen=True, kw_only=True)
class ResizeConfig:
    """Write an adapter with smaller ranks, and tell what that costs."""

    file: str
    """Adapter file, or PEFT folder."""
    output: str = "resized.safetensors"
    """The adapter file to write."""
    rank: int | None = None
    """Largest rank of a layer; alone, or as a cap on the others."""
    energy: float | None = None
    """Keep this share of each layer's squared norm, as in 0.95."""
    size: str | None = None
    """Size of the file, as in 5MB; ranks go where they keep most."""
    dynamic_method: Literal["sv_ratio", "sv_cumulative", "sv_fro"] | None = None
    """Choose each layer's rank as kohya does, by --dynamic-param."""
    dynamic_param: float | None = None
    """The ratio (sv_ratio) or share (sv_cumulative, sv_fro) to reach."""
    precision: Stored | None = None
    """Type of the stored numbers (default: as they are)."""
    format: Format = "kohya"
    """Spelling of the adapter file."""

    def __post_init__(self) -> None:
        ways = [name for name in ("energy", "size", "dynamic_method") if getattr(self, name) is not None]
        if len(ways) > 1 or (not ways and self.rank is None):
            raise ValueError(
                "one of --rank, --energy, --size and --dynamic-method is needed (--rank may cap the others)"
            )
        if (self.dynamic_method is None) != (self.dynamic_param is None):
            raise ValueError("--dynamic-method and --dynamic-param go together")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"--rank {self.rank}: at least 1 is needed")


@dataclass(frozen=True, kw_only=True)
class BakeConfig:
    """Write adapters into a full checkpoint, for tools that know no adapters."""

    adapter: tuple[str, ...]
    """Adapter file and, after a colon, its scale: ink.safetensors:0.8 (scale 1 if left out)."""
    output: str
    """A name ending in .safetensors (a single file that A1111 and ComfyUI open), or a diffusers folder."""
    base: str = "tiny"
    """Stable Diffusion to write into: tiny, a diffusers folder, a single .safetensors checkpoint or a Hub id."""
    base_config: str | None = None
    """For a single checkpoint without network: a diffusers folder of the same kind of model."""
    precision: Stored = "fp32"
    """Type of the stored weights; sums are computed in fp32 and rounded once."""

    def __post_init__(self) -> None:
        if not self.adapter:
            raise ValueError("--adapter is missing: nothing to bake")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Tell how two adapters agree, how much they will fight, and at which weights both are equally large."""

    a: str
    """One adapter file."""
    b: str
    """The other."""
    picture: str | None = None
    """Also draw it, into this PNG file."""
    base: str | None = None
    """Also draw with this base (8 sets of 12 pictures), and say whose look survives: tiny, a folder, a checkpoint or a
    Hub id. DoRA and IA3, which multiply its weights, can only be compared with it."""
    base_config: str | None = None
    """For a single checkpoint without network: a diffusers folder of the same kind of model."""

    def __post_init__(self) -> None:
        if self.picture is not None and not self.picture.lower().endswith(".png"):
            raise ValueError(f"--picture {self.picture}: a name ending in .png is needed")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Give an account of an adapter on one HTML page: where its change lies, what each block does to the picture."""

    file: str
    """Adapter file, or PEFT folder."""
    output: str | None = None
    """Folder to write (default: the file's name and -report, in the current folder)."""
    base: str | None = None
    """Also measure against this base, and draw what each block does: tiny, a folder, a checkpoint or a Hub id."""
    base_config: str | None = None
    """For a single checkpoint without network: a diffusers folder of the same kind of model."""
    prompts: tuple[str, ...] = ()
    """What to draw (default: captions the adapter was trained on)."""
    seed: int = 0
    """Seed of the pictures."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check an adapter file: hashes, finite values, shapes, the base it was made for, signed-off metadata."""

    file: str
    """Adapter file."""
    base: str | None = None
    """Also check that it fits this base, and was made for it."""
    base_config: str | None = None
    """For a single checkpoint without network: a diffusers folder of the same kind of model."""
    sign_off: str | None = None
    """If all is well, sign the file off under this name: later changes of any byte are found."""
    key: str | None = None
    """File with a secret: sign with it, or check that the signature was made with it."""


@dataclass(frozen=True, kw_only=True)
class HistoryConfig:
    """List the adapters of a folder: how each was made, of what, from which pictures, with what scores."""

    folder: str
    """Folder with adapter files; folders inside it are searched too."""
    diff: tuple[str, ...] = ()
    """Show the settings in which two of them differ; give it twice."""

    def __post_init__(self) -> None:
        if len(self.diff) not in (0, 2):
            raise ValueError(f"--diff was given {len(self.diff)} times: two files are needed")


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """Write the model card of an adapter, as the Hub shows it."""

    file: str
    """Adapter file."""
    output: str | None = None
    """The file to write (default: README.md in the training folder beside the file, else beside the file)."""
    licence: str | None = None
    """Licence of the pictures it was trained on, as in cc-by-4.0."""


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Upload an adapter with its model card and samples to the Hugging Face Hub."""

    file: str
    """Adapter file."""
    repo: str
    """Where to: USER/NAME; it is made if there is none."""
    licence: str | None = None
    """Licence of the pictures it was trained on, as in cc-by-4.0."""
    private: bool = False
    """Make a new repository private."""
    dry_run: bool = False
    """Only tell what would be uploaded."""
