"""Keeps credentials out of whatever is printed, written to a run directory, or sent to a tracking store."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

HIDDEN = "(hidden)"

_SHORTEST_SECRET = 8  # a shorter value of a secret variable ("true", "1") would hide innocent text

_SECRET_NAME = re.compile(
    r"(passw(or)?d|secret|credential|api_?key|access_?key|private_?key|signature"
    r"|([._/-]|^)(token|auth|authorization)$|[._-]key$)",
    re.IGNORECASE,
)
# user:password@, also where the password holds a slash (AWS secrets do); host:port/…@ is none.
_USERINFO = re.compile(r"""(?<=://)(?:[^/\s'"@:]+:(?!\d+[/\s])[^\s'"@]+@(?:[^/\s'"@]+@)?|[^/\s'"]+@)""")
_QUERY = re.compile(
    r"([?&][\w.-]*(?:signature|token|secret|credential|password|key)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE
)
# AWS access key ids, Hugging Face and GitHub tokens, HTTP authorization headers.
_SHAPES = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|(?<=Bearer )[\w.~+/=-]+"
)
_ASSIGNMENT = re.compile(
    r"""^(?P<head>\s*(?:-\s+)?["']?(?P<name>[\w.-]+)["']?\s*[:=]\s*)(?P<value>\S.*?)(?P<tail>,?)$"""
)


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name (``data.s3.secret_key``, ``HF_TOKEN``) holds a credential."""
    return _SECRET_NAME.search(name) is not None


def scrub(text: str) -> str:
    """``text`` without URL user names and passwords, signed query parameters, known shapes of tokens, and the
    values of secret environment variables."""
    for name, value in os.environ.items():
        if is_secret_name(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    text = _USERINFO.sub("", text)
    return _SHAPES.sub(HIDDEN, _QUERY.sub(rf"\g<1>{HIDDEN}", text))


def hide_secrets() -> None:
    """From here on this process prints no secrets: not in lines, warnings or tracebacks."""
    sys.stdout, sys.stderr = _Scrubbed(sys.stdout), _Scrubbed(sys.stderr)


class _Scrubbed:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(scrub(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def scrub_mapping(values: Mapping[str, object]) -> dict[str, str]:
    """Every value as scrubbed text; hidden where its name is a secret's."""
    return {k: HIDDEN if is_secret_name(k) else scrub(str(v)) for k, v in values.items()}


def scrub_document(text: str) -> str:
    """YAML, JSON or .env text, scrubbed, and values hidden on every line that sets a secret name."""
    return "\n".join(_scrub_line(line) for line in scrub(text).split("\n"))


def _scrub_line(line: str) -> str:
    match = _ASSIGNMENT.match(line)
    if match is None or not is_secret_name(match["name"]) or match["value"] in ("null", "{", "["):
        return line
    return f'{match["head"]}"{HIDDEN}"{match["tail"]}'
