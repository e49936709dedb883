"""Loads descriptions of datasets: from a file, or by name those that ship with the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from maestro_scale.datasets.description.config import Description
from maestro_scale.datasets.description.spec import dataset_spec
from maestro_scale.datasets.spec import DatasetSpec, Modality, Sensor, Target
from maestro_scale.datasets.spec_check import spec_problems, view_problems
from maestro_scale.datasets.spec_limits import Problem
from maestro_scale.errors import KeyPath, dotted
from maestro_scale.strict_yaml import shipped as documents
from maestro_scale.strict_yaml.errors import DocumentError
from maestro_scale.strict_yaml.loading import validated
from maestro_scale.strict_yaml.merge import read_tree

_SUFFIXES = (".yaml", ".yml")


def load_description(path: str | Path, overrides: Sequence[str] = ()) -> Description:
    """Read a description, what it extends, ``key=value`` overrides and the environment.

    DocumentError with a line per mistake: its file, its key, what to change and the nearest valid name.
    """
    tree = read_tree(path, overrides, "description")
    description = validated(tree, Description)
    spec = dataset_spec(description)
    # Of a spec whose parts contradict themselves the view has only errors that follow from it.
    problems = [*spec_problems(spec)] or [*view_problems(spec)]
    if problems:
        lines = (_line(loc, reason, description, spec) for loc, reason in problems)
        raise DocumentError("\n".join(f"{tree.origin(loc)}: {dotted(loc)}: {text}" for loc, text in lines))
    return description


def find_description(name: str) -> Path | None:
    """The file of a description: ``name`` itself if it is a path, or one that ships with the package; else None."""
    if name.endswith(_SUFFIXES):
        return Path(name)
    return documents.find("description", name)


def shipped() -> tuple[str, ...]:
    """Names of the descriptions that ship with the package."""
    return tuple(documents.names("description"))


def shipped_spec(name: str) -> DatasetSpec | None:
    """The spec of a dataset whose description ships with the package; None if there is none."""
    path = find_description(name) if name in shipped() else None
    return None if path is None else dataset_spec(load_description(path))


def _line(loc: KeyPath, reason: str, description: Description, spec: DatasetSpec) -> Problem:
    """The key of the description that a problem of its spec comes from, and the reason."""
    part, *rest = loc
    if part not in ("modalities", "targets", "sensors") or not rest:
        return loc, reason
    items: Mapping[str, Sequence[Modality | Target | Sensor]] = {
        "modalities": spec.modalities,
        "targets": spec.targets,
        "sensors": spec.sensors,
    }
    first, below = rest[0], tuple(rest[1:])
    name = items[str(part)][first].name if isinstance(first, int) else first
    if part == "targets":
        return ("targets", name, *below), reason
    if part == "modalities":
        # The size of a raster follows from the extent of a tile and of a pixel.
        return ("rasters", name, *("resolution_m" if b == "size" else b for b in below)), reason
    if name in description.sensors:
        return ("sensors", name, *below), reason
    return ("rasters", name, "sensor", *below), reason
