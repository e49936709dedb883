"""``evaluate.py`` from the command line on a segmentation benchmark, on one and on several ranks."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from maestro_scale.evaluation import run
from maestro_scale.evaluation.paired import load_runs
from maestro_scale.evaluation.results import Architecture, EvalResult
from maestro_scale.evaluation.run import EvalOptions
from maestro_scale.shards.storage import LocalStorage as Storage
from maestro_scale.shards.write.writer import Writer
from maestro_scale.training.manifests import ManifestMismatchError
from maestro_scale.training.run_dir import RunDirError, lock
from tests.evaluation.conftest import SCENES, SPLITS, field_tile, scene_tile
from tests.evaluation.test_oracle import recipe
from tests.testkit.runs import REPO, Trainer

EVALUATE = REPO / "maestro_scale" / "evaluate.py"


def evaluator(fields, tmp_path, **options):
    return Trainer(fields.recipe(tmp_path), entry=EVALUATE, **options)


def numbers(path):
    content = json.loads(path.read_text())
    return {k: v for k, v in content.items() if k not in ("timings", "recipe")}


@pytest.mark.slow
def test_one_two_and_three_ranks_print_identical_numbers(fields, tmp_path):
    results, maps = [], []
    for ranks in (1, 2, 3):
        out, modes = tmp_path / f"out-{ranks}", ("knn", "probe", *(("attentive",) if ranks != 2 else ()))
        launcher = "deepspeed" if ranks == 2 else "env"
        asked = [f"--checkpoint={fields.model}", f"--out={out}", "--maps", *(f"--mode={m}" for m in modes)]
        code, output = evaluator(fields, tmp_path, launcher=launcher).run(None, ranks, *asked)
        assert code == 0, output[-4000:]
        assert output.count("probe: mIoU") == 1
        results.append({mode: numbers(out / mode / "results.json") for mode in modes})
        maps.append({p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*.tif"))})
    assert results[0] == results[2]
    assert results[1].items() <= results[0].items()
    assert len(maps[0]) == 3 * SPLITS["test"]
    assert maps[0] == maps[2]
    assert maps[1].items() <= maps[0].items()
    path = tmp_path / "out-1" / "probe" / "results.json"
    result = EvalResult.load(path)
    assert result.value > 0.85
    # The hashes of the counts are among the numbers above: they are the same for any number of ranks, too.
    counts = result.load_counts(path)
    assert sorted(counts.keys) == [f"field-{n:03d}" for n in range(27, 38)]
    assert tuple(map(tuple, counts.array.sum(0)[:3].tolist())) == result.confusion
    for key, of_tile in zip(counts.keys, counts.array, strict=True):
        cover = field_tile(int(key.removeprefix("field-"))).targets["cover"]
        assert of_tile.sum(1).tolist() == [
            *((cover == c).sum() for c in (0, 2, 3)),
            np.isin(cover, (1, 9)).sum(),
        ]
    assert len(load_runs(path, result)) == 1


@pytest.mark.slow
def test_the_oracle_scores_the_same_on_three_ranks_as_on_one(tmp_path):
    with Writer(str(tmp_path / "shards"), SCENES, "test") as writer:
        for number in range(7):
            writer.add(scene_tile(number))
    path = recipe(tmp_path, "scenes", tmp_path / "shards").removeprefix("--recipe=")
    results = []
    for ranks in (1, 3):
        out = tmp_path / f"out-{ranks}"
        code, output = Trainer(Path(path), entry=EVALUATE).run(
            None, ranks, "--baseline=oracle", f"--out={out}"
        )
        assert code == 0, output[-4000:]
        assert output.count("oracle: wF1") == 1
        results.append(numbers(out / "oracle" / "results.json"))
    assert results[0] == results[1]
    assert results[0]["num_tiles"] == 7


@pytest.mark.slow
def test_mistakes_are_one_line(fields, tmp_path):
    evaluate = evaluator(fields, tmp_path)
    code, output = evaluate.run(
        None, 1, f"--checkpoint={fields.model}", f"--out={tmp_path / 'out'}", "--target=roof"
    )
    assert code == 2
    assert "error: fields has no target 'roof'; it has: cover" in output
    asked = ["--baseline=statistics", "--mode=knn", "--mode=finetune", f"--out={tmp_path / 'out'}"]
    code, output = evaluate.run(None, 1, *asked)
    assert code == 2
    assert "error: --baseline statistics is not trained here" in output
    code, output = evaluate.run(None, 1, f"--checkpoint={tmp_path}", f"--out={tmp_path / 'out'}")
    assert code == 2
    assert "is neither a run directory, nor a checkpoint, nor an exported model" in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_two_evaluations_of_a_mode_into_one_folder_are_refused(fields, tmp_path):
    recipe = str(fields.recipe(tmp_path))
    options = EvalOptions(recipe, tmp_path / "out", baseline="statistics", modes=("knn",))
    with lock(tmp_path / "out" / "knn"), pytest.raises(RunDirError, match="out/knn is in use by another run"):
        run.run_evaluation(options)
    assert not (tmp_path / "out" / "knn" / "results.json").exists()
    run.run_evaluation(options)
    assert EvalResult.load(tmp_path / "out" / "knn" / "results.json").mode == "knn"


def test_a_result_records_the_model_that_was_evaluated_and_not_that_of_the_recipe(fields, tmp_path):
    """The recipe leaves the model at its default, base with three blocks between groups."""
    recipe = str(fields.recipe(tmp_path))
    small = Architecture(
        width=32,
        depth=3,
        heads=2,
        dim_head=16,
        mlp_ratio=2,
        fusion="group",
        inter_depth=1,
        spectral="joint",
        norm="group",
    )
    for name, encoder, expected in (
        ("a", {"checkpoint": str(fields.model)}, small),
        ("b", {"baseline": "statistics"}, None),
    ):
        run.run_evaluation(EvalOptions(recipe, tmp_path / name, modes=("knn",), **encoder))
        assert EvalResult.load(tmp_path / name / "knn" / "results.json").architecture == expected


def test_ranks_with_other_manifests_are_refused_and_results_record_theirs(
    fields, tmp_path, monkeypatch, caplog
):
    digest = hashlib.sha256((fields.shards / "manifest.json").read_bytes()).hexdigest()
    other = SimpleNamespace(
        size=2, is_main=True, gather=lambda text: [text, json.dumps({"fields": "c" * 64})]
    )
    options = EvalOptions(
        str(fields.recipe(tmp_path)), tmp_path / "out", checkpoint=str(fields.model), modes=("knn",)
    )
    for modes in (("knn",), ("finetune",)):  # before any of them reads a sample
        with monkeypatch.context() as patch:
            patch.setattr(run, "_init_distributed", lambda trains, device: other)
            patch.setattr(run, "_watched", lambda *args: nullcontext())
            with pytest.raises(ManifestMismatchError, match=f"rank 0: {digest[:12]}, rank 1: cccccccccccc"):
                run.run_evaluation(replace(options, modes=modes))
    assert not (tmp_path / "out").exists()

    def change(*args) -> None:
        """Another process adds a note while the evaluation runs."""
        text = (fields.shards / "manifest.json").read_text()
        monkeypatch.setattr(
            Storage, "read", lambda self, name, limit=None: text.replace("Fields", "Changed").encode()
        )

    monkeypatch.setattr(run.EvalResult, "write", lambda self, path: (written.append(self), change()))
    written: list[EvalResult] = []
    run.run_evaluation(options)
    assert written[0].datasets == {"fields": digest}
    assert "manifest.json: the manifest of fields has changed while this job runs" in caplog.text
