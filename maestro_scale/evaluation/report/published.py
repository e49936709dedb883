"""Published scores as data: the tables of the MAESTRO paper (arXiv 2508.10894), in percent; None where not given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from maestro_scale.evaluation.results import Architecture, EvalResult


@dataclass(frozen=True)
class BenchmarkColumn:
    """A column of the tables: a dataset, its target and metric, its official test split (by its names in shards), and
    the folds of its cross-validation."""

    benchmark: str
    title: str
    metric: str
    target: str
    test_splits: tuple[str, ...] = ("test",)
    folds: tuple[int, ...] = ()

    def is_of(self, result: EvalResult) -> bool:
        """Whether a result is a score of this benchmark."""
        key = result.benchmark, result.metric, result.target or self.target
        return key == (self.benchmark, self.metric.lower(), self.target)

    def is_official(self, results: Iterable[EvalResult]) -> bool:
        """Whether results that are reported as one score are of the official test split, or together of all folds.
        Files of earlier revisions do not name their splits: without folds they count as official."""
        results = tuple(results)
        folds = {fold for r in results for fold in r.folds}
        if folds and folds == set(self.folds):
            return True
        tests = [set(r.splits.get("test", () if folds else self.test_splits)) for r in results]
        return all(test and test <= set(self.test_splits) for test in tests)


@dataclass(frozen=True)
class PublishedRow:
    """A method, and its score per column."""

    method: str
    scores: tuple[float | None, float | None, float | None, float | None]


COLUMNS = (
    BenchmarkColumn("treesatai_ts", "TreeSatAI-TS", "wF1", "species"),
    BenchmarkColumn(
        "pastis_hd", "PASTIS-HD", "mIoU", "crop_type", ("test", "fold_5", "test_rotation_1"), (1, 2, 3, 4, 5)
    ),
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

PAPER_MODEL = Architecture(768, 12, 12, 64, 4, "group", 3)
"""Base size, three of the twelve blocks between groups: of all rows of MAESTRO and of the supervised ViT, but where a
row says otherwise."""

# The row that a result is compared with: the finetuned encoder of the paper's own method with the same pretraining.
INTRA_REFERENCE = {PAPER_MODEL: INTRA[0], replace(PAPER_MODEL, inter_depth=0): INTRA[2]}
SCRATCH_REFERENCE = {PAPER_MODEL: INTRA[4]}
CROSS_REFERENCE = {("flair_hub", PAPER_MODEL): CROSS[0], ("s2_naip", PAPER_MODEL): CROSS[1]}
# By the name of the weights. The table does not give the size of DINOv2: taken to be base, as that of MAESTRO.
IMAGE_REFERENCE = {"dinov2-base": CROSS[2]}

PRETRAINING_DATA = ("the benchmark's own data", "flair_hub", "s2_naip")
"""Rows of the paper's cross-dataset comparison of MAESTRO, by the names of datasets here."""

TEMPLATE_FRACTIONS = (0.01, 0.1, 1.0)
"""Columns of a table over shares of the labels: those of the lists that TreeSatAI-TS ships."""
