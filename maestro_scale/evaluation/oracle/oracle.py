"""An upper reference for scores on synthetic scenes: predictions that use the generator's class signatures.

The oracle knows the signatures of the classes and reads of every tile what an encoder reads, noise included. For each
kind of sensor it computes the likelihood of every variant of the classes in cells of 10 m (:mod:`.evidence`), adds the
kinds that it may use, and infers which few variants the tile consists of (:mod:`.mixture`); where labels are finer, it
refines borders with the image of highest resolution (:mod:`.borders`). It is evaluated with every single kind, every
pair, and all. Elevation is not used, and errors of neighbouring cells are treated as independent after a reduction of
their weight, so that the best possible predictor reaches a little more.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.datasets.synthetic.classes import variants_of
from maestro_scale.evaluation.benchmark import Benchmark, Provenance, build_result
from maestro_scale.evaluation.metrics import segmentation_scores
from maestro_scale.evaluation.oracle.borders import class_map
from maestro_scale.evaluation.oracle.mixture import class_shares, responsibilities
from maestro_scale.evaluation.oracle.sensors import SensorKinds
from maestro_scale.evaluation.oracle.simulation import SceneKind
from maestro_scale.evaluation.probes import dense
from maestro_scale.evaluation.progress import ProgressFactory, no_progress
from maestro_scale.evaluation.results import ORACLE, EvalResult, EvaluationError, SensorScore
from maestro_scale.evaluation.tasks.first_maps import FirstMaps
from maestro_scale.evaluation.tasks.protocol import Predictions, Task
from maestro_scale.evaluation.tasks.task import (
    MultilabelTask,
    SegmentationTask,
    multilabel_predictions,
    task_for,
)
from maestro_scale.evaluation.tasks.tile_maps import TileMapWriter
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.sensor_sets import absent_sensors
from maestro_scale.stream.source import Source
from maestro_scale.training.distributed import World

# Targets with the classes of the scenes, in their order: the number of classes of the scenes (None: as the target), and
# whether the scenes are fields.
SCENE_TARGETS = {
    "species": (None, False),
    "crop_type": (19, True),
    "crops_present": (19, True),
    "cosia": (15, False),
}
_MAX_MISFIT = 1.6  # standard deviations; scenes of the generator are at 1


def evaluate_oracle(
    benchmark: Benchmark,
    provenance: Provenance,
    workers: int = 0,
    world: World | None = None,
    maps_dir: Path | None = None,
    progress: ProgressFactory = no_progress,
) -> EvalResult | None:
    """The oracle's result on the test split, on rank 0; None on the other ranks. ``maps_dir``: for its predicted maps.

    ``value`` is the score with all sensors, ``by_sensors`` has those of their subsets. EvaluationError where the target
    has other classes than the scenes, no sensor in use is of a kind that scenes have, or the tiles do not come from the
    generator.
    """
    manifest = benchmark.load_manifest()
    spec = benchmark.spec
    task = task_for(spec, benchmark.target)
    started = time.perf_counter()
    store = Store(benchmark.shards, benchmark.cache_dir, benchmark.cache_bytes)
    source = Source(spec, manifest.shards_of(benchmark.stored_splits("test")), store)
    if lacking := {name for shard in source.shards for name in absent_sensors(spec, shard)}:
        raise EvaluationError(
            f"{benchmark.shards}: has tiles that lack {', '.join(sorted(lacking))}: the oracle needs every sensor"
        )
    oracle = Oracle(spec, task)
    writer = TileMapWriter(maps_dir, source, task) if maps_dir else None
    rank, size = (world.rank, world.size) if world else (0, 1)
    loader = EvalLoader(source, oracle.num_crops, rank, size, workers=workers, crops=task.num_crops)
    tiles = np.zeros((loader.num_samples, len(oracle.set_names), *oracle.tile_shape))
    misfits = np.zeros(loader.num_samples)
    first_maps = FirstMaps(loader.num_samples)
    first = loader.first_row // oracle.num_crops
    with progress(f"oracle {spec.name}", "tiles") as report:
        for number, batch in enumerate(loader):  # one tile per batch
            tile = first + number
            tiles[tile], misfits[tile], maps = oracle.predict_tile(batch)
            first_maps.add(tile, maps)
            if writer is not None and maps is not None:
                writer.write(tile, maps["answer"][0])
            report(number + 1, len(loader), 0)
    if world is not None:  # every tile was predicted by one rank and is 0 on the others: the sum is a gather
        device = world.device
        tiles, misfits = (world.sum(torch.from_numpy(a).to(device)).cpu().numpy() for a in (tiles, misfits))
    # The median: single tiles under cloud may be far off. The same on all ranks, so all of them raise.
    if np.median(misfits) > _MAX_MISFIT:
        raise EvaluationError(
            f"{benchmark.shards}: the tiles differ from synthetic scenes by {np.median(misfits):.1f} standard "
            "deviations of the noise: the oracle is only for data of `maestro-scale synth`"
        )
    maps = first_maps.gather(world)
    if writer is not None:
        writer.close()
    if world is not None and not world.is_main:
        return None
    timings = {"fit_s": time.perf_counter() - started}
    by_sensors = {}
    for number, name in enumerate(oracle.set_names):
        predictions = replace(oracle.predictions(tiles[:, number]), maps=maps)
        result = build_result(benchmark, manifest, ORACLE, task, predictions, provenance, timings)
        by_sensors[name] = SensorScore(result.value, result.interval, result.per_class)
    return replace(result, by_sensors=by_sensors)  # the last set is that of all sensors


class Oracle:
    """Predicts tiles and counts the predictions. ``num_crops``: of a tile; ``tile_shape``: of what scoring needs of it,
    as in ``tasks.losses.TargetLoss``; ``set_names``: the sets of kinds of sensors, that of all kinds last."""

    def __init__(self, spec: DatasetSpec, task: Task) -> None:
        if task.target.name not in SCENE_TARGETS or not isinstance(task, MultilabelTask | SegmentationTask):
            raise EvaluationError(
                f"{spec.name}: {task.target.name} is not a map of a scene's classes; the oracle knows "
                f"{', '.join(SCENE_TARGETS)}"
            )
        self._task = task
        self._sensors = SensorKinds.of(spec)
        kinds = self._sensors.kinds
        self._sets = [s for size in range(1, len(kinds) + 1) for s in itertools.combinations(kinds, size)]
        self.set_names = tuple("+".join(s) for s in self._sets)
        num_classes, fields = SCENE_TARGETS[task.target.name]
        self._crop_m = spec.crop_m
        self._kind = SceneKind(num_classes or len(task.target.classes), spec.crop_m, fields)
        self._variants = variants_of(self._kind.num_classes)
        if isinstance(task, SegmentationTask):
            self.num_crops = task.layout.crop_grid.num_crops
            self.tile_shape: tuple[int, ...] = (len(task.classes) + 1, len(task.classes))
            self._classes = [i for i, _ in enumerate(task.target.classes) if i not in task.target.ignored]
        else:
            self.num_crops, self.tile_shape = 1, (2, len(task.classes))
            of = spec.target(task.target.of) if task.target.of else task.target
            self._classes = [of.classes.index(name) for name in task.classes]

    def predict_tile(self, batch: Batch) -> tuple[np.ndarray, float, dict[str, np.ndarray] | None]:
        """Of the crops of one tile: for each set what scoring needs, the misfit, and of the last set the ``truth`` and
        ``answer`` maps (1, H, W), or None."""
        crops = [self._crop(batch, row) for row in range(len(batch))]
        misfit = float(np.median([crop.misfit for crop in crops]))
        labels = self._task.labels(batch)
        if isinstance(self._task, MultilabelTask):
            threshold = self._task.target.threshold
            (crop,) = crops
            scores = [_class_scores(shares.mean(axis=(1, 2)), threshold) for shares in crop.shares]
            return np.stack([np.stack([s, labels[0]]) for s in scores]), misfit, None
        layout = self._task.layout
        truth = layout.assemble(labels)
        counts = []
        for number, kinds in enumerate(self._sets):
            maps = [
                self._map(layout, batch, row, crops[row].shares[number], kinds) for row in range(len(batch))
            ]
            answer = layout.assemble(np.stack(maps))
            counts.append(dense.tile_confusion(len(self._task.classes), answer, truth))
        return np.stack(counts), misfit, {"truth": truth[None], "answer": answer[None]}

    def predictions(self, tiles: np.ndarray) -> Predictions:
        """Counts and scores from all tiles, of one set of sensors."""
        if isinstance(self._task, MultilabelTask):
            return multilabel_predictions(tiles[:, 0] > 0.5, tiles[:, 0], tiles[:, 1] > 0.5, {})
        return Predictions(tiles, {}, segmentation_scores(tiles.sum(0)))

    def _crop(self, batch: Batch, row: int) -> _Crop:
        evidence = self._sensors.evidence(batch, row, self._kind, self._variants, self._crop_m)
        cells = round(self._crop_m / 10)
        labels = np.array([v.label for v in self._variants])
        nothing = np.zeros((len(labels), cells, cells))
        shares = []
        for kinds in self._sets:
            logs = sum((evidence[kind].logs for kind in kinds if kind in evidence), nothing)
            shares.append(class_shares(responsibilities(logs), labels, self._kind.num_classes)[self._classes])
        return _Crop(shares, max((e.misfit for e in evidence.values()), default=0.0))

    def _map(
        self, layout: dense.PixelLayout, batch: Batch, row: int, shares: np.ndarray, kinds: tuple[str, ...]
    ) -> np.ndarray:
        """(H, W) uint8 index among the classes that count, on the pixels of the labels."""
        image = self._sensors.picture(batch, row) if "image" in kinds else None
        return class_map(shares, layout.crop_pixels, image, layout.crop_grid.crop_m)


@dataclass(frozen=True)
class _Crop:
    """``shares`` (K, h, w) of the classes that count, for each set of sensors; ``misfit`` of the worst kind."""

    shares: list[np.ndarray]
    misfit: float


def _class_scores(shares: np.ndarray, threshold: float) -> np.ndarray:
    """Scores in [0, 1] that increase with the share, and exceed one half where it exceeds the threshold."""
    return np.where(shares > threshold, 0.5 + shares / 2 + 1e-9, 0.5 * shares / max(threshold, 1e-9)).clip(
        0, 1
    )
