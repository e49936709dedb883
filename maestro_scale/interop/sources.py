"""Locations of exported models: a folder, an object store, the Hugging Face hub or an MLflow registry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from maestro_scale import untrusted
from maestro_scale.errors import did_you_mean
from maestro_scale.interop import hub
from maestro_scale.interop.export import CONFIG, FORMAT_VERSION, WEIGHTS, ExportError
from maestro_scale.interop.published import PUBLISHED
from maestro_scale.shards.errors import StoreError
from maestro_scale.shards.storage import LocalStorage, open_storage

TRACKING_URI = "MLFLOW_TRACKING_URI"
REGISTERED_FOLDER = "data/model"  # folder of the model's files within an MLflow pyfunc model

# An address that went through ``Path``, which joins the slashes. The scheme of MLflow has one.
_JOINED = re.compile(r"^(?!models:)([a-z0-9]{2,}):/(?!/)")


def model_address(path: str | Path) -> str:
    """The address of a model as :class:`ModelSource` reads it: names of published models become their addresses."""
    text = _JOINED.sub(r"\1://", str(path).rstrip("/"))
    if text in PUBLISHED and not Path(text).exists():
        return PUBLISHED[text].address
    return text


def is_local(path: str | Path) -> bool:
    """Whether it is a path on this machine: no URL, no name of a published model."""
    text = model_address(path)
    return "://" not in text and not text.startswith("models:/")


class ModelSource:
    """One exported model: ``config.json`` and ``model.safetensors``.

    ``url``: a folder, ``s3://bucket/prefix`` (or another scheme of fsspec), ``hf://owner/name[@revision][/folder]``,
    which needs the ``hub`` extra and is cached by it, the name of a published model (``published.PUBLISHED``), or
    ``models:/name/version`` of the MLflow registry at ``MLFLOW_TRACKING_URI``. A checkpoint of the authors on the hub
    is converted.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = model_address(url)
        fetch = next((f for scheme, f in _FETCH.items() if self.url.startswith(scheme)), str)
        self._storage = open_storage(fetch(self.url))

    def read_config(self) -> dict[str, Any]:
        """Content of config.json; ExportError if it is missing or has another format version."""
        try:
            record = untrusted.load_json(self._storage.read(CONFIG, untrusted.DOCUMENT.bytes))
        except (OSError, ValueError, StoreError) as error:
            what = "there is no config.json" if isinstance(error, FileNotFoundError) else error
            name = did_you_mean(self.url, PUBLISHED)
            name = name if name.startswith(" (did") else ""  # not the whole list
            raise ExportError(
                f"{self.url} is not an exported model ({what}){name}; create one with `maestro-scale export`, or with "
                "`maestro-scale convert-ign` from an original checkpoint; `maestro-scale models` lists published ones"
            ) from None
        found = record.get("format_version") if isinstance(record, dict) else None
        if found != FORMAT_VERSION:
            raise ExportError(
                f"{self.url}/{CONFIG} has format {found}, this version reads {FORMAT_VERSION}: update maestro_scale"
            )
        return record

    def read_weights(self) -> dict[str, Tensor]:
        """Content of model.safetensors, on the CPU; ExportError if it is missing or damaged."""
        try:
            # A local file is memory-mapped instead of being read into memory first.
            if isinstance(self._storage, LocalStorage):
                return untrusted.load_tensors(self._storage.folder / WEIGHTS)
            return untrusted.load_tensors(self._storage.read(WEIGHTS))
        except (OSError, untrusted.InputError, StoreError) as error:
            raise ExportError(f"{self.url}/{WEIGHTS} cannot be read ({error}): fetch it again") from None


def _from_registry(url: str) -> Path:
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    store = mlflow.get_registry_uri()
    chosen_by_mlflow = not mlflow.is_tracking_uri_set() and store == mlflow.get_tracking_uri()
    if (
        chosen_by_mlflow and store.startswith("sqlite:") and not Path("mlflow.db").exists()
    ):  # MLflow would create an empty one and report that the model does not exist
        raise ExportError(
            f"{url}: set {TRACKING_URI} to the store with the registered model, as printed by `maestro-scale export "
            f"--register` (sqlite:////…/mlflow.db, http://…); there is no mlflow.db in {Path.cwd()} either"
        )
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=url)) / REGISTERED_FOLDER
    except (MlflowException, OSError) as error:
        raise ExportError(
            f"{url}: cannot be fetched from {store.rpartition('@')[2]} "
            f"({str(error).strip().splitlines()[0]}); is {TRACKING_URI} set?"
        ) from None


_FETCH = {hub.SCHEME: hub.fetch, "models:/": _from_registry}
