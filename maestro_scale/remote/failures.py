"""Classification of the exceptions of object store clients: transient or permanent, and the HTTP status."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from typing import Any

_RETRIED_STATUS = (408, 425, 429)  # timeout, too early, too many requests


def network_errors(*others: type[BaseException]) -> tuple[type[BaseException], ...]:
    """What a client raises, and ``others``. A function, so that the clients are only imported when one has failed."""
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError

    classes = [OSError, EOFError, BotoCoreError, ClientError, aiohttp.ClientError]
    # gcsfs and adlfs are optional, and have exceptions of other bases.
    for module, name in (("gcsfs.retry", "HttpError"), ("azure.core.exceptions", "AzureError")):
        try:
            classes.append(getattr(__import__(module, fromlist=[name]), name))
        except (ImportError, AttributeError):
            continue
    return (*classes, *others)


def no_answer_errors() -> tuple[type[BaseException], ...]:
    """What a client raises if no answer arrives in time. A function, as :func:`network_errors`."""
    from botocore.exceptions import ReadTimeoutError

    return (asyncio.TimeoutError, TimeoutError, ReadTimeoutError)


def is_permanent(error: BaseException) -> bool:
    """Whether a retry would fail as well: no or wrong credentials, no certificates, forbidden, malformed request.

    HTTP 408, 425, 429 and 5xx except 501 (not implemented) are transient; 3xx is permanent, since it means a wrong
    region or endpoint. A host name that cannot be resolved is transient: resolvers of clusters fail under load.
    """
    if isinstance(error, PermissionError):
        return True
    status = http_status(error)
    if status is not None:
        return status == 501 or (300 <= status < 500 and status not in _RETRIED_STATUS)
    return any(_is_permanent_kind(e) for e in _chain(error))


def http_status(error: BaseException) -> int | None:
    """The HTTP status of the response that an exception reports; None if it reports none.

    s3fs translates client errors to OSError and keeps the original as the cause.
    """
    for link in _chain(error):
        try:
            status = int(_reported_status(link))
        except (TypeError, ValueError):
            continue
        if 100 <= status < 600:
            return status
    return None


def _reported_status(error: BaseException) -> Any:
    import aiohttp
    from botocore.exceptions import ClientError

    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status
    # Not the attributes of any exception: aiohttp's error for a body that was cut off has a code 400.
    if type(error).__module__.startswith(("gcsfs.", "azure.")):
        return getattr(error, "status_code", None) or getattr(error, "code", None)
    return None


def advice(error: BaseException) -> str:
    """What the user can check after a permanent error."""
    if any(isinstance(e, FileNotFoundError) for e in _chain(error)):
        return "a file with certificates is missing: check AWS_CA_BUNDLE"
    if any(_is_about_certificates(e) for e in _chain(error)):
        return "check the certificates (AWS_CA_BUNDLE, SSL_CERT_FILE) and the address"
    return "check credentials and address"


def _is_permanent_kind(error: BaseException) -> bool:
    import aiohttp
    from botocore import exceptions as boto

    if _is_about_certificates(error):
        return True
    if not isinstance(error, boto.BotoCoreError):
        return isinstance(error, aiohttp.InvalidURL)
    if isinstance(error, boto.HTTPClientError) and isinstance(error.__context__, FileNotFoundError):
        return True  # AWS_CA_BUNDLE names a file that does not exist
    # All other errors of botocore are about credentials, login or settings: NoCredentialsError, TokenRetrievalError,
    # SSOTokenLoadError, UnauthorizedSSOTokenError, CredentialRetrievalError, ProfileNotFound, ParamValidationError, …
    transient = (
        boto.HTTPClientError,  # also timeouts and resets
        boto.ConnectionError,
        boto.IncompleteReadError,
        boto.ChecksumError,
        boto.FlexibleChecksumError,
        boto.MetadataRetrievalError,
        _parser_error(),
    )
    return not isinstance(error, transient)


def _is_about_certificates(error: BaseException) -> bool:
    if isinstance(
        error, ssl.CertificateError
    ):  # a certificate that is not trusted, also as aiohttp raises it
        return True
    return isinstance(error, ssl.SSLError) and error.reason == "NO_CERTIFICATE_OR_CRL_FOUND"


def _parser_error() -> type[BaseException]:
    from botocore.parsers import ResponseParserError

    return ResponseParserError


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and those that it was raised from, or while handling."""
    links: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in links:
        links.append(following)
        following = following.__cause__ or following.__context__
    yield from links
