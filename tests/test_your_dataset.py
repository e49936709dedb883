"""The commands of docs/your_dataset.md run as they are written, from a folder of scenes to a score."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rasterio
import yaml
from matplotlib.image import imread
from testkit.runs import REPO, curve, metrics

from maestro_scale.shards.format.manifest import Manifest

PAGE = (REPO / "docs" / "your_dataset.md").read_text()


def block(name: str) -> str:
    return re.search(rf"<!-- test: {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)[1]


def run(name: str, folder: Path, *more: str) -> str:
    """Output of a block of the page in a shell; ``more``: words to add to its last command."""
    script = " ".join([block(name).rstrip(), *more])
    rank = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")  # an earlier test may have set them
    env = {
        **{k: v for k, v in os.environ.items() if k not in rank},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "MAESTRO_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_page_leads_from_a_folder_to_a_score(tmp_path):
    (tmp_path / "make_valley.py").write_text(block("make_valley.py"))
    run("make", tmp_path)
    run("describe", tmp_path)
    text = (tmp_path / "valley.yaml").read_text()
    for line in re.findall(
        r"^    ( *\w+:.*?)(?:  #|$)", PAGE.partition("assumed`:\n")[2].partition("Read it")[0], re.M
    ):
        assert line.removeprefix("    ") in text, line  # the page shows the draft
    draft = yaml.safe_load(text)
    assert draft["rasters"]["s2"]["bands"] == ["B2", "B3", "B4", "B8"]
    assert draft["targets"]["fields"]["classes"] == ["barley", "beet", "maize", "unlabelled"]

    run("patch", tmp_path)
    draft["rasters"]["s2"]["sensor"]["patch"] = 4
    assert yaml.safe_load((tmp_path / "valley.yaml").read_text()) == draft

    assert "samples, all valid" in run("shard", tmp_path)
    manifest = Manifest.load(str(tmp_path / "shards" / "valley"))
    samples = {
        split: sum(s.samples for s in manifest.shards_of([split])) for split in ("train", "val", "test")
    }
    assert sum(samples.values()) == 64
    assert min(samples.values()) >= 4

    inspected = run("inspect", tmp_path)
    for word in ("barley", "s2", "train", "Mar"):
        assert word in inspected
    assert imread(tmp_path / "valley.png").std() > 0.1

    run("recipe", tmp_path)
    small = (
        "model.width=64",
        "model.depth=2",
        "model.heads=2",
        "model.inter_depth=1",
        "model.decoder_width=32",
    )
    run("pretrain", tmp_path, *small)
    losses = curve(metrics(tmp_path / "runs" / "valley"))
    assert losses[-1] < losses[0]
    run("probe", tmp_path)
    results = json.loads((tmp_path / "results" / "probe" / "results.json").read_text())
    assert results["benchmark"] == "valley"
    assert results["value"] > 0.6  # a third without any knowledge

    run("finetune", tmp_path, "train.steps=4", "evaluation.overlap=0")
    run("map", tmp_path)
    with rasterio.open(tmp_path / "maps" / "valley.tif") as image:
        assert (image.crs.to_string(), image.bounds[0], image.bounds[3]) == ("EPSG:32632", 600_000, 5_400_000)
        assert set(image.tags(1).values()) == {"barley", "beet", "maize"}
        assert image.read(1).max() <= 2  # a class everywhere
