"""The sections of a recipe except ``data``. Each field is documented by the string below it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from maestro_scale.model.config import (
    CHECKPOINTING,
    MAX_OVERLAP,
    OVERLAP,
    AttentionChoice,
    CompileMode,
    DecoderName,
    Fusion,
    Loss,
    Norm,
    Spectral,
    TargetNorm,
    inter_depth_problem,
)
from maestro_scale.model.sizes import SIZES, Size
from maestro_scale.recipe.errors import ConflictError
from maestro_scale.recipe.fields import (
    AutoOrCount,
    ClassWeights,
    Count,
    Place,
    Probability,
    Section,
    distinct,
    listed,
    nearest_divisors,
)

Precision = Literal["bf16", "bf16_weights", "fp32"]
Decay = Literal["matrices", "all"]


def _compile_mode(given: Any) -> Any:
    """The mode of a boolean: earlier versions had no other values, and their recipes are stored with runs."""
    return {True: "blocks", False: "none"}[given] if isinstance(given, bool) else given


class Model(Section):
    """The network: a size by name, of which single dimensions can be changed, and its variants."""

    size: Literal["tiny", "small", "base", "large", "huge"] = "base"
    """A row of model.sizes.SIZES."""
    width: Count | None = None
    """Encoder width, 8 plus a multiple of 4."""
    depth: Count | None = None
    """Encoder blocks, the inter-group ones included."""
    heads: Count | None = None
    """Attention heads of the encoder."""
    dim_head: Count | None = None
    """Channels per head; null: that of the size, or width / heads if one of them is given."""
    mlp_ratio: Count | None = None
    """Hidden width of the encoder's MLPs over its width."""
    decoder_depth: Count | None = None
    """Decoder blocks."""
    decoder_width: Count | None = None
    """Decoder width, 8 plus a multiple of 4."""
    decoder_heads: Count | None = None
    """Attention heads of the decoder; null: those of the size, or decoder_width / 32 if decoder_width is given."""
    fusion: Fusion = "group"
    """What forms a token sequence: a group of sensors, a sensor, a date, or a date with one encoder for all."""
    inter_depth: Annotated[int, Field(ge=0)] = 3
    """Blocks, of ``depth``, that attend over all groups; 0 with monotemp and shared."""
    spectral: Spectral = "joint"
    """One token for all bands of a patch (joint), or one per group of bands (token; ``token_groups`` of the sensor)."""
    norm: Norm = "group"
    """Normalisation after the patch embedding: over all tokens of a date (as published), or per token."""
    target: TargetNorm = "patch_group"
    """Normalisation of target pixels: over patch and band group, over the patch, or none."""
    loss: Loss = "l1"
    """Distance between reconstruction and target."""
    checkpointing: Annotated[str, Field(pattern=f"^({CHECKPOINTING})$")] = "none"
    """Activation checkpointing. blocks: each block keeps only its input and is recomputed in the backward pass, which
    saves memory for a third more compute; every_2, every_3, …: only every second, third, … block."""
    attention: AttentionChoice = "auto"
    """Attention kernel: torch's choice, one of its backends, or the flash-attn package."""
    decoder: DecoderName = "attentive"
    """What a finetuning predicts with: attention over all sensors and dates (of each cell of a map) and one linear
    layer; one linear layer on the means over dates; or, for maps only, UPerNet on four depths of the encoder."""
    compile: Annotated[CompileMode, BeforeValidator(_compile_mode)] = "none"
    """torch.compile in training. blocks: each transformer block; step: forward and loss of a micro-batch as one graph
    per dataset, on a GPU replayed as CUDA graphs. ZeRO stage 2 or below. true and false mean blocks and none."""
    init_from: Place | None = None
    """Pretrained model to initialise from (a folder, s3:// or hf://). Parameters that fit are loaded, the others are
    initialised at random, and a table lists both. Not read when a run resumes."""

    @property
    def dimensions(self) -> Size:
        """The size with the changes applied; ValueError if they contradict each other."""
        base, width, heads = SIZES[self.size], self.width, self.heads
        dim_head = self.dim_head or base.dim_head
        if (width or heads) and not self.dim_head:
            dim_head = _dim_head("width", width or base.width, "heads", heads or base.heads)
        decoder_heads = self.decoder_heads or base.decoder_heads
        decoder_dim_head = base.decoder_dim_head
        if self.decoder_width and not self.decoder_heads:
            decoder_heads = max(1, self.decoder_width // base.decoder_dim_head)
        if self.decoder_width or self.decoder_heads:
            total = self.decoder_width or base.decoder_width
            decoder_dim_head = _dim_head("decoder_width", total, "decoder_heads", decoder_heads)
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


def _dim_head(width_key: str, width: int, heads_key: str, heads: int) -> int:
    """Channels per head where ``heads`` share ``width``; the keys are for the message."""
    if width % heads:
        raise ConflictError(((heads_key,), f"{heads} does not divide {width_key} {width}"))
    return width // heads


class Masking(Section):
    """How much of the input is masked, and in which units; the defaults are the paper's (arXiv 2508.10894)."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Fraction of the tokens of each group that is masked."""
    modality: Probability = 0.25
    """Probability that all tokens of a sensor are masked, if it shares its group with others."""
    date: Probability = 0.25
    """Probability that all tokens of a date are masked, if there are several dates."""
    location: Probability = 0.25
    """Probability that a location is masked on all dates of a sensor."""
    band_group: Probability = 0.0
    """Probability that all tokens of a band group are masked (only with model.spectral=token)."""
    structure: Literal["auto", True, False] = "auto"
    """Whether structural masks (modality, date, location, band_group) are drawn; else tokens are masked at random only.
    auto: with fusion group and mod, as in the reference, or what the run's checkpoints were trained with."""


class Optim(Section):
    """AdamW and its learning rate schedule. The peak learning rate is ``Recipe.lr``."""

    base_lr: Annotated[float, Field(gt=0)] = 3e-5
    """Learning rate at global_batch 3; the peak is base_lr · sqrt(global_batch / 3)."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """Decay rates of AdamW's first and second moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator of the update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    decay: Decay = "matrices"
    """What decays: the matrices of linear maps only, or all parameters (biases, norms, queries and mask tokens too), as
    in the reference."""
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    """one_cycle: cosine warm-up and cosine decay; cosine: linear warm-up and cosine decay."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Fraction of the steps over which the learning rate rises."""
    start_div: Annotated[float, Field(ge=1)] = 1e3
    """The learning rate starts at lr / start_div."""
    final_div: Annotated[float, Field(ge=1)] = 1e7
    """The learning rate ends at lr / final_div."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the global gradient (gradient clipping); 0: no clipping."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per update of an exponential moving average of the weights, e.g. 0.9999; 0: none."""
    ema_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs between updates of the average; 0: it is updated after every step."""


class Train(Section):
    """Length, batch sizes and precision of training."""

    epochs: Count | None = None
    """Passes over the mixture; 100 if neither this nor ``steps`` is given."""
    steps: Count | None = None
    """Number of optimizer steps, instead of ``epochs``."""
    global_batch: Count = 96
    """Samples per optimizer step, summed over all ranks."""
    micro_batch: AutoOrCount = 8
    """Samples per forward pass of a rank; gradients are accumulated over the micro-batches of its share. auto: the
    largest that divides a rank's share and is estimated to fit 90 % of the memory of the GPU (on a CPU: of the rank's
    part of the machine's memory), chosen at every start. Does not change results, up to rounding."""
    warmup_check: bool = True
    """Run one step on random data of the largest shape at every start, so that a lack of memory shows in the first
    minute. Does not change weights or optimizer state."""
    precision: Literal["auto", "bf16", "bf16_weights", "fp32"] = "auto"
    """bf16: fp32 weights, matrix products in bf16 (autocast). bf16_weights: computes with bf16 copies of fp32 master
    weights, which saves memory and traffic but follows fp32 less closely; needs ZeRO stage 1 or higher. auto: bf16 on a
    GPU, fp32 on a CPU (bf16 is hundreds of times slower on most CPUs)."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU per rank, or the CPU on nodes without GPUs; a node whose GPUs torch cannot use is an error. cpu: the
    CPU, also where there are GPUs."""
    deterministic: bool = False
    """Deterministic algorithms only, somewhat slower on a GPU: a resumed run is then bitwise the uninterrupted one on
    the same kind and number of GPUs. On a CPU it is in any case."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl; in a mixture, each dataset's own steps."""
    audit: bool = False
    """Write every step's sample keys and a digest of them, per rank."""
    spike: Annotated[float, Field(ge=0)] = 10.0
    """Pretraining: skip a step whose loss or gradient norm exceeds this many times its running mean (after 100 steps);
    0: skip only steps that are not finite."""
    max_skipped: Count = 3
    """Number of consecutive skipped steps that ends the run."""
    hang_timeout_s: Annotated[float, Field(ge=1)] = 600.0
    """Seconds without progress after which a run ends and names the rank that hangs. Must be longer than loading a
    checkpoint, than the slowest step, and than the fit of a classifier on rank 0 (``evaluation.every_steps``)."""
    collect_every: Annotated[int, Field(ge=0)] = 500
    """Steps between runs of Python's garbage collector, at the same step on all ranks, so that they do not wait for
    each other in turn; 0: Python decides."""

    @property
    def samples_per_micro_batch(self) -> int:
        """``micro_batch`` as a number. ValueError while it is auto: call ``Recipe.with_micro_batch`` first."""
        if self.micro_batch == "auto":
            raise ValueError("train.micro_batch is auto and has not been chosen yet")
        return self.micro_batch

    def num_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # one of both is always set, see _default_length
        return self.epochs * steps_per_epoch

    def precision_on(self, device: str) -> Precision:
        """The precision on ``device`` (``cpu``, ``cuda``, …)."""
        if self.precision != "auto":
            return self.precision
        return "fp32" if device.startswith("cpu") else "bf16"

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("epochs") is None and given.get("steps") is None:
            return {**given, "epochs": 100}
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> Train:
        if self.epochs is not None and self.steps is not None:
            reason = f"epochs {self.epochs} and steps {self.steps} are both given: keep one"
            raise ConflictError((("steps",), reason))
        if self.micro_batch != "auto" and self.global_batch % self.micro_batch:
            near = nearest_divisors(self.micro_batch, self.global_batch)
            reason = f"{self.micro_batch} does not divide train.global_batch {self.global_batch}: use {near}"
            raise ConflictError((("micro_batch",), reason))
        return self


class Checkpoint(Section):
    """When checkpoints are written and how many are kept."""

    every_steps: Count = 1000
    """Steps between checkpoints, which are the most that a kill can lose."""
    keep: Count = 3
    """Number of newest checkpoints to keep on disk."""
    every_minutes: Annotated[float, Field(ge=0)] = 0.0
    """Most minutes between checkpoints; 0: only ``every_steps`` counts."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints of steps divisible by this are never deleted; 0: none."""
    mirror: Place | None = None
    """URL, e.g. s3://bucket/runs, to which every committed checkpoint is copied in the background."""


class Tracking(Section):
    """MLflow and pictures."""

    experiment: Annotated[str, Field(min_length=1)] = "maestro"
    """Name of the MLflow experiment."""
    pictures_every: Annotated[int, Field(ge=0)] = 500
    """Steps between pictures of reconstructions, counted as in train.log_every; 0: none."""
    enabled: bool = True
    """Whether to log to MLflow; metrics.jsonl is always written."""
    tensorboard: bool = False
    """Whether to write event files for TensorBoard too, to ``RUN_DIR/tensorboard``."""
    plugins: tuple[str, ...] = ()
    """Trackers of installed packages (docs/mlflow.md)."""


class Evaluation(Section):
    """What evaluate.py measures. Finetuning follows ``optim`` and ``train``."""

    modes: Annotated[
        tuple[Literal["knn", "probe", "attentive", "finetune", "scratch"], ...],
        BeforeValidator(listed),
        AfterValidator(distinct),
    ] = ("knn", "probe")
    """On frozen features: knn, probe (linear) and attentive (attentive probe). Trained end to end: finetune, and
    scratch, the same network without pretrained weights."""
    every_steps: Annotated[int, Field(ge=0)] = 0
    """Pretraining: steps between scores of the encoder (kNN and a linear probe on a small part of train and val), as
    eval/… in metrics.jsonl and MLflow; 0: none."""
    shards: Place | None = None
    """Pretraining: the benchmark that every_steps scores; default: the first dataset of the mixture with a target."""
    num_crops: Count = 256
    """Pretraining: crops of train, and of val, that every_steps encodes."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay per update of the moving average of finetuned weights, which is evaluated; 0: the last weights."""
    ema_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs between updates of this average; 0: it is updated after every step, with a smaller decay at first."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Finetuning: learning rate of an encoder block as a fraction of that of the block above it; 1: all the same."""
    validations: Count = 20
    """Number of validations in a finetuning, evenly spaced; its best weights are tested."""
    patience: Annotated[int, Field(ge=0)] = 5
    """Early stopping: number of validations of a finetuning without a better score; 0: never."""
    spike: Annotated[float, Field(ge=0)] = 0.0
    """As ``train.spike``, in finetune and scratch. 0 by default: once the labels are learned, the gradient of a single
    wrong tile is many times the mean, and the network needs it."""
    class_weights: ClassWeights = "none"
    """Weights of the classes in the loss of probe, attentive, finetune and scratch: balanced (inverse to the number of
    training labels), or a weight by class name, 1 for the others."""
    regression_loss: Literal["l2", "smooth_l1"] = "l2"
    """Loss of a regression target in attentive, finetune and scratch, on standardised values."""
    overlap: Annotated[float, Field(ge=0, le=MAX_OVERLAP)] = OVERLAP
    """Maps that ``predict`` makes with the finetuned model: share of a window that the next one covers again; 0: no
    overlap. Recorded in the model; no score depends on it."""
