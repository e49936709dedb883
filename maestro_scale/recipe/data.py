"""The ``data`` section of a recipe: the mixture of datasets, changes to their sensors, and how shards are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from maestro_scale.datasets.spec_check import group_problems, patch_problem
from maestro_scale.recipe.errors import ConflictError
from maestro_scale.recipe.fields import Count, Place, Section, distinct, listed, some


class ScaleOverride(Section):
    """Changes to how raw values become network inputs; omitted fields keep the dataset's values."""

    kind: Literal["linear", "log"] | None = None
    """``linear``: x / divisor; ``log``: ln(max(x, 1e-10)) / divisor."""
    divisor: Annotated[float, Field(gt=0)] | None = None
    """Divisor of the value."""


class SensorOverride(Section):
    """Changes to one sensor of the dataset's preset (datasets.spec.Sensor); omitted fields keep their values."""

    source: str | None = None
    """The stored modality it reads."""
    image_size: Count | None = None
    """Pixels per side of the model's input, to which the crop is resized; a multiple of ``patch``."""
    patch: Count | None = None
    """Pixels per patch side."""
    num_dates: Count | None = None
    """Dates sampled per tile, one from each of this many equal bins of the series."""
    bands: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Indices into the modality's bands, in model order."""
    band_groups: tuple[Count, ...] | None = None
    """Sizes of the consecutive groups of bands that targets are normalised over; they add up to the number of bands."""
    token_groups: tuple[Count, ...] | None = None
    """Bands per token with model.spectral=token; they add up to the number of bands. null: those of the dataset, else
    ``band_groups``; []: one token for all."""
    scale: ScaleOverride | None = None
    """How raw values become network inputs."""
    group: str | None = None
    """Sensors of one group form one token sequence in the encoder."""
    embed: str | None = None
    """Sensors of one embed share the weights of the patch embedding (same patch, same number of bands)."""
    mask_threshold: Annotated[float, Field(ge=0, le=100)] | None = None
    """A pixel is cloudy or snowy where any mask band exceeds this, in percent."""
    elevation: bool | None = None
    """After scaling, channel 1 becomes 30 · (channel 0 - channel 1): the height above the terrain."""

    @model_validator(mode="after")
    def _check_sizes(self) -> SensorOverride:
        # Here only what the override says by itself, so that the message names the file; resolve_spec checks the rest.
        if self.image_size and self.patch:
            reason = patch_problem(self.image_size, self.patch)
            if reason is not None:
                raise ConflictError((("patch",), reason))
        if self.bands:
            num_bands = len(self.bands)
            groups = group_problems(num_bands, self.band_groups or (num_bands,), self.token_groups or ())
            if problems := list(groups):
                raise ConflictError(*problems)
        return self


class MixtureEntry(Section):
    """One dataset of the mixture."""

    dataset: Annotated[str, Field(min_length=1)]
    """The dataset's name, as in its manifest."""
    shards: Place
    """Folder or s3:// prefix that holds its manifest.json."""
    split: Annotated[tuple[str, ...], BeforeValidator(listed), AfterValidator(distinct)] = ("train",)
    """One split or a list of them."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often the mixture draws a step from it, relative to the other entries."""
    sensors: dict[str, SensorOverride | None] = Field(default_factory=dict)
    """Changes to its sensors by name; null omits the sensor."""
    incomplete: Literal["use", "leave_out"] = "use"
    """Tiles that lack a sensor in use: train on the sensors that they have, in steps of their own (docs/loader.md), or
    leave them out, in pretraining and finetuning. Validation and test score every tile."""
    crop_m: Annotated[float, Field(gt=0)] | None = None
    """Ground extent of the random crop in metres: at most the tile, else a multiple of the coarsest sensor's pixel;
    null: the dataset's default."""


class Data(Section):
    """Where the samples come from and how they are read."""

    mixture: Annotated[tuple[MixtureEntry, ...], AfterValidator(some)]
    """The datasets; each step draws its global batch from one of them."""
    lanes: Count = 32
    """Largest number of ranks that can ever share this run. Determines the order of samples, so it cannot change later.
    Divides train.global_batch."""
    workers: Annotated[int, Field(ge=0)] = 4
    """Loader processes per rank; 0: samples are read in the training process."""
    cache_dir: Place = "~/.cache/maestro-scale"
    """Local folder for downloaded shards."""
    cache_gib: Annotated[float, Field(gt=0)] = 100
    """Size limit of the cache in GiB."""
    retry_s: Annotated[float, Field(gt=0)] = 120
    """Seconds for which a failing request to an object store is retried before the run ends, at least three times;
    permanent errors such as 403 and 404 are not retried."""
    on_bad_shard: Literal["fail", "replace"] = "fail"
    """After a second failed download of a shard: fail (stop and name it), or replace its samples deterministically and
    count them."""
    shuffle_window: Count = 4096
    """Number of consecutive samples of a lane that are shuffled together."""
    flips: bool = True
    """Flip and transpose at random, the same for all sensors of a sample."""
    first_date: Literal["auto", "any", "ends"] = "auto"
    """Where the bins of dates begin in training, if ``num_dates`` does not divide the T dates of a series: at a date
    drawn from 0 … T mod num_dates (any, as in the reference), or at one of the two ends of this range (ends, as in
    earlier revisions). auto: any, or what the run's checkpoints were trained with. Evaluation begins at 0."""

    @model_validator(mode="after")
    def _check_no_split_twice(self) -> Data:
        used: set[tuple[str, str]] = set()
        for i, entry in enumerate(self.mixture):
            for split in entry.split:
                where = (entry.shards.rstrip("/"), split)
                if where in used:
                    reason = (
                        f"{where[0]} is in the mixture already with split {split!r}: raise its weight instead"
                    )
                    raise ConflictError((("mixture", i), reason))
                used.add(where)
        return self
