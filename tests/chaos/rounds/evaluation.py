"""Rounds of evaluation: kills in kNN (from S3 with faults), finetuning and embedding; the results must be equal."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.compare import compare_files, compare_json, compare_runs, compare_safetensors, files_of
from tests.chaos.kills import draw_kill
from tests.chaos.processes import LAUNCHER
from tests.chaos.round import Round
from tests.chaos.rounds.common import faulty_s3, kill_after, killed_start
from tests.chaos.site import CACHE_GIB, FINETUNING

_TARGETS = ("rank 0", "rank 1", LAUNCHER, "all processes")


def knn(r: Round) -> None:
    """kNN from S3 with faults, killed at two random moments."""
    reference = r.site.evaluation("knn")
    with faulty_s3(r, rate=0.2) as env:
        recipe = r.site.recipe(r.folder, r.site.shards_url)
        out = r.folder / "out"
        command = r.site.evaluate(recipe, out, 2, "knn", *FINETUNING, f"data.cache_gib={CACHE_GIB}")
        for _ in range(2):
            if not kill_after(r, r.start(command, **env), reference, r.rng.choice(_TARGETS), "evaluate knn"):
                break
        if r.must_succeed(r.start(command, **env)):
            r.found(compare_json(out / "knn" / "results.json", reference.folder / "knn" / "results.json"))


def finetune(r: Round) -> None:
    """Finetuning, killed once at a step or during a commit, once at a random moment, which may be in its test."""
    reference = r.site.evaluation("finetune")
    command = r.site.evaluate(r.site.recipe(r.folder), r.folder / "out", 2, "finetune", *FINETUNING)
    r.run_dir = r.folder / "out" / "finetune"
    killed_start(r, command, draw_kill(r.rng, _TARGETS, max_steps=7))
    kill_after(r, r.start(command), reference, r.rng.choice(_TARGETS), "finetune")
    if r.must_succeed(r.start(command)):
        other = reference.folder / "finetune"
        r.found(compare_json(r.run_dir / "results.json", other / "results.json"))
        r.found(compare_runs(r.run_dir, other, exact=True))
        for path in sorted(other.glob("best/*.safetensors")):
            r.found(compare_safetensors(r.run_dir / path.relative_to(other), path))


def embed(r: Round) -> None:
    """Embeddings of a split, killed at two random moments; the files must be equal byte by byte."""
    model = r.site.training(2, 2).folder

    def command(out: Path) -> list[str]:
        words = (
            "embed",
            str(model),
            str(r.site.shards),
            str(out / "embeddings"),
            "--split=train",
            "--batch=4",
        )
        return r.site.command_line(*words, "--workers=1", f"--cache-dir={out / 'cache'}")

    reference = r.site.reference("embed", command)
    for _ in range(2):
        if not kill_after(r, r.start(command(r.folder)), reference, "rank 0", "embed"):
            break
    if r.must_succeed(r.start(command(r.folder))):
        r.found(compare_files(files_of(r.folder / "embeddings"), files_of(reference.folder / "embeddings")))
