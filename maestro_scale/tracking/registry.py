"""MLflow's model registry: registers an exported model as a version, with a signature, and loads it as a pyfunc."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maestro_scale.errors import MaestroError
from maestro_scale.escaping import mlflow_key, python_command, shell_command
from maestro_scale.interop.export import CONFIG, WEIGHTS
from maestro_scale.interop.pretrained import load_model, read_model
from maestro_scale.interop.sources import REGISTERED_FOLDER, TRACKING_URI, ModelSource
from maestro_scale.model.config import ModelConfig
from maestro_scale.secrets_filter import scrub, scrub_mapping
from maestro_scale.shards.temporary import temporary_folder
from maestro_scale.tracking.mlflow_run import NOTE_TAG, tracking_uri
from maestro_scale.tracking.mlflow_tracker import configure_mlflow
from maestro_scale.tracking.model_scores import STEP_TAG, describe, scores
from maestro_scale.tracking.run_file import find_run
from maestro_scale.tracking.store import DeletedExperimentError, check_run_experiment

if TYPE_CHECKING:
    from mlflow.models import ModelSignature


NEWEST = "newest"  # alias of the last version; MLflow reserves "latest"
_MODEL_DESCRIPTION = (
    "Encoders of maestro-scale, one version per export. `maestro_scale.load_model('models:/NAME@newest')` loads the "
    "last one."
)


class RegistryError(MaestroError):
    """A model could not be registered; the message says why."""


@dataclass(frozen=True)
class ModelVersion:
    """A registered version of a model. ``store``: address of the tracking store."""

    name: str
    version: str
    store: str

    @property
    def uri(self) -> str:
        """The address for ``load_model`` and MLflow."""
        return f"models:/{self.name}/{self.version}"

    @property
    def load_command(self) -> str:
        """A shell command that loads it from any folder; sets ``MLFLOW_TRACKING_URI`` if the environment does not."""
        store = "" if os.environ.get(TRACKING_URI) else f"{TRACKING_URI}={shlex.quote(self.store)} "
        return store + python_command(f"from maestro_scale import load_model; load_model({self.uri!r})")


def check_tracked(run_dir: Path) -> None:
    """RegistryError if the tracking store of ``run_dir`` is a file that does not exist; MLflow would create it."""
    uri = tracking_uri(run_dir)
    if uri.startswith(_FILE) and not Path(uri.removeprefix(_FILE)).exists():
        raise RegistryError(
            f"{scrub(uri)} does not exist, so {run_dir} is not tracked there: {_sync(run_dir)}"
        )


_FILE = "sqlite:///"


def _sync(run_dir: Path) -> str:
    return f"run `{shell_command('maestro-scale', 'sync', run_dir)}` first"


def register(model: Path, name: str, run_dir: Path, aliases: Sequence[str] = ()) -> ModelVersion:
    """Register an exported model as a new version of ``name``, stored as an artifact of the MLflow run of ``run_dir``.

    The version gets the alias ``newest`` and ``aliases``, a description, and the scores of its checkpoint as tags.

    Raises:
        ExportError: ``model`` is not an exported model.
        RegistryError: the run is not in the store, or the store failed.
    """
    source = ModelSource(model)
    config, _ = read_model(source)
    trained = source.read_config()["trained"]
    configure_mlflow()
    import mlflow.pyfunc
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(run_dir)
    # The path contains the hash of the weights: registering again (raw, then the moving average) must not overwrite
    # the files of an earlier version of the same step.
    content = hashlib.sha256((model / WEIGHTS).read_bytes() + (model / CONFIG).read_bytes()).hexdigest()
    artifact_path = f"models/step_{trained.get('step') or 0:08d}-{content[:12]}"
    try:
        client = MlflowClient(uri, uri)
        run = find_run(client, run_dir)
        if run is None:
            check_run_experiment(client, run_dir, uri)
            raise RegistryError(
                f"{scrub(uri)} has no run of {run_dir}, which was not tracked there: {_sync(run_dir)}"
            )
        run_id = run.info.run_id
        with temporary_folder() as folder:
            pyfunc, exported = folder / "pyfunc", folder / Path(REGISTERED_FOLDER).name
            exported.mkdir()
            for file_name in (CONFIG, WEIGHTS):
                shutil.copy(model / file_name, exported)
            # Not log_model: it uses the process-wide tracking URI and active run.
            mlflow.pyfunc.save_model(
                path=str(pyfunc),
                loader_module=__name__,
                data_path=str(exported),
                signature=signature(config),
                pip_requirements=["maestro-scale"],
            )
            client.log_artifacts(run_id, str(pyfunc), artifact_path)
        try:
            client.create_registered_model(name, description=_MODEL_DESCRIPTION)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        root = run.info.artifact_uri
        step = trained.get("step")
        of_run = client.get_run(run_id).data
        found = scores(client, run, step)
        tags = {
            "size": of_run.tags.get("size") or _size_tag(config),
            "dataset": ",".join(v.dataset for v in config.views),
            "sensors": ",".join(s.name for s in config.sensors),
            **({} if step is None else {STEP_TAG: str(step)}),
            **found,
        }
        version = client.create_model_version(
            name,
            f"{root}/{artifact_path}",
            run_id,
            tags={mlflow_key(k): v for k, v in scrub_mapping(tags).items()},
            description=describe(of_run.tags.get(NOTE_TAG, ""), found),
        ).version
        for alias in dict.fromkeys((NEWEST, *aliases)):
            client.set_registered_model_alias(name, alias, str(version))
    except (MlflowException, DeletedExperimentError, OSError) as error:
        raise RegistryError(
            f"{scrub(uri)} did not accept {model}: {scrub(str(error).splitlines()[0])}"
        ) from None
    return ModelVersion(name, str(version), scrub(uri))


def signature(config: ModelConfig) -> ModelSignature:
    """Inputs: raw values (B, D, C, H, W) and dates (B, D, 3) of every sensor; output: vectors (B, S*E).

    MLflow then requires every sensor; the model from ``load_model`` accepts any subset.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    inputs: list[ColSpec | TensorSpec] = []
    for s in config.sensors:
        shape = (-1, -1, len(s.bands), -1, -1)
        inputs.append(TensorSpec(np.dtype("float32"), shape, s.name))
        inputs.append(TensorSpec(np.dtype("int16"), (-1, -1, 3), f"{s.name}.dates"))
    inputs.append(TensorSpec(np.dtype("int16"), (-1, 3), "ref_date"))
    outputs: list[ColSpec | TensorSpec] = [TensorSpec(np.dtype("float32"), (-1, -1))]
    return ModelSignature(Schema(inputs), Schema(outputs))


class PyfuncModel:
    """The model behind ``mlflow.pyfunc.load_model``: from arrays to embeddings. ``model``: as from ``load_model``."""

    def __init__(self, folder: str) -> None:
        self.model = load_model(folder)

    def predict(self, inputs: Mapping[str, np.ndarray], params: dict[str, Any] | None = None) -> np.ndarray:
        """Arrays named as in ``signature`` -> (B, S*E) float32: the mean token of each of the S given sensors."""
        del params
        import torch

        from maestro_scale.stream.batch import Batch

        arrays = {k: torch.as_tensor(np.asarray(v)) for k, v in inputs.items()}
        ref_date = arrays.pop("ref_date")
        dates = {k.removesuffix(".dates"): v for k, v in arrays.items() if k.endswith(".dates")}
        pixels = {k: v for k, v in arrays.items() if not k.endswith(".dates")}
        dataset = self.model.config.dataset
        keys = tuple(map(str, range(len(ref_date))))
        batch = Batch(dataset, pixels, dates, ref_date, {}, {}, keys)
        with torch.no_grad():
            return self.model.embed(batch).vector.float().numpy()


def _load_pyfunc(path: str) -> PyfuncModel:
    """Called by MLflow, which stored the name of this module with the model (``loader_module``): do not move it."""
    return PyfuncModel(path)


def _size_tag(config: ModelConfig) -> str:
    return f"{config.size.width}x{config.size.depth}"
