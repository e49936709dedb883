"""Escape names that come from data: one function per target (file name, shell, link, Markdown, plot, terminal, MLflow).

Keys, class names, dataset names, band names and notes are chosen by whoever wrote the shards or the results. They are
never put into a path, a command, a page or a figure as they are, but through one of these functions.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from rich.text import Text

MAX_FILE_NAME = 255
"""Longest file name in bytes on the common file systems of Linux, macOS and object stores."""

_HASH_DIGITS = 16
# A percent sign is followed by two hexadecimal digits everywhere else, so a shortened name equals no other name.
_HASH_MARK = "%-"
# Device names of Windows, also with a suffix: `con.tif` cannot be created on its file systems.
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|$)", re.IGNORECASE)
# What begins or ends markup within a line; an underscore between letters or digits is only an underscore.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])")
_MLFLOW_INVALID = re.compile(r"[^\w\-. :/]")
_MAX_MLFLOW_KEY = 250


def file_name(name: str, suffix: str = "", ignore_case: bool = False) -> str:
    """``name`` as one path component that ends in ``suffix``; different names give different file names.

    Letters, digits, ``_``, ``-``, ``.`` and ``~`` stay, everything else is percent-encoded as in a URL (``/`` becomes
    ``%2F``). A leading dot or hyphen and the first letter of a Windows device name are encoded too: the file is not
    hidden, is not an option of a command and can be copied anywhere. A result over 255 bytes is shortened and ends in
    a hash of the name. ``suffix`` is trusted and kept.

    Args:
        ignore_case: also add the hash to names that differ from their lower-case form: the target is a file system
            on which ``A`` and ``a`` are one file (see :func:`ignores_case`).
    """
    encoded = quote(name, safe="", errors="surrogatepass")
    if not encoded or encoded[0] in ".-" or _DEVICES.match(encoded):
        encoded = f"%{ord(encoded[0]):02X}{encoded[1:]}" if encoded else "%"
    mark = _HASH_MARK + hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:_HASH_DIGITS]
    if ignore_case and encoded != encoded.lower():
        encoded += mark
    if len(encoded) + len(suffix.encode()) > MAX_FILE_NAME:
        start = encoded[: MAX_FILE_NAME - len(suffix.encode()) - len(mark)]
        encoded = re.sub(r"%[0-9A-F]?$", "", start) + mark  # without a cut escape at the end
    return encoded + suffix


def ignores_case(folder: Path) -> bool:
    """Whether ``A`` and ``a`` are the same file in an existing folder, as on most disks of macOS and Windows."""
    descriptor, probe = tempfile.mkstemp(prefix=".case-a", dir=folder)
    os.close(descriptor)
    try:
        return os.path.exists(os.path.join(folder, os.path.basename(probe).swapcase()))
    finally:
        os.unlink(probe)


def shell_command(*words: object) -> str:
    """A command line for POSIX shells on which each word stays one word."""
    return shlex.join(str(word) for word in words)


def python_command(code: str) -> str:
    """A command line that runs one line of Python, for POSIX shells."""
    return 'python -c "' + re.sub(r'[\\"$`]', r"\\\g<0>", code) + '"'


def link_target(path: str) -> str:
    """A relative or absolute path as the target of a link: never a URL with a scheme (``javascript:``) or a host.

    HTML itself is escaped by the template engine: the environment of the report has ``autoescape``.
    """
    return re.sub("^//+", "/", quote(path, safe="/", errors="surrogatepass"))


def markdown_text(text: str) -> str:
    """``text`` for a table cell of Markdown, or within a line of text: on one line, without markup."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def plot_text(text: str, longest: int = 80) -> str:
    """``text`` for matplotlib: on one line, at most ``longest`` characters, without mathtext.

    Matplotlib parses text between dollar signs as mathtext, where ``\\frac{a}`` is an error that ends the drawing, and
    leaves labels that begin with an underscore out of legends.
    """
    shown = printable(text[: longest + 1])
    if len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def printable(text: str) -> str:
    """``text`` on one line for a terminal or a log: control and format characters as Python escapes (``\\x1b``).

    Without it a key could clear the screen, change its title, or reverse the direction of the text after it.
    """
    # Not printable: control and format characters, separators other than the blank, lone surrogates.
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """As :func:`printable`, but line breaks stay: for texts of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def console_text(text: str) -> Text:
    """``text`` for rich: on one line, without markup (``[bold]``, where ``[/]`` is an error) and emoji codes."""
    from rich.text import Text

    return Text(printable(text))


def mlflow_key(name: str) -> str:
    """``name`` as a metric, parameter or tag of MLflow: other characters than ``\\w - . : /`` and blank become ``_``.

    MLflow also refuses keys that are not a normal relative path, such as ``a//b``, ``/a`` and ``../a``: their empty,
    ``.`` and ``..`` parts become ``_``. A key over 250 characters ends in a hash of the name.
    """
    parts = _MLFLOW_INVALID.sub("_", name).split("/")
    key = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    return key if len(key) <= _MAX_MLFLOW_KEY else _hashed(key, name)


def mlflow_keys(names: Iterable[str]) -> dict[str, str]:
    """{name: key} with different keys: where two names give the same, all but the first end in a hash of the name."""
    keys: dict[str, str] = {}
    used: set[str] = set()
    for name in dict.fromkeys(names):
        key = mlflow_key(name)
        keys[name] = _hashed(key, name) if key in used else key
        used.add(keys[name])
    return keys


def _hashed(key: str, name: str) -> str:
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:_HASH_DIGITS]
    return f"{key[: _MAX_MLFLOW_KEY - _HASH_DIGITS - 1]}-{digest}"
