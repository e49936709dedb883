"""Recipes: accepted and refused values, error messages, merging, and the DeepSpeed config."""

from __future__ import annotations

import dataclasses
import math
import os
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from maestro_scale import datasets
from maestro_scale.datasets.description.load import shipped_spec
from maestro_scale.datasets.spec import DatasetSpec, Modality, Scale, Sensor
from maestro_scale.model.masking import MaskingConfig
from maestro_scale.model.sizes import SIZES
from maestro_scale.recipe import (
    MixtureEntry,
    Recipe,
    RecipeError,
    build_masking,
    build_model_config,
    check_world,
    load_recipe,
    parse_recipe,
    resolve_spec,
)
from maestro_scale.recipe.data import SensorOverride
from maestro_scale.strict_yaml.merge import dump_yaml, parse_yaml

RECIPES = Path(__file__).parents[1] / "recipes"
# Studies, and the scales that they extend, are not recipes; tests/study loads them.
RECIPE_FILES = sorted(
    path
    for path in RECIPES.rglob("*.yaml")
    if "questions:" not in path.read_text() and path.name != "scales.yaml"  # studies
)
MINIMAL = {"name": "run", "data": {"mixture": [{"dataset": "d", "shards": "/d"}]}}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, "minimal.yaml", yaml.safe_dump(MINIMAL))


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# --- shipped recipes


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda p: p.stem)
def test_shipped_recipes_load_without_data_and_run_on_one_and_two_ranks(path, monkeypatch):
    monkeypatch.delenv("MAESTRO_DATA", raising=False)
    recipe = load_recipe(path)
    for world_size in (1, 2):
        check_world(recipe, world_size)
    for entry_ in recipe.data.mixture:
        resolve_spec(shipped_spec(entry_.dataset) or datasets.spec(entry_.dataset), entry_)


@pytest.mark.parametrize(
    ("name", "size"),
    [("vitt", "tiny"), ("vits", "small"), ("vitb", "base"), ("vitl", "large"), ("vith", "huge")],
)
def test_vit_recipes_are_the_papers_setting_in_other_sizes(name, size):
    recipe, paper = load_recipe(RECIPES / f"{name}.yaml"), load_recipe(RECIPES / "treesatai_ts.yaml")
    assert recipe.model.dimensions == SIZES[size]
    assert (recipe.data, recipe.masking, recipe.optim, recipe.train) == (
        (paper.data, paper.masking, paper.optim, paper.train)
    )


def test_the_papers_setting():
    recipe = load_recipe(RECIPES / "treesatai_ts.yaml")
    assert recipe.data.mixture[0].split == ("train", "val")
    assert (recipe.model.fusion, recipe.model.inter_depth, recipe.train.epochs) == ("group", 3, 100)
    assert recipe.lr == pytest.approx(3e-5 * math.sqrt(32))


def test_every_field_is_documented():
    def check(model: type[BaseModel]) -> None:
        assert model.__doc__
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    check(part)

    check(Recipe)
    check(MixtureEntry)
    check(SensorOverride)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(MINIMAL).train.epochs = 3


# --- layers


def test_extends_merges_mappings_and_replaces_lists(tmp_path):
    write(tmp_path, "a.yaml", yaml.safe_dump({**MINIMAL, "model": {"size": "tiny", "loss": "l2"}, "seed": 3}))
    write(tmp_path, "b.yaml", "extends: a.yaml\nmodel: {size: small}\noptim: {betas: [0.8, 0.95]}\n")
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub", "c.yaml", "extends: ../b.yaml\nname: third\ntracking:\n")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.seed, recipe.model.size, recipe.model.loss) == ("third", 3, "small", "l2")
    assert recipe.optim.betas == (0.8, 0.95)


def test_extends_in_a_cycle_or_to_nothing_is_refused(tmp_path):
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    b = write(tmp_path, "b.yaml", "extends: a.yaml\n")
    assert "cycle: b.yaml → a.yaml → b.yaml" in refusal(b)
    c = write(tmp_path, "c.yaml", "extends: aa.yaml\n")
    assert "aa.yaml does not exist (did you mean 'a.yaml'?)" in refusal(c)


def test_a_later_choice_of_steps_or_epochs_drops_the_earlier_one(tmp_path):
    paper = RECIPES / "treesatai_ts.yaml"
    assert load_recipe(paper, ["train.steps=50"]).train.model_dump(include={"epochs", "steps"}) == {
        "epochs": None,
        "steps": 50,
    }
    assert load_recipe(paper, ["train={steps: 50}"]).train.epochs is None
    a = write(tmp_path, "a.yaml", yaml.safe_dump({**MINIMAL, "train": {"steps": 7}}))
    b = write(tmp_path, "b.yaml", f"extends: {a}\ntrain: {{epochs: 2}}\n")
    assert (load_recipe(b).train.epochs, load_recipe(b).train.steps) == (2, None)
    assert "both given" in refusal(paper, "train.steps=50", "train.epochs=2")
    both = write(tmp_path, "both.yaml", yaml.safe_dump({**MINIMAL, "train": {"steps": 7, "epochs": 1}}))
    assert "train.steps: epochs 1 and steps 7 are both given" in refusal(both)


def test_the_default_length_is_100_epochs(minimal):
    assert load_recipe(minimal).train.epochs == 100
    assert load_recipe(minimal, ["train.log_every=1"]).train.epochs == 100


@pytest.mark.parametrize("key", ["data.mixture[0].shards", "data.mixture.0.shards"])
def test_set_changes_list_items(minimal, key):
    assert load_recipe(minimal, [f"{key}=s3://bucket/x"]).data.mixture[0].shards == "s3://bucket/x"


def test_set_takes_yaml_values_and_makes_sections(minimal):
    recipe = load_recipe(
        minimal,
        [
            "optim.base_lr=3e-4",
            "deepspeed.zero_optimization.offload_optimizer.device=cpu",
            "data.mixture[0].sensors={s1: null, s2: {num_dates: 8}}",
            "optim.betas=[0.8, 0.9]",
            "tracking.experiment=a=b",
        ],
    )
    assert recipe.optim.base_lr == 3e-4
    assert recipe.deepspeed == {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    assert recipe.zero_stage == 2
    assert recipe.data.mixture[0].sensors["s1"] is None
    assert recipe.optim.betas == (0.8, 0.9)
    assert recipe.tracking.experiment == "a=b"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.steps", "is not section.key=value"),
        ("=3", "is not section.key=value"),
        ("train..steps=3", "is not section.key=value"),
        ("data.mixture[1].shards=x", "data.mixture is a list of 1: use data.mixture[0]"),
        ("data.mixture.shards=x", "data.mixture is a list of 1"),
        ("name.x=3", "name is 'run', so it has no 'x'"),
        ("model.size=[a", "model.size: is not valid YAML"),
        ("modle.size=tiny", "modle: unknown key (did you mean 'model'?)"),
    ],
)
def test_a_wrong_override_is_refused(minimal, override, reason):
    message = refusal(minimal, override)
    assert message.startswith("--set: ")
    assert reason in message
    assert "\n" not in message


# --- the environment


def test_environment_values_and_defaults(minimal, monkeypatch):
    monkeypatch.setenv("ROOT_OF_DATA", "/data")
    monkeypatch.setenv("LANES", "16")
    monkeypatch.setenv("RUN", "0012")
    monkeypatch.setenv("EMPTY", "")
    recipe = load_recipe(
        minimal,
        [
            "data.mixture[0].shards=${ROOT_OF_DATA}/${UNSET_DATASET:-trees}",
            "data.lanes=${LANES}",
            "name=${RUN}",
            "data.cache_gib=${UNSET_GIB:-1.5e1}",
            "data.cache_dir=${EMPTY:-~/cache}",
            "tracking.experiment=$${RUN}",
        ],
    )
    assert recipe.data.mixture[0].shards == "/data/trees"
    assert (recipe.data.lanes, recipe.name, recipe.data.cache_gib) == (16, "0012", 15.0)
    assert recipe.data.cache_dir == os.path.expanduser("~/cache")
    assert recipe.tracking.experiment == "${RUN}"
    assert load_recipe(minimal).data.cache_dir == os.path.expanduser("~/.cache/maestro-scale")


def test_a_missing_variable_is_named_with_its_key_and_file(tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_HERE", raising=False)
    data = {**MINIMAL, "data": {"mixture": [{"dataset": "d", "shards": "${NOT_HERE}/d"}]}}
    path = write(tmp_path, "r.yaml", yaml.safe_dump(data))
    message = refusal(path)
    assert message.startswith(f"{path}: data.mixture[0].shards: environment variable NOT_HERE is not set")
    assert load_recipe(path, ["data.mixture[0].shards=/x"]).data.mixture[0].shards == "/x"


def test_a_broken_reference_is_refused(minimal):
    assert "is not a reference" in refusal(minimal, "data.mixture[0].shards=${HOME")


# --- refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.sise=tiny"], "--set: model.sise: unknown key (did you mean 'size'?)"),
        (["data.mixture[0].shard=x"], "--set: data.mixture[0].shard: unknown key (did you mean 'shards'?)"),
        (
            ["data.mixture[0].sensors.s2.patc=3"],
            "--set: data.mixture[0].sensors.s2.patc: unknown key (did you mean 'patch'?)",
        ),
        (
            ["data.mixture[0].sensors.s2.scale={divisr: 3}"],
            "--set: data.mixture[0].sensors.s2.scale.divisr: unknown key (did you mean 'divisor'?)",
        ),
        (["model.size=bas"], "(did you mean 'base'?)"),
        (["optim.base_lr=fast"], "--set: optim.base_lr: must be a number, got 'fast'"),
        (["optim.base_lr=.inf"], "--set: optim.base_lr: "),
        (["train.global_batch='96'"], "--set: train.global_batch: must be a whole number, got '96'"),
        (["train.global_batch=96.0"], "--set: train.global_batch: must be a whole number, got 96.0"),
        (["train.audit=1"], "--set: train.audit: must be true or false, got 1"),
        (["train=3"], "--set: train: must be a mapping of keys to values, got 3"),
        (["name=a/b"], "--set: name: must match"),
        (["seed=-1"], "--set: seed: should be greater than or equal to 0, got -1"),
        (["masking.ratio=1.0"], "--set: masking.ratio: should be less than 1, got 1.0"),
        (["data.mixture=[]"], "--set: data.mixture: must name at least one"),
        (["data.mixture[0].split=[]"], "--set: data.mixture[0].split: must name at least one"),
        (["data.mixture[0].split=[a, a]"], "--set: data.mixture[0].split: a is given twice"),
        (["data.lanes=7"], "--set: data.lanes: 7 does not divide train.global_batch 96: use 6 or 8"),
        (
            ["train.micro_batch=7"],
            "--set: train.micro_batch: 7 does not divide train.global_batch 96: use 6 or 8",
        ),
        (["model.inter_depth=12"], "--set: model.inter_depth: 12 leaves no block to the groups: at most 11"),
        (
            ["model.fusion=shared"],
            "model.inter_depth: 3, but fusion shared has no inter-group blocks: set it to 0",
        ),
        (["model.fusion=monotemp"], "model.inter_depth: 3, but fusion monotemp has no inter-group blocks"),
        (["model.heads=7"], "--set: model.heads: 7 does not divide width 768"),
        (["model.width=130", "model.heads=10"], "width 130"),
        (
            ["data.mixture[0].sensors.s2={image_size: 7, patch: 2}"],
            "--set: data.mixture[0].sensors.s2.patch: 2 does not divide image_size 7",
        ),
        (
            ["data.mixture[0].sensors.s2={bands: [0, 1], band_groups: [1, 2]}"],
            "--set: data.mixture[0].sensors.s2.band_groups: [1, 2] do not add up to 2 bands",
        ),
        (["masking.band_group=0.2"], "--set: masking.band_group: needs model.spectral=token"),
        (
            ["data.mixture=[{dataset: d, shards: /d}, {dataset: d, shards: /d/, split: [val, train]}]"],
            "--set: data.mixture[1]: /d is in the mixture already with split 'train'",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(minimal, overrides, message):
    error = refusal(minimal, *overrides)
    assert message in error
    assert "\n" not in error


def test_every_mistake_is_named_with_the_file_that_has_it(tmp_path):
    a = write(tmp_path, "a.yaml", yaml.safe_dump({**MINIMAL, "optim": {"base_rl": 1}}))
    b = write(tmp_path, "b.yaml", "extends: a.yaml\nmodel: {sice: tiny}\n")
    assert refusal(b, "train.log_evry=1").split("\n") == [
        f"{b}: model.sice: unknown key (did you mean 'size'?)",
        f"{a}: optim.base_rl: unknown key (did you mean 'base_lr'?)",
        "--set: train.log_evry: unknown key (did you mean 'log_every'?)",
    ]


def test_missing_keys_are_named(tmp_path):
    message = refusal(write(tmp_path, "r.yaml", "data: {mixture: [{dataset: d}]}"))
    assert "name: is missing" in message
    assert "data.mixture[0].shards: is missing" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n- b", "a recipe is a mapping of sections, this file holds a list"),
        ("name: a\nname: b", "key 'name' is given twice"),
        ("name: x\nextends: [a]", "extends: must be the path of one recipe"),
        ("", "name: is missing"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path, text, reason):
    path = write(tmp_path, "r.yaml", text)
    assert str(path) in refusal(path)
    assert reason in refusal(path)


def test_a_file_that_is_not_there_is_refused_with_a_similar_name():
    assert "No such file" in refusal(RECIPES / "vitz.yaml")
    assert "did you mean 'vit" in refusal(RECIPES / "vitz.yaml")


def test_yaml_numbers_are_numbers_and_dates_are_text():
    read = parse_yaml("[3e-5, 1E3, .5, 1_000, 2024-01-01, 1.0.2, -2, +3.5]")
    assert read == [3e-5, 1000.0, 0.5, 1000, "2024-01-01", "1.0.2", -2, 3.5]


@pytest.mark.parametrize("text", ["08", "1e5", "-.5", "1_000", "2024-01-01", "yes", ".inf", "12"])
def test_text_that_looks_like_a_number_stays_text(text):
    assert parse_yaml(dump_yaml({"name": text})) == {"name": text}


# --- round trip


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda p: p.stem)
def test_the_resolved_recipe_reads_back_the_same(path, tmp_path):
    recipe = load_recipe(path)
    again = load_recipe(write(tmp_path, "resolved.yaml", recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


@settings(max_examples=60, deadline=None)
@given(
    name=st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=8),
    shards=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1).filter(
        lambda s: not s.startswith("~")
    ),
    seed=st.integers(0, 2**63 - 1),
    base_lr=st.floats(1e-12, 1e3),
    lanes=st.sampled_from([1, 2, 3, 4, 8]),
    per_lane=st.integers(1, 9),
    steps=st.none() | st.integers(1, 10**9),
    drop=st.booleans(),
)
def test_any_recipe_reads_back_the_same(
    tmp_path_factory, name, shards, seed, base_lr, lanes, per_lane, steps, drop
):
    sensors = {"s1": None} if drop else {"s2": {"num_dates": 3, "scale": {"divisor": 2.5}}}
    recipe = parse_recipe(
        {
            "name": name,
            "seed": seed,
            "data": {"mixture": [{"dataset": "d", "shards": shards, "sensors": sensors}], "lanes": lanes},
            "optim": {"base_lr": base_lr},
            "train": {"steps": steps, "global_batch": lanes * per_lane, "micro_batch": 1},
        }
    )
    path = write(tmp_path_factory.getbasetemp(), "any.yaml", recipe.to_yaml())
    assert load_recipe(path) == recipe


def test_flat_is_scalars_by_dotted_path(minimal):
    flat = load_recipe(minimal, ["data.mixture[0].sensors.s1=null"]).flat()
    assert flat["data.mixture[0].shards"] == "/d"
    assert flat["data.mixture[0].sensors.s1"] == "null"
    assert flat["optim.betas[1]"] == 0.99
    assert flat["deepspeed.zero_optimization.stage"] == 2
    assert all(isinstance(value, str | int | float | bool) for value in flat.values())


# --- model dimensions


def test_dimensions_can_be_changed_one_by_one(minimal):
    narrow = [
        "model.size=tiny",
        "model.width=128",
        "model.depth=4",
        "model.heads=4",
        "model.decoder_width=128",
    ]
    size = load_recipe(minimal, narrow).model.dimensions
    assert (size.width, size.heads, size.dim_head, size.depth) == (128, 4, 32, 4)
    assert (size.decoder_width, size.decoder_heads, size.decoder_dim_head) == (128, 4, 32)
    assert size.mlp_ratio == SIZES["tiny"].mlp_ratio
    assert load_recipe(minimal, ["model.dim_head=16"]).model.dimensions.dim_head == 16


# --- ranks


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 48), st.integers(1, 12), st.integers(1, 12), st.integers(1, 64))
def test_ranks_fit_exactly_when_lanes_and_batch_can_be_shared(lanes, per_lane, micro, world_size):
    batch = lanes * per_lane
    if batch % micro:
        return
    recipe = parse_recipe(
        {
            **MINIMAL,
            "data": {**MINIMAL["data"], "lanes": lanes},
            "train": {"global_batch": batch, "micro_batch": micro},
        }
    )
    fits = lanes % world_size == 0 and batch % (world_size * micro) == 0
    if fits:
        check_world(recipe, world_size)
    else:
        with pytest.raises(RecipeError, match=rf"^[^\n]*\b{world_size} ranks[^\n]*$"):
            check_world(recipe, world_size)


def test_a_wrong_number_of_ranks_is_refused_with_what_fits():
    recipe = load_recipe(RECIPES / "vitl.yaml")
    with pytest.raises(
        RecipeError, match=r"32 cannot be shared evenly by 3 ranks: .* on 1, 2, 4, 8, 16 ranks"
    ):
        check_world(recipe, 3)
    with pytest.raises(RecipeError, match=r"32 ranks share .* 96, 3 each, .*set train.micro_batch to 3"):
        check_world(recipe, 32)


def test_micro_batches_of_a_rank_and_steps_of_a_run_are_counted(minimal):
    recipe = load_recipe(minimal, ["train.global_batch=96", "train.micro_batch=4", "train.epochs=3"])
    assert [recipe.num_micro_batches(ranks) for ranks in (1, 2, 8)] == [24, 12, 3]
    assert recipe.with_zero_stage(2).with_micro_batch(6).num_micro_batches(2) == 8
    with pytest.raises(RecipeError, match=r"16 ranks share train\.global_batch 96, 6 each"):
        recipe.num_micro_batches(16)
    assert recipe.train.num_steps(50) == 150
    assert load_recipe(minimal, ["train.steps=7"]).train.num_steps(50) == 7


# --- DeepSpeed


def test_under_another_zero_stage_a_stated_micro_batch_does_not_contradict(minimal):
    given = ["deepspeed.train_micro_batch_size_per_gpu=8", "deepspeed.gradient_accumulation_steps=12"]
    recipe = load_recipe(minimal, given)
    assert recipe.with_zero_stage(2).with_micro_batch(8).deepspeed["gradient_accumulation_steps"] == 12
    config = recipe.with_zero_stage(3).with_micro_batch(4).deepspeed_config(1, "cpu")
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 24)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train_batch_size=64", "64 contradicts 96, which follows from train.global_batch 96"),
        ("train_micro_batch_size_per_gpu=4", "4 contradicts 8, which follows from train.micro_batch 8"),
        ("gradient_clipping=0.5", "0.5 contradicts 1.0, which follows from optim.clip 1.0"),
        ("fp16.enabled=true", "True contradicts False"),
        ("gradient_allreduce_op=sum", "'sum' contradicts 'mean'"),
        ("prescale_gradients=true", "True contradicts False"),
        ("gradient_predivide_factor=2.0", "2.0 contradicts 1.0"),
        ("tensor_parallel.autotp_size=2", "refused: ranks share the batch"),
        ("zero_optimization.offload_param.device=cpu", "ZeRO stage 2 ignores it: use stage 3"),
        (
            "zero_optimization={stage: 0, offload_optimizer: {device: cpu}}",
            "ZeRO stage 0 ignores it: use stage 1 or higher",
        ),
        ("optimizer.type=Adam", "refused: the optimizer is AdamW"),
        ("scheduler.type=WarmupLR", "refused: the schedule"),
        ("elasticity.enabled=true", "refused: DeepSpeed 0.19 removed it"),
        ("amp.enabled=true", "refused: DeepSpeed 0.19 removed it"),
        ("zero_optimization.mics_shard_size=2", "refused: DeepSpeed 0.19 removed MiCS"),
        ("bf16.bf16_master_weights_and_grads=true", "refused: master weights"),
        ("bf16.bf16_optimizer_states=true", "refused: master weights"),
        ("fp16.fp16_master_weights_and_grads=true", "refused: master weights"),
        ("zero_force_ds_cpu_optimizer=true", "refused: the optimizer is torch's AdamW"),
        ("zero_optimization.zenflow={topk_ratio: 0.1}", "refused: DeepSpeed would replace"),
        (
            "zero_optimization.offload_optimizer={device: cpu, super_offload: true}",
            "refused: DeepSpeed would replace",
        ),
        ("zero_optimization.stage=4", "must be 0, 1, 2 or 3, got 4"),
        ("zero_optimization=true", "must be a mapping"),
        ("bf16=true", "must be a mapping"),
        ("zero=3", "DeepSpeed would ignore this key (did you mean 'zero_optimization.stage'?)"),
        ("zero.stage=3", "DeepSpeed would ignore this key (did you mean 'zero_optimization.stage'?)"),
        ("zero_optimisation.stage=2", "DeepSpeed would ignore this key (did you mean 'zero_optimization'?)"),
    ],
)
def test_a_deepspeed_section_that_contradicts_the_recipe_is_refused(minimal, override, reason):
    message = refusal(minimal, f"deepspeed.{override}")
    assert message.startswith(f"--set: deepspeed.{override.partition('=')[0].partition('.')[0]}")
    assert reason in message


@pytest.mark.parametrize(
    ("precision", "key", "value"),
    [
        ("bf16", "bf16.enabled", "true"),
        ("bf16", "torch_autocast.enabled", "false"),
        ("bf16", "torch_autocast.dtype", "float16"),
        ("bf16_weights", "bf16.enabled", "false"),
        ("bf16_weights", "torch_autocast.enabled", "true"),
        ("fp32", "bf16.enabled", "true"),
        ("fp32", "torch_autocast.enabled", "true"),
    ],
)
def test_precision_is_decided_in_one_place(minimal, precision, key, value):
    message = refusal(minimal, f"train.precision={precision}", f"deepspeed.{key}={value}")
    assert f"deepspeed.{key}" in message
    assert f"follows from train.precision {precision}" in message


def test_derived_values_may_be_repeated(minimal):
    overrides = [
        "deepspeed.train_batch_size=96",
        "deepspeed.gradient_clipping=auto",
        "deepspeed.wandb.enabled=true",
    ]
    config = load_recipe(minimal, overrides).deepspeed_config(4, "cuda")
    assert (config["train_batch_size"], config["gradient_clipping"]) == (96, 1.0)
    assert config["wandb"] == {"enabled": True}


def test_accumulation_follows_from_the_ranks(minimal):
    recipe = load_recipe(minimal)
    for world_size in (1, 2, 4):
        config = recipe.deepspeed_config(world_size, "cpu")
        parts = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
        assert parts * world_size == 96
    with pytest.raises(RecipeError, match="cannot be shared"):
        recipe.deepspeed_config(5, "cpu")
    wrong = load_recipe(minimal, ["deepspeed.gradient_accumulation_steps=3"])
    assert wrong.deepspeed_config(4, "cpu")["gradient_accumulation_steps"] == 3
    with pytest.raises(RecipeError, match=r"gradient_accumulation_steps: 3 contradicts 6"):
        wrong.deepspeed_config(2, "cpu")


def test_auto_precision_follows_the_device(minimal):
    recipe = load_recipe(minimal)
    assert recipe.deepspeed_config(1, "cpu")["bf16"]["enabled"] is False
    config = recipe.deepspeed_config(1, "cuda")
    assert (config["bf16"]["enabled"], config["torch_autocast"]["enabled"]) == (False, True)
    with pytest.raises(ValueError, match="pass the device"):
        recipe.deepspeed_config(1)
    assert load_recipe(minimal, ["train.precision=fp32"]).deepspeed_config(1)["bf16"]["enabled"] is False


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_is_autocast_over_fp32_weights_at_every_stage(minimal, stage):
    zero = f"deepspeed.zero_optimization.stage={stage}"
    config = load_recipe(minimal, [zero, "train.precision=bf16"]).deepspeed_config(1)
    assert config["bf16"]["enabled"] is False
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert config["torch_autocast"] == autocast
    assert config["communication_data_type"] == "fp32"


def test_bf16_weights_need_a_stage_with_master_weights(minimal):
    zero, weights = "deepspeed.zero_optimization.stage=", "train.precision=bf16_weights"
    for stage in (1, 2, 3):
        config = load_recipe(minimal, [f"{zero}{stage}", weights]).deepspeed_config(1)
        assert (config["bf16"]["enabled"], config["torch_autocast"]["enabled"]) == (True, False)
    message = refusal(minimal, f"{zero}0", weights)
    assert (
        "deepspeed.zero_optimization.stage: train.precision bf16_weights needs ZeRO stage 1, 2 or 3"
        in message
    )
    # The planner compares stages of one recipe.
    replanned = load_recipe(minimal, [weights]).with_zero_stage(0).deepspeed_config(1, "cuda")
    assert replanned["torch_autocast"]["enabled"] is True


def test_the_deepspeed_section_itself_is_not_modified(minimal):
    recipe = load_recipe(minimal)
    before = recipe.to_yaml()
    recipe.deepspeed_config(2, "cuda")["zero_optimization"]["stage"] = 0
    assert recipe.to_yaml() == before


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_deepspeed_accepts_the_config(minimal, stage, device):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    recipe = load_recipe(minimal, [f"deepspeed.zero_optimization.stage={stage}"])
    accepted = DeepSpeedConfig(recipe.deepspeed_config(1, device))
    assert (accepted.train_batch_size, accepted.train_micro_batch_size_per_gpu) == (96, 8)
    assert accepted.gradient_accumulation_steps == 12
    assert accepted.zero_optimization_stage == stage
    assert accepted.gradient_clipping == 1.0
    unclipped = load_recipe(minimal, [f"deepspeed.zero_optimization.stage={stage}", "optim.clip=0"])
    assert DeepSpeedConfig(unclipped.deepspeed_config(1, device)).gradient_clipping == 0.0
    assert accepted.torch_autocast_enabled == (device == "cuda")
    assert not accepted.bfloat16_config.enabled
    assert accepted.zero_force_ds_cpu_optimizer is False


# --- sensors

SPEC = DatasetSpec(
    name="toy",
    title="Toy",
    tile_m=60,
    crop_m=60,
    pos_grid=12,
    modalities=(
        Modality("aerial", ("nir", "r", "g", "b"), 0.2, 304, "uint8"),
        Modality("s1_asc", ("vv", "vh"), 10, 6, "float32", series=True),
        Modality("s1_des", ("vv", "vh"), 10, 6, "float32", series=True),
    ),
    targets=(),
    sensors=(
        Sensor(
            "aerial", "aerial", 300, 20, 1, (0, 1, 2, 3), (1, 3), Scale("linear", 255), "aerial", "aerial"
        ),
        Sensor("s1_asc", "s1_asc", 6, 2, 4, (0, 1), (1, 1), Scale("log", 5), "s1", "s1"),
        Sensor("s1_des", "s1_des", 6, 2, 4, (0, 1), (1, 1), Scale("log", 5), "s1", "s1"),
    ),
    ref_sensor="aerial",
)


def entry(**fields) -> MixtureEntry:
    return parse_recipe(
        {"name": "x", "data": {"mixture": [{"dataset": "toy", "shards": "/x", **fields}]}}
    ).data.mixture[0]


def test_every_sensor_field_can_be_overridden():
    assert set(SensorOverride.model_fields) == {f.name for f in dataclasses.fields(Sensor)} - {"name"}


def test_sensors_are_changed_unchanged_or_omitted():
    sensors = resolve_spec(
        SPEC,
        entry(sensors={"aerial": {"image_size": 60, "patch": 10, "scale": {"divisor": 100}}, "s1_des": None}),
    ).sensors
    assert [s.name for s in sensors] == ["aerial", "s1_asc"]
    assert (sensors[0].image_size, sensors[0].grid, sensors[0].scale) == (60, 6, Scale("linear", 100))
    assert sensors[1] == SPEC.sensor("s1_asc")
    assert resolve_spec(SPEC, entry()).sensors == SPEC.sensors


def test_bands_become_tuples():
    aerial = resolve_spec(SPEC, entry(sensors={"aerial": {"bands": [1, 2], "band_groups": [2]}})).sensors[0]
    assert (aerial.bands, aerial.band_groups) == ((1, 2), (2,))


@pytest.mark.parametrize(
    ("sensors", "reason"),
    [
        ({"arial": {"patch": 10}}, "data.mixture[1].sensors.arial: unknown sensor (did you mean 'aerial'?)"),
        ({"aerial": {"patch": 7}}, "data.mixture[1].sensors.aerial.patch: 7 does not divide image_size 300"),
        (
            {"aerial": {"bands": [0]}},
            "data.mixture[1].sensors.aerial.band_groups: [1, 3] do not add up to 1 bands",
        ),
        ({"aerial": {"token_groups": [2, 3]}}, "aerial.token_groups: [2, 3] do not add up to 4 bands"),
        (
            {"aerial": {"bands": [0, 4], "band_groups": [2]}},
            "bands: [0, 4] do not index the 4 bands of aerial",
        ),
        ({"aerial": {"num_dates": 2}}, "num_dates: aerial is a single image, so 1, not 2"),
        ({"aerial": {"source": "areal"}}, "unknown modality 'areal' (did you mean 'aerial'?)"),
        ({"aerial": {"elevation": True}}, "elevation: needs 2 bands"),
        (
            {"s1_asc": {"patch": 3}},
            "s1_des.embed: 's1' is shared with s1_asc, but patch 2 of 2 bands differs from patch 3",
        ),
        ({"aerial": None}, "cannot be left out"),
    ],
)
def test_changes_that_do_not_fit_are_refused(sensors, reason):
    with pytest.raises(RecipeError) as caught:
        resolve_spec(SPEC, entry(sensors=sensors), 1)
    assert reason in str(caught.value)


def test_with_token_a_sensor_has_a_token_per_band_group_by_default():
    def groups(**sensors):
        spec = resolve_spec(SPEC, entry(sensors=sensors), spectral="token")
        return {s.name: s.token_groups for s in spec.sensors}

    assert groups() == {"aerial": (1, 3), "s1_asc": (1, 1), "s1_des": (1, 1)}
    assert groups(aerial={"token_groups": []})["aerial"] == ()
    assert groups(aerial={"token_groups": [2, 2]})["aerial"] == (2, 2)
    assert groups(aerial={"bands": [0, 1, 2], "band_groups": [2, 1]})["aerial"] == (2, 1)
    assert groups(aerial={"band_groups": [4]})["aerial"] == ()  # one group: the token of all bands
    given = dataclasses.replace(SPEC, sensors=(dataclasses.replace(SPEC.sensors[0], token_groups=(3, 1)),))
    assert resolve_spec(given, entry(), spectral="token").sensors[0].token_groups == (3, 1)


@pytest.mark.parametrize(
    ("sensor", "target", "reason"),
    [
        ({}, "patch_group", None),
        ({"patch": 1}, "patch_group", r"sensors.aerial.band_groups: [1, 3]: group 0 has one band"),
        ({"patch": 1}, "patch", None),
        ({"patch": 1}, "none", None),
        ({"patch": 1, "band_groups": [2, 2]}, "patch_group", None),
        ({"patch": 1, "bands": [3], "band_groups": [1]}, "patch", "sensors.aerial.patch: 1 pixel of 1 band"),
        ({"patch": 1, "bands": [3], "band_groups": [1]}, "patch_group", "or model.target=none"),
        ({"patch": 1, "bands": [3], "band_groups": [1]}, "none", None),
        ({"patch": 2, "bands": [3], "band_groups": [1]}, "patch_group", None),
    ],
)
@pytest.mark.parametrize("spectral", ["joint", "token"])
def test_target_groups_of_one_value_are_refused(sensor, target, reason, spectral):
    mixture = [{"dataset": "toy", "shards": "/x", "sensors": {"aerial": sensor}}]
    model = {"target": target, "spectral": spectral}
    recipe = parse_recipe({"name": "x", "data": {"mixture": mixture}, "model": model})
    specs = [resolve_spec(SPEC, recipe.data.mixture[0], spectral=spectral)]
    if reason is None:
        build_model_config(recipe, specs)
        return
    with pytest.raises(RecipeError) as caught:
        build_model_config(recipe, specs)
    assert "data.mixture[0].sensors.aerial" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("fusion", ["group", "mod", "monotemp", "shared"])
@pytest.mark.parametrize("structure", ["auto", True, False])
def test_structural_masks_of_a_fusion(fusion, structure):
    mixture = [{"dataset": "toy", "shards": "/x"}]
    model, masking = {"fusion": fusion, "inter_depth": 0}, {"structure": structure, "date": 0.5}
    recipe = parse_recipe({"name": "x", "data": {"mixture": mixture}, "model": model, "masking": masking})
    drawn = structure is True or (structure == "auto" and fusion in ("group", "mod"))
    expected = MaskingConfig(0.75, 0.25, 0.5, 0.25, 0.0) if drawn else MaskingConfig(0.75, 0.0, 0.0, 0.0, 0.0)
    assert build_masking(recipe) == expected


def test_the_crop_can_be_smaller_than_the_tile_but_not_larger():
    assert resolve_spec(SPEC, entry(crop_m=30)).crop_m == 30
    assert resolve_spec(SPEC, entry()) == SPEC
    with pytest.raises(RecipeError, match=r"data\.mixture\[0\]\.crop_m: 61 m is larger than a tile, 60 m"):
        resolve_spec(SPEC, entry(crop_m=61))


# --- model.compile


@pytest.mark.parametrize(
    ("given", "mode"),
    [("true", "blocks"), ("false", "none"), ("none", "none"), ("blocks", "blocks"), ("step", "step")],
)
def test_compile_is_a_mode_and_reads_the_booleans_of_earlier_versions(minimal, given, mode):
    assert load_recipe(minimal, [f"model.compile={given}"]).model.compile == mode
    stored = {**MINIMAL, "model": {"compile": yaml.safe_load(given)}}
    assert parse_recipe(stored).model.compile == mode


def test_compile_refuses_other_values_and_stage_3(minimal):
    assert "model.compile: must be 'none', 'blocks' or 'step', got 'steps'" in refusal(
        minimal, "model.compile=steps"
    )
    for mode in ("blocks", "step"):
        message = refusal(minimal, f"model.compile={mode}", "deepspeed.zero_optimization.stage=3")
        assert f"model.compile: {mode!r} does not work with ZeRO stage 3" in message
        assert "\n" not in message
    load_recipe(minimal, ["model.compile=none", "deepspeed.zero_optimization.stage=3"])
