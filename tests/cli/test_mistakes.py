"""Mistakes at the command line, for people and for programs; other ways of naming a recipe."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest
from invoke import done, gdetkd

from gdetkd_cli.errors import ModelError, StoppedError


def test_errors_as_json(runs: Any) -> None:
    runs.fails = ModelError("no detector")
    shown = gdetkd("eval", "runs/tiny", "--json")
    assert shown.exit_code == 2
    assert json.loads(shown.stdout) == {
        "schema": 1,
        "error": {"type": "ModelError", "message": "no detector", "exit_code": 2},
    }
    assert "Error: no detector" in shown.stderr
    runs.fails = StoppedError("stopped after step 3", 15)
    assert json.loads(gdetkd("eval", "runs/tiny", "--json").stdout)["error"]["exit_code"] == 143
    for arguments, message in (
        (["eval", "--json"], "Missing argument"),
        (["eval", "a", "--jsn", "--json"], "--jsn"),
        (["--json", "eval"], "--json"),
    ):
        shown = gdetkd(*arguments)
        assert shown.exit_code == 2
        error = json.loads(shown.stdout)["error"]
        assert (error["type"], error["exit_code"]) == ("UsageError", 2)
        assert message in error["message"]
    assert gdetkd("eval", "runs/tiny").stdout == ""
    runs.fails = OSError(errno.ENOSPC, "No space left on device")
    shown = gdetkd("eval", "runs/tiny", "--json")
    assert shown.exit_code == json.loads(shown.stdout)["error"]["exit_code"] == 1
    assert "Error: a file could not be written (No space left on device); free some space" in shown.stderr


def test_near_names_are_suggested() -> None:
    assert "Did you mean 'probe'?" in gdetkd("prob").stderr
    assert "--recipe" in gdetkd("distill", "--recpe", "a").stderr


@pytest.mark.parametrize("command", ["train", "distill"])
def test_a_recipe_without_its_option(runs: Any, command: str, recipe: str) -> None:
    done(command, recipe)
    done(command, "--recipe", recipe)
    assert runs.calls[0] == runs.calls[1]
    shown = gdetkd(command, recipe, "--recipe", "other.yaml")
    assert shown.exit_code == 2
    assert f"two recipes given, {recipe} and --recipe other.yaml; remove one" in shown.stderr
    shown = gdetkd(command)
    assert "no recipe given; name a RECIPE to start a run" in shown.stderr


def test_recipe_commands_as_json(recipe: str) -> None:
    listed = json.loads(done("recipe", "list", "--json").stdout)
    assert {"name", "title"} == set(listed["recipes"][0])
    assert json.loads(done("recipe", "show", recipe, "--json").stdout)["recipe"]["name"] == "tiny"
    checked = json.loads(done("recipe", "validate", recipe, "--json").stdout)
    assert checked["recipe"]["train"]["batch_size"]
    assert json.loads(done("recipe", "init", "new.yaml", "--json").stdout) == {"schema": 1, "path": "new.yaml"}
    shown = gdetkd("recipe", "show", "absent", "--json")
    assert json.loads(shown.stdout)["error"]["type"] == "RecipeError"
