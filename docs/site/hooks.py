"""Hooks of mkdocs: pages of the repository's root as pages of the site, and links to files that are not pages.

README.md is the home page. In the repository links are relative to the file. A link to a file that is
not in the site becomes its name as code, since a built site has no repository next to it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
}
"""File in the repository's root → page of the site."""

_LINK = re.compile(r"\[(?P<text>[^]]*)\]\((?P<target>[^):#]+)(?P<anchor>#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site needs them."""
    sources = {page: source for source, page in PAGES.items()}
    # Where the file is in the repository.
    here = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def replaced(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), link["target"]))
        target = PAGES.get(path, path.removeprefix("docs/"))
        if target in files.src_uris:
            start = posixpath.dirname(page.file.src_uri)
            return f"[{link['text']}]({posixpath.relpath(target, start or '.')}{link['anchor'] or ''})"
        if not (ROOT / path).exists():
            return link[0]  # reported by mkdocs
        return link["text"] if link["text"].startswith("`") else f"{link['text']} (`{path}`)"

    return _LINK.sub(replaced, markdown)
