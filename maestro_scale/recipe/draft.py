"""A first recipe for a dataset in shards, from its manifest: sizes that fit its number of samples and its sensors."""

from __future__ import annotations

from collections import Counter

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.datasets.spec_check import target_group_problems
from maestro_scale.escaping import printable
from maestro_scale.recipe.loading import parse_recipe
from maestro_scale.recipe.resolve import build_model_config, resolve_spec
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.strict_yaml.merge import dump_yaml

# As in the recipes of the package: jobs on a cluster set it to a disk of the node.
_CACHE_DIR = "${MAESTRO_CACHE:-~/.cache/maestro-scale}"
_BATCHES = (96, 64, 32, 16, 8, 4, 2, 1)
_MIN_STEPS = 8  # of an epoch
_SIZES = ((2_000, "tiny", 3.0e-4), (30_000, "small", 1.0e-4), (1 << 62, "base", 3.0e-5))
"""Samples up to which a model size is proposed, and its learning rate; that of base is the paper's."""
_MIN_UPDATES = 1_000


def draft_recipe(url: str) -> str:
    """A recipe for the dataset at ``url``, as YAML with comments; it is valid for the dataset as it is.

    ManifestError if there is no dataset, or no samples for training.
    """
    manifest = Manifest.load(url)
    spec = manifest.spec
    samples = Counter[str]()
    for shard in manifest.shards:
        samples[shard.split] += shard.samples
    split = "train" if samples["train"] else next((s for s in sorted(samples) if s != "test"), None)
    if split is None:
        found = f"only the splits {', '.join(samples)}" if samples else "no shards"
        raise ManifestError(f"{url}: holds {found}; write the split train first")
    num = samples[split]
    size, base_lr = next((size, lr) for most, size, lr in _SIZES if num <= most)
    batch = next(b for b in _BATCHES if num // b >= _MIN_STEPS or b == 1)
    epochs = max(100, -(-_MIN_UPDATES // max(1, num // batch)))
    # The largest is taken where several targets of groups cannot be normalised.
    norm = next(
        t for t in ("patch_group", "patch", "none") if not list(target_group_problems(spec.sensors, t))
    )
    name = "".join(c if c.isalnum() or c in "_-." else "-" for c in spec.name)
    sections = {
        "name": f"{size}-{name}",
        "data": {
            "mixture": [{"dataset": spec.name, "shards": url, "split": split}],
            "cache_dir": _CACHE_DIR,
            "lanes": min(32, batch),
            "workers": 2,
        },
        "model": {"size": size, **({} if norm == "patch_group" else {"target": norm})},
        "optim": {"base_lr": base_lr},
        "train": {"epochs": epochs, "global_batch": batch, "micro_batch": "auto"},
        "checkpoint": {"every_steps": 200},
        "tracking": {"experiment": name, "pictures_every": 200},
    }
    recipe = parse_recipe(sections)
    resolved = resolve_spec(spec, recipe.data.mixture[0])
    build_model_config(recipe, [resolved])
    tokens = {s.name: s.num_dates * s.grid**2 for s in resolved.sensors}
    notes = {
        "data": f"{', '.join(f'{n} samples of {s}' for s, n in sorted(samples.items()))}; lanes: the most ranks ever",
        "model": f"for {num} samples; tokens a sample: {', '.join(f'{s} {n}' for s, n in tokens.items())}",
        "optim": "learning rate for a global batch of 3; the peak is base_lr · sqrt(global_batch / 3)",
        "train": f"{epochs * (num // batch)} steps of {batch} samples, however many GPUs share them",
    }
    lines = [
        "# A first recipe, by: maestro-scale describe --recipe. Sensors and sizes of crops come with the shards;"
    ]
    lines.append(f"# change them here, under mixture, for example: sensors: {{{_example(resolved)}}}")
    for key, value in sections.items():
        if key in notes:
            lines.append(f"# {printable(notes[key])}")
        lines.append(dump_yaml({key: value}).rstrip())
    return "\n".join(lines) + "\n"


def _example(spec: DatasetSpec) -> str:
    """A change to a sensor that the dataset has."""
    series = next((s for s in spec.sensors if s.num_dates > 1), None)
    if series is not None:
        return f"{series.name}: {{num_dates: {series.num_dates // 2}}}"
    sensor = spec.sensors[0]
    return f"{sensor.name}: {{patch: {sensor.patch}}}"
