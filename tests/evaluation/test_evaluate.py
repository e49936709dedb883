"""``evaluate.py`` from the command line, on a benchmark with a class per pixel, alone and on several ranks."""

from __future__ import annotations

import json

import pytest

from maestro_scale.evaluation.results import EvalResult
from tests.testkit.runs import REPO, Trainer

EVALUATE = REPO / "maestro_scale" / "evaluate.py"


def evaluator(fields, tmp_path, **options):
    return Trainer(fields.recipe(tmp_path), entry=EVALUATE, **options)


def numbers(path):
    content = json.loads(path.read_text())
    return {k: v for k, v in content.items() if k not in ("timings", "recipe")}


@pytest.mark.slow
def test_one_two_and_three_ranks_print_identical_numbers(fields, tmp_path):
    results = []
    for ranks in (1, 2, 3):
        out = tmp_path / f"out-{ranks}"
        launcher = "deepspeed" if ranks == 2 else "env"
        code, output = evaluator(fields, tmp_path, launcher=launcher).run(
            None, ranks, f"--checkpoint={fields.model}", f"--out={out}"
        )
        assert code == 0, output[-4000:]
        assert output.count("probe: mIoU") == 1
        results.append({mode: numbers(out / mode / "results.json") for mode in ("knn", "probe")})
    assert results[0] == results[1] == results[2]
    assert EvalResult.load(tmp_path / "out-1" / "probe" / "results.json").value > 0.85


@pytest.mark.slow
def test_mistakes_are_one_line(fields, tmp_path):
    evaluate = evaluator(fields, tmp_path)
    code, output = evaluate.run(
        None, 1, f"--checkpoint={fields.model}", f"--out={tmp_path / 'out'}", "--target=roof"
    )
    assert code == 2
    assert "error: fields has no target 'roof'; it has: cover" in output
    code, output = evaluate.run(None, 1, f"--checkpoint={tmp_path}", f"--out={tmp_path / 'out'}")
    assert code == 2
    assert "is neither a run directory, nor a checkpoint, nor an exported model" in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()
