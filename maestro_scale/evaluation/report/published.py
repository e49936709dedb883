"""Published scores as data: the tables of the MAESTRO paper (arXiv 2508.10894), in percent; None where not given."""

from __future__ import annotations

from dataclasses import dataclass

from maestro_scale.evaluation.results import EvalResult


@dataclass(frozen=True)
class BenchmarkColumn:
    """A column of the tables: a dataset, its target, metric and official test splits (by their names in shards)."""

    benchmark: str
    title: str
    metric: str
    target: str
    test_splits: tuple[str, ...] = ("test",)

    def is_of(self, result: EvalResult) -> bool:
        """Whether a result is a score of this benchmark."""
        key = result.benchmark, result.metric, result.target or self.target
        return key == (self.benchmark, self.metric.lower(), self.target)


@dataclass(frozen=True)
class PublishedRow:
    """A method, and its score per column."""

    method: str
    scores: tuple[float | None, float | None, float | None, float | None]


COLUMNS = (
    BenchmarkColumn("treesatai_ts", "TreeSatAI-TS", "wF1", "species"),
    BenchmarkColumn("pastis_hd", "PASTIS-HD", "mIoU", "crop_type", ("test", "fold_5", "test_rotation_1")),
    BenchmarkColumn("flair2", "FLAIR#2", "mIoU", "cosia"),
    BenchmarkColumn("flair_hub", "FLAIR-HUB", "mIoU", "cosia"),
)

INTRA = (
    PublishedRow("MAESTRO, group, inter-group blocks", (78.8, 68.6, 62.6, 65.9)),
    PublishedRow("the same, twice the epochs", (79.4, 69.0, 63.3, 65.8)),
    PublishedRow("MAESTRO, group, no inter-group blocks", (78.5, 68.8, 63.8, 64.9)),
    PublishedRow("the same, twice the epochs", (79.1, 68.8, 64.0, 64.8)),
    PublishedRow("supervised ViT, same architecture", (75.6, 64.5, 58.2, 62.1)),
    PublishedRow("AnySat", (75.1, 66.5, 55.1, None)),
    PublishedRow("previous best", (75.1, 66.5, 64.1, 64.3)),
)

CROSS = (
    PublishedRow("MAESTRO from FLAIR-HUB", (79.6, 68.0, None, None)),
    PublishedRow("MAESTRO from S2-NAIP", (78.8, 67.4, 62.6, 64.6)),
    PublishedRow("DINOv2", (76.7, 64.4, 64.2, 66.0)),
    PublishedRow("DINOv2-sat", (76.3, 64.0, 63.5, 66.0)),
    PublishedRow("DOFA", (76.0, 62.9, 62.3, 65.1)),
    PublishedRow("CROMA", (70.5, 65.0, 39.0, 44.3)),
    PublishedRow("Prithvi-EO-2.0", (75.6, 66.2, 41.8, 44.9)),
    PublishedRow("SatMAE", (76.9, 66.6, 42.5, 45.0)),
)

# The row that a result is compared with: the finetuned encoder of the paper's own method with the same pretraining.
INTRA_REFERENCE = INTRA[0]
SCRATCH_REFERENCE = INTRA[4]
CROSS_REFERENCE = {"flair_hub": CROSS[0], "s2_naip": CROSS[1]}
IMAGE_REFERENCE = {"dinov2": CROSS[2]}  # by a part of the image encoder's name

PRETRAINING_DATA = ("the benchmark's own data", "flair_hub", "s2_naip")
"""Rows of the paper's cross-dataset comparison of MAESTRO, by the names of datasets here."""

TEMPLATE_FRACTIONS = (0.01, 0.1, 1.0)
"""Columns of a table over shares of the labels: those of the lists that TreeSatAI-TS ships."""
