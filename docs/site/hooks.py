"""Hooks of mkdocs: files of the repository's root and notebooks as pages of the site; links to files that are no pages.

README.md is the home page. A notebook becomes a page of its texts and its code; the file itself is part of the
site. In the repository links are relative to the file. A link to a file that is not in the site becomes its name as
code, since a built site has no repository next to it.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")
)
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    **{source: source.removeprefix("docs/").replace(".ipynb", ".md") for source in NOTEBOOKS},
}
"""File in the repository's root → page of the site."""

_LINK = re.compile(r"\[(?P<text>[^]]*)\]\((?P<target>[^):#]+)(?P<anchor>#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, and a page for each notebook."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        content = notebook_page(text, posixpath.basename(source)) if source in NOTEBOOKS else text
        files.append(File.generated(config, page, content=content))
    return files


def notebook_page(text: str, name: str) -> str:
    """Markdown of a notebook: its texts, and its code as blocks, in order."""
    parts = []
    for cell in json.loads(text)["cells"]:
        body = "".join(cell["source"])
        if cell["cell_type"] == "code":
            shell = body.startswith("%%script bash")
            body = f"```{'sh' if shell else 'python'}\n{body.partition(chr(10))[2] if shell else body}\n```"
        parts.append(body)
    title, *rest = parts[0].split("\n", 1)
    download = f"The notebook: [{name}]({name}). It runs in CI; its pictures appear when you run it."
    return "\n\n".join([title, download, *rest, *parts[1:]])


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
