"""Every gdetkd command that the documentation shows is one that the program understands; links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from gdetkd_cli.cli.app import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shown_commands() -> list[tuple[str, str]]:
    """Lines of code blocks that start with ``gdetkd``, comments and continuation lines put right."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == "gdetkd":
                    found.append((document.name, shlex.join(words[1:])))
    return found


COMMANDS = shown_commands()


def test_the_documentation_shows_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=lambda value: value)
def test_it_parses(document: str, command: str) -> None:
    group = typer.main.get_command(app)
    arguments = shlex.split(command)
    while arguments and hasattr(group, "commands"):
        assert arguments[0] in group.commands, f"{document}: no command {arguments[0]!r}"
        group = group.commands[arguments.pop(0)]
    group.make_context(group.name, arguments).close()  # raises a usage error for what it does not know


def links() -> list[tuple[str, str]]:
    """(document, target) of each link into the project."""
    found = []
    for document in [*DOCUMENTS, *ROOT.glob("*/README.md"), *ROOT.glob("docs/*/README.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if "://" not in target:
                found.append((str(document.relative_to(ROOT)), target))
    return found


@pytest.mark.parametrize(("document", "target"), links(), ids=lambda value: value)
def test_links_lead_somewhere(document: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    linked = (ROOT / document).parent / path if path else ROOT / document

    assert linked.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
