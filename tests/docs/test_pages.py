"""The documentation holds: links lead somewhere, commands and recipes parse, generated pages match the program."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml
from documents import DOCUMENTS, PAGES, ROOT, blocks, shown_commands

from gdetkd_cli.cli.app import app
from gdetkd_cli.recipe.builtin import list_builtin
from gdetkd_cli.recipe.load import build_json_schema, load_recipe

_LONGEST_README = 120  # lines


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMMANDS = shown_commands()


def parsed(command: str) -> Mapping[str, Any]:
    """The arguments of a command line; raises a usage error for what the program does not have."""
    group: Any = typer.main.get_command(app)
    arguments = shlex.split(command)
    while arguments and arguments[0].startswith("-"):  # options of gdetkd itself
        arguments.pop(0)
    while arguments and hasattr(group, "commands"):
        assert arguments[0] in group.commands, f"no command {arguments[0]!r}"
        group = group.commands[arguments.pop(0)]
    if "--help" in arguments or not arguments:
        return {}
    with group.make_context(group.name, arguments) as context:
        return dict(context.params)


def test_the_documentation_shows_commands() -> None:
    assert len(COMMANDS) >= 60
    assert {document for document, _ in COMMANDS} >= {"README.md", "docs/index.md", "docs/guides/compare.md"}


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=str)
def test_commands_parse(document: str, command: str) -> None:
    parameters = parsed(command)

    if (recipe := parameters.get("recipe")) in {one.name for one in list_builtin()}:
        load_recipe(recipe, parameters.get("overrides") or ())


def shown_recipes() -> list[tuple[str, str]]:
    """(document, text) of each YAML block that is a part of a recipe."""
    fields = build_json_schema()["properties"].keys()
    return [(document, text) for document, text in blocks("yaml") if yaml.safe_load(text).keys() <= fields]


@pytest.mark.parametrize(("document", "text"), shown_recipes())
def test_parts_of_recipes_are_valid(document: str, text: str, tmp_path: Path) -> None:
    whole = yaml.safe_load(load_recipe_text("shapes/frcnn-frcnn")) | yaml.safe_load(text)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole))

    load_recipe(path)


def load_recipe_text(name: str) -> str:
    return next(one.path for one in list_builtin() if one.name == name).read_text()


def test_the_documentation_shows_recipes() -> None:
    assert len(shown_recipes()) >= 12


def links() -> list[tuple[str, str]]:
    """(document, target) of each link into the project, images included."""
    found = []
    for document in DOCUMENTS:
        text = re.sub(r"^ *```.*?^ *```$", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" not in target:
                found.append((str(document.relative_to(ROOT)), target))
    return found


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, by the rule that both GitHub and the site follow."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("document", "target"), sorted(set(links())), ids=str)
def test_links_lead_somewhere(document: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    linked = (ROOT / document).parent / path if path else ROOT / document

    assert linked.exists()
    if anchor:
        assert anchor in anchors(linked.read_text("utf-8"))


def navigation(entries: Any) -> Iterator[str]:
    """The pages that mkdocs.yml names."""
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from [value] if isinstance(value, str) else navigation(value)


def test_every_page_is_in_the_navigation() -> None:
    named = list(navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]))
    added = set(script("site").PAGES.values())

    assert len(named) == len(set(named))
    assert set(named) == {str(page.relative_to(ROOT / "docs")) for page in PAGES} | added


def test_the_site_keeps_links_between_repository_files() -> None:
    rewrite = script("site").site_links

    def site(link: str, page: str) -> str:
        return rewrite(f"[x]({link})", page)

    assert site("../method.md#sgfi", "guides/export.md") == "[x](../method.md#sgfi)"
    assert site("../../SECURITY.md", "guides/export.md") == "[x](../project/security.md)"
    assert site("../docs/method.md", "project/recipes.md") == "[x](../method.md)"  # shown from recipes/README.md
    assert site("docs/guides/export.md", "project/security.md") == "[x](../guides/export.md)"
    assert site("../LICENSE", "method.md") == "x"  # the site does not show it
    assert site("benchmarks", "benchmarks.md") == "x"  # a folder
    assert site("../nowhere.md", "method.md") == "[x](../nowhere.md)"  # dead: the site's build must fail
    assert site("https://example.org/a.md", "method.md") == "[x](https://example.org/a.md)"
    assert site("#cost", "method.md") == "[x](#cost)"
    assert rewrite("```\n[x](../LICENSE)\n```", "method.md") == "```\n[x](../LICENSE)\n```"  # code stays as it is


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= _LONGEST_README


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    return script("generate").pages()


@pytest.mark.parametrize("name", ["cli.md", "recipe.md"])
def test_generated_pages_match_the_program(generated: dict[str, str], name: str) -> None:
    page = ROOT / "docs" / "reference" / name

    assert page.read_text("utf-8") == generated[name], "run: python docs/generate.py"


def test_generated_pages_have_every_command_and_field(generated: dict[str, str]) -> None:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        for path in [f"{name} {sub}" for sub in getattr(command, "commands", {})] or [name]:
            assert f"`gdetkd {path}`" in generated["cli.md"]
    schema = build_json_schema()
    for block in [schema, *schema["$defs"].values()]:
        for field in block.get("properties", {}):
            assert f"| `{field}` |" in generated["recipe.md"]


NAMED = {
    (str(document.relative_to(ROOT)), path)
    for document in [*sorted(ROOT.glob("*.md")), *PAGES]
    if document.name != "CHANGELOG.md"
    for path in re.findall(r"`((?:gdetkd_cli|tests|benchmarks|docs|recipes)/[\w./-]+?)/?`", document.read_text("utf-8"))
}


@pytest.mark.parametrize(("document", "path"), sorted(NAMED), ids=str)
def test_named_files_exist(document: str, path: str) -> None:
    assert "NAME" in path or (ROOT / path).exists()
