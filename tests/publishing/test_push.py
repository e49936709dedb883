"""``maestro-scale push``: a run or a finetuned model on a hub, with a card written from its files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml
from testkit.hostile import NAMES
from testkit.hub_server import TOKEN, hub_server
from testkit.models import TINY
from typer.testing import CliRunner

from maestro_scale import load_model
from maestro_scale.cli import app
from maestro_scale.datasets.spec import Target
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.interop.export import CONFIG, WEIGHTS, write_model
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.maestro import Maestro
from maestro_scale.publishing.card import without_places
from maestro_scale.shards.format.manifest import Manifest
from tests.evaluation.conftest import FIELDS

FIXTURES = Path(__file__).parents[1] / "fixtures"
ALL = ["README.md", CONFIG, "loss.png", WEIGHTS, "recipe.yaml"]


def call(*arguments: object):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_server(monkeypatch, tmp_path / "home") as found:
        yield found


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with a result of it."""
    shutil.copytree(FIXTURES / "run", tmp_path / "run")
    shutil.copytree(FIXTURES / "evaluation" / "probe", tmp_path / "run" / "probe")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    recipe["data"]["mixture"][0]["shards"] = "s3://private-bucket/team/shards"
    recipe["data"]["cache_dir"] = "/home/ada/cache"
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "run"


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_run_is_published_and_loads_by_its_address(server, run):
    done = call(run, "hf://me/model", "--license", "cc-by-4.0", "--private")
    assert done.exit_code == 0, done.output + str(done.exception)
    assert TOKEN not in done.output
    assert sorted(server.repositories["me/model"]["main"]) == ALL
    assert server.private == {"me/model"}
    assert server.commits == 1
    load_model("hf://me/model")
    card = server.repositories["me/model"]["main"]["README.md"].decode()
    meta = front(card)
    assert (meta["license"], meta["library_name"]) == ("cc-by-4.0", "maestro-scale")
    (entry,) = meta["model-index"][0]["results"]
    assert entry["metrics"] == [{"type": "wf1", "value": 0.25, "name": "wF1 (probe)"}]
    manifest = FIXTURES / "run" / "manifests" / "0-treesatai_ts.json"
    digest = Manifest.loads(manifest.read_bytes()).digest
    for text in (
        "load_model('hf://me/model')",
        "backbone('hf://me/model')",
        f"`{digest}`",
        "| treesatai_ts | probe | wF1 (%) | 25.0 | 0.0 to 50.0 | 2 | these |",
        "- optimizer steps: 4",
        "![Loss over steps](loss.png)",
        "Loss 1.1841 at step 1",
        "base_lr: 0.002",
    ):
        assert text in card, text
    published = b"".join(server.repositories["me/model"]["main"].values())
    for secret in (b"private-bucket", b"/home/ada", TOKEN.encode()):
        assert secret not in published


def test_a_dry_run_writes_the_folder_and_asks_no_server(server, run, tmp_path):
    done = call(run, "hf://me/model", "--dry-run", "--folder", tmp_path / "out")
    assert done.exit_code == 0, done.output + str(done.exception)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ALL
    assert not server.requests
    assert "have not chosen a license" in (tmp_path / "out" / "README.md").read_text()
    assert call(run, "hf://me/model", "--dry-run", "--folder", tmp_path / "out").exit_code == 0
    (tmp_path / "out" / "secret.txt").write_text("")
    assert call(run, "hf://me/model", "--dry-run", "--folder", tmp_path / "out").exit_code != 0


def finetuned(folder: Path, classes: tuple[str, ...], title: str) -> Path:
    """An exported finetuned model with these names of classes."""
    target = Target("cover", "segmentation", classes, ignored=(1, 9), resolution_m=10.0)
    spec = dataclasses.replace(FIELDS, targets=(target,), title=title)
    config = ModelConfig(
        FIELDS.sensors,
        TINY,
        12,
        inter_depth=1,
        ref_sensor="s2",
        dataset="fields",
        heads=(target,),
    )
    model = Maestro(config, decodes=False).initialise(0)
    record = Finetuned(spec, "cover", "miou", "finetune", 4, 0.5, 0.25, ("treesatai_ts",))
    write_model(folder, model.state_dict(), config, {"step": 4}, record)
    return folder


def test_a_finetuned_model_keeps_its_head(server, tmp_path):
    model = finetuned(tmp_path / "model", ("wood", "void", "meadow", "lake"), "Fields")
    done = call(model, "hf://me/model@v2/cover", "--license", "other")
    assert done.exit_code == 0, done.output + str(done.exception)
    assert not server.repositories["me/model"]["main"]
    files = server.repositories["me/model"]["v2"]
    assert sorted(files) == [f"cover/{n}" for n in ("README.md", CONFIG, WEIGHTS)]
    loaded = load_model("hf://me/model@v2/cover")
    assert loaded.finetuned is not None
    assert loaded.finetuned.target == "cover"
    card = files["cover/README.md"].decode()
    assert front(card)["pipeline_tag"] == "image-segmentation"
    for text in (
        ".predict(batch_or_tile)",
        "Extent of an input: 40 m (fields).",
        "Classes: 0 wood, 2 meadow, 3 lake",
        "mIoU on the test split: 25.0",
    ):
        assert text in card
    # With a result of it, the card has the interval.
    result = EvalResult("fields", "miou", "finetune", 0.25, {"wood": 0.5}, (0.2, 0.3), 11)
    (tmp_path / "results").mkdir()
    result.write(tmp_path / "results" / "results.json")
    # Those of other finetunings are not scores of this model.
    others = (
        dataclasses.replace(result, benchmark="meadows"),
        dataclasses.replace(result, value=0.29, fraction=0.1),
        dataclasses.replace(result, mode="test", weights="0" * 64),
    )
    for number, other in enumerate(others):
        (tmp_path / "results" / str(number)).mkdir()
        other.write(tmp_path / "results" / str(number) / "results.json")
    done = call(
        *(
            model,
            "hf://me/model",
            "--results",
            tmp_path / "results",
            "--dry-run",
            "--folder",
            tmp_path / "out",
        )
    )
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 25.0 | 20.0 to 30.0 | 11 | these |" in card
    assert (card.count("| these |"), card.count("| others |")) == (1, 3)
    (entry,) = front(card)["model-index"][0]["results"]
    assert entry["dataset"]["name"] == "fields"


def test_names_of_others_are_no_markup(tmp_path):
    names = tuple(NAMES)[:4]
    model = finetuned(tmp_path / "model", names, NAMES[0])
    done = call(model, "hf://me/model", "--dry-run", "--folder", tmp_path / "out")
    assert done.exit_code == 0, done.output + str(done.exception)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script" not in card
    assert front(card)["library_name"] == "maestro-scale"
    assert "\n\n\n" not in card


def test_refusals_are_one_line_without_the_token(server, run, monkeypatch, tmp_path):
    def refused(*arguments: object) -> str:
        done = call(*arguments)
        assert done.exit_code != 0
        text = str(done.exception) + done.output
        assert TOKEN not in text
        return text

    assert "use an identifier" in refused(run, "hf://me/model", "--license", "My own")
    assert "write hf://owner/name" in refused(run, "me/model")
    assert "neither a run directory" in refused(tmp_path, "hf://me/model")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong1" * 6)
    text = refused(run, "hf://me/model")
    assert "hf://me/model: cannot be written (" in text
    assert "log in with `hf auth login` or set HF_TOKEN" in text
    assert "wrong1" not in text
    assert "me/model" not in server.repositories


def test_places_of_a_recipe_are_shortened():
    document = {"a": ["s3://b/c/d", "~/x/y", "relative/kept"], "token": "secret", "n": 3}
    assert without_places(document) == {
        "a": ["…/d", "…/y", "relative/kept"],
        "token": "(hidden)",
        "n": 3,
    }
    assert json.dumps(without_places({"n": None})) == '{"n": null}'
