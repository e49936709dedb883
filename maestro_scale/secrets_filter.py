"""Removes credentials from everything that is printed, written to a run directory, or sent to a tracking store."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from maestro_scale import untrusted

HIDDEN = "(hidden)"

# Values of secret variables that are shorter ("true", "1") are kept: replacing them would alter unrelated text.
_MIN_SECRET_LENGTH = 8

_SECRET_NAME = re.compile(
    r"(passw(or)?d|passphrase|secret|credential|api_?key|access_?key|private_?key|signature|connection_?string"
    r"|([._/-]|^)(token|auth|authorization)$|[._-](key|pass|pwd)$)",  # but not PWD, the working directory
    re.IGNORECASE,
)
# user:password@, also with a slash in the password (AWS secrets have them); but not host:port/…@.
_USERINFO = re.compile(r"""(?<=://)(?:[^/\s'"@:]+:(?!\d+[/\s])[^\s'"@]+@(?:[^/\s'"@]+@)?|[^/\s'"]+@)""")
_WORD = re.compile(r"""[^\s'"]+""")
_QUERY = re.compile(r"""([?&]([\w.-]+)=)[^&\s'"]+""")
# The id of a saved view of MLflow is no secret.
_QUERY_NAME = re.compile(
    r"(?!viewStateShareKey$)(?:sig$|.*(?:signature|token|secret|credential|password|key))", re.IGNORECASE
)
# AWS access key ids, Hugging Face, GitHub and GitLab tokens, Azure connection strings, HTTP authorization headers.
_TOKENS = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}|(?<=AccountKey=)[^;\s'\"]+|(?<=SharedAccessKey=)[^;\s'\"]+"
    r"|(?<=Bearer )[\w.~+/=-]+|(?<=Basic )[\w+/=]{12,}"
)
_ASSIGNMENT = re.compile(
    r"""^(?P<head>\s*(?:-\s+)?["']?(?P<name>[\w.-]+)["']?\s*[:=]\s*)(?P<value>\S.*?)(?P<tail>,?)$"""
)


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name (``data.s3.secret_key``, ``HF_TOKEN``) holds a credential."""
    return _SECRET_NAME.search(name) is not None


def scrub(text: str) -> str:
    """``text`` without users and passwords in URLs, signed query parameters, tokens of known formats, and the values of
    secret environment variables."""
    secrets = {v for k, v in os.environ.items() if is_secret_name(k) and len(v) >= _MIN_SECRET_LENGTH}
    for value in sorted(secrets, key=len, reverse=True):  # a secret may be a part of another one
        text = text.replace(value, HIDDEN)
    if "://" in text and "@" in text:
        text = _WORD.sub(_without_userinfo, text)
    return _TOKENS.sub(HIDDEN, _QUERY.sub(_without_value, text))


def _without_userinfo(word: re.Match[str]) -> str:
    # Only up to the last @: where none follows, each :// would be searched to the end of the word.
    head, at, tail = word[0].rpartition("@")
    return _USERINFO.sub("", head + at) + tail


def _without_value(match: re.Match[str]) -> str:
    return f"{match[1]}{HIDDEN}" if _QUERY_NAME.match(match[2]) else match[0]


def hide_secrets() -> None:
    """Replace standard output and error by streams that scrub all text: prints, warnings and tracebacks."""
    sys.stdout, sys.stderr = _ScrubbingStream(sys.stdout), _ScrubbingStream(sys.stderr)


class _ScrubbingStream:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(scrub(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def scrub_mapping(values: Mapping[str, object]) -> dict[str, str]:
    """Every value as scrubbed text; a value with a secret name is replaced."""
    return {k: HIDDEN if is_secret_name(k) else scrub(str(v)) for k, v in values.items()}


def scrub_document(text: str) -> str:
    """Scrub YAML, JSON or .env text; values on lines that set a secret name are replaced."""
    return "\n".join(_scrub_line(line) for line in scrub(text).split("\n"))


def scrub_tree(node: Any, name: str = "") -> Any:
    """A copy of nested dicts and lists with scrubbed texts; everything below a secret name is replaced."""
    if isinstance(node, Mapping):
        return {k: scrub_tree(v, name if is_secret_name(name) else str(k)) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [scrub_tree(v, name) for v in node]
    if node is not None and is_secret_name(name):
        return HIDDEN
    return scrub(node) if isinstance(node, str) else node


def scrub_command(words: Sequence[str]) -> str:
    """A shell command line, scrubbed; values of secret names are replaced: ``a.token=…``, ``--token=…``,
    ``--token …``."""
    shown: list[str] = []
    for word in words:
        name, is_given, value = word.partition("=")
        if is_given and is_secret_name(name):
            shown.append(f"{name}={HIDDEN}")
        elif is_given and (tree := _parse_yaml(value)) is not None:
            shown.append(f"{name}={json.dumps(scrub_tree(tree), default=str)}")
        elif shown and shown[-1].startswith("--") and "=" not in shown[-1] and is_secret_name(shown[-1]):
            shown.append(HIDDEN)
        else:
            shown.append(scrub(word))
    return shlex.join(shown)


def _parse_yaml(text: str) -> dict[str, Any] | list[Any] | None:
    """A mapping or list in YAML flow style, as ``--set`` accepts; None for anything else."""
    if not text.startswith(("{", "[")):
        return None
    try:
        return untrusted.load_yaml(text)
    except untrusted.InputError:
        return None


def has_credentials(url: str) -> bool:
    """Whether a URL contains a user or a password."""
    return _USERINFO.search(url) is not None


def _scrub_line(line: str) -> str:
    match = _ASSIGNMENT.match(line)
    if match is None or not is_secret_name(match["name"]) or match["value"] in ("null", "{", "["):
        return line
    return f'{match["head"]}"{HIDDEN}"{match["tail"]}'
