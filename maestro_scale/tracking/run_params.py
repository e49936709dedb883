"""Parameters, tags, artifacts and datasets of a run for MLflow, read from its recipe and run directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maestro_scale import untrusted
from maestro_scale.recipe import Recipe
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.tracking.metric_names import metric_names
from maestro_scale.tracking.mlflow_run import DatasetInput, RunMetadata, StepMetrics
from maestro_scale.tracking.origin import provenance_tags
from maestro_scale.tracking.run_report import REPORT, report_head
from maestro_scale.tracking.run_times import line_times_ms, start_ms
from maestro_scale.training.run_dir import JsonLines, manifest_path
from maestro_scale.training.setup import setup_tags

_DOCUMENTS = ("recipe.yaml", "environment.json", "metrics.jsonl", REPORT)


def run_metadata(recipe: Recipe, run_dir: Path) -> RunMetadata:
    """What MLflow stores of a run.

    Everything is read from the run directory, so that ``maestro-scale sync`` sends the same as the run itself.
    """
    metrics = JsonLines(run_dir / "metrics.jsonl")
    mixture = recipe.data.mixture

    def history() -> Iterable[StepMetrics]:
        lines = metrics.read()
        times = line_times_ms(lines, metrics.path)
        return [
            StepMetrics(line["step"], time_ms, metric_names(line, len(mixture) > 1))
            for line, time_ms in zip(lines, times, strict=True)
        ]

    return RunMetadata(
        run_dir=run_dir,
        experiment=recipe.tracking.experiment,
        run_name=" ".join(filter(None, (recipe.name, _environment(run_dir).get("mode")))),
        params=recipe.flat(),
        tags=_tags(recipe, run_dir),
        artifacts=[run_dir / name for name in _DOCUMENTS],
        datasets=_datasets(recipe, run_dir),
        history=history,
        description=lambda: report_head(recipe, run_dir),
        start_ms=start_ms(run_dir, metrics.read()),
    )


def _datasets(recipe: Recipe, run_dir: Path) -> list[DatasetInput]:
    datasets = []
    for number, entry in enumerate(recipe.data.mixture):
        path = manifest_path(run_dir, number, entry.dataset)
        if path.exists():  # missing if the run was killed while it started
            text = path.read_text()
            digest = Manifest.loads(text, str(path)).content_digest
            datasets.append(DatasetInput(entry.dataset, digest, entry.shards, text))
    return datasets


def _environment(run_dir: Path) -> dict[str, Any]:
    return untrusted.read_record(run_dir / "environment.json")


def _tags(recipe: Recipe, run_dir: Path) -> dict[str, str]:
    environment = _environment(run_dir)
    mode = environment.get("mode")  # of a finetuning; a pretraining has none
    return {
        **({"mode": mode} if mode else {}),
        "run_dir": str(run_dir.resolve()),
        "dataset": ",".join(e.dataset for e in recipe.data.mixture),
        "size": recipe.model.size,
        "fusion": recipe.model.fusion,
        "target": recipe.model.target,
        **setup_tags(environment),
        **provenance_tags(environment),
    }
