"""Reference checkpoints (Lightning) are converted without running their code and without loss in both directions."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from testkit.authors import TheirModule
from testkit.models import full_batch
from testkit.parity import FIXTURES, batch_of, build, close, load

from maestro_scale import datasets, load_model
from maestro_scale.cli import main
from maestro_scale.datasets.spec import Target
from maestro_scale.interop.convert import ConvertOptions, convert
from maestro_scale.interop.convert_back import convert_to_reference
from maestro_scale.interop.export import ExportError, write_model
from maestro_scale.interop.reference_keys import to_reference
from maestro_scale.interop.reference_model import ConversionHints
from maestro_scale.interop.restricted import load_untrusted
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.sizes import SIZES, Size

SPEC = datasets.spec("treesatai_ts")
SIZE = Size(
    width=24,
    depth=3,
    heads=2,
    dim_head=12,
    mlp_ratio=2,
    decoder_depth=1,
    decoder_width=16,
    decoder_heads=4,
    decoder_dim_head=4,
)
HINTS = ConversionHints(heads=2, decoder_heads=4)


def config(**changes) -> ModelConfig:
    fields = {"sensors": SPEC.sensors, "size": SIZE, "pos_grid": SPEC.pos_grid, "inter_depth": 1}
    view = {"dataset": SPEC.name, "crop_m": SPEC.crop_m}
    return ModelConfig(**{**fields, **view, **changes})


@pytest.fixture
def mask_config(monkeypatch):
    """A configuration object of the reference, from a module that does not exist when the checkpoint is read."""

    @dataclasses.dataclass
    class MaskConfig:
        mask_ratio: float = 0.75
        mask_mod: object = 0.25

    names = ("maestro", "maestro.conf", "maestro.conf.mask")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    MaskConfig.__module__, MaskConfig.__qualname__ = names[-1], "MaskConfig"
    sys.modules[names[-1]].MaskConfig = MaskConfig

    def write(path: Path, content: dict, **fields) -> Path:
        content.setdefault("hyper_parameters", {})["mask"] = MaskConfig(**fields)
        torch.save(content, path)
        for name in names:
            sys.modules.pop(name, None)
        return path

    return write


def lightning(model: Maestro, **hyper) -> dict:
    """A checkpoint as Lightning saves it with the reference code: weights, their moving average, and the rest."""
    theirs = to_reference(model.state_dict(), model.config)
    state = {f"model.{k}": v for k, v in theirs.items()}
    state |= {f"ema_model.{k}": v + 1 for k, v in theirs.items()}
    return {
        "epoch": 99,
        "global_step": 1234,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}],
        "hyper_parameters": {"interpolate": "nearest", "model_size": "medium", "loss": "l1_norm", **hyper},
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fusion": "mod"},
        {"fusion": "monotemp", "inter_depth": 0},
        {"fusion": "shared", "inter_depth": 0},
        {"spectral": "token"},
        {"heads": (dataclasses.replace(SPEC.targets[0], name="treesat_mlc_thresh"),)},
        {"size": dataclasses.replace(SIZE, heads=1, dim_head=24)},
        {"size": dataclasses.replace(SIZE, decoder_width=24)},
    ],
    ids=lambda c: "-".join(map(str, c.values()))[:30] or "default",
)
def test_a_checkpoint_survives_a_round_trip(tmp_path, mask_config, changes):
    if changes.get("spectral"):
        sensors = (dataclasses.replace(s, token_groups=s.band_groups) for s in SPEC.sensors)
        changes = {**changes, "sensors": tuple(sensors)}
    model = Maestro(config(**changes)).initialise(0).eval()
    content = lightning(model, fusion_mode=model.config.fusion)
    checkpoint = mask_config(tmp_path / "pretrain-epoch=99.ckpt", content)
    hints = dataclasses.replace(HINTS, heads=None) if model.config.size.heads == 1 else HINTS
    parts = convert(checkpoint, tmp_path / "ours", ConvertOptions(hints=hints))
    assert {p.status for p in parts} == {"loaded"}
    ours = load_model(tmp_path / "ours")
    assert ours.config == model.config
    batch = full_batch(model.config, 2)
    with torch.no_grad():
        assert torch.equal(ours.embed(batch).vector, model.embed(batch).vector)
        for target, logits in model.head_outputs(batch).items():
            assert torch.equal(ours.head_outputs(batch)[target], logits)
    convert_to_reference(tmp_path / "ours", tmp_path / "back" / "theirs.ckpt")
    back = torch.load(tmp_path / "back" / "theirs.ckpt", weights_only=False)
    assert back["global_step"] == 1234
    expected = {k: v for k, v in content["state_dict"].items() if k.startswith("model.")}
    assert {k for k in back["state_dict"] if k.startswith("model.")} == expected.keys()
    for key, tensor in expected.items():
        assert back["state_dict"][key].shape == tensor.shape, key
        assert torch.equal(back["state_dict"][key], tensor), key
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    written["trained"] = ["of", "others"]  # a model from elsewhere: nothing is known of its training
    (tmp_path / "ours" / "config.json").write_text(json.dumps(written))
    convert_to_reference(tmp_path / "ours", tmp_path / "back" / "theirs.ckpt")
    assert torch.load(tmp_path / "back" / "theirs.ckpt", weights_only=False)["global_step"] == 0


@pytest.mark.parametrize("name", FIXTURES)
def test_fixtures_convert_to_the_same_weights(tmp_path, mask_config, name):
    fixture = load(name)
    expected = build(fixture)
    size = fixture.config.size
    state = {f"model.{k}": v for k, v in fixture.under("weights").items()}
    content = {"state_dict": state, "hyper_parameters": {"fusion_mode": fixture.config.fusion}}
    write_model(tmp_path / "like", {}, fixture.config, {})
    checkpoint = mask_config(tmp_path / "fixture.ckpt", content)
    convert(checkpoint, tmp_path / "ours", ConvertOptions(like=tmp_path / "like" / "config.json"))
    with torch.no_grad():
        logits = load_model(tmp_path / "ours").head_outputs(batch_of(fixture))
        for target, theirs in fixture.under("logits").items():
            close(logits[target], theirs.reshape(logits[target].shape))
            assert torch.equal(logits[target], expected.head_outputs(batch_of(fixture))[target])
    convert_to_reference(tmp_path / "ours", tmp_path / "back.ckpt")
    back = torch.load(tmp_path / "back.ckpt", weights_only=False)["state_dict"]
    assert {k for k in back if k.startswith("model.")} == state.keys()
    assert all(torch.equal(back[k], v) and back[k].shape == v.shape for k, v in state.items())
    if "treesatai" in name:  # the preset of this dataset gives the same configuration
        hints = ConversionHints(heads=size.heads, decoder_heads=size.decoder_heads)
        convert(checkpoint, tmp_path / "found", ConvertOptions(hints=hints))
        found = load_model(tmp_path / "found").config
        assert [(s.name, s.grid, s.group) for s in found.sensors] == [
            (s.name, s.grid, s.group) for s in fixture.config.sensors
        ]


def test_the_moving_average_is_converted_on_request(tmp_path, mask_config):
    model = Maestro(config()).initialise(0)
    checkpoint = mask_config(tmp_path / "a.ckpt", lightning(model))
    convert(checkpoint, tmp_path / "ema", ConvertOptions(weights="ema", hints=HINTS))
    for name, tensor in load_file(tmp_path / "ema" / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name] + 1)


@pytest.mark.parametrize("dataset", ["flair_hub", "treesatai_ts"])
@pytest.mark.parametrize("inter_depth", [0, 3])
def test_the_authors_loader_takes_a_model_and_gives_it_back(
    tmp_path, capsys, monkeypatch, dataset, inter_depth
):
    spec = datasets.spec(dataset)
    # Their smallest size, but for channels: its name goes by all numbers.
    small = dataclasses.replace(
        SIZES["tiny"], width=48, heads=2, dim_head=12, decoder_width=32, decoder_dim_head=2
    )
    monkeypatch.setitem(SIZES, "tiny", small)
    view = {
        "pos_grid": spec.pos_grid,
        "crop_m": spec.crop_m,
        "ref_sensor": spec.ref_sensor,
        "dataset": spec.name,
    }
    model = Maestro(ModelConfig(spec.sensors, small, inter_depth=inter_depth, **view)).initialise(0)
    write_model(tmp_path / "ours", model.state_dict(), model.config, {"step": 5, "epoch": 1})
    for source, out in (("ours", "theirs.ckpt"), ("theirs.ckpt", "again"), ("again", "again.ckpt")):
        monkeypatch.setattr(
            sys, "argv", ["maestro-scale", "convert-ign", str(tmp_path / source), str(tmp_path / out)]
        )
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code in (0, None)
    assert "note:" not in capsys.readouterr().out
    expected = to_reference(model.state_dict(), model.config)
    shapes = {name: w.shape for name, w in expected.items()}
    for path in ("theirs.ckpt", "again.ckpt"):
        module = TheirModule.load_from_checkpoint(tmp_path / path, strict=False, datasets=shapes)
        for name, weight in expected.items():
            assert torch.equal(module.weights[f"model.{name}"], weight)
            assert torch.equal(module.weights[f"ema_model.{name}"], weight)
    assert load_model(tmp_path / "again").config == model.config
    convert(tmp_path / "theirs.ckpt", tmp_path / "ema", ConvertOptions(weights="ema"))
    for name, tensor in load_file(tmp_path / "ema" / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name])
    # The moving average shares the bytes of the weights.
    bytes_of_weights = sum(w.nbytes for w in expected.values())
    assert (tmp_path / "theirs.ckpt").stat().st_size < 1.5 * bytes_of_weights


def test_conversion_takes_little_more_memory_than_the_file(tmp_path):
    big = dataclasses.replace(SIZE, width=488, mlp_ratio=4, depth=4)
    model = Maestro(config(size=big)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    write_model(tmp_path / "ours", model.state_dict(), model.config, {})
    program = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from maestro_scale.interop import convert as c, convert_back as b\n"
        "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nfirst = peak()\n"
        f"folder = Path({str(tmp_path)!r})\nb.convert_to_reference(folder / 'ours', folder / 'theirs.ckpt')\n"
        "c.convert(folder / 'theirs.ckpt', folder / 'again')\nprint(peak() - first)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "theirs.ckpt").stat().st_size
    assert size > 2**25
    assert int(done.stdout) < 2.5 * size


@pytest.mark.parametrize("option", [("--weights", "ema"), ("--dataset", "flair_hub"), ("--heads", "3")])
def test_an_option_of_their_checkpoints_is_refused_where_ours_is_converted(
    tmp_path, capsys, monkeypatch, option
):
    model = Maestro(config()).initialise(0)
    write_model(tmp_path / "ours", model.state_dict(), model.config, {})
    arguments = ["convert-ign", str(tmp_path / "ours"), str(tmp_path / "theirs.ckpt"), *option]
    monkeypatch.setattr(sys, "argv", ["maestro-scale", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert f"{option[0]} is for checkpoints of the authors" in capsys.readouterr().err
    assert not (tmp_path / "theirs.ckpt").exists()


def test_what_the_authors_code_lacks_is_said(tmp_path):
    model = Maestro(config(norm="token")).initialise(0)
    write_model(tmp_path / "ours", model.state_dict(), model.config, {})
    notes = convert_to_reference(tmp_path / "ours", tmp_path / "a.ckpt")
    assert [n.partition(" has ")[2][:9] or n[-13:] for n in notes] == ["the sizes", "tokens differ"]
    content = torch.load(tmp_path / "a.ckpt", weights_only=False)
    content["maestro_scale"]["model"]["size"]["depth"] = "many"
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ExportError, match=r"maestro_scale\.model is not a configuration .* with --like"):
        convert(tmp_path / "a.ckpt", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("kind", "decoder"), [("segmentation", "upernet"), ("regression", "linear"), ("multilabel", "attentive")]
)
def test_a_finetuned_model_survives_a_round_trip(tmp_path, kind, decoder):
    classes = () if kind == "regression" else ("a", "b")
    size = None if kind == "multilabel" else SPEC.crop_m / SPEC.sensors[0].grid
    target = Target("cover", kind, classes, resolution_m=size, units="m" if kind == "regression" else "")
    ref = SPEC.sensors[0].name
    cfg = config(heads=(target,), decoder=decoder, ref_sensor=ref)
    spec = dataclasses.replace(SPEC, targets=(target,), ref_sensor=ref)
    model = Maestro(cfg, decodes=False).initialise(0)
    write_model(
        tmp_path / "ours",
        model.state_dict(),
        cfg,
        {"step": 3},
        Finetuned(spec, "cover", "miou", "finetune", 3, 0.5, 0.25),
    )
    notes = convert_to_reference(tmp_path / "ours", tmp_path / "a.ckpt")
    assert any("was finetuned and has no decoder of pixels" in note for note in notes)
    convert(tmp_path / "a.ckpt", tmp_path / "back")
    back, ours = load_model(tmp_path / "back"), load_model(tmp_path / "ours")
    assert (back.config, back.finetuned) == (ours.config, ours.finetuned)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in ours.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "back", "ours"]


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("where", ["top", "state", "config"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, mask_config, capsys, monkeypatch, where):
    target = tmp_path / "ran"
    content = lightning(Maestro(config()).initialise(0))
    payload = Payload(target)
    if where == "top":
        content["callbacks"] = payload
    elif where == "state":
        content["state_dict"]["model.evil"] = payload
    checkpoint = mask_config(tmp_path / "evil.ckpt", content, mask_mod=payload if where == "config" else 0.25)
    monkeypatch.setattr(sys, "argv", ["maestro-scale", "convert-ign", str(checkpoint), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "system" in error
    assert error.count("\n") == 1
    assert not target.exists()
    assert not (tmp_path / "out").exists()


def test_configuration_objects_are_kept_as_records(tmp_path, mask_config):
    checkpoint = mask_config(tmp_path / "a.ckpt", {"state_dict": {}}, mask_ratio=0.5)
    record = load_untrusted(checkpoint)["hyper_parameters"]["mask"]
    assert record.fields == {"mask_ratio": 0.5, "mask_mod": 0.25}
    assert "maestro.conf.mask" not in sys.modules


def test_mismatches_are_listed(tmp_path, mask_config):
    content = lightning(Maestro(config()).initialise(0))
    content["state_dict"]["model.extra.weight"] = torch.zeros(3)
    missing = content["state_dict"].pop("model.decoder.s2.norm.weight")
    assert missing is not None
    with pytest.raises(ExportError) as error:
        convert(mask_config(tmp_path / "a.ckpt", content), tmp_path / "out", ConvertOptions(hints=HINTS))
    assert "extra.weight" in str(error.value)
    assert "decoders.s2.norm.weight" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_sensor_is_left_out_only_on_request(tmp_path, mask_config):
    more = dataclasses.replace(SPEC.sensor("s2"), name="spot", group="spot", embed="spot")
    model = Maestro(config(sensors=(*SPEC.sensors, more))).initialise(0)
    checkpoint = mask_config(tmp_path / "a.ckpt", lightning(model, fusion_mode="group"))
    with pytest.raises(ExportError, match="--leave-out spot"):
        convert(checkpoint, tmp_path / "out", ConvertOptions(hints=HINTS))
    parts = convert(
        checkpoint,
        tmp_path / "out",
        ConvertOptions(hints=dataclasses.replace(HINTS, leave_out=("spot",))),
    )
    left = {p.name for p in parts if p.status == "unused"}
    assert left == {f"{kind}.spot" for kind in ("patch_embed", "encoder", "enc_to_dec", "decoder")} | {
        "embed_to_rec.spot",
        "mask_token.spot",
    }
    assert load_model(tmp_path / "out").config.sensors == SPEC.sensors


def test_a_group_may_have_another_name_in_the_file(tmp_path, mask_config):
    renamed = (dataclasses.replace(s, group="sen1") if s.group == "s1" else s for s in SPEC.sensors)
    model = Maestro(config(sensors=tuple(renamed))).initialise(0)
    checkpoint = mask_config(tmp_path / "a.ckpt", lightning(model, fusion_mode="group"))
    convert(checkpoint, tmp_path / "out", ConvertOptions(hints=HINTS))
    assert load_model(tmp_path / "out").config.sensors == model.config.sensors


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, ConvertOptions(), "pass --heads"),
        ({}, ConvertOptions(hints=ConversionHints(heads=5, decoder_heads=4)), "--heads 5 does not divide"),
        ({}, ConvertOptions(hints=HINTS, dataset="s2_naip"), "patches of 20 pixels"),
        ({}, ConvertOptions(hints=HINTS, dataset="treesat"), "did you mean 'treesatai_ts'"),
        (
            {"fusion": "monotemp", "inter_depth": 0},
            ConvertOptions(hints=HINTS),
            "--fusion mod or --fusion monotemp",
        ),
    ],
)
def test_ambiguous_shapes_name_the_option(tmp_path, mask_config, changes, options, message):
    model = Maestro(config(**changes)).initialise(0)
    sensors = tuple(s for s in model.config.sensors if s.name != "s1_des") if changes else None
    if sensors:  # without a shared group, the names of encoders do not distinguish the fusions
        model = Maestro(dataclasses.replace(model.config, sensors=sensors)).initialise(0)
    with pytest.raises(ExportError, match=message):
        convert(mask_config(tmp_path / "a.ckpt", lightning(model)), tmp_path / "out", options)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x80\x02}q\x00."])
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"a\.ckpt"):
        load_untrusted(path)
