"""What can be reached on synthetic scenes: an oracle that is told the generator's signatures of the classes, and sees
of every tile what an encoder sees of it, noise and all.

It unmixes the time series of Sentinel-2 (:mod:`.signatures`) into shares per pixel of 10 m;
where labels are finer, the sharpest photograph draws the borders. It makes no use of radar and elevation, so the best
possible predictor reaches a little more.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import uniform_filter, zoom

from maestro_scale.datasets.spec import DatasetSpec, Sensor
from maestro_scale.datasets.synthetic.scene import BAND_NM
from maestro_scale.evaluation.benchmark import Benchmark, Provenance, build_result
from maestro_scale.evaluation.metrics import segmentation_scores
from maestro_scale.evaluation.oracle.signatures import ReflectanceSeries, unmix
from maestro_scale.evaluation.probes import dense
from maestro_scale.evaluation.progress import ProgressFactory, no_progress
from maestro_scale.evaluation.results import ORACLE, EvalResult, ResultsError
from maestro_scale.evaluation.tasks.first_maps import FirstMaps
from maestro_scale.evaluation.tasks.task import (
    MultilabelTask,
    Predictions,
    SegmentationTask,
    multilabel_predictions,
    task_for,
)
from maestro_scale.evaluation.tasks.tile_maps import TileMapWriter
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.source import Source
from maestro_scale.training.distributed import World

# Targets whose classes are the scenes', in their order, and how many classes the scenes have (None: as many).
SCENE_TARGETS = {"species": None, "crop_type": 19, "crops_present": 19, "cosia": 15}

_REFLECTANCE = 10_000
_LEAST_SHARE = 0.01  # of a crop, for a class to be on its map
_MAX_MISFIT = 6.0  # deviations of the noise; scenes of the generator stay below 3, veiled ones
_SMOOTHED_M = 1.0
_COLOUR_NOISE = 0.06  # of the logarithm of a band's part of the brightness, smoothed
_LEAST_PRIOR = 1e-3
_ROUNDS = 3


def evaluate_oracle(
    benchmark: Benchmark,
    provenance: Provenance,
    workers: int = 0,
    world: World | None = None,
    maps_dir: Path | None = None,
    progress: ProgressFactory = no_progress,
) -> EvalResult | None:
    """The oracle's result on the test split, on rank 0; None on the other ranks. ``maps_dir``: for its predictions of
    whole tiles.

    ResultsError where the target is none of the scenes' classes, Sentinel-2 is not among the sensors in use, or the
    tiles are not the generator's.
    """
    manifest = Manifest.load(benchmark.shards)
    spec = benchmark.spec
    task = task_for(spec, benchmark.target)
    started = time.perf_counter()
    store = Store(benchmark.shards, benchmark.cache_dir, benchmark.cache_bytes)
    source = Source(spec, manifest.shards_of(benchmark.stored_splits("test")), store)
    oracle = Oracle(spec, task)
    written = TileMapWriter(maps_dir, source, task) if maps_dir else None
    rank, size = (world.rank, world.size) if world else (0, 1)
    loader = EvalLoader(source, oracle.crops, rank, size, workers=workers, crops=task.num_crops)
    tiles = np.zeros((loader.num_samples, *oracle.shape))
    misfits = np.zeros(loader.num_samples)
    at, maps = loader.first_row // oracle.crops, FirstMaps(loader.num_samples)
    with progress(f"oracle {spec.name}", "tiles") as report:
        for number, batch in enumerate(loader, 1):  # a tile each
            tiles[at], misfits[at], seen = oracle.tile(batch)
            maps.add(at, seen)
            if written is not None:
                written.write(at, seen["answer"][0])
            at += 1
            report(number, len(loader), 0)
    if world is not None:  # every tile is one rank's, and nothing is added to it
        device = world.device
        tiles, misfits = (world.sum(torch.from_numpy(a).to(device)).cpu().numpy() for a in (tiles, misfits))
    if np.median(misfits) > _MAX_MISFIT:
        raise ResultsError(
            f"{benchmark.shards}: the tiles are {np.median(misfits):.1f} deviations off the scenes that the oracle "
            "knows: it is for data of `maestro-scale synth`"
        )
    shown = maps.gather(world)
    if written is not None:
        written.close()
    if world is not None and not world.is_main:
        return None
    timings = {"fit_s": time.perf_counter() - started}
    return build_result(
        benchmark, manifest, ORACLE, task, replace(oracle.predictions(tiles), maps=shown), provenance, timings
    )


class Oracle:
    """Predictions of tiles, and how they are counted. ``crops``: of a tile; ``shape``: what is kept of a tile."""

    def __init__(self, spec: DatasetSpec, task: MultilabelTask | SegmentationTask) -> None:
        if task.target.name not in SCENE_TARGETS:
            raise ResultsError(
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
            raise ResultsError(
                f"{spec.name}: the oracle needs Sentinel-2, which is not among the sensors in use"
            )
        self._series = series[0]
        photos = [
            s
            for s in spec.sensors
            if not spec.modality(s.source).series and {"R", "G", "B"} <= set(self._bands(s))
        ]
        self._photo = min(photos, key=lambda s: spec.modality(s.source).resolution_m, default=None)
        if isinstance(task, SegmentationTask):
            self.crops = task.layout.crop_grid.num_crops
            self.shape: tuple[int, ...] = (len(task.classes) + 1, len(task.classes))
            self._classes = [i for i, _ in enumerate(task.target.classes) if i not in task.target.ignored]
        else:
            self.crops, self.shape = 1, (2, len(task.classes))
            of = spec.target(task.target.of) if task.target.of else task.target
            self._classes = [of.classes.index(name) for name in task.classes]

    def tile(self, batch: Batch) -> tuple[np.ndarray, float, dict[str, np.ndarray] | None]:
        """(what is kept of a tile's crops, deviations off, label and answer as maps where there are such)."""
        seen = [self._shares(batch, row) for row in range(len(batch))]
        misfit = float(np.median([m for _, m in seen]))
        labels = self._task.labels(batch)
        if isinstance(self._task, MultilabelTask):
            shares = seen[0][0].mean(axis=(1, 2))[self._classes]
            return np.stack([_class_scores(shares, self._task.target.threshold), labels[0]]), misfit, None
        answers = np.stack([self._map(batch, row, shares) for row, (shares, _) in enumerate(seen)])
        layout = self._task.layout
        truth, answer = layout.assemble(labels), layout.assemble(answers)
        counts = dense.tile_confusion(len(self._task.classes), answer, truth)
        return counts, misfit, {"truth": truth[None], "answer": answer[None]}

    def predictions(self, tiles: np.ndarray) -> Predictions:
        """Counts and scores of all tiles."""
        if isinstance(self._task, MultilabelTask):
            return multilabel_predictions(tiles[:, 0] > 0.5, tiles[:, 0], tiles[:, 1] > 0.5, {})
        return Predictions(tiles, {}, segmentation_scores(tiles.sum(0)))

    def _bands(self, sensor: Sensor) -> list[str]:
        bands = self._spec.modality(sensor.source).bands
        return [bands[b] for b in sensor.bands]

    def _shares(self, batch: Batch, row: int) -> tuple[np.ndarray, float]:
        """(K, h, w) shares of the scene's classes on Sentinel-2's pixels, and deviations off."""
        name = self._series.name
        values = batch.pixels[name][row].numpy() / _REFLECTANCE
        nm = np.array([BAND_NM[b] for b in self._bands(self._series)], float)
        days = batch.dates[name][row, :, 1].numpy()
        threshold = self._task.target.threshold if isinstance(self._task, MultilabelTask) else 0.0
        flat = values.reshape(*values.shape[:2], -1)
        shares, misfit = unmix(
            ReflectanceSeries(flat, days, nm), self._num_classes, max(0.85 * threshold, _LEAST_SHARE)
        )
        return shares.reshape(-1, *values.shape[2:]), misfit

    def _map(self, batch: Batch, row: int, shares: np.ndarray) -> np.ndarray:
        """(H, W) uint8 class among those that count, on the pixels of the labels."""
        shares = shares[self._classes]
        side = self._task.layout.crop_pixels
        factor = side / shares.shape[-1]
        prior = (
            zoom(shares, (1, factor, factor), order=1, mode="nearest", grid_mode=True)
            if factor != 1
            else shares
        )
        if factor <= 1 or self._photo is None:
            return prior.argmax(axis=0).astype(np.uint8)
        photo = batch.pixels[self._photo.name][row, 0].numpy().astype(np.float32)
        size = max(round(_SMOOTHED_M * photo.shape[-1] / self._task.layout.crop_grid.crop_m), 1)
        smooth = np.stack([uniform_filter(band, size, mode="nearest") for band in photo])
        if smooth.shape[-1] != side:
            smooth = zoom(
                smooth, (1, side / smooth.shape[-1], side / smooth.shape[-1]), order=1, grid_mode=True
            )
        return _refine_borders(np.log(np.maximum(smooth, 1.0)), prior).astype(np.uint8)


def _refine_borders(logs: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """(H, W) classes from the colours of a photograph (C, H, W), whose light varies, and blurred shares (K, H, W)."""
    colour = logs - logs.mean(axis=0)
    belief = np.log(np.maximum(prior, _LEAST_PRIOR))
    present = np.flatnonzero(prior.mean(axis=(1, 2)) > 0)
    answer = prior.argmax(axis=0)
    for _ in range(_ROUNDS):
        posterior = np.full(prior.shape, -np.inf, np.float32)
        for k in present:
            inside = (answer == k) & (prior[k] > 0.5)
            if inside.any():
                off = colour - np.median(colour[:, inside], axis=1)[:, None, None]
                posterior[k] = belief[k] - 0.5 * (off**2).sum(axis=0) / _COLOUR_NOISE**2
            else:
                posterior[k] = belief[k] - 0.5 * len(colour)
        answer = posterior.argmax(axis=0)
    return answer


def _class_scores(shares: np.ndarray, threshold: float) -> np.ndarray:
    """Shares as scores in [0, 1] that are above one half where the share is above the threshold."""
    return np.where(shares > threshold, 0.5 + shares / 2 + 1e-9, 0.5 * shares / max(threshold, 1e-9)).clip(
        0, 1
    )
