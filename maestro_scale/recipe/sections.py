"""The sections of a recipe but ``data``. Each field is documented by the string below it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from maestro_scale.model.config import CHECKPOINTING, AttentionChoice, inter_depth_problem
from maestro_scale.model.sizes import SIZES, Size
from maestro_scale.recipe.errors import ConflictError
from maestro_scale.recipe.fields import Count, Place, Probability, Section, distinct, listed, nearest_divisors

Precision = Literal["bf16", "fp32"]


class Model(Section):
    """What is learned: a size by name, single dimensions of it changed where given, and its variants."""

    size: Literal["tiny", "small", "base", "large", "huge"] = "base"
    """A row of model.sizes.SIZES."""
    width: Count | None = None
    """Encoder width, 8 plus a multiple of 4."""
    depth: Count | None = None
    """Encoder blocks, the inter-group ones included."""
    heads: Count | None = None
    """Attention heads of the encoder."""
    dim_head: Count | None = None
    """Channels per head; null: the size's own, or width / heads where either of them is given."""
    mlp_ratio: Count | None = None
    """Hidden width of the encoder's MLPs over its width."""
    decoder_depth: Count | None = None
    """Decoder blocks."""
    decoder_width: Count | None = None
    """Decoder width, 8 plus a multiple of 4."""
    decoder_heads: Count | None = None
    """Attention heads of the decoder; null: the size's own, or decoder_width / 32 where that is given."""
    fusion: Literal["group", "mod", "monotemp", "shared"] = "group"
    """What forms a sequence: a group of sensors, a sensor, a date, or a date with one encoder for all."""
    inter_depth: Annotated[int, Field(ge=0)] = 3
    """Of ``depth``, the blocks over all groups together; 0 with monotemp and shared."""
    spectral: Literal["joint", "token"] = "joint"
    """One token for all bands, or one per band group."""
    norm: Literal["group", "token"] = "group"
    """Normalisation after patch embedding: over the whole date (as published), or per token."""
    target: Literal["patch_group", "patch", "none"] = "patch_group"
    """What pixels are normalised over before the loss: patch and band group, patch, or not at all."""
    loss: Literal["l1", "l2"] = "l1"
    """Distance between reconstruction and target."""
    checkpointing: Annotated[str, Field(pattern=f"^({CHECKPOINTING})$")] = "none"
    """blocks: keep only the input of each block and recompute backwards: less memory, a third more work; every_2,
    every_3, …: so with every second, third, … block."""
    attention: AttentionChoice = "auto"
    """The kernel: torch's choice, one of its backends, or the flash-attn package."""
    compile: bool = False
    """torch.compile, block by block; ZeRO stage 2 or below."""
    init_from: Place | None = None
    """A model to start from (a folder, s3:// or hf://): what fits is taken, the rest stays as drawn, and a table says
    which; a run that resumes does not read it."""

    @property
    def dimensions(self) -> Size:
        """The size with the changes applied; ValueError if they do not go together."""
        base, width, heads = SIZES[self.size], self.width, self.heads
        dim_head = self.dim_head or base.dim_head
        if (width or heads) and not self.dim_head:
            dim_head = _shared_out("width", width or base.width, "heads", heads or base.heads)
        decoder_heads = self.decoder_heads or base.decoder_heads
        decoder_dim_head = base.decoder_dim_head
        if self.decoder_width and not self.decoder_heads:
            decoder_heads = max(1, self.decoder_width // base.decoder_dim_head)
        if self.decoder_width or self.decoder_heads:
            total = self.decoder_width or base.decoder_width
            decoder_dim_head = _shared_out("decoder_width", total, "decoder_heads", decoder_heads)
        return Size(
            width=width or base.width,
            depth=self.depth or base.depth,
            heads=heads or base.heads,
            dim_head=dim_head,
            mlp_ratio=self.mlp_ratio or base.mlp_ratio,
            decoder_depth=self.decoder_depth or base.decoder_depth,
            decoder_width=self.decoder_width or base.decoder_width,
            decoder_heads=decoder_heads,
            decoder_dim_head=decoder_dim_head,
        )

    @model_validator(mode="after")
    def _fits_together(self) -> Model:
        reason = inter_depth_problem(self.inter_depth, self.fusion, self.dimensions.depth)
        if reason is not None:
            raise ConflictError((("inter_depth",), reason))
        return self


def _shared_out(what: str, total: int, among: str, parts: int) -> int:
    if total % parts:
        raise ConflictError(((among,), f"{parts} does not divide {what} {total}"))
    return total // parts


class Masking(Section):
    """How much of the input is hidden, and in what pieces (facts: the paper's defaults)."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of the tokens of each group that is masked."""
    modality: Probability = 0.25
    """Probability that a sensor is masked as a whole, where it shares its group."""
    date: Probability = 0.25
    """Probability that a date is masked as a whole, where there are several."""
    location: Probability = 0.25
    """Probability that a place is masked on all dates of a sensor."""
    band_group: Probability = 0.0
    """Probability that a band group is masked as a whole (spectral: token)."""


class Optim(Section):
    """AdamW and its schedule. The peak learning rate is ``Recipe.lr``."""

    base_lr: Annotated[float, Field(gt=0)] = 3e-5
    """Learning rate at global_batch 3; the peak is base_lr · sqrt(global_batch / 3)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """Decay of the running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator of the update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    """one_cycle: cosine up, cosine down; cosine: linear up, cosine down."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the steps that the learning rate rises over."""
    start_div: Annotated[float, Field(ge=1)] = 1e3
    """The learning rate starts at lr / start_div."""
    final_div: Annotated[float, Field(ge=1)] = 1e7
    """The learning rate ends at lr / final_div."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the global gradient; 0 does not clip."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of an exponential moving average of the weights, e.g. 0.9999; 0 keeps none."""


class Train(Section):
    """How long, in what pieces, in what precision."""

    epochs: Count | None = None
    """Passes over the mixture; 100 where neither this nor ``steps`` is given."""
    steps: Count | None = None
    """Optimizer steps, instead of epochs."""
    global_batch: Count = 96
    """Samples per optimizer step, over all ranks."""
    micro_batch: Count = 8
    """Samples per forward pass of one rank; the rest of its share is accumulated."""
    warmup_check: bool = True
    """Rehearse one step on made-up data of the largest shape at every start, so that what does not fit in memory
    shows in the first minute. Changes nothing that is learned."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU (bf16 is hundreds of times slower on most CPUs)."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl; in a mixture, each dataset's own steps."""
    audit: bool = False
    """Write every step's sample keys and a digest of them, per rank."""
    spike: Annotated[float, Field(ge=0)] = 10.0
    """Skip a step whose loss or gradient norm is this many times its running mean (after 100 steps); 0: only
    one that is not finite."""
    max_skipped: Count = 3
    """Skipped steps in a row that end the run."""
    hang_timeout_s: Annotated[float, Field(ge=1)] = 600.0
    """Seconds without progress after which a run ends itself, naming the rank that it waited for. Loading a
    checkpoint and the slowest step must fit in."""
    collect_every: Annotated[int, Field(ge=0)] = 500
    """Steps between runs of Python's garbage collector, on all ranks at once; 0 leaves it to itself."""

    def precision_on(self, device: str) -> Precision:
        """The precision on ``device`` (``cpu``, ``cuda``, …)."""
        if self.precision != "auto":
            return self.precision
        return "fp32" if device.startswith("cpu") else "bf16"

    @model_validator(mode="before")
    @classmethod
    def _some_length(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("epochs") is None and given.get("steps") is None:
            return {**given, "epochs": 100}
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> Train:
        if self.epochs is not None and self.steps is not None:
            reason = f"epochs {self.epochs} and steps {self.steps} are both given: keep one"
            raise ConflictError((("steps",), reason))
        if self.global_batch % self.micro_batch:
            near = nearest_divisors(self.micro_batch, self.global_batch)
            reason = f"{self.micro_batch} does not divide train.global_batch {self.global_batch}: use {near}"
            raise ConflictError((("micro_batch",), reason))
        return self


class Checkpoint(Section):
    """What is kept for resuming."""

    every_steps: Count = 1000
    """Steps between checkpoints: the most that a kill can cost."""
    keep: Count = 3
    """Newest checkpoints that stay on disk."""
    every_minutes: Annotated[float, Field(ge=0)] = 0.0
    """Minutes after the last checkpoint at which the next one is due at the latest; 0: steps alone decide."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints of steps divisible by this stay for good; 0: none does."""
    mirror: Place | None = None
    """URL, e.g. s3://bucket/runs, that every committed checkpoint is copied below, in the background."""


class Tracking(Section):
    """MLflow and pictures."""

    experiment: Annotated[str, Field(min_length=1)] = "maestro"
    """Name of the MLflow experiment."""
    pictures_every: Annotated[int, Field(ge=0)] = 500
    """Steps between reconstruction pictures, counted likewise; 0 makes none."""
    enabled: bool = True
    """Whether to log to MLflow at all; metrics.jsonl is written either way."""


class Evaluation(Section):
    """What evaluate.py measures. Finetuning follows ``optim`` and ``train``."""

    modes: Annotated[
        tuple[Literal["knn", "probe", "attentive", "finetune", "scratch"], ...],
        BeforeValidator(listed),
        AfterValidator(distinct),
    ] = ("knn", "probe")
    """On frozen features nearest neighbours, a linear probe and an attentive one; finetuning, and the same without
    pretraining."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay per step of the moving average of finetuned weights, which is what is scored; 0: the last weights."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Finetuning: each encoder block learns by this factor slower than the one above it; 1: all alike."""
    validations: Count = 20
    """How often a finetuning is validated, evenly spread; its best weights are tested."""
    patience: Annotated[int, Field(ge=0)] = 5
    """Validations in a row without a better score that end a finetuning; 0: none do."""
