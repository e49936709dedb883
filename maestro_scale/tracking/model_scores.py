"""The scores of a registered model: tags and description of its version, from the evaluations of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from maestro_scale.escaping import markdown_text

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

STEP_TAG = "step"
_PREFIX = "eval/"
_MAX_DESCRIPTION = 5000
_TABLE_HEAD = "| score | |\n|---|---:|"


def scores(client: MlflowClient, run: Run, step: int | None) -> dict[str, str]:
    """The scores ``eval/<benchmark>/<mode>/<metric>`` of a training run at a step, the last of each. Raises any MLflow
    error."""
    found = {}
    for key in client.get_run(run.info.run_id).data.metrics:
        # eval/<name> without a benchmark is of the training loop, on a small part of the data.
        if not key.startswith(_PREFIX) or key.count("/") < 2:
            continue
        history = [m for m in client.get_metric_history(run.info.run_id, key) if m.step == (step or 0)]
        if history:
            found[key] = f"{max(history, key=lambda m: m.timestamp).value:.4g}"
    return found


def describe(head: str, found: Mapping[str, str]) -> str:
    """The description of a version: that of its run, and a table of its scores. Markdown."""
    rows = [
        f"| {markdown_text(key.removeprefix(_PREFIX))} | {value} |" for key, value in sorted(found.items())
    ]
    table = "\n".join([_TABLE_HEAD, *rows]) if rows else ""
    return "\n\n".join(filter(None, [head.strip(), table]))[:_MAX_DESCRIPTION]


def update_versions(client: MlflowClient, run: Run, step: int) -> None:
    """Add a new score to the versions that were registered from this step of a run. Raises any MLflow error."""
    found: dict[str, str] | None = None
    for version in client.search_model_versions(f"run_id = '{run.info.run_id}'"):
        if version.tags.get(STEP_TAG) != str(step):
            continue
        found = scores(client, run, step) if found is None else found
        for key, value in found.items():
            if version.tags.get(key) != value:
                client.set_model_version_tag(version.name, version.version, key, value)
        # A table below text that a user may have written.
        head = (version.description or "").partition(_TABLE_HEAD)[0]
        client.update_model_version(version.name, version.version, describe(head, found))
