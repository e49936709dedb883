"""Does a dataset spec make sense? For manifests, which people also write by hand."""

from __future__ import annotations

import re

from maestro_scale.datasets.spec import DatasetSpec, Modality, Sensor, Target
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.codec import DTYPES

_NAME = re.compile(r"[A-Za-z0-9_-]+")


def check_spec(spec: DatasetSpec, where: str = "spec") -> None:
    """ManifestError, with the path of the entry, where ``spec`` contradicts itself."""
    _check_name(spec.name, f"{where}.name")
    for what in ("modalities", "targets", "sensors"):
        names = [item.name for item in getattr(spec, what)]
        for i, name in enumerate(names):
            _check_name(name, f"{where}.{what}[{i}].name")
            if name in names[:i]:
                raise ManifestError(f"{where}.{what}[{i}].name: {name!r} is there twice")
    if not spec.modalities:
        raise ManifestError(f"{where}.modalities: is empty; a dataset has at least one")
    modalities = {m.name: m for m in spec.modalities}
    for i, modality in enumerate(spec.modalities):
        _check_modality(modality, f"{where}.modalities[{i}]")
    for i, target in enumerate(spec.targets):
        if not target.classes:
            raise ManifestError(f"{where}.targets[{i}].classes: is empty")
        if target.of is not None:
            _check_derived(target, spec, f"{where}.targets[{i}].of")
    for i, sensor in enumerate(spec.sensors):
        _check_sensor(sensor, modalities, f"{where}.sensors[{i}]")
    if spec.ref_sensor is not None and spec.ref_sensor not in {s.name for s in spec.sensors}:
        raise ManifestError(f"{where}.ref_sensor: {spec.ref_sensor!r} is none of the sensors")


def _check_derived(target: Target, spec: DatasetSpec, where: str) -> None:
    sources = {t.name: t for t in spec.targets if t.kind == "segmentation"}
    if target.kind != "multilabel" or target.of not in sources:
        raise ManifestError(
            f"{where}: {target.of!r} is no segmentation target that shares can be counted from"
        )
    unknown = [c for c in target.classes if c not in sources[target.of].classes]
    if unknown:
        raise ManifestError(f"{where}: {target.of} has no class {unknown[0]!r}")


def _check_name(name: str, where: str) -> None:
    # Field names join these with dots, files carry them.
    if not _NAME.fullmatch(name) or name in ("target", "ref_date"):
        raise ManifestError(f"{where}: {name!r} is no name; use letters, digits, '_' and '-'")


def _check_modality(modality: Modality, where: str) -> None:
    if modality.dtype not in DTYPES:
        raise ManifestError(f"{where}.dtype: {modality.dtype!r} is none of {', '.join(DTYPES)}")
    if modality.size < 1 or not modality.bands:
        raise ManifestError(f"{where}: has {len(modality.bands)} bands of {modality.size} pixels a side")


def _check_sensor(sensor: Sensor, modalities: dict[str, Modality], where: str) -> None:
    if sensor.source not in modalities:
        raise ManifestError(f"{where}.source: {sensor.source!r} is none of {', '.join(modalities)}")
    num_bands = len(modalities[sensor.source].bands)
    if not sensor.bands or not all(0 <= band < num_bands for band in sensor.bands):
        raise ManifestError(f"{where}.bands: {list(sensor.bands)} do not index {num_bands} bands from 0")
    for name in ("band_groups", "token_groups"):
        groups = getattr(sensor, name)
        if (groups or name == "band_groups") and sum(groups) != len(sensor.bands):
            raise ManifestError(f"{where}.{name}: {list(groups)} do not sum to {len(sensor.bands)} bands")
    if sensor.patch < 1 or sensor.image_size % sensor.patch:
        raise ManifestError(f"{where}.patch: {sensor.patch} does not divide image_size {sensor.image_size}")
    if sensor.num_dates < 1:
        raise ManifestError(f"{where}.num_dates: is {sensor.num_dates}, at least 1 is drawn")
