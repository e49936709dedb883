"""Reading objects of S3 by botocore's own client, in the thread of the caller.

s3fs uses the same client through one event loop per process, which all threads share; docs/performance.md compares
both (``python -m benchmarks.object_store``). Settings and credentials are those of the s3fs client, so that both reach
the same store; errors are translated as s3fs does.
"""

from __future__ import annotations

import time
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

_PIECE_BYTES = 1024 * 1024  # read at once; between pieces the time of the attempt is checked
_MAX_CONNECTIONS = 32


class S3Client:
    """A client with the settings of ``fs``, a connected ``s3fs.S3FileSystem``. Threads may share it, processes not."""

    def __init__(self, fs: Any) -> None:
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.session import Session

        own = {
            "endpoint_url": fs.endpoint_url,
            "use_ssl": fs.use_ssl,
            **({} if fs.anon else _keys(fs)),
            **fs.client_kwargs,
        }
        config = {**fs.config_kwargs, "max_pool_connections": _MAX_CONNECTIONS}
        if fs.anon:
            config["signature_version"] = UNSIGNED
        given = {name: value for name, value in own.items() if value is not None}
        self._fs = fs
        session = Session(**fs.kwargs)
        session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
        _check_certificates(session.get_config_variable("ca_bundle"))
        self._client = session.create_client("s3", config=Config(**config), **given)

    def read(self, path: str, start: int | None, stop: int | None, timeout_s: float) -> bytes:
        """Bytes [start, stop) of an object, or all of it.

        ``path``: with its bucket, as s3fs has it. FileNotFoundError if there is no such object, PermissionError and
        OSError as s3fs; TimeoutError if its bytes did not arrive in time, to within a piece of 1 MiB.
        """
        from botocore.exceptions import ClientError
        from s3fs.errors import translate_boto_error

        bucket, key, version = self._fs.split_path(path)
        options = dict(self._fs.req_kw)
        if version:
            options["VersionId"] = version
        if start is not None and stop is not None:
            options["Range"] = f"bytes={start}-{stop - 1}"
        ends = time.monotonic() + timeout_s
        try:
            with closing(self._client.get_object(Bucket=bucket, Key=key, **options)["Body"]) as body:
                pieces = []
                while piece := body.read(_PIECE_BYTES):
                    pieces.append(piece)
                    if time.monotonic() > ends:
                        raise TimeoutError
        except ClientError as error:
            raise translate_boto_error(error) from error
        return b"".join(pieces)


@cache
def _loader(data_path: str | None) -> Any:
    """botocore's descriptions of S3 and its endpoints. Parsing them takes most of the time of a first client."""
    from botocore.loaders import create_loader

    return create_loader(data_path)


def _check_certificates(bundle: str | None) -> None:
    """HTTPClientError if there is no such file, as the client of s3fs raises it; botocore's would first connect."""
    from botocore.exceptions import HTTPClientError

    try:
        if bundle:
            Path(bundle).stat()
    except FileNotFoundError as error:
        raise HTTPClientError(error=error) from error


def _keys(fs: Any) -> dict[str, Any]:
    return {"aws_access_key_id": fs.key, "aws_secret_access_key": fs.secret, "aws_session_token": fs.token}
