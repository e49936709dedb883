"""Connect to a tracking store: creates a SQLite store once, whoever comes first, and names deleted experiments."""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from maestro_scale.escaping import printable
from maestro_scale.secrets_filter import scrub
from maestro_scale.shards.locks import Locked, file_lock
from maestro_scale.tracking.run_file import recorded_run_id

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

ARTIFACTS = "mlartifacts"  # folder beside a SQLite store
_CREATE_WAIT_S = 60.0  # creating the tables takes seconds, on a busy node or a slow disk longer
_POLL_S = 0.1
_NEW = ".new"  # suffix of a store that is not published yet
_ABANDONED_S = 3600.0  # age from which such a file is of a killed process
_LOCKED_S = 10.0  # wait for a store in which another process writes
# Columns of MLflow's tables with the address of a file; those that a release does not have are skipped.
_ADDRESSES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "model_versions": ("source", "storage_location"),
    "logged_models": ("artifact_location",),
}
# Without this tag the MLflow UI shows pages for traces of language models.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class DeletedExperimentError(Exception):
    """The experiment of a run was deleted in MLflow; the message names it and how to restore it."""


def connect(uri: str) -> MlflowClient:
    """A client of the store at ``uri``; a SQLite store that does not exist is created. Raises any MLflow error."""
    from mlflow.tracking import MlflowClient

    if (path := sqlite_path(uri)) is not None:
        _create_sqlite(path)
        relocate(path)
    return MlflowClient(uri)


def relocate(path: Path) -> None:
    """Point a SQLite store that was moved or copied with its folder to the artifacts beside it.

    MLflow keeps absolute addresses: a copy would show the files of the original, and write to them. Nothing is changed
    where there are no artifacts beside the store, where the address is the same folder by another name, or where the
    store cannot be written.
    """
    folder = path.resolve().parent / ARTIFACTS
    if not folder.is_dir():
        return
    try:
        with closing(sqlite3.connect(path, timeout=_LOCKED_S)) as database, database:
            addresses = [
                (table, column)
                for table, columns in _ADDRESSES.items()
                for column in columns
                if column in {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
            ]
            found = database.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall()
            for experiment, old in found:
                runs = database.execute("SELECT run_uuid FROM runs WHERE experiment_id = ?", (experiment,))
                if not _is_elsewhere(old, folder, [run for (run,) in runs]):
                    continue
                for table, column in addresses:
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (folder.as_uri(), len(old) + 1, old, len(old) + 1, f"{old}/"),
                    )
                _forget_addresses()
    except sqlite3.Error as error:
        log.warning("%s may show the files of the folder that it was copied from (%s)", path, error)


def _forget_addresses() -> None:
    """MLflow keeps the addresses of runs for the life of the process; those of a copy have the same ids."""
    with suppress(ImportError, AttributeError):
        from mlflow.tracking._tracking_service import utils

        utils._artifact_repos_cache.clear()


def _is_elsewhere(address: object, folder: Path, runs: Sequence[str]) -> bool:
    """Whether an experiment's address is of another folder than ``folder``, which has the artifacts of ``runs``."""
    if not isinstance(address, str) or not address.startswith("file://") or address == folder.as_uri():
        return False
    old = Path(unquote(urlsplit(address).path))
    if old.name != ARTIFACTS:  # not given by active_experiment
        return False
    try:
        return not old.samefile(folder) and any((folder / run).is_dir() for run in runs)
    except OSError:  # it does not exist any more
        return True


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store; None for any other store, and for URIs with options."""
    name = uri.removeprefix("sqlite:///")
    return None if name == uri or not name or "?" in name or name.startswith(":") else Path(name)


def active_experiment(client: MlflowClient, name: str, uri: str, artifacts: str | None) -> str:
    """The id of the experiment ``name``, which is created if it does not exist.

    Args:
        artifacts: artifact location of a new experiment; None: the store's own.

    Raises:
        DeletedExperimentError: it was deleted. Any other error is MLflow's.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags=_EXPERIMENT_TAGS)
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # another run created it meanwhile
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise _deleted(experiment, uri)
    return experiment.experiment_id


def check_run_experiment(client: MlflowClient, run_dir: Path, uri: str) -> None:
    """Raise DeletedExperimentError if the MLflow run that ``run_dir`` was last sent to is in a deleted experiment."""
    from mlflow.exceptions import MlflowException

    run_id = recorded_run_id(run_dir)
    if run_id is None:
        return
    try:
        experiment = client.get_experiment(client.get_run(run_id).info.experiment_id)
    except MlflowException:
        return  # the record is of another store, or the run was removed for good
    if experiment.lifecycle_stage == "deleted":
        raise _deleted(experiment, uri)


def _deleted(experiment: Experiment, uri: str) -> DeletedExperimentError:
    store = f"MLFLOW_TRACKING_URI={shlex.quote(scrub(uri))}"
    command = f"{store} mlflow experiments restore --experiment-id {experiment.experiment_id}"
    return DeletedExperimentError(
        f"the experiment {printable(experiment.name)!r} was deleted: restore it with `{command}`, or set another "
        "tracking.experiment"
    )


def _create_sqlite(path: Path) -> None:
    """Create the tables of a SQLite store that does not exist yet.

    MLflow creates them in place, in dozens of migrations: of several processes that open a new store all but one fail,
    and may leave it half migrated, as does a kill. Here the file is created under another name and published complete,
    by a hard link, which fails if another process was first. The lock only saves the others the work: where the file
    system has none, or its holder is stopped, every process creates a file and the first one is used.
    """
    if not _is_empty(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with suppress(OSError):  # no locks on this file system
            stack.enter_context(_creation_lock(path))
        if not _is_empty(path):
            return
        path.unlink(missing_ok=True)  # empty: of a process that was killed after sqlite had created the file
        _remove_stale(path)
        fresh = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{_NEW}")
        try:
            _create_tables(fresh)
            os.link(fresh, path)
        except FileExistsError:
            pass  # another process was first
        except OSError:
            _create_tables(path)  # no hard links on this file system: in place, protected by the lock alone
        finally:
            fresh.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Remove the unpublished files of killed processes."""
    for fresh in path.parent.glob(f".{path.name}.*{_NEW}"):
        with suppress(FileNotFoundError):
            if time.time() - fresh.stat().st_mtime > _ABANDONED_S:
                fresh.unlink()


@contextmanager
def _creation_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a store that is created, or wait until it exists, at most a minute."""
    deadline = time.monotonic() + _CREATE_WAIT_S
    with ExitStack() as stack:
        while _is_empty(path) and time.monotonic() < deadline:
            try:
                stack.enter_context(file_lock(path.with_name(f".{path.name}.lock"), wait=False))
                break
            except Locked:
                time.sleep(_POLL_S)
        yield


def _is_empty(path: Path) -> bool:
    """Whether the file is missing or has no tables."""
    try:
        return path.stat().st_size == 0
    except FileNotFoundError:
        return True


def _create_tables(path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{path}"
    MlflowClient(uri).search_experiments(max_results=1)
    # MLflow keeps its connections in a table of its own for the life of the process; the file is renamed.
    with suppress(ImportError, AttributeError, KeyError):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        SqlAlchemyStore._engine_map.pop(uri).dispose()
