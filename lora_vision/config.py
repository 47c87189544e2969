"""Settings: frozen dataclasses, one per concern, free of torch.

The text below a field is its help line: the command line and the configuration file are built from these classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Self

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class ChangeConfig:
    """What kind of change a layer learns."""

    variant: Literal["lora", "rslora", "pissa", "dora", "loha", "lokr"] = "lora"
    """Kind of change: lora; rslora (scaled by alpha / sqrt(rank)); pissa (lora that starts from the principal values);
    dora; loha; lokr."""
    alpha: float | None = None
    """The change is multiplied by alpha / rank (default: the rank, hence by 1)."""
    layers: tuple[str, ...] = ()
    """Other numbers for some layers, as "conv:rank=8,alpha=4" or "unet.up_blocks.*:rate=0.5": rate multiplies the
    learning rate; where several cover a layer, the last one counts."""
    up_rate: float = 1.0
    """Learning rate of the up matrices over that of the down matrices (LoRA+; 16 is its authors' choice). Where no
    learning rate is given, that of the down matrices falls, so that their product stays."""
    rank_dropout: float = 0.0
    """Share of the ranks left out in each micro-batch."""
    module_dropout: float = 0.0
    """Share of the layers left out in each micro-batch."""

    def rate_of_change(self, lora: float) -> float:
        """The learning rate of this kind of change where plain LoRA's would be `lora`: benchmarks/RESULTS.md."""
        return lora * {"pissa": 1 / 3, "loha": 1 / 2}.get(self.variant, 1.0) / math.sqrt(self.up_rate)


@dataclass(frozen=True, kw_only=True)
class LoraConfig(ChangeConfig):
    """Which layers get a trainable change, of what kind and size."""

    rank: int = 16
    """Rank of each layer's change."""
    targets: str | tuple[str, ...] = "attention"
    """Layers to adapt: named sets joined by + ("attention+ff") or globs over layer names."""
    seed: int = 0
    """Seed of the first values."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that depend on the base: what a training run takes for everything the user leaves open."""

    rank: int
    """Rank of each layer's change."""
    targets: str
    """Layers to adapt."""
    learning_rate: float
    """Highest learning rate."""
    steps: int
    """Optimizer steps."""
    batch_size: int
    """Pictures in one micro-batch."""
    resolution: int
    """Side of the square training pictures in pixels."""
    sample_steps: int
    """Denoising steps of a sample picture."""
    guidance: float
    """Classifier-free guidance of a sample picture."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The training loop: how long, how fast, how often it looks up."""

    steps: int | None = None
    """Optimizer steps (default: the base's own)."""
    batch_size: int | None = None
    """Pictures in one micro-batch of one process (default: the base's own)."""
    accumulate: int = 1
    """Micro-batches whose gradients are added up before one optimizer step."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy", "lion", "schedulefree"] = "adamw"
    """What turns gradients into steps; prodigy finds the learning rate, schedulefree needs no length of the run known
    beforehand. All but adamw and adafactor want their libraries: pip install 'lora-vision[optim]'."""
    learning_rate: float | None = None
    """Highest learning rate; it warms up to it and falls along a cosine to zero (default: the base's own; for prodigy
    1, for lion a fifth)."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip: float = 1.0
    """Largest norm of all gradients together; 0 leaves them alone."""
    ema: float = 0.0
    """Validate, draw and keep a running mean of the weights with this decay (0.99 for hundreds of steps, 0.999 for
    thousands); 0 keeps the weights themselves."""
    precision: Precision = "auto"
    """Arithmetic of the frozen base; adapter weights are always fp32 (auto: fp32 on a CPU, else bf16 or fp16)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, but needs far less memory."""
    seed: int = 0
    """Seed of everything random: same seed, same machine, same file."""
    validate_every: int = 50
    """Steps between two looks at the held-out pictures; 0 never looks."""
    sample_every: int | None = None
    """Steps between two rows of sample pictures; 0 draws none (default: a quarter of the steps)."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; 0 writes none."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the adapter: those after the last step, or those best on the held-out pictures."""
    patience: int = 0
    """Looks at the held-out pictures without an improvement after which training stops; 0 never stops."""
    tracker: str = "auto"
    """Where the losses are reported while they come: a tracker that Accelerate knows (tensorboard, wandb, ...), or none
    (auto: TensorBoard where it is installed)."""
    resume: bool = False
    """Continue from the last checkpoint of this output instead of starting over."""

    def rate_of_optimizer(self, adamw: float) -> float:
        """The learning rate of this optimizer where AdamW's would be `adamw`.

        Lion's is 3 to 10 times lower (Chen et al. 2023, arXiv 2302.06675, sec. 5); Prodigy's is a multiplier.
        """
        return {"prodigy": 1.0, "lion": adamw / 5}.get(self.optimizer, adamw)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt from: pictures, captions, and how they are shown."""

    data: str
    """Folder of pictures (png, jpg, webp), captions in NAME.txt beside each or in metadata.jsonl; its subfolders called
    as 10_fox hold concepts: shown 10 times in each pass, "fox" where a caption is missing."""
    trigger: str | None = None
    """Words put before every caption (or used as the caption) that will call the style."""
    resolution: int | None = None
    """Side of a square picture in pixels; others keep their shape and about its area (default: the base's own)."""
    upscale: bool = False
    """Enlarge pictures smaller than the resolution instead of training them at their own size."""
    flip: bool = False
    """Show each picture's mirror image too."""
    alpha_mask: bool = False
    """Learn only what is opaque in pictures with an alpha channel (NAME.mask.png beside a picture always counts)."""
    shuffle_tags: bool = False
    """Show the comma-separated tags of a caption in a new order each time, the trigger first."""
    keep_tags: int = 0
    """Tags at a caption's beginning that are neither moved nor dropped."""
    drop_tags: float = 0.0
    """Chance of each other tag to be left out."""
    drop_captions: float = 0.0
    """Chance of a whole caption to be left out."""
    prior: str | None = None
    """What shall stay: a folder of pictures of the same class, or "base" for the base's own answers without trigger."""
    prior_weight: float = 1.0
    """Weight of what shall stay against what is new."""
    holdout: float = 0.1
    """Share of the pictures kept out of training to validate on."""
    cache: str | None = None
    """Folder that keeps encoded pictures for further runs; what changed is encoded anew."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What counts as an error: how noise levels and large errors weigh, what is done to the noise."""

    weighting: Literal["min-snr", "debiased", "none"] = "min-snr"
    """Weight of the noise levels: min-snr; debiased (1 / sqrt(SNR), stressing noisy ones); none: all alike."""
    snr_gamma: float = 5.0
    """For min-snr: no noise level counts for more than this signal-to-noise ratio."""
    huber: Literal["snr", "exponential", "constant"] | None = None
    """Pseudo-Huber instead of squared error, for flawed pictures: beyond a threshold errors count linearly. It falls to
    huber-c with the signal-to-noise ratio or exponentially in the timestep, or is constant."""
    huber_c: float = 0.1
    """For huber: the threshold at full noise."""
    noise_offset: float = 0.0
    """Noise that is the same all over the picture, for darker and brighter ones (0.05 to 0.1 is usual)."""
    input_perturbation: float = 0.0
    """Noise in the input that is not asked for, against the errors that pile up in sampling (0.1 is usual)."""


@dataclass(frozen=True, kw_only=True)
class StyleConfig(ChangeConfig, FitConfig, ObjectiveConfig, DataConfig):
    """Train a style adapter on a folder of pictures."""

    output: str
    """The adapter file to write, ending in .safetensors."""
    base: str = "tiny"
    """Stable Diffusion to adapt: tiny, a diffusers folder, a single .safetensors checkpoint or a Hub id."""
    base_config: str | None = None
    """For a single checkpoint without network: a diffusers folder of the same kind of model."""
    rank: int | Literal["auto"] | None = None
    """Rank of each layer's change; auto: each layer keeps what its change needs (default: the base's own)."""
    targets: str | None = None
    """Layers to adapt: named sets joined by + ("attention+ff") or globs (default: the base's own)."""
    quantise: Literal["int8"] | None = None
    """Keep the frozen UNet's weights in 8 bits while training: less memory, a little less exact. For lora and
    rslora."""
    compile: bool = False
    """Compile the UNet (torch.compile): minutes at the beginning for faster steps afterwards, on a GPU."""
    train_text: bool = False
    """Adapt the text encoder(s) too."""
    new_tokens: int = 0
    """Learn so many new tokens for the trigger with the adapter (pivotal tuning); it must be a word of its own."""
    max_norm: float = 0.0
    """Largest norm of a layer's change, as kohya's scale_weight_norms; 0 leaves them alone."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the sample pictures (default: captions of held-out pictures)."""
    format: Literal["kohya", "diffusers", "peft"] = "kohya"
    """Spelling of the adapter file."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("steps", "batch_size", "accumulate", "rank"), 1) | {"resolution": 8}
        least |= dict.fromkeys(("holdout", "noise_offset", "input_perturbation", "warmup", "weight_decay", "clip"), 0)
        least |= dict.fromkeys(("validate_every", "sample_every", "checkpoint_every", "keep_tags", "max_norm"), 0)
        least |= dict.fromkeys(("ema", "patience", "new_tokens"), 0)
        shares = ("ema", "holdout", "warmup", "drop_tags", "drop_captions", "rank_dropout", "module_dropout")
        least |= dict.fromkeys((*shares, "prior_weight"), 0)
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value != "auto" and not value >= lowest:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least {lowest} is needed")
        for name in ("learning_rate", "alpha", "up_rate", "snr_gamma", "huber_c"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} {value}: a number above 0 is needed")
        if self.variant in ("loha", "lokr") and self.up_rate != 1:
            raise ValueError(f"--up-rate {self.up_rate}: {self.variant} has no up matrices")
        if self.optimizer == "prodigy" and self.up_rate != 1:
            raise ValueError(f"--up-rate {self.up_rate}: prodigy finds one learning rate for all; use adamw")
        if self.variant == "pissa" and self.max_norm:
            raise ValueError(f"--max-norm {self.max_norm}: a pissa change is a difference, which cannot be limited")
        if self.quantise and self.variant not in ("lora", "rslora"):
            raise ValueError(f"--quantise {self.quantise}: {self.variant} computes with the exact weights; use lora")
        if self.new_tokens and self.format != "kohya":
            raise ValueError(
                f"--format {self.format} has no place for new tokens; use kohya, or leave out --new-tokens"
            )
        if self.optimizer == "schedulefree" and (self.ema or self.max_norm):
            raise ValueError("--optimizer schedulefree averages the weights itself: leave out --ema and --max-norm")
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"--output {self.output}: a name ending in .safetensors is needed")
        if self.resolution is not None and self.resolution % 8:
            raise ValueError(f"--resolution {self.resolution}: a multiple of 8 is needed")
        for name in shares:
            if not getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: a share below 1 is needed")

    def filled(self, recipe: Recipe) -> Self:
        """This configuration with everything the user left open taken from the base's recipe."""
        names = ("rank", "targets", "learning_rate", "steps", "batch_size", "resolution")
        recipe = replace(recipe, learning_rate=self.rate_of_optimizer(self.rate_of_change(recipe.learning_rate)))
        open_fields = {name: getattr(recipe, name) for name in names if getattr(self, name) is None}
        if self.sample_every is None:
            open_fields["sample_every"] = -(-(self.steps or recipe.steps) // 4)
        return replace(self, **open_fields)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Draw pictures from prompts, with any number of adapters."""

    prompts: tuple[str, ...]
    """What to draw: a picture (or a row of the grid) for each."""
    output: str = "out.png"
    """The PNG file to write; several pictures are numbered out-1.png, out-2.png, and so on."""
    base: str = "tiny"
    """Stable Diffusion to draw with: tiny, a diffusers folder, a single .safetensors checkpoint or a Hub id."""
    base_config: str | None = None
    """For a single checkpoint without network: a diffusers folder of the same kind of model."""
    adapter: tuple[str, ...] = ()
    """Adapter file, scale (1 if left out), scales of some layers: ink.safetensors:0.8@unet.up_blocks.*=0.5."""
    adapter_dir: str | None = None
    """Folder of adapter files, for --adapter, --sweep and <lora:NAME:SCALE> in prompts to call by name."""
    schedule: tuple[str, ...] = ()
    """What scales are multiplied by while denoising: ink=linear:1:0, or linear:1:0 for all adapters. Kinds: constant:X,
    linear:FROM:TO, cosine:FROM:TO (1 to 0 if left out), window:BEGIN:END (from 0 to 1), list:X:X:...; for all adapters
    also switch:STEPS (they take turns) and klora (layers of the first, the subject, pass to the second, the style)."""
    how: Literal["sum", "composite", "switch", "klora"] = "sum"
    """How several adapters meet: their changes are added up (sum), what the model predicts under each is averaged
    (composite), they take turns by steps (switch), or layers pass from the first, the subject, to the second, the style
    (klora)."""
    region: tuple[str, ...] = ()
    """What sounds in a part of the picture, and perhaps a prompt of its own: "left=an owl <lora:ink:0.8>". Parts: left,
    right, top, bottom, middle, or a picture that is white there; elsewhere the prompt and --adapter hold."""
    sweep: tuple[str, ...] = field(default=(), metadata={"several": True})
    """Draw one sheet over scales of one adapter or two: ink=0,0.25,...,1 gold=0,1."""
    seed: int = 0
    """Seed of each prompt's first picture."""
    count: int = 1
    """Pictures of each prompt, with seeds counting up."""
    steps: int | None = None
    """Denoising steps (default: the base's own)."""
    guidance: float | None = None
    """Classifier-free guidance: how strictly the prompt is followed (default: the base's own)."""
    size: str | None = None
    """Width and height in pixels, as 512 or 768x512 (default: the base's own)."""
    negative: str = ""
    """What the pictures should not show."""
    grid: bool = False
    """Draw one grid: prompts down; across the base, each adapter alone, and all of them blended."""
    precision: Precision = "auto"
    """Arithmetic of the base (auto: fp32 on a CPU, else fp16)."""

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError('an empty prompt: say what to draw, as in "a red apple"')
        if not self.output.lower().endswith(".png"):
            raise ValueError(f"--output {self.output}: a name ending in .png is needed")
        if self.grid and self.sweep:
            raise ValueError("--grid and --sweep are two kinds of sheet: choose one")
        if self.region and (self.grid or self.sweep or self.how == "composite"):
            raise ValueError(
                "--region has its own adapters in its place: it goes without --grid, --sweep and composite"
            )
        if self.count < 1:
            raise ValueError(f"--count {self.count}: at least 1 is needed")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"--steps {self.steps}: at least 1 is needed")
        if self.guidance is not None and not self.guidance >= 0:
            raise ValueError(f"--guidance {self.guidance}: at least 0 is needed (1 follows the prompt alone)")
        self.pixels()

    def pixels(self) -> tuple[int, int] | None:
        """Width and height in pixels, or None for the base's own."""
        if self.size is None:
            return None
        sides = self.size.lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 and int(side) % 8 == 0 for side in sides):
            raise ValueError(f"--size {self.size}: multiples of 8 are needed, as 512 or 768x512")
        return int(sides[0]), int(sides[-1])


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Tell what is in an adapter file."""

    file: str
    """Adapter file, or PEFT folder."""
    scan: bool | None = None
    """Read the tensors too: hashes, layers with NaN or only zeros (default: where that takes no time)."""
    allow_pickle: bool = False
    """Also read .pt and .bin files."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write an adapter in another format, without loss or not at all."""

    input: str
    """Adapter file, or PEFT folder."""
    output: str
    """The file (for peft: folder) to write."""
    format: Literal["kohya", "diffusers", "peft"] = "kohya"
    """Format to write."""
    approximate: int | None = None
    """Turn whatever is no plain LoRA into pairs of at most this rank, and tell the error that costs."""
    base: str | None = None
    """For approximating DoRA and IA3, which multiply the base's weights: that base."""
    allow_pickle: bool = False
    """Also read .pt and .bin files."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Make one adapter file of several, and tell how far it is from their true weighted sum."""

    adapters: tuple[str, ...]
    """Adapter files with their scales, as a.safetensors:0.8 (also of some layers: a.safetensors:0.8@text_encoder=0)."""
    output: str
    """The adapter file to write, ending in .safetensors."""
    how: Literal["concat", "svd", "linear", "ties", "dare", "magnitude", "klora", "ziplora"] = "concat"
    """concat is exact; all others approximate. klora and ziplora want the subject's adapter first, then the style's."""
    rank: int | None = None
    """Rank of the result of svd, ties, dare and magnitude (default: the largest of the adapters in each layer)."""
    density: float = 0.5
    """Share of each change's elements that ties, dare and magnitude keep."""
    seed: int = 0
    """Seed of what dare drops, and of the noise that ziplora learns on."""
    base: str | None = None
    """The base they were made for: what DoRA and IA3 multiply, and what ziplora learns on."""
    prompts: tuple[str, ...] = ()
    """For ziplora: a prompt that calls the subject, then one that calls the style."""
    steps: int = 100
    """Steps of ziplora's learning."""
    format: Literal["kohya", "diffusers", "peft"] = "kohya"
    """Format to write."""

    def __post_init__(self) -> None:
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"--output {self.output}: a name ending in .safetensors is needed")
        if self.how == "ziplora" and (self.base is None or len(self.prompts) != 2):
            raise ValueError("--how ziplora learns on a base: --base and two --prompts, subject and style, are needed")
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps}: at least 1 is needed")


@dataclass(frozen=True, kw_only=True)
class WhereConfig:
    """Print the path of something this package brings along."""

    name: str
    """A script (train_style), a base (tiny), the picture sets (pictures) or one of them."""
