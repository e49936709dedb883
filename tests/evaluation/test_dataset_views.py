"""Sensors and crops that do not fit a benchmark: one line and exit code 2, in an evaluation and in an embedding."""

from __future__ import annotations

import dataclasses
import json

import pytest

from maestro_scale import evaluate
from maestro_scale.cli import app
from maestro_scale.entry import run_command
from maestro_scale.evaluation.baselines.statistics import ChannelStatistics
from maestro_scale.evaluation.features.adapt import encoder_spec
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.model.config import DatasetView
from tests.evaluation.conftest import FIELDS
from tests.evaluation.test_evaluate import evaluator

# Tiles of 60 m; labels and Sentinel-2 have pixels of 10 m. The dataset's crop is 40 m: 4 pixels of each.
REFUSED = [
    ("crop_m=61", "data.mixture[0].crop_m: 61 m is larger than a tile, 60 m"),
    ("crop_m=45", "data.mixture[0].crop_m: 45 m is not a multiple of the coarsest sensor's pixel, 10 m: use 40 or 50"),
    ("sensors.s2=null", "data.mixture[0].sensors.s2: cannot be left out, segmentation is predicted on its grid"),
    ("sensors.s2={image_size: 3, patch: 1}", "labels of 4 pixels per side are"),
    ("dataset=meadows", "data.mixture[0].dataset: 'meadows', but "),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_an_evaluation_refuses_in_one_line(fields, tmp_path, capsys, change, reason):
    arguments = [f"--recipe={fields.recipe(tmp_path)}", "--baseline=statistics", f"--out={tmp_path / 'out'}"]
    assert evaluate.main([*arguments, "--set", f"data.mixture[0].{change}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert reason in line


@pytest.mark.parametrize(("change", "reason"), [REFUSED[0], REFUSED[3]])
def test_a_finetuning_refuses_in_one_line(fields, tmp_path, change, reason):
    code, output = evaluator(fields, tmp_path).run(
        None,
        1,
        f"--checkpoint={fields.model}",
        "--mode=finetune",
        f"--out={tmp_path / 'out'}",
        "--set",
        f"data.mixture[0].{change}",
    )
    assert code == 2, output[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith("error")]
    assert reason in line
    assert "Traceback" not in output


def test_an_embedding_refuses_in_one_line(fields, tmp_path, capsys):
    manifest = json.loads((fields.shards / "manifest.json").read_text())
    manifest["spec"]["crop_m"] = 45.0
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    command = ["embed", str(fields.model), str(tmp_path), str(tmp_path / "out"), "--split", "test"]
    assert run_command(lambda: app(command, standalone_mode=False)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: fields.crop_m: 45 m is not a multiple of the coarsest sensor's pixel, 10 m: use 40 or 50"
    )


def test_the_spec_of_an_encoder_has_its_sensors_and_is_checked():
    aerial, s2 = FIELDS.sensors
    encoder = ChannelStatistics(FIELDS)

    def seen_as(**changes):
        encoder.config = dataclasses.replace(
            encoder.config, view=dataclasses.replace(DatasetView.of_spec(FIELDS), **changes)
        )
        return encoder_spec(encoder, FIELDS)

    assert seen_as() == FIELDS
    assert seen_as(sensors=(s2,)) == dataclasses.replace(FIELDS, sensors=(s2,))
    assert seen_as(ref_sensor=None).ref_sensor is None
    with pytest.raises(EvaluationError, match=r"^fields\.sensors\.spot\.source: unknown modality 'spot'"):
        seen_as(sensors=(dataclasses.replace(aerial, name="spot", source="spot"),))
    with pytest.raises(EvaluationError, match=r"^fields\.crop_m: 25 m is not a multiple"):
        encoder_spec(ChannelStatistics(FIELDS), dataclasses.replace(FIELDS, crop_m=25.0))
