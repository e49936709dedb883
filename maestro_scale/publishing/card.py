"""The model card of a model: what it reads, what it was trained on and how, its scores, and how to use it.

Everything comes from files: config.json, and of a run its manifests, recipe, metrics, environment and results.
Addresses and folders of the machine that trained it are left out. Metadata as in https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from maestro_scale.escaping import markdown_text, printable, shell_command
from maestro_scale.evaluation.finetune.tested import MODE as TEST_MODE
from maestro_scale.evaluation.metric_kinds import METRIC_KINDS
from maestro_scale.evaluation.report.groups import FROZEN_MODES, ResultFile
from maestro_scale.evaluation.report.tables import score_text
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.interop.hub import HubAddress
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned, sized
from maestro_scale.model.sizes import SIZES
from maestro_scale.secrets_filter import scrub_tree
from maestro_scale.shards.format.manifest import Manifest

LOSS_PICTURE = "loss.png"
_TASKS = {
    "segmentation": "image-segmentation",
    "classification": "image-classification",
    "multilabel": "image-classification",
    "regression": "image-to-image",
}
_PLACES = re.compile(r"^(?:[a-z0-9]+://|~?/|\.\.?/|[A-Za-z]:\\)")


@dataclass(frozen=True)
class Training:
    """What is known of a run. ``manifests``: of its datasets; ``digests``: by dataset, of an export without them;
    ``setup``: devices and versions; ``lines``: of metrics.jsonl."""

    manifests: Sequence[Manifest] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    setup: str = ""
    lines: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Card:
    """Content of a model card. ``trained``: as in config.json; ``weights``: digest as in results; ``license``: an
    identifier of the hub, empty where none was chosen."""

    address: HubAddress
    config: ModelConfig
    trained: Mapping[str, Any]
    finetuned: Finetuned | None
    parameters: int
    weights: str
    training: Training = Training()
    results: Sequence[ResultFile] = ()
    license: str = ""
    has_picture: bool = False

    def text(self) -> str:
        """Metadata and Markdown."""
        parts = [
            f"---\n{yaml.safe_dump(self._metadata(), sort_keys=False)}---",
            f"# {markdown_text(self._name)}",
            self._summary(),
            "## Use",
            *self._use(),
            "## Inputs",
            self._inputs(),
            *self._scores(),
            "## Training",
            *self._training(),
            "## License",
            f"`{self.license}`." if self.license else "The authors of this model have not chosen a license.",
        ]
        return "\n\n".join(parts) + "\n"

    @property
    def _name(self) -> str:
        return self.address.path.rpartition("/")[2] or self.address.repository.partition("/")[2]

    @property
    def _target(self) -> Any:
        if self.finetuned is None:
            return None
        return next(t for t in self.finetuned.spec.targets if t.name == self.finetuned.target)

    def _metadata(self) -> dict[str, Any]:
        target = self._target
        task = "image-feature-extraction" if target is None else _TASKS.get(target.kind, "other")
        found: dict[str, Any] = {"license": self.license} if self.license else {}
        found |= {
            "library_name": "maestro-scale",
            "pipeline_tag": task,
            "tags": ["earth-observation", "remote-sensing", "masked-autoencoder", "maestro"],
        }
        entries = [
            {
                "task": {"type": task},
                "dataset": {"name": printable(r.benchmark), "type": printable(r.benchmark)},
                "metrics": [
                    {
                        "type": r.metric,
                        "value": round(r.value, 6),
                        "name": f"{METRIC_KINDS[r.metric].title} ({r.mode})",
                    }
                ],
            }
            for r in (f.result for f in self.results if self._is_own(f.result))
        ]
        if entries:
            found["model-index"] = [{"name": printable(self._name), "results": entries}]
        return found

    def _is_own(self, result: EvalResult) -> bool:
        """Whether a result is of these weights, and not of others of the run or of another finetuning."""
        known = self.finetuned
        if known is None:
            return result.mode in FROZEN_MODES and result.weights in (self.weights, "")
        if result.mode == TEST_MODE:
            return result.weights == self.weights
        # The weights that a finetuning's result names are those that it began with: its score says which one it is.
        return (result.mode, result.benchmark, result.metric) == (
            known.mode,
            known.spec.name,
            known.metric,
        ) and math.isclose(result.value, known.test, rel_tol=1e-9)

    def _summary(self) -> str:
        size = next((name for name, s in SIZES.items() if s == self.config.size), "custom")
        sensors = ", ".join(dict.fromkeys(s.name for s in self.config.all_sensors))
        what = f"MAESTRO encoder of size {size} ({self.parameters:,} parameters) for {markdown_text(sensors)}"
        if self.finetuned is None:
            names = ", ".join(v.dataset for v in self.config.views if v.dataset)
            return f"{what}, pretrained as a masked autoencoder" + (
                f" on {markdown_text(names)}." if names else "."
            )
        target = self._target
        units = f" in {markdown_text(target.units)}" if target.units else ""
        text = (
            f"{what}, with a head for `{markdown_text(target.name)}` ({target.kind}{units}) of "
            f"{markdown_text(self.finetuned.spec.title)}"
        )
        pretrained = ", ".join(self.finetuned.trained_on)
        how = "trained from scratch" if self.finetuned.mode == "scratch" else "finetuned"
        text += f"; {how}" + (f" after pretraining on {markdown_text(pretrained)}." if pretrained else ".")
        if target.classes:
            text += "\n\nClasses: " + ", ".join(
                f"{i} {markdown_text(name)}"
                for i, name in enumerate(target.classes)
                if i not in target.ignored
            )
        return text

    def _use(self) -> Iterator[str]:
        address = str(self.address)
        yield "`pip install 'maestro-scale[hub]'`, then"
        lines = [
            "from maestro_scale import backbone, load_model",
            "",
            f"model = load_model({address!r})  # input scaling is part of the model",
        ]
        if self.finetuned is None:
            lines += ["embedding = model.embed(batch_or_tile)  # .tokens[sensor], .vector"]
        else:
            lines += ["found = model.predict(batch_or_tile)  # .values, .probabilities, .classes"]
        lines += [f"features = backbone({address!r})  # a plain nn.Module for other decoders"]
        yield "```python\n" + "\n".join(lines) + "\n```"
        commands = [shell_command("maestro-scale", "embed", address, "SHARDS", "OUT")]
        if self.finetuned is not None:
            commands = [shell_command("maestro-scale", "predict", address, "SCENES.yaml", "MAPS")]
        yield "```bash\n" + "\n".join(commands) + "\n```"

    def _inputs(self) -> str:
        head = ("dataset", "sensor", "bands", "dates", "pixels", "patch", "scaling of stored values")
        rows = [
            (
                markdown_text(view.dataset),
                markdown_text(s.name),
                len(s.bands),
                s.num_dates,
                f"{s.image_size} x {s.image_size}",
                s.patch,
                _scale(s.scale),
            )
            for view in self.config.views
            for s in view.sensors
        ]
        views = sized(self.config, self.finetuned).views
        extents = ", ".join(f"{v.crop_m:g} m ({markdown_text(v.dataset)})" for v in views if v.crop_m)
        return _table(head, rows) + (f"\n\nExtent of an input: {extents}." if extents else "")

    def _scores(self) -> Iterator[str]:
        if not self.results and self.finetuned is None:
            return
        yield "## Scores"
        if not self.results:
            assert self.finetuned is not None
            kind = METRIC_KINDS.get(self.finetuned.metric)
            shown = kind.number(self.finetuned.test) if kind else f"{self.finetuned.test:g}"
            unit = kind.unit(self._target.units) if kind else ""
            title = kind.title if kind else self.finetuned.metric
            yield f"{title} on the test split: {shown}{' ' * bool(unit)}{markdown_text(unit)}."
            return
        rows = []
        for r in (f.result for f in self.results):
            kind = METRIC_KINDS[r.metric]
            unit = kind.unit(r.units)
            interval = f"{kind.number(r.interval[0])} to {kind.number(r.interval[1])}"
            spread = f" ± {kind.number(r.deviation)}" if r.deviation is not None else ""
            others = ", ".join(
                f"{name.replace('_', ' ')} {score_text(name, v)}" for name, v in r.scores.items()
            )
            other = "others" if self.finetuned else f"step {r.checkpoint_step or 0:,}"
            of = "these" if self._is_own(r) else other
            data = markdown_text(r.benchmark) + (" (synthetic)" if r.synthetic else "")
            labels = f", {100 * r.fraction:g} % of the labels" if r.fraction < 1 else ""
            rows.append(
                (
                    data,
                    r.mode + labels,
                    kind.title + (f" ({markdown_text(unit)})" if unit else ""),
                    kind.number(r.value) + spread,
                    interval,
                    f"{r.num_tiles:,}",
                    of,
                    markdown_text(others),
                )
            )
        head = ("benchmark", "mode", "metric", "score", "95 % interval", "tiles", "weights", "other scores")
        yield _table(head, rows)
        yield "Intervals are bootstraps over test tiles; ± is the standard deviation over seeds or folds."

    def _training(self) -> Iterator[str]:
        counts = {k: v for k in ("step", "samples", "seed") if type(v := self.trained.get(k)) is int}
        names = {"step": "optimizer steps", "samples": "samples", "seed": "seed"}
        facts = [f"- {names[k]}: {v:,}" for k, v in counts.items()]
        if self.trained.get("source"):
            facts.append(f"- converted from {markdown_text(str(self.trained['source']))}")
        if self.training.setup:
            facts.append(f"- {markdown_text(self.training.setup)}")
        if facts:
            yield "\n".join(facts)
        data = [_dataset_row(m) for m in self.training.manifests]
        known = {m.spec.name for m in self.training.manifests}
        data += [
            (markdown_text(name), "", "", f"`{markdown_text(digest)}`")
            for name, digest in self.training.digests.items()
            if name not in known
        ]
        if data:
            yield _table(("dataset", "tiles", "synthetic", "SHA-256 of the manifest"), data)
        losses = [line for line in self.training.lines if isinstance(line.get("loss"), float)]
        if losses:
            first, last = losses[0], losses[-1]
            yield (
                f"Loss {first['loss']:.4f} at step {first['step']:,}, {last['loss']:.4f} at step {last['step']:,}."
            )
        if self.has_picture:
            yield f"![Loss over steps]({LOSS_PICTURE})"
        if self.training.recipe is not None:
            recipe = yaml.safe_dump(without_places(self.training.recipe), sort_keys=False)
            yield "Recipe:"
            yield "\n".join(f"    {line}" for line in recipe.splitlines())


def _scale(scale: Any) -> str:
    text = "ln x" if scale.kind == "log" else "x"
    return text if scale.divisor == 1 else f"{text} / {scale.divisor:g}"


def _dataset_row(manifest: Manifest) -> tuple[str, ...]:
    tiles: dict[str, int] = {}
    for shard in manifest.shards:
        tiles[shard.split] = tiles.get(shard.split, 0) + shard.samples
    counts = ", ".join(f"{markdown_text(split)} {n:,}" for split, n in tiles.items())
    synthetic = "" if manifest.synthetic is None else "yes" if manifest.synthetic else "no"
    return markdown_text(manifest.spec.title), counts, synthetic, f"`{manifest.digest}`"


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def without_places(node: Any) -> Any:
    """A document without credentials, and with the last part alone of paths and addresses: they name people, machines
    and buckets."""
    return _without_places(scrub_tree(node))


def _without_places(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _without_places(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_places(value) for value in node]
    if isinstance(node, str) and _PLACES.match(node):
        return f"…/{Path(node.rstrip('/')).name}"
    return node
