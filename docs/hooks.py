"""mkdocs hooks: files beside docs/ become pages of the site, and links between all of them keep working.

Every link in the project's Markdown is relative to its own file, so that it works in the repository too. The site
rewrites links that leave docs/: to the page that shows the file, or to plain text where the site does not show it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {  # file in the repository: page of the site
    "recipes/README.md": "project/recipes.md",
    "benchmarks/README.md": "project/scripts.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Adds the files beside docs/ as pages."""
    from mkdocs.structure.files import File  # the tests of this file need no mkdocs

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Rewrites the links of one page; code blocks stay as they are."""
    known = {file.src_uri for file in files}
    parts = _FENCE.split(markdown)
    rewritten = [part if i % 2 else site_links(part, page.file.src_uri, known) for i, part in enumerate(parts)]
    return "".join(rewritten)


def site_links(markdown: str, page: str, known: set[str]) -> str:
    """The text with links between repository files turned into links between pages.

    Args:
        markdown: of the page.
        page: the page's path in the site.
        known: paths of all pages and files of the site.
    """
    sources = {shown: source for source, shown in PAGES.items()}
    folder = posixpath.dirname(sources.get(page, f"docs/{page}"))

    def rewrite(match: re.Match[str]) -> str:
        text, link = match.groups()
        path, hash_sign, anchor = link.partition("#")
        if not path or "://" in link or link.startswith("mailto:"):
            return match[0]
        target = posixpath.normpath(posixpath.join(folder, path))
        shown = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else "")
        if shown not in known:
            return text
        return f"[{text}]({posixpath.relpath(shown, posixpath.dirname(page))}{hash_sign}{anchor})"

    return _LINK.sub(rewrite, markdown)
