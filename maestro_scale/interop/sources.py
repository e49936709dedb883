"""Locations of exported models: a folder, an object store, the Hugging Face hub or an MLflow registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from maestro_scale import untrusted
from maestro_scale.interop.export import CONFIG, FORMAT_VERSION, WEIGHTS, ExportError
from maestro_scale.shards.errors import StoreError
from maestro_scale.shards.storage import LocalStorage, open_storage

TRACKING_URI = "MLFLOW_TRACKING_URI"
REGISTERED_FOLDER = "data/model"  # folder of the model's files within an MLflow pyfunc model


class ModelSource:
    """One exported model: ``config.json`` and ``model.safetensors``.

    ``url``: a folder, ``s3://bucket/prefix`` (or another scheme of fsspec), ``hf://owner/name[@revision][/folder]``,
    which needs the ``hub`` extra and is cached by it, or ``models:/name/version`` of the MLflow registry at
    ``MLFLOW_TRACKING_URI``.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url).rstrip("/")
        fetch = next((f for scheme, f in _FETCH.items() if self.url.startswith(scheme)), str)
        self._storage = open_storage(fetch(self.url))

    def read_config(self) -> dict[str, Any]:
        """Content of config.json; ExportError if it is missing or has another format version."""
        try:
            record = untrusted.load_json(self._storage.read(CONFIG, untrusted.DOCUMENT.bytes))
        except (OSError, ValueError, StoreError) as error:
            what = "there is no config.json" if isinstance(error, FileNotFoundError) else error
            raise ExportError(
                f"{self.url} is not an exported model ({what}); create one with `maestro-scale export`, or with "
                "`maestro-scale convert-ign` from an original checkpoint"
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


def _from_hub(url: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ExportError(
            f"{url}: models on the Hugging Face hub need its client: pip install 'maestro-scale[hub]'"
        ) from None
    parts = url.removeprefix("hf://").split("/")
    if len(parts) < 2 or not all(parts[:2]):
        raise ExportError(f"{url}: write hf://owner/name, hf://owner/name@revision or hf://owner/name/folder")
    name, _, revision = parts[1].partition("@")
    folder = "/".join(parts[2:])
    try:
        paths = [
            hf_hub_download(
                f"{parts[0]}/{name}", filename, subfolder=folder or None, revision=revision or None
            )
            for filename in (WEIGHTS, CONFIG)
        ]
    except (OSError, ValueError) as error:  # the base classes of the client's errors
        raise ExportError(f"{url}: cannot be fetched ({str(error).strip().splitlines()[0]})") from None
    return Path(paths[-1]).parent


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


_FETCH = {"hf://": _from_hub, "models:/": _from_registry}
