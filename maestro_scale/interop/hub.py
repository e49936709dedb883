"""Models on the Hugging Face hub: our exported models, and checkpoints in the authors' format, converted once.

Converted models are kept beside the client's own files, in ``HF_HOME/maestro-scale``, under the address and the hash of
the checkpoint: a checkpoint that is replaced on the hub is converted again. Where the hub gives none, for want of a
network or of access, the last one is used, and a line says so.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestro_scale.errors import shorten
from maestro_scale.escaping import file_name, printable
from maestro_scale.interop.export import CONFIG, WEIGHTS, ExportError
from maestro_scale.interop.published import PublishedModel, published_in
from maestro_scale.secrets_filter import scrub

SCHEME = "hf://"
CHECKPOINT_SUFFIX = ".ckpt"
MAX_CHECKPOINT_BYTES = 64 * 2**30
MAX_FILES = 100_000  # of a repository
_HASH_DIGITS = 32


@dataclass(frozen=True)
class HubAddress:
    """``hf://owner/name[@revision][/path]``. ``path``: of a folder or a checkpoint in the repository."""

    repository: str
    revision: str | None
    path: str

    @classmethod
    def parse(cls, url: str) -> HubAddress:
        """ExportError if it is no such address."""
        parts = url.removeprefix(SCHEME).rstrip("/").split("/")
        if not url.startswith(SCHEME) or len(parts) < 2 or not all(parts) or {".", ".."} & set(parts):
            raise ExportError(
                f"{url}: write hf://owner/name, hf://owner/name@revision or hf://owner/name/folder"
            )
        name, _, revision = parts[1].partition("@")
        return cls(f"{parts[0]}/{name}", revision or None, "/".join(parts[2:]))

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repository}{revision}" + (f"/{self.path}" if self.path else "")


def fetch(url: str) -> Path:
    """The folder of an exported model, on this machine. ExportError if it cannot be fetched or converted."""
    address = HubAddress.parse(url)
    client = hub_client(url)
    published = published_in(address.repository) if not address.path else None
    if published is None and not address.path.endswith(CHECKPOINT_SUFFIX):
        from huggingface_hub.utils import EntryNotFoundError

        try:
            with hub_errors(url, "be fetched"):
                try:
                    return _exported(client, address)
                except EntryNotFoundError as error:
                    if _is_offline(error):
                        raise
        except ExportError as error:
            if (cached := _cached(address, error)) is not None:
                return cached
            raise
    return _from_checkpoint(client, address, published)


def hub_client(url: str) -> Any:
    """The client's ``HfApi``. ExportError where the client is not installed."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ExportError(
            f"{url}: models on the Hugging Face hub need its client: pip install 'maestro-scale[hub]'"
        ) from None
    return HfApi()


@contextmanager
def hub_errors(url: str, what: str) -> Iterator[None]:
    """ExportError, without credentials, for the errors of the client: ``URL: cannot WHAT (…)``."""
    # Its errors are OSError and ValueError, those of the connection belong to the library that this version uses.
    transports = (getattr(sys.modules.get(name), "HTTPError", None) for name in ("httpx", "httpx2"))
    kinds = (OSError, ValueError, *(kind for kind in transports if kind is not None))
    try:
        yield
    except kinds as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hints = {
            401: "; log in with `hf auth login` or set HF_TOKEN",
            403: "; does your token allow it? See `hf auth whoami`",
        }
        if isinstance(status, int):
            hint = hints.get(status, "")
        else:
            hint = "; check the network and HF_ENDPOINT, or give a folder" if _is_unreachable(error) else ""
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(scrub(f"{url}: cannot {what} ({first}){hint}")) from None


def _is_unreachable(error: BaseException) -> bool:
    """Whether a connection was not made: the library of this version has a class of its own for it."""
    return isinstance(error, ConnectionError) or type(error).__name__ == "ConnectError"


def _exported(client: Any, address: HubAddress) -> Path:
    paths = [
        client.hf_hub_download(
            address.repository, name, subfolder=address.path or None, revision=address.revision
        )
        for name in (WEIGHTS, CONFIG)
    ]
    return Path(paths[-1]).parent


def _is_offline(error: Exception) -> bool:
    from huggingface_hub.utils import LocalEntryNotFoundError

    return isinstance(error, LocalEntryNotFoundError)


def _from_checkpoint(client: Any, address: HubAddress, published: PublishedModel | None) -> Path:
    """The converted model of a checkpoint in the authors' format."""
    from maestro_scale.interop.convert import ConvertOptions, convert

    cache = _cache(address)
    try:
        with hub_errors(str(address), "be fetched"):
            info = client.model_info(address.repository, revision=address.revision, files_metadata=True)
    except ExportError as error:
        if (cached := _cached(address, error)) is not None:
            return cached
        raise
    chosen = _choose(address, list(info.siblings or ()), published)
    digest = _digest(chosen)
    out = cache / digest[:_HASH_DIGITS]
    if (out / CONFIG).exists():
        return out
    with hub_errors(str(address), "be fetched"):
        checkpoint = Path(client.hf_hub_download(address.repository, chosen.rfilename, revision=info.sha))
        cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f".partial-{uuid.uuid4().hex}"
    try:
        dataset = published.dataset if published is not None else None
        try:
            convert(checkpoint, partial, ConvertOptions(dataset=dataset))
        except ExportError as error:
            where = f"{SCHEME}{address.repository}/{chosen.rfilename}"
            raise ExportError(
                f"{where}: {error} (convert it with `maestro-scale convert-ign` and these options)"
            ) from None
        try:
            os.replace(partial, out)
        except OSError:
            if not (out / CONFIG).exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _choose(address: HubAddress, files: list[Any], published: PublishedModel | None) -> Any:
    """The checkpoint among the files of a repository. ExportError if there is none, or a choice."""
    if len(files) > MAX_FILES:
        raise ExportError(
            f"{address}: the repository has {len(files)} files, at most {MAX_FILES} are supported"
        )
    wanted = published.checkpoint if published is not None else address.path
    exact = [f for f in files if f.rfilename == wanted]
    folder = "" if published is not None or not address.path else f"{address.path}/"
    found = exact or [
        f for f in files if f.rfilename.endswith(CHECKPOINT_SUFFIX) and f.rfilename.startswith(folder)
    ]
    if len(found) != 1:
        if not found:
            raise ExportError(
                f"{address}: has neither {WEIGHTS} with {CONFIG}, nor a checkpoint ({CHECKPOINT_SUFFIX}): give the "
                "folder of the model, as in hf://owner/name/folder"
            )
        names = ", ".join(shorten(f.rfilename) for f in found[:5])
        raise ExportError(
            f"{address}: has {len(found)} checkpoints ({names}): name one, as in hf://owner/name/FILE.ckpt"
        )
    size = found[0].size
    if type(size) is int and size > MAX_CHECKPOINT_BYTES:
        raise ExportError(
            f"{address}: {shorten(found[0].rfilename)} has {size} bytes, at most {MAX_CHECKPOINT_BYTES} are supported"
        )
    return found[0]


def _digest(file: Any) -> str:
    """A hash of the content: SHA-256 of large files, else that of git."""
    large = getattr(file, "lfs", None)
    digest = getattr(large, "sha256", None) or (large.get("sha256") if isinstance(large, dict) else None)
    return file_name(str(digest or file.blob_id))


def _cache(address: HubAddress) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "maestro-scale" / file_name(str(address).removeprefix(SCHEME))


def _cached(address: HubAddress, error: ExportError) -> Path | None:
    """The model that was converted last, with a line on why it is used."""
    found = _newest(_cache(address))
    if found is not None:
        print(printable(f"{error}; using the copy in {found}"), file=sys.stderr, flush=True)
    return found


def _newest(cache: Path) -> Path | None:
    """The model that was converted last."""
    found = [path.parent for path in cache.glob(f"*/{CONFIG}") if not path.parent.name.startswith(".")]
    return max(found, key=lambda folder: (folder / CONFIG).stat().st_mtime, default=None)
