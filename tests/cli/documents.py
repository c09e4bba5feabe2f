"""The project's documents, and the code blocks and commands that they show."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *PAGES, ROOT / "recipes" / "README.md", ROOT / "benchmarks" / "README.md"]


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(document, text) of each code block, also of one that is indented inside a list."""
    for document in DOCUMENTS:
        found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", document.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        for indent, text in found:
            yield str(document.relative_to(ROOT)), re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)


def shown_commands() -> list[tuple[str, str]]:
    """(document, words behind ``gdetkd``) of each command, with continued lines joined and variables replaced."""
    found, variables = [], {}
    for document, block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if assignment := re.fullmatch(r"([A-Z]+)='([^']*)'", line):
                variables[assignment[1]] = assignment[2]
            words = shlex.split(line, comments=True)
            if words[:1] == ["gdetkd"] or words[:4:3] == ["torchrun", "-m"] or "gdetkd_cli" in words:
                after = words[words.index("gdetkd_cli") + 1 :] if "gdetkd_cli" in words else words[1:]
                found.append((document, after))
    names = {f"${name}": value for name, value in variables.items()}
    return [(document, shlex.join(names.get(word, word) for word in words)) for document, words in found]
