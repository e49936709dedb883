"""An upper reference for scores on synthetic scenes: predictions that use the generator's class signatures.

The oracle knows the signatures of the classes and reads of every tile what an encoder reads, noise included. It unmixes
the Sentinel-2 series into class shares per pixel of 10 m (:mod:`.signatures`); where labels are finer, it refines the
borders with the image of highest resolution. It does not use radar and elevation, so the best possible predictor
reaches a little more.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import uniform_filter, zoom

from maestro_scale.datasets.spec import DatasetSpec, Sensor
from maestro_scale.datasets.synthetic.vegetation import BAND_NM
from maestro_scale.evaluation.benchmark import Benchmark, Provenance, build_result
from maestro_scale.evaluation.metrics import segmentation_scores
from maestro_scale.evaluation.oracle.signatures import ReflectanceSeries, unmix
from maestro_scale.evaluation.probes import dense
from maestro_scale.evaluation.progress import ProgressFactory, no_progress
from maestro_scale.evaluation.results import ORACLE, EvalResult, EvaluationError
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
from maestro_scale.stream.source import Source
from maestro_scale.training.distributed import World

# Targets with the classes of the scenes, in their order: the number of classes of the scenes (None: as the target).
SCENE_TARGETS = {"species": None, "crop_type": 19, "crops_present": 19, "cosia": 15}

_REFLECTANCE = 10_000  # digital number of a reflectance of 1
_MIN_SHARE = 0.01  # of a crop, for a class to be on its map
_MAX_MISFIT = (
    6.0  # standard deviations of the noise; scenes of the generator stay below 3, clouded ones below this
)
_SMOOTHING_M = 1.0  # of the high-resolution image, against its noise
_COLOUR_NOISE = 0.06  # of the logarithm of a band relative to the brightness, after smoothing
_MIN_PRIOR = 1e-3  # of a class at a pixel, so that colour can outweigh blurred shares
_ROUNDS = 3  # of border refinement


def evaluate_oracle(
    benchmark: Benchmark,
    provenance: Provenance,
    workers: int = 0,
    world: World | None = None,
    maps_dir: Path | None = None,
    progress: ProgressFactory = no_progress,
) -> EvalResult | None:
    """The oracle's result on the test split, on rank 0; None on the other ranks. ``maps_dir``: for its predicted maps.

    EvaluationError where the target has other classes than the scenes, Sentinel-2 is not among the sensors in use, or
    the tiles do not come from the generator.
    """
    manifest = benchmark.load_manifest()
    spec = benchmark.spec
    task = task_for(spec, benchmark.target)
    started = time.perf_counter()
    store = Store(benchmark.shards, benchmark.cache_dir, benchmark.cache_bytes)
    source = Source(spec, manifest.shards_of(benchmark.stored_splits("test")), store)
    oracle = Oracle(spec, task)
    writer = TileMapWriter(maps_dir, source, task) if maps_dir else None
    rank, size = (world.rank, world.size) if world else (0, 1)
    loader = EvalLoader(source, oracle.num_crops, rank, size, workers=workers, crops=task.num_crops)
    tiles = np.zeros((loader.num_samples, *oracle.tile_shape))
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
    predictions = replace(oracle.predictions(tiles), maps=maps)
    return build_result(benchmark, manifest, ORACLE, task, predictions, provenance, timings)


class Oracle:
    """Predicts tiles and counts the predictions. ``num_crops``: of a tile; ``tile_shape``: of what scoring needs of it,
    as in ``tasks.losses.TargetLoss``."""

    def __init__(self, spec: DatasetSpec, task: Task) -> None:
        if task.target.name not in SCENE_TARGETS or not isinstance(task, MultilabelTask | SegmentationTask):
            raise EvaluationError(
                f"{spec.name}: {task.target.name} is not a map of a scene's classes; the oracle knows "
                f"{', '.join(SCENE_TARGETS)}"
            )
        self._task = task
        self._num_classes = SCENE_TARGETS[task.target.name] or len(task.target.classes)
        self._spec = spec
        series = [
            s for s in spec.sensors if spec.modality(s.source).series and set(self._bands(s)) <= set(BAND_NM)
        ]
        if not series:
            raise EvaluationError(
                f"{spec.name}: the oracle needs Sentinel-2, which is not among the sensors in use"
            )
        self._series = series[0]
        images = [
            s
            for s in spec.sensors
            if not spec.modality(s.source).series and {"R", "G", "B"} <= set(self._bands(s))
        ]
        self._image = min(images, key=lambda s: spec.modality(s.source).resolution_m, default=None)
        if isinstance(task, SegmentationTask):
            self.num_crops = task.layout.crop_grid.num_crops
            self.tile_shape: tuple[int, ...] = (len(task.classes) + 1, len(task.classes))
            self._classes = [i for i, _ in enumerate(task.target.classes) if i not in task.target.ignored]
        else:
            self.num_crops, self.tile_shape = 1, (2, len(task.classes))
            of = spec.target(task.target.of) if task.target.of else task.target
            self._classes = [of.classes.index(name) for name in task.classes]

    def predict_tile(self, batch: Batch) -> tuple[np.ndarray, float, dict[str, np.ndarray] | None]:
        """(what scoring needs, misfit, ``truth`` and ``answer`` maps (1, H, W) or None) of the crops of one tile."""
        unmixed = [self._class_shares(batch, row) for row in range(len(batch))]
        misfit = float(np.median([m for _, m in unmixed]))
        labels = self._task.labels(batch)
        if isinstance(self._task, MultilabelTask):
            shares = unmixed[0][0].mean(axis=(1, 2))[self._classes]
            return np.stack([_class_scores(shares, self._task.target.threshold), labels[0]]), misfit, None
        layout = self._task.layout
        predicted = np.stack([self._map(layout, batch, row, s) for row, (s, _) in enumerate(unmixed)])
        truth, answer = layout.assemble(labels), layout.assemble(predicted)
        counts = dense.tile_confusion(len(self._task.classes), answer, truth)
        return counts, misfit, {"truth": truth[None], "answer": answer[None]}

    def predictions(self, tiles: np.ndarray) -> Predictions:
        """Counts and scores from all tiles."""
        if isinstance(self._task, MultilabelTask):
            return multilabel_predictions(tiles[:, 0] > 0.5, tiles[:, 0], tiles[:, 1] > 0.5, {})
        return Predictions(tiles, {}, segmentation_scores(tiles.sum(0)))

    def _bands(self, sensor: Sensor) -> list[str]:
        bands = self._spec.modality(sensor.source).bands
        return [bands[b] for b in sensor.bands]

    def _class_shares(self, batch: Batch, row: int) -> tuple[np.ndarray, float]:
        """(K, h, w) shares of the scene's classes in the pixels of Sentinel-2, and the misfit."""
        name = self._series.name
        values = batch.pixels[name][row].numpy() / _REFLECTANCE
        nm = np.array([BAND_NM[b] for b in self._bands(self._series)], float)
        days = batch.dates[name][row, :, 1].numpy()
        threshold = self._task.target.threshold if isinstance(self._task, MultilabelTask) else 0.0
        flat = values.reshape(*values.shape[:2], -1)
        shares, misfit = unmix(
            ReflectanceSeries(flat, days, nm), self._num_classes, max(0.85 * threshold, _MIN_SHARE)
        )
        return shares.reshape(-1, *values.shape[2:]), misfit

    def _map(self, layout: dense.PixelLayout, batch: Batch, row: int, shares: np.ndarray) -> np.ndarray:
        """(H, W) uint8 index among the classes that count, on the pixels of the labels."""
        shares = shares[self._classes]
        side = layout.crop_pixels
        factor = side / shares.shape[-1]
        prior = (
            zoom(shares, (1, factor, factor), order=1, mode="nearest", grid_mode=True)
            if factor != 1
            else shares
        )
        if factor <= 1 or self._image is None:
            return prior.argmax(axis=0).astype(np.uint8)
        image = batch.pixels[self._image.name][row, 0].numpy().astype(np.float32)
        size = max(round(_SMOOTHING_M * image.shape[-1] / layout.crop_grid.crop_m), 1)
        smooth = np.stack([uniform_filter(band, size, mode="nearest") for band in image])
        if smooth.shape[-1] != side:
            smooth = zoom(
                smooth, (1, side / smooth.shape[-1], side / smooth.shape[-1]), order=1, grid_mode=True
            )
        return _refine_borders(np.log(np.maximum(smooth, 1.0)), prior).astype(np.uint8)


def _refine_borders(logs: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """(H, W) classes from log values of an image (C, H, W) and blurred shares (K, H, W).

    Alternates between the median colour of each class and the most probable class of each pixel. Brightness is removed,
    because the light varies over the tile.
    """
    colour = logs - logs.mean(axis=0)
    belief = np.log(np.maximum(prior, _MIN_PRIOR))
    present = np.flatnonzero(prior.mean(axis=(1, 2)) > 0)
    classes = prior.argmax(axis=0)
    for _ in range(_ROUNDS):
        posterior = np.full(prior.shape, -np.inf, np.float32)
        for k in present:
            inside = (classes == k) & (prior[k] > 0.5)
            if inside.any():
                offset = colour - np.median(colour[:, inside], axis=1)[:, None, None]
                posterior[k] = belief[k] - 0.5 * (offset**2).sum(axis=0) / _COLOUR_NOISE**2
            else:
                posterior[k] = belief[k] - 0.5 * len(colour)
        classes = posterior.argmax(axis=0)
    return classes


def _class_scores(shares: np.ndarray, threshold: float) -> np.ndarray:
    """Scores in [0, 1] that increase with the share, and exceed one half where it exceeds the threshold."""
    return np.where(shares > threshold, 0.5 + shares / 2 + 1e-9, 0.5 * shares / max(threshold, 1e-9)).clip(
        0, 1
    )
