"""Hooks of MkDocs: pages from outside train/docs join the site, and links follow the pages. mkdocs.yml names this file."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OWN = {"README.md": "index.md", "train/docs/README.md": "guides.md", "bench/RESULTS.md": "results.md"}
"""Pages whose name on the site is not that of their file, by their path in the repository."""
ON_TOP = ("ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
LINK = re.compile(r"(?<!\\)\[([^\]]*)\]\(([^)#\s]*)(#[^)]*)?\)")
API = ("train.api",)
"""Modules whose public functions and classes are documented on the page api.md."""


def place_of(path: str) -> str | None:
    """Place of a page on the site by its path in the repository; None for a file that is no page of the site."""
    if path in OWN:
        return OWN[path]
    if path in ON_TOP:
        return path.lower()
    folder, name = posixpath.split(path)
    if folder == "train/docs":
        return name
    return f"cluster/{name}" if folder == "cluster/docs" and name.endswith(".md") else None


def pages() -> dict[str, str]:
    """Path in the repository of every page of the site, by its place there."""
    found = [*OWN, *ON_TOP]
    found += [
        path.relative_to(ROOT).as_posix()
        for folder in ("train/docs", "cluster/docs")
        for path in (ROOT / folder).glob("*.md")
    ]
    return {place: path for path in found if (place := place_of(path)) is not None}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside train/docs, and the page of the API."""
    files.remove(files.src_uris["README.md"])
    for place, path in pages().items():
        if place not in files.src_uris:
            files.append(File.generated(config, place, content=(ROOT / path).read_text(encoding="utf-8")))
    blocks = "\n\n".join(f"::: {module}" for module in API)
    files.append(File.generated(config, "api.md", content=f"# Functions and classes\n\n{blocks}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    """Point links at pages of the site. A link to another file of the repository becomes the file's name."""
    here = page.file.src_uri
    source = pages().get(here, here)

    def follow(link: re.Match) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if not target or "://" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = place_of(path)
        if place is None:
            return f"{text} (`{path}`)" if path not in text else text
        return f"[{text}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{anchor})"

    fence = re.compile(r"(^```.*?^```$)", re.S | re.M)
    return "".join(part if part.startswith("```") else LINK.sub(follow, part) for part in fence.split(markdown))
