"""Write the folder that is published, and upload it in one commit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from maestro_scale import untrusted
from maestro_scale.errors import MaestroError
from maestro_scale.evaluation.features.cache import weights_digest
from maestro_scale.evaluation.features.load_encoder import export_run
from maestro_scale.evaluation.report.groups import ResultFile, find_results
from maestro_scale.evaluation.results import ORACLE, RESULTS
from maestro_scale.interop.export import CONFIG, WEIGHTS, ExportError, export_model
from maestro_scale.interop.hub import HubAddress, hub_client, hub_errors
from maestro_scale.interop.pretrained import load_model
from maestro_scale.publishing.card import LOSS_PICTURE, Card, Training, without_places
from maestro_scale.publishing.curves import loss_picture
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.training.checkpoint import commit
from maestro_scale.training.run_dir import JsonLines
from maestro_scale.training.setup import read_environment, setup_line

CARD = "README.md"  # the name that the hub shows
RECIPE = "recipe.yaml"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_WRITTEN = (WEIGHTS, CONFIG, CARD, RECIPE, LOSS_PICTURE)


class PublishError(MaestroError):
    """A model cannot be published as requested."""


def write_folder(
    run: Path,
    folder: Path,
    address: HubAddress,
    ema: bool = False,
    license: str = "",
    results: Sequence[Path] = (),
) -> list[str]:
    """Write model, configuration, card, recipe and picture of ``run`` to ``folder``; returns the names of the files.

    ``run``: a run directory, that of a finetuning, a checkpoint, or an exported model. ``results``: folders with
    further results; those in the run are found. PublishError, ExportError, CheckpointError, EvaluationError.
    """
    if license and not _LICENSE.fullmatch(license):
        raise PublishError(
            f"--license {license}: use an identifier of https://huggingface.co/docs/hub/repositories-licenses, such as "
            "apache-2.0, cc-by-4.0 or other"
        )
    if folder.exists() and any(p.name not in _WRITTEN for p in folder.iterdir()):
        raise PublishError(f"{folder} holds other files, which would be published too: use an empty folder")
    if ema and (run / CONFIG).exists():
        raise ExportError(f"{run} is an exported model: --ema needs the run")
    if not any((run / name).exists() for name in (CONFIG, commit.MARKER, "checkpoints")):
        raise ExportError(f"{run} is neither a run directory, nor a checkpoint, nor an exported model")
    scores = _results(run, results)  # refused here: nothing is written yet
    folder.mkdir(parents=True, exist_ok=True)
    _write_model(run, folder, ema)
    model = load_model(folder)
    trained = untrusted.read_record(folder / CONFIG, allow_nan=True).get("trained")
    trained = trained if isinstance(trained, dict) else {}
    training = _training(run, trained)
    picture = loss_picture(training.lines)
    for name, content in ((LOSS_PICTURE, picture), (RECIPE, _recipe_text(training))):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    card = Card(
        address,
        model.config,
        trained,
        model.finetuned,
        sum(p.numel() for p in model.parameters()),
        weights_digest(model),
        training,
        scores,
        license,
        picture is not None,
    )
    (folder / CARD).write_text(card.text())
    return sorted(p.name for p in folder.iterdir())


def upload(folder: Path, address: HubAddress, private: bool = False) -> str:
    """Upload a folder of ``write_folder`` in one commit; returns its URL. Creates a missing repository or branch.

    ExportError if the hub refuses it or cannot be reached.
    """
    client = hub_client(str(address))
    from huggingface_hub import CommitOperationAdd

    prefix = f"{address.path}/" if address.path else ""
    with hub_errors(str(address), "be written"):
        client.create_repo(address.repository, private=private, exist_ok=True)
        if address.revision:
            client.create_branch(address.repository, branch=address.revision, exist_ok=True)
        additions = [
            CommitOperationAdd(prefix + p.name, str(p))
            for p in sorted(folder.iterdir())
            if p.name in _WRITTEN
        ]
        done = client.create_commit(
            address.repository,
            additions,
            commit_message="Upload with maestro-scale",
            revision=address.revision,
        )
    return str(done.commit_url)


def _write_model(run: Path, folder: Path, ema: bool) -> None:
    if (run / CONFIG).exists():
        for name in (WEIGHTS, CONFIG):
            if not (run / name).is_file():
                raise ExportError(f"{run} has no {name}: export the model again")
            shutil.copyfile(run / name, folder / name)
    elif (run / commit.MARKER).exists():
        if problem := commit.problem(run, hashes=True):
            raise ExportError(f"{run}: {problem}; use another checkpoint")
        export_model(run, folder, ema)
    else:
        export_run(run, folder, ema)


def _training(run: Path, trained: dict[str, Any]) -> Training:
    found = trained.get("datasets")
    digests = {str(k): v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}
    if (run / commit.MARKER).exists():
        run = run.parent.parent
    if not (run / "metrics.jsonl").exists():
        return Training(digests=digests)
    manifests = [
        Manifest.loads(untrusted.read_bytes(path), str(path))
        for path in sorted((run / "manifests").glob("*.json"))
    ]
    recipe = run / RECIPE
    document = untrusted.load_yaml(recipe.read_text()) if recipe.exists() else None
    return Training(
        manifests,
        digests,
        document if isinstance(document, dict) else None,
        setup_line(read_environment(run)),
        JsonLines(run / "metrics.jsonl").read(),
    )


def _recipe_text(training: Training) -> bytes | None:
    if training.recipe is None:
        return None
    return yaml.safe_dump(without_places(training.recipe), sort_keys=False, allow_unicode=True).encode()


def _results(run: Path, more: Sequence[Path]) -> list[ResultFile]:
    places = [run] if any(run.rglob(RESULTS)) else []
    found = find_results([*places, *more]) if places or more else []
    return [f for f in found if f.result.mode != ORACLE]
