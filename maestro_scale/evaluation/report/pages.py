"""Templates of pages, whose values are all escaped: names in results are as trustworthy as the files."""

from __future__ import annotations

import base64
from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from maestro_scale.escaping import markdown_text, printable_lines


def html_templates(package: str) -> Environment:
    """The templates of HTML pages in the folder ``templates`` of a package."""
    return _environment(package, printable_lines, is_html=True)


def markdown_templates(package: str) -> Environment:
    """The templates of Markdown pages in the folder ``templates`` of a package."""
    return _environment(package, markdown_text, is_html=False)


def data_url(content: bytes, kind: str = "image/png") -> str:
    """An image as a URL, so that a page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _environment(package: str, escape: Callable[[str], str], is_html: bool) -> Environment:
    """Values are passed through ``escape`` and, in HTML, also through the engine's own escaping."""

    def finalize(value: object) -> object:
        if isinstance(value, Markup):  # escaped by a filter: not to be escaped again
            return Markup(escape(value))
        return escape(value) if isinstance(value, str) else value

    return Environment(
        loader=PackageLoader(package, "templates"),
        autoescape=is_html,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
