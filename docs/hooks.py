"""Add the documents outside of docs/ to the site, for mkdocs.yml. README.md is the start page."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md"}
PAGES |= {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
LINK = re.compile(r"(?<=\]\()[^)#\s]+")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and everything else that documents link to, and adapt the links."""
    for page in [*files.documentation_pages()]:
        page.content_string = adapt_links(ROOT / "docs" / page.src_uri)
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=adapt_links(ROOT / name)))
    texts = [page.content_string for page in files.documentation_pages()]
    for link in sorted({link for text in texts for link in LINK.findall(text) if link.startswith("files/")}):
        files.append(File.generated(config, link, content=(ROOT / link.removeprefix("files/")).read_bytes()))
    return files


def adapt_links(document: Path) -> str:
    """Return the text of a document with links relative to the root of the site, where all pages are."""

    def adapt(link: re.Match[str]) -> str:
        target = document.parent / link[0]
        if not target.exists():  # another site
            return link[0]
        name = target.resolve().relative_to(ROOT).as_posix()
        if name in PAGES:
            return PAGES[name]
        return name.removeprefix("docs/") if name.startswith("docs/") else f"files/{name}"

    return LINK.sub(adapt, document.read_text(encoding="utf-8"))
