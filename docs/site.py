"""Writes the source of the documentation site into build/docs: docs/ and the Markdown files beside it.

    python docs/site.py && zensical build --strict

Every link in the project's Markdown is relative to its own file, so that it works in the repository too. In the copy,
a link to a file that the site shows leads to its page, and a link to any other file of the repository becomes plain
text.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "build" / "docs"  # mkdocs.yml: docs_dir
PAGES = {  # file beside docs/: page of the site
    "recipes/README.md": "project/recipes.md",
    "benchmarks/README.md": "project/scripts.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
}
_SHOWN = (".md", ".csv", ".svg", ".png")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^ *```.*?^ *```$)", flags=re.DOTALL | re.MULTILINE)


def main() -> None:
    """Writes the folder anew."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    for name, source in files().items():
        target = SOURCE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".md":
            target.write_text(site_links(source.read_text(encoding="utf-8"), name), encoding="utf-8")
        else:
            shutil.copyfile(source, target)


def files() -> dict[str, Path]:
    """Every file of the site: its path there, and where its content is."""
    docs = ROOT / "docs"
    shown = [path for path in docs.rglob("*") if path.suffix in _SHOWN] + list((docs / "examples").glob("*.py"))
    own = {path.relative_to(docs).as_posix(): path for path in sorted(shown)}
    return own | {page: ROOT / source for source, page in PAGES.items()}


def site_links(markdown: str, page: str) -> str:
    """The text with links between repository files turned into links between pages; code blocks stay as they are.

    Args:
        markdown: of the page.
        page: the page's path in the site.
    """
    parts = _FENCE.split(markdown)
    return "".join(part if i % 2 else _rewritten(part, page) for i, part in enumerate(parts))


def _rewritten(text: str, page: str) -> str:
    shown = {source: name for name, source in PAGES.items()}
    folder = posixpath.dirname(shown.get(page, f"docs/{page}"))

    def rewrite(match: re.Match[str]) -> str:
        words, link = match.groups()
        path, hash_sign, anchor = link.partition("#")
        if not path or "://" in link or link.startswith("mailto:"):
            return match[0]
        target = posixpath.normpath(posixpath.join(folder, path))
        inside = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if inside is None or (ROOT / target).is_dir():
            # A dead link stays, so that the site's build fails.
            return words if (ROOT / target).exists() else match[0]
        return f"[{words}]({posixpath.relpath(inside, posixpath.dirname(page))}{hash_sign}{anchor})"

    return _LINK.sub(rewrite, text)


if __name__ == "__main__":
    main()
