"""Hidden characters in names of classes and files are visible in everything that is printed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from invoke import gdetkd

from gdetkd_cli.data.split import Record, Split
from gdetkd_cli.errors import DataError
from gdetkd_cli.recipe.load import dump_recipe, load_recipe
from gdetkd_cli.report.images import draw_predictions
from gdetkd_cli.text import show_hidden

EVIL = "cat\x1b[2J\u202egpj\r\x07"
SHOWN = r"cat\x1b[2J\u202egpj\r\x07"
HIDDEN = set("\x1b\u202e\r\x07")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe: 大小 🙂 [bold]", "Größe: 大小 🙂 [bold]"),
        (EVIL, SHOWN),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x7f\x9b\u200b\u2028", r"\x7f\x9b\u200b\u2028"),
        (b"\xff.jpg".decode(errors="surrogateescape"), r"\udcff.jpg"),
    ],
)
def test_hidden_characters_become_visible(text: str, shown: str) -> None:
    assert show_hidden(text) == shown
    assert show_hidden("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_results_notes_and_errors_are_shown_visibly(runs: Any) -> None:
    metrics = dataclasses.replace(runs.results["run_eval"].metrics, per_class={EVIL: 50.0})
    runs.results["run_eval"] = dataclasses.replace(runs.results["run_eval"], source=EVIL, metrics=metrics)
    shown = gdetkd("eval", "x")
    assert shown.stdout.count(SHOWN) == 2  # the title and the row of the class
    assert not HIDDEN & set(shown.stdout)
    assert not HIDDEN & set(gdetkd("eval", "x", "--json").stdout)

    runs.fails = DataError(f"{EVIL} is missing\nadd it")
    shown = gdetkd("--debug", "eval", "x")
    assert shown.stderr.endswith(f"Error: {SHOWN} is missing\nadd it\n")
    assert not HIDDEN & set(shown.stderr)


def test_a_table_of_methods_is_shown_visibly(runs: Any, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = runs.results["run_compare"]
    rows = tuple(dataclasses.replace(row, method=f"{row.method}{EVIL}") for row in result.rows)
    runs.results["run_compare"] = dataclasses.replace(result, rows=rows)
    shown = gdetkd("compare", recipe, "--output", "out")
    assert shown.stdout.count(SHOWN) == len(rows) + sum(row.mean is not None for row in rows)  # two tables
    assert not HIDDEN & set(shown.stdout)


def test_a_recipe_is_shown_visibly_and_reads_back_equal(recipe: str, tmp_path: Path) -> None:
    fields = yaml.safe_load(Path(recipe).read_text())
    fields["data"] = {"format": "coco", "classes": [EVIL]}
    (tmp_path / "evil.yaml").write_text(yaml.dump(fields))
    shown = gdetkd("recipe", "validate", "evil.yaml").stdout
    assert not HIDDEN & set(shown)
    (tmp_path / "again.yaml").write_text(shown)
    assert load_recipe("again.yaml") == load_recipe("evil.yaml")
    assert "Größe" in dump_recipe(load_recipe(recipe, ["data.format=coco", "data.classes=[Größe]"]))

    (tmp_path / "shown.yaml").write_text(f"# {EVIL}\nname: x\n", newline="")
    assert gdetkd("recipe", "show", "shown.yaml").stdout == f"# {SHOWN}\nname: x\n".replace(r"\r", "\r")


def test_a_class_named_like_a_formula_is_drawn(tmp_path: Path) -> None:
    record = Record(1, (8, 8), torch.tensor([[1.0, 1, 6, 6]]), torch.tensor([1]))
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    split = Split("x", (rf"$\nothing$ {EVIL}",), [record], lambda index: image)
    draw_predictions(split=split, predictors={}, folder=tmp_path, count=1, device="cpu")
    assert (tmp_path / "00.png").stat().st_size > 0
