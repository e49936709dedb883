"""The ``data`` section: which datasets, and which of their sensors, seen how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from maestro_scale.datasets.spec_check import group_problems, patch_problem
from maestro_scale.recipe.errors import ConflictError
from maestro_scale.recipe.fields import Count, Place, Section, distinct, listed, some


class ScaleOverride(Section):
    """How raw values become network inputs; what is left out stays as the dataset has it."""

    kind: Literal["linear", "log"] | None = None
    """``linear``: x / divisor; ``log``: ln(max(x, 1e-10)) / divisor."""
    divisor: Annotated[float, Field(gt=0)] | None = None
    """What the value is divided by."""


class SensorOverride(Section):
    """Changes to one sensor of the preset (datasets.spec.Sensor); what is left out stays."""

    source: str | None = None
    """The stored modality it reads."""
    image_size: Count | None = None
    """Pixels per side that the model sees; a multiple of ``patch``."""
    patch: Count | None = None
    """Pixels per patch side."""
    num_dates: Count | None = None
    """Dates drawn per tile, one from each of this many equal bins."""
    bands: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Indices into the modality's bands, in model order."""
    band_groups: tuple[Count, ...] | None = None
    """Sizes of the consecutive groups the targets are normalised over; they add up to the number of bands."""
    token_groups: tuple[Count, ...] | None = None
    """Bands per token where model.spectral is ``token``; they add up likewise; []: one token for all."""
    scale: ScaleOverride | None = None
    """How raw values become network inputs."""
    group: str | None = None
    """Sensors of one group share one sequence in the encoder."""
    embed: str | None = None
    """Sensors of one embed share patch-embedding weights (same patch, same number of bands)."""
    mask_threshold: Annotated[float, Field(ge=0, le=100)] | None = None
    """A pixel is marked where any mask band exceeds this, in percent."""
    elevation: bool | None = None
    """Channel 1 becomes 30 · (channel 0 - channel 1), after scaling."""

    @model_validator(mode="after")
    def _fits_together(self) -> SensorOverride:
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
    """Changes to its sensors by name; null leaves the sensor out."""
    crop_m: Annotated[float, Field(gt=0)] | None = None
    """Ground extent of the random crop in metres; null: the dataset's own."""


class Data(Section):
    """Where the samples come from and how they are read."""

    mixture: Annotated[tuple[MixtureEntry, ...], AfterValidator(some)]
    """The datasets; each step draws its global batch from one of them."""
    lanes: Count = 32
    """Most ranks that can ever share this run; part of the order of samples. Divides train.global_batch."""
    workers: Annotated[int, Field(ge=0)] = 4
    """Loader processes per rank; 0 reads in the training process."""
    cache_dir: Place = "~/.cache/maestro-scale"
    """Local folder for shards read from elsewhere."""
    cache_gib: Annotated[float, Field(gt=0)] = 100
    """Most that the cache may hold."""
    retry_s: Annotated[float, Field(gt=0)] = 120
    """Seconds that a failing request to an object store is tried again before the run ends; never after 403 or 404."""
    on_bad_shard: Literal["fail", "replace"] = "fail"
    """After a second failed fetch: stop and name it, or replace its samples deterministically and count."""
    shuffle_window: Count = 4096
    """Samples of a lane that are shuffled together."""
    flips: bool = True
    """Flip and transpose at random, all sensors of a sample alike."""

    @model_validator(mode="after")
    def _no_sample_twice(self) -> Data:
        seen: set[tuple[str, str]] = set()
        for i, entry in enumerate(self.mixture):
            for split in entry.split:
                where = (entry.shards.rstrip("/"), split)
                if where in seen:
                    reason = (
                        f"{where[0]} is in the mixture already with split {split!r}: raise its weight instead"
                    )
                    raise ConflictError((("mixture", i), reason))
                seen.add(where)
        return self
