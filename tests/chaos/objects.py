"""An S3 server for the rounds: moto in a thread, which a FaultyProxy stands in front of."""

from __future__ import annotations

import http.client
import logging
import os
from pathlib import Path

BUCKET = "chaos"


class ObjectStore:
    """A running server with one bucket; requests of this process reach it directly, without faults."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]
        self._request("PUT", "")

    def stop(self) -> None:
        """End the server."""
        self._server.stop()

    def upload(self, folder: Path, prefix: str) -> None:
        """Copy the files of a folder to a prefix."""
        for path in sorted(folder.iterdir()):
            self._request("PUT", f"{prefix}/{path.name}", path.read_bytes())

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Names below a prefix, and their contents."""
        import s3fs

        fs = s3fs.S3FileSystem(
            key="test", secret="test", endpoint_url=f"http://127.0.0.1:{self.port}", skip_instance_cache=True,
            use_listings_cache=False,
        )  # fmt: skip
        root = f"{BUCKET}/{prefix}"
        return {path.removeprefix(root + "/"): fs.cat_file(path) for path in fs.find(root)}

    def _request(self, method: str, name: str, body: bytes = b"") -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20200101/us-east-1/s3/aws4_request"}
        connection.request(method, f"/{BUCKET}/{name}", body, headers)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {name}: HTTP {answer.status}")


def environment(port: int) -> dict[str, str]:
    """Variables that lead S3 clients to a port of this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
