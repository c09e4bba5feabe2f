"""Writes docs/reference/cli.md and docs/reference/recipe.md from the program.

    python docs/generate.py            # writes both pages
    python docs/generate.py --check    # fails where a page differs from the program

``typer utils docs`` writes the commands; the recipe's fields come from its JSON schema. No model is built and torch is
not imported.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gdetkd_cli import errors
from gdetkd_cli.recipe.load import build_json_schema

FOLDER = Path(__file__).parent / "reference"
_NOTE = "<!-- docs/generate.py writes this page from the program: change the program's help texts instead. -->\n\n"
_RECIPE_TITLE = """\
# Recipe schema

A recipe is one YAML file with everything a run needs. `gdetkd recipe schema` prints this schema as JSON Schema, which
editors use to complete and check YAML. `gdetkd recipe init` writes a commented recipe to start from, and `gdetkd recipe
validate FILE` names the field and the line of each mistake. You can set every field on the command line:
`--set train.steps=500 --set student.width=16`. A relative path starts from the folder that you run the command in.

Steps are optimizer steps, sizes are pixels and AP is in 0-100, unless a field's description names another unit.
[Detectors](detectors.md) explains the `student` and `teacher` blocks, and [the method](../method.md) explains the terms
of `distill`.
"""


def main() -> None:
    """Writes the pages, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    check = parser.parse_args().check
    for name, text in pages().items():
        path = FOLDER / name
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            sys.exit(f"{path} is out of date; run: python docs/generate.py")
        if not check:
            path.write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Text of each generated page by file name."""
    return {"cli.md": _NOTE + command_page(), "recipe.md": _NOTE + recipe_page(build_json_schema())}


def command_page() -> str:
    """Every command with its arguments and options."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cli.md"
        command = [sys.executable, "-m", "typer", "gdetkd_cli.cli.app", "utils", "docs", "--name", "gdetkd"]
        subprocess.run([*command, "--title", "Command line", "--output", str(path)], check=True, capture_output=True)
        text = path.read_text(encoding="utf-8")
    return f"{_with_whole_summaries(text).strip()}\n\n{_exit_codes()}\n"


def _exit_codes() -> str:
    """A table of the exit codes with the errors that have them, from the docstrings of ``gdetkd_cli.errors``."""
    codes: dict[int, list[str]] = {}
    bases = (errors.GDetKDError, errors._InputError)
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.GDetKDError) and error not in bases:
            codes.setdefault(error.exit_code, []).append(str(error.__doc__).splitlines()[0])
    codes[2].append("The command line is wrong: an unknown option, a missing argument, or two that exclude each other.")
    rows = {
        "0": "The command is done.",
        **{str(code): " ".join(meanings) for code, meanings in sorted(codes.items())},
        "70": "An error of gdetkd itself. `gdetkd --debug ...` shows where.",
        "128 + N": "Signal N stopped the command: 130 is an interrupt, 143 a termination. A run can be resumed.",
    }
    table = "\n".join(f"| {code} | {meaning} |" for code, meaning in rows.items())
    text = 'Every error is one sentence on stderr. With `--json`, stdout also has `{"schema": 1, "error": {...}}`.'
    return f"## Exit codes\n\n{text}\n\n| code | meaning |\n|---|---|\n{table}"


def _with_whole_summaries(text: str) -> str:
    """Lists of commands with each command's whole first sentence, which typer cuts short."""
    summaries = dict(re.findall(r"^#+ `gdetkd ([^`]+)`\n\n([^\n]+)$", text, flags=re.MULTILINE))
    lines, group = [], ""
    for line in text.splitlines():
        if heading := re.fullmatch(r"#+ `gdetkd ?([^`]*)`", line):
            group = heading[1]
        if (item := re.fullmatch(r"\* `([a-z]+)`: .*", line)) and (name := f"{group} {item[1]}".strip()) in summaries:
            line = f"* `{item[1]}`: {summaries[name]}"
        lines.append(line)
    return "\n".join(lines)


def recipe_page(schema: Mapping[str, Any]) -> str:
    """One table of fields for the recipe and for each block of it, in the order in which a reader meets them."""
    definitions: Mapping[str, Any] = schema["$defs"]
    sections = [_RECIPE_TITLE]
    tops = [schema] if "properties" in schema else [definitions[name] for name in _references(schema)]
    for top in tops:
        sections += [f"## {top['title'] if len(tops) > 1 else 'The whole file'}", *_section(top)]
    for name in _in_order(schema, definitions):
        if definitions[name] not in tops and "properties" in definitions[name]:
            sections += [f"## {name}", *_section(definitions[name])]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _section(block: Mapping[str, Any]) -> Iterator[str]:
    if "description" in block:
        yield _text(" ".join(block["description"].split()))
    required = block.get("required", [])
    rows = ["| field | values | default | meaning |", "|---|---|---|---|"]
    for name, field in block["properties"].items():
        default = "required" if name in required else _default(field)
        meaning = _text(" ".join(field.get("description", "").split()))
        rows.append(f"| `{name}` | {_values(field)} | {default} | {meaning} |")
    yield "\n".join(rows)


def _text(words: str) -> str:
    """Docstring markup as Markdown, safe inside a table."""
    return words.replace("``", "`").replace("|", "\\|")


def _default(field: Mapping[str, Any]) -> str:
    if "default" not in field or isinstance(field["default"], dict):
        return ""  # a block: its own table has the defaults
    value = field["default"]
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _values(field: Mapping[str, Any]) -> str:
    """The values of a field, in a few words."""
    for name in ("anyOf", "oneOf"):
        if name in field:
            return " or ".join(dict.fromkeys(_values(part) for part in field[name]))
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    match field.get("type"):
        case "null":
            return "`null`"
        case "boolean":
            return "`true`, `false`"
        case "integer" | "number" as kind:
            return ("whole number" if kind == "integer" else "number") + _range(field)
        case "array":
            items = field.get("items") or field.get("prefixItems", [{}])[0]
            length = field.get("minItems") if field.get("minItems") == field.get("maxItems") else None
            return f"list{f' of {length}' if length else ''}: {_values(items)}"
        case "object":
            return "mapping"
        case "string":
            return "path" if field.get("format") == "path" else "text"
    return "any value"


def _range(field: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[name]:g}" for name, sign in signs.items() if name in field]
    return f" {', '.join(limits)}" if limits else ""


def _references(node: Any) -> Iterator[str]:
    """Names of the blocks that a schema refers to, in their order, each as often as it is named."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for key, value in node.items():
            if key not in ("$defs", "discriminator"):
                yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _in_order(node: Any, definitions: Mapping[str, Any]) -> list[str]:
    """Names of all blocks, each behind the one that names it first."""
    found: dict[str, None] = {}

    def visit(part: Any) -> None:
        for name in _references(part):
            if name not in found:
                found[name] = None
                visit(definitions[name])

    visit(node)
    return list(found)


if __name__ == "__main__":
    main()
