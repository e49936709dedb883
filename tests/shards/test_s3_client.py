"""The client that reads objects of S3: the settings of s3fs, and the time of an attempt."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import s3fs
from botocore import UNSIGNED
from botocore.exceptions import ClientError

from maestro_scale.remote.s3_client import S3Client

ENDPOINT = "http://127.0.0.1:9"


def client(**settings) -> S3Client:
    return S3Client(s3fs.S3FileSystem(endpoint_url=ENDPOINT, skip_instance_cache=True, **settings))


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


def test_settings_are_those_of_the_file_system():
    config = {"read_timeout": 7, "retries": {"total_max_attempts": 1}}
    made = client(
        key="k", secret="s", config_kwargs=config, client_kwargs={"region_name": "eu-north-1"}
    )._client
    assert (made.meta.endpoint_url, made.meta.region_name, made.meta.config.read_timeout) == (
        ENDPOINT,
        "eu-north-1",
        7,
    )
    credentials = made._request_signer._credentials
    assert (credentials.access_key, credentials.secret_key) == ("k", "s")


def test_anonymous_access_is_not_signed():
    made = client(anon=True, client_kwargs={"region_name": "eu-north-1"})._client
    assert made.meta.config.signature_version is UNSIGNED


def with_body(pieces: list[bytes], delay_s: float = 0.0) -> tuple[S3Client, list[dict]]:
    """A client whose answer has this body, and the requests that it gets."""
    requests: list[dict] = []

    def read(size: int) -> bytes:
        time.sleep(delay_s)
        return pieces.pop(0) if pieces else b""

    def get_object(**options):
        requests.append(options)
        return {"Body": SimpleNamespace(read=read, close=lambda: None)}

    made = client(anon=True, client_kwargs={"region_name": "x"})
    made._client = SimpleNamespace(get_object=get_object)
    return made, requests


def test_a_range_is_one_request_for_its_bytes():
    made, requests = with_body([b"ab", b"c"])
    assert made.read("bucket/some/name", 4, 7, timeout_s=10) == b"abc"
    assert requests == [{"Bucket": "bucket", "Key": "some/name", "Range": "bytes=4-6"}]


def test_a_body_that_comes_too_slowly_ends_the_attempt():
    made, _ = with_body([b"a"] * 1000, delay_s=0.02)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        made.read("bucket/name", 0, 1000, timeout_s=0.1)
    assert time.monotonic() - started < 10  # not the 20 s of the whole body


@pytest.mark.parametrize(
    ("code", "kind"), [("NoSuchKey", FileNotFoundError), ("AccessDenied", PermissionError)]
)
def test_errors_are_those_of_s3fs(code, kind):
    made, _ = with_body([])

    def refuse(**_):
        raise ClientError({"Error": {"Code": code, "Message": "no"}}, "GetObject")

    made._client = SimpleNamespace(get_object=refuse)
    with pytest.raises(kind):
        made.read("bucket/name", None, None, timeout_s=1)


def test_a_second_client_parses_no_description_of_services_again(monkeypatch):
    from botocore.loaders import JSONFileLoader

    client()
    parsed = []
    load = JSONFileLoader.load_file
    monkeypatch.setattr(
        JSONFileLoader, "load_file", lambda self, path: parsed.append(path) or load(self, path)
    )
    client()
    assert parsed == []
