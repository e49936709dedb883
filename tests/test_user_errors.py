"""What users do wrong, and what the one line that they get must contain; before anything is computed.

The commands run in this process, on the small files of tests/fixtures. Rows are (what the user did, command, texts).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from testkit.runs import REPO

from maestro_scale import cli, evaluate, train
from maestro_scale.entry import run_command
from maestro_scale.recipe import load_recipe
from maestro_scale.training.assembly import _new_length
from maestro_scale.training.checkpoint.record import Position
from maestro_scale.training.distributed import World
from maestro_scale.training.stop import StopRequest

FIXTURES = REPO / "tests" / "fixtures"
TRAIN = "train --recipe pretrain.yaml --run-dir r --set"
EVALUATE = "evaluate --recipe evaluate.yaml --checkpoint model --out res --mode knn"
BASELINE = "evaluate --recipe evaluate.yaml --out res --mode knn --baseline"
SHARDS = "data.mixture[0].shards"
SENSORS = "data.mixture[0].sensors"
DESCRIPTION = REPO / "descriptions" / "eurosat_ms.yaml"
STUDY = REPO / "recipes" / "study" / "targets.yaml"
NO_MODEL = "is neither a run directory, nor a checkpoint, nor an exported model"

RECIPE = [
    ("no such file", "train --recipe pretrian.yaml", "cannot read the recipe", "mean 'pretrain.yaml'?"),
    ("no such name", "train --recipe vitbb", "nor the name of a recipe", "did you mean 'vitb'?"),
    ("a name like no other", "train --recipe qqqq", "`maestro-scale recipes` lists them"),
    ("a run directory as recipe", "train --recipe run", "is a folder", "run/recipe.yaml"),
    ("an empty name", "train --recipe ''", "--recipe is empty", "is a variable of the command not set?"),
    (
        "a description",
        f"train --recipe {DESCRIPTION}",
        "is a description, not a recipe: use it with `maestro-scale shard`",
    ),
    ("a study", f"train --recipe {STUDY}", "is a study, not a recipe: use it with `maestro-scale study`"),
    ("no recipe", "train", "the following arguments are required: --recipe"),
    ("indented by a tab", "train --recipe tab.yaml", "line 3, column 1", "spaces, not tabs"),
    ("a brace is missing", "train --recipe brace.yaml", "is not valid YAML", "expected ',' or '}' in line 3"),
    ("not UTF-8", "train --recipe latin1.yaml", "byte 7 is not UTF-8: save the recipe as UTF-8 text"),
    ("a key twice", "train --recipe twice.yaml", "key 'train' is given twice", "line 3"),
    ("a section misspelt", "train --recipe section.yaml", "trian: unknown key (did you mean 'train'?)"),
    ("a key misspelt", "train --recipe key.yaml", "train.step: unknown key (did you mean 'steps'?)"),
    (
        "extends misspelt",
        "train --recipe extends.yaml",
        "pretran.yaml does not exist",
        "mean 'pretrain.yaml'?",
    ),
    (
        "underscore for hyphen",
        "train --recipe pretrain.yaml --run_dir x",
        "unrecognized arguments: --run_dir",
    ),
]
SET = [
    ("no value", f"{TRAIN} train.steps", "is not section.key=value"),
    ("spaces around =", f"{TRAIN} train.steps = 3", "is not section.key=value", "no spaces"),
    ("an empty value", f"{TRAIN} train.steps=", "'train.steps' has no value", "null"),
    ("a key misspelt", f"{TRAIN} train.step=3", "train.step: unknown key (did you mean 'steps'?)"),
    ("text for a number", f"{TRAIN} train.steps=many", "train.steps: must be a whole number, got 'many'"),
    ("a negative number", f"{TRAIN} train.steps=-3", "greater than or equal to 1, got -3"),
    ("no index", f"{TRAIN} data.mixture.split=val", "use data.mixture[0]"),
    ("an index too high", f"{TRAIN} data.mixture[3].split=val", "is a list of 1: use data.mixture[0]"),
    ("fp16", f"{TRAIN} train.precision=fp16", "must be 'auto', 'bf16', 'bf16_weights' or 'fp32'"),
    ("per cent for a fraction", f"{TRAIN} masking.ratio=75", "masking.ratio: should be less than 1, got 75"),
    ("a size that there is not", f"{TRAIN} model.size=giant", "'base', 'large' or 'huge', got 'giant'"),
    ("cuda", f"{TRAIN} train.device=cuda", "train.device: must be 'auto' or 'cpu'"),
    ("ZeRO 4", f"{TRAIN} deepspeed.zero_optimization.stage=4", "must be 0, 1, 2 or 3, got 4"),
    ("a negative seed", f"{TRAIN} seed=-1", "seed: should be greater than or equal to 0"),
    ("a batch that does not divide", f"{TRAIN} train.micro_batch=3", "does not divide train.global_batch 4"),
    ("lanes that do not divide", f"{TRAIN} data.lanes=3", "does not divide train.global_batch 4: use 2 or 4"),
    (
        "a variable that is not set",
        f"{TRAIN} {SHARDS}=${{NO_SUCH}}/x",
        "NO_SUCH is not set: export NO_SUCH=…",
    ),
]
DATA = [
    ("no shards", f"{TRAIN} {SHARDS}=nowhere", "nowhere/manifest.json: not found", "`maestro-scale shard`"),
    ("MAESTRO_DATA not set", "train --recipe vitt --run-dir r", "MAESTRO_DATA is not set"),
    ("MAESTRO_DATA not set in a path", f"{TRAIN} {SHARDS}=/treesatai_ts", "MAESTRO_DATA is not set"),
    ("the manifest for the folder", f"{TRAIN} {SHARDS}=shards/manifest.json", "give the folder that holds"),
    (
        "the folder above",
        f"{TRAIN} {SHARDS}=above",
        "above/manifest.json: not found",
        "above contains 'inner': give one",
    ),
    ("no such protocol", f"{TRAIN} {SHARDS}=s4://bucket/x", "cannot be opened", "s3://bucket/name"),
    ("no such split", f"{TRAIN} data.mixture[0].split=training", "no split 'training'", "train, val, test"),
    ("another dataset", f"{TRAIN} data.mixture[0].dataset=pastis_hd", "or use a recipe of treesatai_ts"),
    ("no such sensor", f"{TRAIN} {SENSORS}.s3.patch=2", "s3: unknown sensor (there are: s1_asc, s2)"),
    (
        "a patch that does not divide",
        f"{TRAIN} {SENSORS}.s2.patch=5",
        "s2.patch: 5 does not divide image_size 6",
    ),
    ("no such band", f"{TRAIN} {SENSORS}.s2.bands=[0,1,2,66]", "do not index the 10 bands of s2"),
    (
        "a cache below a file",
        f"{TRAIN} data.cache_dir=pretrain.yaml/x",
        "cannot be created",
        "set data.cache_dir",
    ),
]
RUN = [
    ("a file as run directory", "train --recipe pretrain.yaml --run-dir pretrain.yaml", "as run directory"),
    ("an empty run directory", "train --recipe pretrain.yaml --run-dir=", "--run-dir is empty"),
    ("shards as run directory", "train --recipe pretrain.yaml --run-dir shards", "shards contains shards of"),
    (
        "a model as run directory",
        "train --recipe pretrain.yaml --run-dir model",
        "contains an exported model",
    ),
    ("--fresh in a run", "train --recipe pretrain.yaml --run-dir run --fresh", "contains a run: use another"),
    ("another seed", "train --recipe pretrain.yaml --run-dir run --set seed=6", "seed: checkpoint 5, now 6"),
    (
        "another model",
        "train --recipe pretrain.yaml --run-dir run --set model.width=24",
        "width: checkpoint 16, now 24",
        "Resume with the values that it was written with, or use another directory",
    ),
    (
        "a run for init_from",
        f"{TRAIN} model.init_from=run",
        "is not an exported model",
        "maestro-scale export",
    ),
    ("no model for init_from", f"{TRAIN} model.init_from=nope", "nope is not an exported model"),
    (
        "a model of another width for init_from",
        f"{TRAIN} model.init_from=model model.width=24",
        "its encoder has width 16, this model's has width 24",
    ),
    ("no disk room", f"{TRAIN} model.width=32", "a checkpoint takes", "--run-dir on a larger disk"),
    ("no number of ranks", "train --nproc 0 --recipe pretrain.yaml", "Invalid value for '--nproc': "),
]
WORLD = [
    ("RANK alone", {"RANK": "1"}, "RANK is set, but WORLD_SIZE is not: set both, or unset RANK"),
    (
        "more ranks than lanes",  # before they wait for each other
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        "data.lanes: 2 cannot be shared evenly by 4 ranks: compat runs on 1, 2 ranks",
    ),
    ("a rank that is not a number", {"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
]
EVALUATION = [
    ("no encoder", "evaluate --recipe evaluate.yaml --out res", "--checkpoint --baseline is required"),
    ("no checkpoint", f"{EVALUATE} --checkpoint nope", NO_MODEL, "does not exist"),
    ("shards as checkpoint", f"{EVALUATE} --checkpoint shards", NO_MODEL, "holds shards"),
    ("a file of a model", f"{EVALUATE} --checkpoint model/model.safetensors", "give its folder, model"),
    ("a file of a run", f"{EVALUATE} --checkpoint run/recipe.yaml", "it is a file; give its folder, run"),
    (
        "a published model misspelt",
        f"{EVALUATE} --checkpoint maestro-flair-hub-bas",
        "did you mean 'maestro-flair-hub-base'?",
    ),
    (
        "unknown class weights",
        f"{EVALUATE} --set evaluation.class_weights=equal",
        "evaluation.class_weights: must be none, balanced or a mapping of classes to weights, got 'equal'",
    ),
    ("the folder above", f"{EVALUATE} --checkpoint evaluation", "it contains finetune: give one of them"),
    ("an unknown mode", f"{EVALUATE} --mode svm", "invalid choice: 'svm'"),
    ("an unknown target", f"{EVALUATE} --target crop", "has no target 'crop'; it has: species"),
    ("per cent as fraction", f"{EVALUATE} --fraction 10", "above 0 and at most 1, 0.1 for 10 %"),
    ("folds that there are not", f"{EVALUATE} --folds 1", "no fold 1 in these shards", "train, val, test"),
    ("letters as folds", f"{EVALUATE} --folds x", "is not a list of whole numbers such as 0,1,2, or all"),
    ("letters as seeds", f"{EVALUATE} --seeds a,b", "'a,b' is not a list of whole numbers such as 0,1,2"),
    ("a split without role", f"{EVALUATE} --split test", "expected train=NAME,NAME…, val=… or test=…"),
    ("a role twice", f"{EVALUATE} --split test=val test=train", "--split test=train: test is given twice"),
    ("a split that there is not", f"{EVALUATE} --split test=tset", "no split 'tset'", "train, val, test"),
    (
        "no test split",
        f"{EVALUATE} --set {SHARDS}=notest",
        "'test' in shards (there are: train, val)",
        "--split",
    ),
    (
        "another dataset's recipe",
        f"{EVALUATE} --recipe eval/pastis_hd --set {SHARDS}=shards",
        "use a recipe of",
    ),
    ("a file for features", f"{EVALUATE} --features pretrain.yaml", "pretrain.yaml: File exists"),
    ("no disk room for features", EVALUATE, "features need 0.0 GiB in ", "--features at a larger disk"),
    ("a file for results", f"{EVALUATE} --out pretrain.yaml", "cannot use pretrain.yaml/knn"),
    ("mode test of an encoder", f"{EVALUATE} --mode test", "OUT/finetune"),
    ("a misspelt baseline", f"{BASELINE} statistic", "did you mean 'statistics'?"),
    ("a baseline without weights", f"{BASELINE} presto", "write presto:WEIGHTS"),
    ("weights that there are not", f"{BASELINE} presto:none.pt", "none.pt: does not exist"),
    ("a module that there is not", f"{BASELINE} python:nopkg:X", "is its folder on PYTHONPATH?"),
    ("like-named sensors", f"{EVALUATE} --set {SENSORS}.s2.patch=3", "patch 3 of 4 bands", "sensors.s2=null"),
    ("empty results", "evaluate --recipe evaluate.yaml --checkpoint model --out ''", "--out is empty"),
    ("embed: an empty folder name", "embed model shards ''", "the argument after 'shards' is empty"),
    ("embed: over a model", "embed model shards model", "model contains an exported model: choose another"),
    ("embed: no model", "embed nope shards out", NO_MODEL),
    ("embed: no shards", "embed model nope out", "nope/manifest.json: not found"),
    ("embed: no test split", "embed model notest out", "no split 'test'; there are: train, val", "--split"),
    ("embed: like-named sensors", "embed model other out", "patch 3 of 10 bands", "recipes/cross/"),
    (
        "embed: an unknown choice",
        "embed model shards out --what pixels",
        "'pixels' is not one of vector, tokens",
    ),
    ("export: a model", "export model out", "it is an exported model"),
    ("export: no run", "export nope out", "nope contains no intact checkpoint: it does not exist"),
    ("export: checkpoints", "export run/checkpoints out", "give the run directory, run"),
    ("export: over shards", "export run shards", "contains shards of a dataset: choose another folder"),
    ("export: over a run", "export run run", "run contains a run: choose another folder"),
    ("export: no average", "export run out --ema", "(optim.ema)"),
    (
        "export: a run that is not tracked",
        "export run out --register m",
        "does not exist",
        "`maestro-scale sync run`",
    ),
    ("report: no results", "report shards", "no results.json in there"),
    ("report: no folder", "report nope", "nope does not exist"),
    ("convert: a folder as file", "convert-ign model shards", "shards is a folder: give a file name"),
    ("convert: no checkpoint", "convert-ign pretrain.yaml out", "cannot be read as a checkpoint"),
]
OTHER = [
    ("a misspelt command", "trian", "No such command 'trian'. Did you mean 'train'?"),
    ("synth: no dataset", "synth treesat raw", "did you mean 'treesatai_ts'?"),
    ("synth: a folder in use", "synth treesatai_ts shards", "is not an empty folder"),
    ("shard: no dataset", "shard treesat raw out --split train", "(did you mean 'treesatai_ts'?)"),
    ("shard: no raw data", "shard treesatai_ts nope out --split train", "nope: cannot list the folder"),
    ("shard: no split named", "shard treesatai_ts empty out", "Missing option '--split'"),
    ("shard: a part of nothing", "shard treesatai_ts empty out --split train --part 5/3", "for example 3/16"),
    (
        "shard: MAESTRO_DATA not set",
        "shard treesatai_ts empty /treesatai_ts --split train",
        "/treesatai_ts would be a new folder at the root of the disk",
        "export MAESTRO_DATA=FOLDER",
    ),
    (
        "shard: no modality",
        "shard treesatai_ts empty out --split train --modalities s3",
        "has no modality 's3'",
    ),
    (
        "shard: a recipe",
        "shard pretrain.yaml empty out --split train",
        "is a recipe, not a description: use it with `maestro-scale train --recipe`",
    ),
    ("shard: no description", "shard my.yaml empty out --split train", "cannot read the description"),
    ("describe: nothing there", "describe empty", "holds no images that could be described (it is empty)"),
    ("inspect: no picture", "inspect shards --png x.docx", "pictures are PNG files, use x.png"),
    ("plan: no such GPU", "plan --recipe vitl --gpus 8 --gpu h1000", "--gpu h1000: unknown; use one of"),
    ("plan: an odd number", "plan --recipe vitl --gpus 7", "7 GPUs cannot share"),
    ("sync: no run", "sync empty", "empty is not a run directory: it has no recipe.yaml"),
    ("dashboard: no runs", "dashboard nope", "nope/mlflow.db does not exist"),
    ("study: no scale", "study targets --scale big --dry-run", "unknown scale 'big' (there are: cpu, gpu)"),
    ("study: no such name", "study targes --dry-run", "nor the name of a study", "targets"),
    ("describe: no such folder", "describe nope", "nope: is neither a folder nor a file"),
    ("predict: no model", "predict nope shards out", NO_MODEL, "it does not exist"),
    (
        "predict: no head",
        "predict model shards out",
        "no head to predict with: finetune it",
        "--mode finetune",
    ),
    (
        "predict: over shards",
        "predict model shards shards --embeddings parquet",
        "contains shards of a dataset",
    ),
    ("predict: no description", "predict model nope.yaml out", "nope.yaml: cannot read the description"),
    (
        "predict: files of shards",
        "predict model shards out --files x",
        "--files is where the files of a descr",
    ),
    (
        "predict: a target and embeddings",
        "predict model shards out --embeddings parquet --target species",
        "--target and --embeddings: embeddings are written instead of a target",
    ),
    ("describe: shards", "describe shards", "holds shards of a dataset; --recipe prints a first recipe"),
    ("describe: an address with one slash", "describe s3:/bucket/x", "or write s3://bucket/x"),
    ("search: no embeddings", "search empty key", "no Parquet files: write them with `maestro-scale embed`"),
    ("push: no address", "push model hf//me/x", "write hf://owner/name"),
    ("push: no results", "push model hf://me/m --dry-run --results nope", "nope does not exist"),
    ("push: no average", "push model hf://me/m --dry-run --ema", "--ema needs the run"),
    ("push: no model", "push nope hf://me/unwritten --dry-run", NO_MODEL),
    (
        "init: a name with its suffix",
        "init vitb.yaml",
        "the recipe that comes with maestro-scale is called vitb",
    ),
    ("init: a study", "init study/targets", "study/targets is a study, not a recipe"),
    ("init: a file in use", "init vitb pretrain.yaml", "pretrain.yaml: exists"),
    ("quickstart: a file", "quickstart --out pretrain.yaml", "is a file; give a folder"),
]
TABLE = [*RECIPE, *SET, *DATA, *RUN, *EVALUATION, *OTHER]


class Alone(World):
    """The only rank, without a process group."""

    def maxima(self, values):
        return list(values)

    def sums(self, values):
        return list(values)

    def gather(self, value):
        return [value]

    def from_main(self, value):
        return value

    def barrier(self):
        pass


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with shards, recipes, a run and a model."""
    folder = tmp_path_factory.mktemp("slips")
    shutil.copytree(FIXTURES, folder, dirs_exist_ok=True)
    (folder / "empty").mkdir()
    shutil.copytree(folder / "shards", folder / "above" / "inner")
    changes = {
        "tab": "train:\n\tsteps: 3\n",
        "brace": "train: {steps: 3\n",
        "twice": "train: {steps: 3}\ntrain: {steps: 4}\n",
        "section": "trian: {steps: 3}\n",
        "key": "train: {step: 3}\n",
    }
    for name, text in changes.items():
        (folder / f"{name}.yaml").write_text(f"extends: pretrain.yaml\n{text}")
    (folder / "latin1.yaml").write_bytes("name: f\xfcr\n".encode("latin1"))
    (folder / "extends.yaml").write_text("extends: pretran.yaml\n")
    for name in ("notest", "other"):
        shutil.copytree(folder / "shards", folder / name)
        manifest = json.loads((folder / "shards" / "manifest.json").read_text())
        if name == "notest":
            manifest["shards"] = [shard for shard in manifest["shards"] if shard["split"] != "test"]
        else:
            manifest["spec"]["name"] = "other"
            for sensor in manifest["spec"]["sensors"]:
                sensor |= {"group": "all", "patch": 3}
        (folder / name / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def run(prepared, monkeypatch, capsys):
    """A function that runs a command there: (exit code, its errors)."""
    monkeypatch.chdir(prepared)
    monkeypatch.delenv("MAESTRO_DATA", raising=False)
    for module in ("maestro_scale.training.run", "maestro_scale.evaluation.run"):
        monkeypatch.setattr(f"{module}.init_distributed", lambda *_: Alone(0, 1, 0, torch.device("cpu")))
        monkeypatch.setattr(f"{module}.monitored", lambda *_: nullcontext(Mock()))
    for module in (train, evaluate):
        monkeypatch.setattr(module, "watch_launcher", lambda *_: None, raising=False)
    monkeypatch.setattr(StopRequest, "install", lambda self: self)

    def run(command: str) -> tuple[int, str]:
        name, *words = shlex.split(command)
        script = {"train": train, "evaluate": evaluate}.get(name)
        try:
            if script is not None and "--nproc" not in words:
                code = script.main(words)
            else:
                code = run_command(lambda: cli.app([name, *words]))
        except SystemExit as ended:
            code = ended.code
        return code, capsys.readouterr().err

    yield run
    shutil.rmtree(prepared / "r", ignore_errors=True)


@pytest.mark.parametrize(
    ("slip", "command", "texts"), [(s, c, t) for s, c, *t in TABLE], ids=[row[0] for row in TABLE]
)
def test_a_slip_is_answered_in_one_line(run, prepared, monkeypatch, slip, command, texts):
    if "no disk room" in slip:
        free = shutil.disk_usage(".")._replace(free=0)
        monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    code, errors = run(command)
    assert code == 2, errors
    assert "Traceback" not in errors
    *_, line = errors.splitlines()  # the usage comes before the errors of argparse and typer
    assert "rror: " in line
    for text in texts:
        assert text in line
    assert not (prepared / "r").exists(), "the run directory of a refused training is left"


@pytest.mark.parametrize(("slip", "variables", "text"), WORLD, ids=[row[0] for row in WORLD])
def test_a_wrong_world_is_told_before_ranks_wait(run, monkeypatch, slip, variables, text):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("maestro_scale.entry._has_peers", lambda: False)
    code, errors = run("train --recipe pretrain.yaml --run-dir r")
    assert code == 2
    assert text in errors


def test_extending_a_run_says_what_the_schedule_does(prepared):
    recipe = load_recipe(prepared / "run" / "recipe.yaml", ["train.steps=24"])
    parts = SimpleNamespace(num_steps=24, stream=SimpleNamespace(steps_per_epoch=1))
    line = _new_length(recipe, prepared / "run", parts, Position(samples=16, step=4))
    assert "this run had 12 steps, now it has 24: the one_cycle schedule spans all of them" in line
    assert "in step 4" in line
    assert "in step 5" in line
    parts.num_steps = 12
    assert _new_length(recipe, prepared / "run", parts, Position(samples=16, step=4)) == ""


def test_nothing_is_written_by_a_refused_push(run, prepared):
    for command in (
        "push model hf://me/unwritten --dry-run --results nope",
        "push empty hf://me/unwritten --dry-run",
    ):
        assert run(command)[0] == 2
        assert not (prepared / "unwritten").exists()


def test_nothing_is_written_by_a_refused_init(run, prepared):
    assert run("init vitb.yaml new/x.yaml")[0] == 2
    assert not (prepared / "new").exists()


def test_nothing_is_left_of_a_refused_evaluation(run, prepared):
    assert run(f"{EVALUATE} --set {SHARDS}=notest --out left")[0] == 2
    assert not (prepared / "left").exists()
    assert os.getcwd() == str(prepared)
