"""Exported models in MLflow's registry: a version each, with a signature; ``load_model("models:/NAME/VERSION")``."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maestro_scale.errors import MaestroError
from maestro_scale.interop.export import CONFIG, WEIGHTS
from maestro_scale.interop.pretrained import load_model, read_model
from maestro_scale.interop.sources import REGISTERED_FOLDER, TRACKING_URI, ModelSource
from maestro_scale.model.config import ModelConfig
from maestro_scale.secrets_filter import scrub
from maestro_scale.tracking.mlflow_run import tracking_uri
from maestro_scale.tracking.mlflow_tracker import configure_mlflow
from maestro_scale.tracking.run_file import find_run

if TYPE_CHECKING:
    from mlflow.models import ModelSignature


class RegistryError(MaestroError):
    """The registry did not take a model; the message says why."""


@dataclass(frozen=True)
class ModelVersion:
    """A version of a model in the registry of a store."""

    name: str
    version: str
    store: str

    @property
    def uri(self) -> str:
        """What ``load_model`` and MLflow take."""
        return f"models:/{self.name}/{self.version}"

    @property
    def load_command(self) -> str:
        """A shell command that loads it from anywhere, also where ``MLFLOW_TRACKING_URI`` is not set."""
        store = "" if os.environ.get(TRACKING_URI) else f"{TRACKING_URI}={shlex.quote(self.store)} "
        return f'{store}python -c "from maestro_scale import load_model; load_model({self.uri!r})"'


def register(model: Path, name: str, run_dir: Path) -> ModelVersion:
    """Make an exported model a version of ``name``, an artifact of the MLflow run of ``run_dir``.

    Raises:
        ExportError: ``model`` is no exported model.
        RegistryError: the run was not tracked, or the store does not answer.
    """
    source = ModelSource(model)
    config, _ = read_model(source)
    trained = source.read_config()["trained"]
    configure_mlflow()
    import mlflow.pyfunc
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(run_dir)
    # Each content has a place of its own: another version must not change under those who use it.
    content = hashlib.sha256((model / WEIGHTS).read_bytes() + (model / CONFIG).read_bytes()).hexdigest()
    place = f"models/step_{trained.get('step') or 0:08d}-{content[:12]}"
    try:
        client = MlflowClient(uri, uri)
        run = find_run(client, run_dir)
        if run is None:
            raise RegistryError(
                f"{scrub(uri)} has no run of {run_dir}, which was not tracked there: `maestro-scale sync {run_dir}` "
                "makes up for it"
            )
        run_id = run.info.run_id
        with tempfile.TemporaryDirectory() as folder:
            made, plain = Path(folder) / "made", Path(folder) / Path(REGISTERED_FOLDER).name
            plain.mkdir()
            for name_of_file in (CONFIG, WEIGHTS):
                shutil.copy(model / name_of_file, plain)
            mlflow.pyfunc.save_model(
                path=str(made),
                loader_module=__name__,
                data_path=str(plain),
                signature=signature(config),
                pip_requirements=["maestro-scale"],
            )
            client.log_artifacts(run_id, str(made), place)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        root = run.info.artifact_uri
        tags = {"size": _size(config), "dataset": ",".join(v.dataset for v in config.views)}
        version = client.create_model_version(name, f"{root}/{place}", run_id, tags=tags).version
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"{scrub(uri)} does not take {model}: {scrub(str(error).splitlines()[0])}"
        ) from None
    return ModelVersion(name, str(version), scrub(uri))


def signature(config: ModelConfig) -> ModelSignature:
    """Raw values of every sensor and their dates in, one vector per sample out. MLflow asks for all of them;
    ``load_model`` takes any."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    inputs = []
    for s in config.sensors:
        shape = (-1, -1, len(s.bands), -1, -1)
        inputs.append(TensorSpec(np.dtype("float32"), shape, s.name))
        inputs.append(TensorSpec(np.dtype("int16"), (-1, -1, 3), f"{s.name}.dates"))
    inputs.append(TensorSpec(np.dtype("int16"), (-1, 3), "ref_date"))
    return ModelSignature(Schema(inputs), Schema([TensorSpec(np.dtype("float32"), (-1, -1))]))


class PyfuncModel:
    """What ``mlflow.pyfunc.load_model`` gives: vectors of arrays. ``unwrap``: the model of ``load_model``."""

    def __init__(self, folder: str) -> None:
        self.model = load_model(folder)

    def predict(self, inputs: Mapping[str, np.ndarray], params: dict[str, Any] | None = None) -> np.ndarray:
        """Arrays as the signature names them -> (B, S*E) float32, the mean tokens of the S sensors given."""
        del params
        import torch

        from maestro_scale.stream.batch import Batch

        given = {k: torch.as_tensor(np.asarray(v)) for k, v in inputs.items()}
        ref_date = given.pop("ref_date")
        dates = {k.removesuffix(".dates"): v for k, v in given.items() if k.endswith(".dates")}
        pixels = {k: v for k, v in given.items() if not k.endswith(".dates")}
        dataset = self.model.config.dataset
        keys = tuple(map(str, range(len(ref_date))))
        batch = Batch(dataset, pixels, dates, ref_date, {}, {}, keys)
        with torch.no_grad():
            return self.model.embed(batch).vector.float().numpy()


def _load_pyfunc(path: str) -> PyfuncModel:
    """MLflow's hook."""
    return PyfuncModel(path)


def _size(config: ModelConfig) -> str:
    return f"{config.size.width}x{config.size.depth}"
