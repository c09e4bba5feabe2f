"""A mistake on the command line is one sentence and an exit code; so is an interrupt."""

from __future__ import annotations

from typing import Any

import pytest
from invoke import gdetkd

from gdetkd_cli.errors import ExportError, NonFiniteLossError, RunFolderError

NO_START = "no recipe given; add --recipe RECIPE to start a run, or --resume RUN to continue one"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train"], NO_START),
        (["distill", "--dry-run"], NO_START),
        (
            ["distill", "--recipe", "r", "--resume", "x"],
            "--resume cannot be combined with --recipe; remove one or the other",
        ),
        (
            ["train", "--resume", "x", "--detector", "teacher", "--set", "a=b", "--output", "o"],
            "--resume cannot be combined with --detector, --set, --output; remove one or the other",
        ),
        (
            ["train", "--recipe", "r", "--steps", "9"],
            "--steps needs --resume RUN; for a new run, use --set train.steps=N",
        ),
        (
            ["distill", "--recipe", "r", "--resume", "auto", "--force"],
            "--force needs --resume RUN; a run that changed cannot be continued by --resume auto",
        ),
        (
            ["distill", "--resume", "x", "--dry-run"],
            "--resume cannot be combined with --dry-run; remove one or the other",
        ),
        (
            ["distill", "--recipe", "r", "--dry-run", "--profile", "3"],
            "--dry-run cannot be combined with --profile; remove one or the other",
        ),
        (["export", "x"], "no format given; add --onnx, --torchscript or both"),
        (
            ["train", "--recipe", "nowhere.yaml"],
            (
                "no recipe file or built-in recipe is named nowhere.yaml; "
                "to list the built-in recipes, run: gdetkd recipe list"
            ),
        ),
        (
            ["distill", "--recipe", "tiny.yaml", "--set", "train.steps=-1"],
            "--set train.steps=-1: train.steps: input should be greater than 0 (got -1)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_nothing_runs(
    runs: Any, recipe: str, arguments: list[str], sentence: str
) -> None:
    shown = gdetkd(*arguments)
    assert (shown.exit_code, shown.stdout, shown.stderr) == (2, "", f"Error: {sentence}\n")
    assert runs.calls == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["train", "--nothing"], "No such option: --nothing"),
        (["eval"], "Missing argument"),
        (["train", "--detector", "both"], "'both' is not one of 'student', 'teacher'"),
        (["probe", "x", "--size", "480"], "expected height x width in pixels, for example 480x640; got 480"),
        (["probe", "x", "--size", "0x640"], "expected height x width in pixels, for example 480x640; got 0x640"),
        (["distill", "--recipe", "r", "--profile", "0"], "Invalid value for '--profile'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_typers_own_usage_errors_keep_code_2(runs: Any, arguments: list[str], part: str) -> None:
    shown = gdetkd(*arguments)
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert part in shown.stderr
    assert runs.calls == []


@pytest.mark.parametrize("error", [RunFolderError("no folder"), NonFiniteLossError("NaN"), ExportError("differs")])
def test_a_known_error_is_a_sentence_and_its_own_code(runs: Any, error: Any) -> None:
    runs.fails = error
    shown = gdetkd("demo", "--json")
    assert (shown.exit_code, shown.stdout) == (error.exit_code, "")
    assert shown.stderr.splitlines()[-1] == f"Error: {error}"
    assert "Traceback" not in shown.stderr


def test_an_unknown_error_is_one_line(runs: Any) -> None:
    runs.fails = ValueError("shapes\n  differ")
    shown = gdetkd("demo")
    assert (shown.exit_code, shown.stdout) == (70, "")
    assert shown.stderr.splitlines()[-1] == (
        "internal error: ValueError: shapes differ; run `gdetkd --debug ...` to see the traceback"
    )
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize("error", [ValueError("boom"), RunFolderError("boom")])
@pytest.mark.parametrize("by", ["option", "variable"])
def test_debug_adds_the_traceback(runs: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, by: str) -> None:
    runs.fails = error
    if by == "variable":
        monkeypatch.setenv("GDETKD_DEBUG", "1")
    shown = gdetkd(*(["--debug"] if by == "option" else []), "demo")
    assert shown.exit_code in (2, 70)
    assert "Traceback (most recent call last)" in shown.stderr
    assert "boom" in shown.stderr.splitlines()[-1]


def test_an_interrupt_is_one_line(runs: Any) -> None:
    runs.fails = KeyboardInterrupt()
    shown = gdetkd("demo")
    assert (shown.exit_code, shown.stdout, shown.stderr.splitlines()[-1]) == (130, "", "interrupted")


def test_an_interrupt_says_how_to_go_on_where_that_is_known(runs: Any) -> None:
    runs.fails = KeyboardInterrupt()
    runs.fails.add_note("continue with gdetkd distill --resume runs/tiny")
    shown = gdetkd("demo")
    assert shown.stderr.splitlines()[-1] == "interrupted; continue with gdetkd distill --resume runs/tiny"
