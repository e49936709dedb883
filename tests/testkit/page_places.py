"""The folders in which the blocks of the pages run: small data under the names that the pages use.

``PLACES`` maps the first word of a block's marker to the function that prepares its folder.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from maestro_scale import datasets
from testkit import corpora
from testkit.page_blocks import ROOT
from testkit.page_shell import Shell

FIXTURES = ROOT / "tests" / "fixtures"
NAMES = {
    "shards": ("SHARDS", "shards", "data/treesatai_ts"),
    "run": ("RUN", "RUN_DIR", "runs/vitb-treesatai-ts", "runs/mine"),
    "model": ("MODEL",),
    "evaluation/probe": ("ours", "theirs", "other/results"),
}
"""Of tests/fixtures: the names that the pages use for such data."""
RECIPES = (
    "eval/treesatai_ts",
    *(f"recipes/{name}.yaml" for name in ("eval/treesatai_ts", "eval/pastis_hd", "vitb")),
)
"""Recipes of the pages that are replaced by that of the fixtures: a file comes before a recipe of this name."""
STEPS = "train: {steps: 2, global_batch: 4, micro_batch: 2, precision: fp32, log_every: 1}\n"
_SMALL = ("model.width=32", "model.depth=2", "model.heads=2", "model.inter_depth=1", "model.decoder_width=32")


def fixture(folder: Path) -> Shell:
    """Shards, a run, a model and results of tests/fixtures."""
    for source, names in NAMES.items():
        for name in names:
            shutil.copytree(FIXTURES / source, folder / name)
    for name in RECIPES:
        # The sensors of the small model have other patches and groups than those of the recipe.
        _write(
            folder / name,
            f"extends: {FIXTURES / 'evaluate.yaml'}\nname: {Path(name).stem}\n"
            f"data: {{cache_dir: cache}}\n{STEPS}",
        )
    rest = ("--recipe", "eval/treesatai_ts", "--out", "results")
    return Shell(folder, {"MAESTRO_DATA": "data", "MAESTRO_CACHE": "cache"}, rest)


def finetuned(folder: Path) -> Shell:
    """The same with a finetuned model of two steps."""
    shell = fixture(folder)
    shell.run(
        "maestro-scale evaluate --recipe eval/treesatai_ts --checkpoint RUN --mode finetune --out results"
    )
    return shell


def raw(folder: Path, name: str) -> Shell:
    """The dataset ``name`` in its raw layout in RAW, and a recipe of its name, of a very small model."""
    if name == "fuel_moisture":
        _fuel_moisture(folder / "RAW")
    else:
        datasets.synth(name, folder / "RAW", 5 if name == "pastis_hd" else 8, 7)
    sensors = "{aerial: {image_size: 60, patch: 20}, s2: {num_dates: 4, patch: 3}}"
    _write(
        folder / name,
        f"extends: {FIXTURES / 'pretrain.yaml'}\ndata: {{cache_dir: cache, mixture: [{{dataset: {name}, split: train, "
        f'shards: "${{MAESTRO_DATA}}/{name}", sensors: {sensors}}}]}}\n{STEPS}',
    )
    return Shell(folder, {"MAESTRO_DATA": "data", "MAESTRO_CACHE": "cache"})


def corpus(folder: Path, name: str) -> Shell:
    """A few tiles of a public corpus: a repository that `hf download` copies, and files as after other downloads."""
    hub = folder / "hub"
    writers: dict[str, Callable[[], object]] = {
        "terramesh": lambda: corpora.write_terramesh(hub, "val", per_subset=1),
        "ssl4eo_s12": lambda: corpora.write_ssl4eo_s12(hub, num_tiles=1),
        "major_tom": lambda: corpora.write_major_tom(hub, "Core-S2L2A", cells=["454U_120R"]),
        "eurosat": lambda: corpora.write_eurosat(folder),
        "flair": lambda: [corpora.write_flair1_toy(folder, number) for number in (1, 2)],
    }
    writers[name]()
    repositories = {
        "ibm-esa-geospatial/TerraMesh": hub,
        "embed2scale/SSL4EO-S12-v1.1": hub,
        "Major-TOM/Core-S2L2A": hub / "Core-S2L2A",
    }
    return Shell(folder, {}, (), repositories)


def area(folder: Path) -> Shell:
    """The scenes of docs/your_dataset.md in SCENES and SRC, their description area.yaml, shards, a pretrained model of
    random weights in MODEL, and a network finetuned in two steps in RESULTS/finetune."""
    (folder / "valley").mkdir(parents=True)
    page = (ROOT / "docs" / "your_dataset.md").read_text()
    (code,) = re.findall(r"<!-- test: make_valley.py -->\n```python\n(.*?)```", page, re.DOTALL)
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(code, "make_valley.py", "exec"), {})
    finally:
        os.chdir(before)
    for name in ("SCENES", "SRC"):
        (folder / name).symlink_to("valley")
    shell = Shell(folder, {"MAESTRO_CACHE": "cache"})
    small = " ".join((*_SMALL, "train.steps=2", "train.epochs=null", "evaluation.validations=1"))
    shell.run(
        "maestro-scale describe SRC --blocks > area.yaml\n"
        "for split in train val test; do maestro-scale shard area.yaml SRC SHARDS --split $split; done\n"
        "maestro-scale describe SHARDS --recipe > recipe.yaml\n"
        "maestro-scale evaluate --recipe recipe.yaml --baseline untrained --mode finetune --target fields "
        f"--out RESULTS --set tracking.enabled=false {small}\n"
        "maestro-scale export RESULTS/finetune MODEL\n"
        "maestro-scale embed MODEL SHARDS EMBEDDINGS --what vector"
    )
    return shell


def tracked(folder: Path) -> Shell:
    """The fixtures, for a run that is tracked in runs/mlflow.db."""
    shell = fixture(folder)
    shutil.copytree(FIXTURES / "run", folder / "runs" / "RUN")
    recipe = folder / "runs" / "RUN" / "recipe.yaml"
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**content, "tracking": {"enabled": True, "pictures_every": 0}}))
    shell.run("maestro-scale sync runs/RUN")
    return shell


def slurm(folder: Path) -> Shell:
    """A folder for the scripts of slurm/, which check what they would run (MAESTRO_CHECK=1)."""
    for name in ("recipes", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(FIXTURES / "shards", folder / "data" / "treesatai_ts")
    return Shell(folder, {"MAESTRO_DATA": str(folder / "data")})


def checkout(folder: Path) -> Shell:
    """The checkout itself, for commands that write nothing."""
    return Shell(ROOT, {"MAESTRO_DATA": str(folder)})


PLACES: dict[str, Callable[..., Shell]] = {
    "area": area,
    "checkout": checkout,
    "corpus": corpus,
    "finetuned": finetuned,
    "fixture": fixture,
    "raw": raw,
    "slurm": slurm,
    "tracked": tracked,
}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _fuel_moisture(folder: Path) -> None:
    """24 pixels, two per place, the last eight of the test split."""
    num = 24
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = {
        "s1_s2_era5_srtm": rng.uniform(0.1, 1, (num, 3, 18)),
        "month": np.tile([3, 4, 5], (num, 1)),
        "latlon": np.repeat(np.arange(num / 2), 2)[:, None] + np.array([40.0, -110.0]),
        "dynamic_world": np.tile(np.arange(num)[:, None] % 3, (1, 3)).astype(np.uint8),
        "target": 10.0 * np.arange(num),
        "is_test": (np.arange(num) >= 16).astype(int),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
