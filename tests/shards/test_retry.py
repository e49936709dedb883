"""Which errors of object store clients are retried, on any scheme, and how often."""

from __future__ import annotations

import errno
import socket
import ssl
import time
from types import SimpleNamespace

import aiohttp
import fsspec
import pytest
from botocore import exceptions as boto
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from maestro_scale.remote.retry import MIN_ATTEMPTS, RetryPolicy, TransientError, call_with_retries
from maestro_scale.shards.errors import StoreError
from maestro_scale.shards.storage import RemoteStorage, open_storage

CONNECTION = SimpleNamespace(ssl=True, host="host", port=443, is_ssl=True)
QUICK = RetryPolicy(deadline_s=0.3, initial_wait_s=0.01, max_wait_s=0.02)


def response_error(status: int) -> aiohttp.ClientResponseError:
    url = URL("http://host/x")
    request = aiohttp.RequestInfo(url, "GET", CIMultiDictProxy(CIMultiDict()), url)
    return aiohttp.ClientResponseError(request, (), status=status, message="m")


def client_error(status: int, code: str = "X") -> boto.ClientError:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto.ClientError(response, "GetObject")


def translated(status: int) -> OSError:
    """As s3fs raises it."""
    error = OSError(errno.EIO, "failed")
    error.__cause__ = client_error(status)
    return error


def wrapped(cause: BaseException) -> boto.BotoCoreError:
    """As aiobotocore raises it."""
    try:
        try:
            raise cause
        except type(cause):
            raise boto.HTTPClientError(error=cause)  # noqa: B904 - aiobotocore does the same
    except boto.HTTPClientError as error:
        return error


def of_gcsfs(status: int) -> Exception:
    kind = type("HttpError", (OSError,), {"__module__": "gcsfs.retry", "code": status})
    return kind("failed")


def certificate_error() -> ssl.SSLError:
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer")
    error.reason = "CERTIFICATE_VERIFY_FAILED"
    return error


def cut_body() -> aiohttp.ClientPayloadError:
    """Its cause has an attribute ``code`` of 400, which is not a status."""
    error = aiohttp.ClientPayloadError("Response payload is not completed")
    error.__cause__ = aiohttp.http_exceptions.ContentLengthError("cut")
    return error


PERMANENT = {
    "http 401": response_error(401),
    "http 403": response_error(403),
    "http 404": response_error(404),
    "gs 403": of_gcsfs(403),
    "s3 301": translated(301),
    "s3 403": translated(403),
    "s3 501": translated(501),
    "no permission": PermissionError("no"),
    "no credentials": boto.NoCredentialsError(),
    "no token": boto.TokenRetrievalError(provider="sso", error_msg="expired"),
    "no SSO login": boto.SSOTokenLoadError(error_msg="no token"),
    "expired SSO login": boto.UnauthorizedSSOTokenError(),
    "credential process": boto.CredentialRetrievalError(provider="custom-process", error_msg="exit 1"),
    "no profile": boto.ProfileNotFound(profile="x"),
    "no CA bundle": wrapped(FileNotFoundError(errno.ENOENT, "No such file or directory")),
    "other CA": wrapped(certificate_error()),
    "other CA over http": aiohttp.ClientConnectorCertificateError(CONNECTION, certificate_error()),
}
TRANSIENT = {
    "http 408": response_error(408),
    "http 429": response_error(429),
    "http 503": response_error(503),
    "gs 503": of_gcsfs(503),
    "s3 500": translated(500),
    "s3 429": client_error(429),
    "unknown host": boto.EndpointConnectionError(
        endpoint_url="http://x", error=socket.gaierror(-2, "unknown")
    ),
    "unknown host over http": aiohttp.ClientConnectorDNSError(
        CONNECTION,
        socket.gaierror(-2, "unknown"),
    ),
    "reset": ConnectionResetError(),
    "s3 reset": boto.ConnectionClosedError(endpoint_url="http://x"),
    "s3 timeout": boto.ReadTimeoutError(endpoint_url="http://x"),
    "cut body": cut_body(),
    "metadata server": boto.MetadataRetrievalError(error_msg="x"),
}


class FailingClient:
    """A client whose requests all raise one error."""

    async_impl = False
    error: BaseException
    attempts = 0

    def cat_file(self, path: str, **options: object) -> bytes:
        self.attempts += 1
        raise self.error


def read(error: BaseException) -> tuple[int, str]:
    """(number of attempts, message) of a read that always fails."""
    client = FailingClient()
    client.error = error
    storage = RemoteStorage("https://host/data", QUICK, lambda: None)
    storage._client = lambda: (client, "data")  # type: ignore[method-assign]
    with pytest.raises((StoreError, FileNotFoundError)) as raised:
        storage.read("manifest.json")
    return client.attempts, str(raised.value)


@pytest.mark.parametrize("name", PERMANENT)
def test_permanent_errors_are_not_retried(name):
    attempts, message = read(PERMANENT[name])
    assert attempts == 1
    assert "https://host/data/manifest.json: refused" in message
    assert "\n" not in message
    assert ("AWS_CA_BUNDLE" in message) == ("CA" in name)


@pytest.mark.parametrize("name", TRANSIENT)
def test_transient_errors_are_retried_until_the_deadline(name):
    attempts, message = read(TRANSIENT[name])
    assert attempts >= MIN_ATTEMPTS
    assert f"gave up after {attempts} attempts" in message


@pytest.mark.parametrize("deadline_s", [0.4, 2.0, 30.0, 120.0])
def test_three_attempts_that_time_out_fit_within_the_deadline(deadline_s, monkeypatch):
    """30 s was one attempt: its timeout was the whole deadline."""
    policy = RetryPolicy.with_deadline(deadline_s)
    now = [0.0]
    monkeypatch.setattr("maestro_scale.remote.retry.time.monotonic", lambda: now[0])

    class Stop:
        def wait(self, pause_s: float) -> bool:
            now[0] += pause_s
            return False

    starts = []

    def attempt() -> None:
        starts.append(now[0])
        now[0] += policy.attempt_timeout_s
        raise TransientError("no answer")

    with pytest.raises(StoreError, match="gave up"):
        call_with_retries(attempt, policy, "x", stop=Stop())
    assert len(starts) >= 3
    assert starts[2] + policy.attempt_timeout_s <= deadline_s
    assert policy.attempt_timeout_s == min(30.0, deadline_s / 4)


def test_attempts_longer_than_the_deadline_are_made_three_times():
    """An upload has no timeout per attempt."""
    calls = []

    def attempt() -> None:
        calls.append(0)
        time.sleep(0.05)
        raise TransientError("reset")

    with pytest.raises(StoreError, match="gave up after 3 attempts"):
        call_with_retries(attempt, RetryPolicy(deadline_s=0.01), "x")
    assert len(calls) == 3


def test_a_missing_ca_bundle_is_reported_at_once(monkeypatch, tmp_path):
    """Not as a missing manifest, although the client reports FileNotFoundError."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in {
        "AWS_ENDPOINT_URL": "https://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_CA_BUNDLE": str(tmp_path / "none.pem"),
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    retries = []
    storage = open_storage("s3://bucket/data", RetryPolicy(5), lambda: retries.append(0))
    with pytest.raises(StoreError, match="a file with certificates is missing: check AWS_CA_BUNDLE"):
        storage.read("manifest.json")
    assert retries == []


def test_http_errors_of_a_real_server(tmp_path):
    """fsspec's HTTP client, with a server that forbids everything."""
    import http.server
    import threading

    requests = []

    class Forbid(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(403)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbid)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        fsspec.get_filesystem_class("http").clear_instance_cache()
        storage = open_storage(f"http://127.0.0.1:{server.server_address[1]}", RetryPolicy(5))
        with pytest.raises(StoreError, match=r"refused .*403"):
            storage.read("manifest.json")
    finally:
        server.shutdown()
        server.server_close()
    assert len(requests) == 1
