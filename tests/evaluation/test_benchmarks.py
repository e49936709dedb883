"""Every benchmark with its shipped recipe, from raw data to four scores."""

from __future__ import annotations

import json

import pytest
from testkit.runs import REPO, Trainer

from maestro_scale import datasets
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.shards.write.writer import write_shards

EVALUATE = REPO / "maestro_scale" / "evaluate.py"
SMALLER = {
    "treesatai_ts": "sensors: {aerial: {image_size: 60}, s2: {num_dates: 4}}",
    "pastis_hd": "crop_m: 640",
    "flair_hub": "sensors: {aerial: {image_size: 64}, dem: {image_size: 64}, s2: {num_dates: 4}}",
    "flair2": "sensors: {aerial: {image_size: 64}, dem: {image_size: 64}, s2: {num_dates: 4}}",
}
METRIC = {
    "treesatai_ts": ("wf1", 15),
    "pastis_hd": ("miou", 19),
    "flair_hub": ("miou", 15),
    "flair2": ("miou", 12),
}
RECIPE = """
extends: {shipped}
data:
  mixture: [{{dataset: {name}, shards: {shards}, {smaller}}}]
  lanes: 2
  workers: 0
  cache_dir: {cache}
model: {{size: tiny, width: 32, depth: 2, heads: 2, inter_depth: 1}}
train: {{steps: 2, global_batch: 4, micro_batch: 2, precision: fp32}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMALLER))
def test_all_four_modes(name, tmp_path):
    datasets.synth(name, tmp_path / "raw", 6, 1)
    for split in ("train", "val", "test"):
        raw = datasets.open_raw(name, tmp_path / "raw", split)
        write_shards(raw, str(tmp_path / "shards"), split, workers=1, codec="raw", shard_mb=64, seed=0)
    shipped = REPO / "recipes" / "eval" / f"{name}.yaml"
    places = {k: json.dumps(str(tmp_path / k)) for k in ("shards", "cache")}
    recipe = tmp_path / "small.yaml"
    recipe.write_text(RECIPE.format(shipped=shipped, name=name, smaller=SMALLER[name], **places))
    out = tmp_path / "out"
    code, output = Trainer(recipe, entry=EVALUATE).run(None, 1, "--baseline=random", f"--out={out}")
    assert code == 0, output[-4000:]
    if name == "pastis_hd":
        code, output = Trainer(recipe, entry=EVALUATE).run(
            None, 1, "--baseline=oracle", "--maps", f"--out={out}"
        )
        assert code == 0, output[-4000:]
        oracle = EvalResult.load(out / "oracle" / "results.json")
        assert len(list((out / "oracle" / "maps").glob("*.tif"))) == oracle.num_tiles
    for mode in ("knn", "probe", "finetune", "scratch"):
        result = EvalResult.load(out / mode / "results.json")
        assert (result.benchmark, result.mode) == (name, mode)
        assert (result.metric, len(result.per_class)) == METRIC[name]
        assert 0 <= result.interval[0] <= result.value <= result.interval[1] <= 1
