"""The command line as its users meet it: arguments, streams and exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import pytest
import typer
from invoke import done, gdetkd

from gdetkd_cli import __version__
from gdetkd_cli.cli.app import app
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import CocoData, SyntheticData

# ----------------------------------------------------------------------------------------- commands and their options


def test_train(runs: Any, recipe: str) -> None:
    shown = done("train", "--recipe", recipe)
    expected = {"detector": "student", "output": None, "requeue": False, "measure": True}
    assert runs.call == ("run_train", (load_recipe(recipe),), expected)
    assert "run runs/tiny: 600 steps" in shown.stdout
    assert shown.stderr.splitlines()[:2] == ["== student", "wrote [bold]nothing"]


def test_train_with_every_option(runs: Any, recipe: str) -> None:
    arguments = ["--detector", "teacher", "--set", "train.steps=5", "--set", "seed=3", "--output", "out"]
    done("train", "--recipe", "shapes/tiny", *arguments)
    expected = {"detector": "teacher", "output": Path("out"), "requeue": False, "measure": True}
    assert runs.call == ("run_train", (load_recipe(recipe, ["train.steps=5", "seed=3"]),), expected)


def test_distill(runs: Any, recipe: str) -> None:
    done("distill", "--recipe", recipe, "--output", "out")
    assert runs.call == (
        "run_distill",
        (load_recipe(recipe),),
        {"output": Path("out"), "requeue": False, "report": True, "measure": True},
    )
    done("distill", "--recipe", recipe, "--no-report")
    assert runs.calls[-1][2]["report"] is False


def test_bench(runs: Any, recipe: str) -> None:
    shown = done("bench", recipe, "--steps", "7", "--set", "seed=2")
    assert runs.call == ("profile_distill", (load_recipe(recipe, ["seed=2"]),), {"steps": 7})
    assert "20.0 images/s; the loader alone: 312.5 images/s (2 processes); peak memory 812 MB" in shown.stdout
    assert "the recipe's 900 steps would take 6 min 00 s without evaluations" in shown.stdout


def test_compare(runs: Any, recipe: str) -> None:
    asked = ("--methods", "none, sgfi+ckd,pkd", "--steps", "500,8000", "--seeds", "2", "--baseline", "pkd")
    shown = done("compare", recipe, *asked, "--json")
    expected = {"methods": ("none", "sgfi+ckd", "pkd"), "steps": (500, 8000), "seeds": 2, "jobs": 1, "output": None}
    expected |= {"baseline": "pkd", "folds": None, "launcher": None}
    assert runs.call == ("run_compare", (load_recipe(recipe),), expected)
    assert json.loads(shown.stdout)["rows"][1]["interval"] == [4.24, 6.86]
    assert json.loads(shown.stdout)["interval_over"] == "seeds and images"
    done("compare", recipe)
    assert runs.calls[-1][2]["methods"] == ()  # the run chooses


def test_advise(runs: Any, recipe: str) -> None:
    shown = done("advise", recipe, "--share", "0.2", "--methods", "sgfi, pkd", "--seeds", "2", "--output", "out")
    expected = {"methods": ("sgfi", "pkd"), "share": 0.2, "seeds": 2, "jobs": 1, "output": Path("out")}
    assert runs.call == ("run_advise", (load_recipe(recipe),), expected)
    for line in ("500 of 5,000 steps", "teacher: AP 52.8", "Expect a gain: sgfi+ckd is +5.5 AP ahead."):
        assert line in shown.stdout
    assert "next: gdetkd distill out/recommended.yaml" in shown.stdout
    done("advise", recipe)
    assert "methods" not in runs.calls[-1][2]
    assert json.loads(done("advise", recipe, "--json").stdout)["verdict"]["expected"] == [8.2, 1.2, 15.0]


@pytest.mark.parametrize("kind", ["weak teacher", "no gain", "too early"])
def test_advice_against_a_run_names_no_command(runs: Any, recipe: str, kind: Any) -> None:
    advised = runs.results["run_advise"]
    verdict = dataclasses.replace(advised.verdict, kind=kind)
    runs.results["run_advise"] = dataclasses.replace(advised, verdict=verdict)
    assert "next:" not in done("advise", recipe).stdout


def test_compare_over_folds(runs: Any, recipe: str) -> None:
    done("compare", recipe, "--folds", "5")
    assert runs.call is not None and runs.call[2]["folds"] == 5
    shown = gdetkd("compare", recipe, "--folds", "1")
    assert shown.exit_code == 2
    assert "--folds" in shown.stderr


def test_compare_ends_with_an_error_where_runs_did_not_finish(runs: Any, recipe: str) -> None:
    failed = dataclasses.replace(runs.results["run_compare"], failures=("pkd, 500 steps, seed 0: loss not finite",))
    runs.results["run_compare"] = failed
    shown = gdetkd("compare", recipe)
    assert shown.exit_code == 1
    assert "sgfi+ckd" in shown.stdout  # the table of the others, all the same
    assert "Error: 1 trial failed; the first: pkd, 500 steps, seed 0: loss not finite" in shown.stderr
    shown = gdetkd("compare", recipe, "--json")
    assert shown.exit_code == 1
    assert json.loads(shown.stdout)["failures"] == list(failed.failures)  # one document, not a second one of the error
    assert "Error: 1 trial failed" in shown.stderr


@pytest.mark.parametrize("steps", ["500,", "0", "many"])
def test_compare_wants_budgets_that_are_numbers(recipe: str, steps: str) -> None:
    shown = gdetkd("compare", recipe, "--steps", steps)
    assert shown.exit_code == 2
    assert f"--steps: expected whole numbers joined by commas, as in 500,8000; got '{steps}'" in shown.stderr


def test_distill_dry_run(runs: Any, recipe: str) -> None:
    shown = done("distill", "--recipe", recipe, "--dry-run")
    assert runs.call == ("plan_distill", (load_recipe(recipe),), {})
    assert "left out" in shown.stdout


def test_distill_profile(runs: Any, recipe: str) -> None:
    shown = done("distill", "--recipe", recipe, "--profile", "20")
    assert runs.call == ("profile_distill", (load_recipe(recipe),), {"steps": 20})
    assert "a distillation step takes" in shown.stdout


@pytest.mark.parametrize("command", ["train", "distill"])
def test_resume(runs: Any, command: str) -> None:
    done(command, "--resume", "runs/tiny")
    expected = {"run": Path("runs/tiny"), "steps": None, "force": False, "measure": True}
    assert runs.call == ("resume_run", (), expected | ({"report": True} if command == "distill" else {}))


@pytest.mark.parametrize("command", ["train", "distill"])
def test_a_run_is_extended(runs: Any, command: str) -> None:
    done(command, "--resume", "runs/tiny", "--steps", "9", "--force", "--no-measure")
    expected = {"run": Path("runs/tiny"), "steps": 9, "force": True, "measure": False}
    assert runs.call == ("resume_run", (), expected | ({"report": True} if command == "distill" else {}))
    done("distill", "--resume", "runs/tiny", "--no-report")
    assert runs.calls[-1][2]["report"] is False


@pytest.mark.parametrize("command", ["train", "distill"])
def test_a_requeued_job(runs: Any, command: str, recipe: str) -> None:
    done(command, "--recipe", recipe, "--output", "out", "--resume", "auto")
    assert runs.call[2]["output"] == Path("out")
    assert runs.call[2]["requeue"] is True


def test_eval(runs: Any, recipe: str, tmp_path: Path) -> None:
    (tmp_path / "val.json").write_text("{}")
    done("eval", "runs/tiny")
    done("eval", "runs/tiny", "--data", recipe)
    done("eval", "student.onnx", "--data", str(tmp_path), "--classes", "cat, big dog")
    (tmp_path / "annotations").mkdir()
    done("eval", "student.onnx", "--data", str(tmp_path / "annotations"))
    assert runs.calls == [
        ("run_eval", ("runs/tiny",), {"data": None, "classes": ()}),
        ("run_eval", ("runs/tiny",), {"data": SyntheticData(), "classes": ()}),
        (
            "run_eval",
            ("student.onnx",),
            {"data": CocoData(format="coco", root=tmp_path), "classes": ("cat", "big dog")},
        ),
        ("run_eval", ("student.onnx",), {"data": tmp_path / "annotations", "classes": ()}),
    ]


@pytest.mark.parametrize("names", ["", "cat,,dog", "cat,dog,cat"])
def test_classes_that_are_no_list_of_names(runs: Any, names: str) -> None:
    shown = gdetkd("eval", "student.onnx", "--classes", names)
    assert shown.exit_code == 2
    assert "expected distinct class names" in shown.output


def test_export(runs: Any) -> None:
    shown = done("export", "runs/tiny", "--onnx", "--output", "x.onnx")
    expected = {"onnx": True, "torchscript": False, "output": Path("x.onnx"), "half": False, "int8": False}
    assert runs.call == ("run_export", ("runs/tiny",), {**expected, "safetensors": False, "opset": 17, "batch": None})
    assert "parity ok" in shown.stdout


def test_demo(runs: Any) -> None:
    done("demo", "--seed", "3", "--steps", "40", "--output", "out")
    assert runs.call == ("run_demo", (), {"seed": 3, "steps": 40, "output": Path("out")})


# ------------------------------------------------------------------------------------------------------- JSON, ranks

COMMANDS = [
    ["train", "--recipe", "tiny.yaml"],
    ["train", "--resume", "runs/tiny"],
    ["distill", "--recipe", "tiny.yaml"],
    ["distill", "--recipe", "tiny.yaml", "--dry-run"],
    ["distill", "--recipe", "tiny.yaml", "--profile", "3"],
    ["eval", "runs/tiny"],
    ["export", "runs/tiny", "--onnx", "--torchscript"],
    ["probe", "teacher.pt"],
    ["demo"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_json_is_one_document_and_nothing_else(runs: Any, recipe: str, arguments: list[str]) -> None:
    shown = done(*arguments, "--json")
    assert json.loads(shown.stdout)["schema"] == 1
    assert "step 20/600" in shown.stderr


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("extra", [[], ["--json"]], ids=["tables", "json"])
def test_other_ranks_are_silent(
    runs: Any, recipe: str, monkeypatch: pytest.MonkeyPatch, arguments: list[str], extra: list[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert done(*arguments, *extra).output == ""


def test_init(runs: Any) -> None:
    shown = done("init", "--teacher", "t.onnx", "--student", "resnet18+fcos", "--data", "d", "--output", "mine.yaml")
    arguments = ("t.onnx", "resnet18+fcos", Path("d"))
    assert runs.call == ("run_init", arguments, {"output": Path("mine.yaml"), "classes": ()})
    assert "mine.yaml: a heterogeneous pair" in shown.stdout
    assert "next: gdetkd distill --recipe mine.yaml --dry-run" in shown.stdout


def test_json_of_the_demo(runs: Any) -> None:
    document = json.loads(done("demo", "--json").stdout)
    row = {"AP", "AP50", "AP_S", "AP_M", "AP_L", "parameters", "size_mb", "ms_per_image"}
    for name in ("teacher", "student", "distilled"):
        assert row <= set(document[name])
    assert document["distilled"]["AP"] == 31.24
    assert document["distilled"]["AP_S"] is None
    rest = {"gain", "onnx_parity", "seconds", "steps", "seed", "output", "image", "verdict"}
    assert rest <= set(document)
    assert (document["onnx_parity"], document["image"]) == (True, "demo/image.png")


# ------------------------------------------------------------------------------------------------------------ recipes


def test_recipe_list_and_show(recipe: str) -> None:
    assert done("recipe", "list").stdout == "shapes/tiny  A tiny recipe\n"
    assert done("recipe", "show", "shapes/tiny").stdout == Path("shipped/shapes/tiny.yaml").read_text()


def test_recipe_list_of_nothing(recipe: str) -> None:
    Path("shipped/shapes/tiny.yaml").unlink()
    assert done("recipe", "list").stdout == ""


def test_recipe_init_writes_a_valid_recipe_once(recipe: str) -> None:
    shown = done("recipe", "init")
    assert shown.stdout == "recipe.yaml\n"
    assert shown.stderr == "Edit this file, then check it with: gdetkd recipe validate recipe.yaml\n"
    assert load_recipe("recipe.yaml").name == "my-detector"
    again = gdetkd("recipe", "init")
    assert again.exit_code == 2
    assert again.stderr == "Error: recipe.yaml already exists; choose another file: gdetkd recipe init PATH\n"


def test_recipe_init_elsewhere(recipe: str) -> None:
    assert done("recipe", "init", "a/b.yaml").stdout == "a/b.yaml\n"
    assert Path("a/b.yaml").read_text().startswith("# gdetkd distill --recipe a/b.yaml\n")


def test_recipe_init_where_nothing_can_be_written(recipe: str) -> None:
    shown = gdetkd("recipe", "init", "tiny.yaml/b.yaml")
    assert (shown.exit_code, shown.stderr) == (2, "Error: cannot write tiny.yaml/b.yaml: File exists\n")


def test_recipe_validate_prints_the_recipe_in_full(recipe: str) -> None:
    shown = done("recipe", "validate", recipe, "--set", "train.steps=99")
    Path("full.yaml").write_text(shown.stdout)
    assert load_recipe("full.yaml") == load_recipe(recipe, ["train.steps=99"])
    assert shown.stderr == "tiny.yaml is valid\n"


def test_recipe_validate_lists_every_problem(recipe: str) -> None:
    Path(recipe).write_text(Path(recipe).read_text().replace("steps: 10", "step: 10"))
    shown = gdetkd("recipe", "validate", recipe)
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr.splitlines() == [
        "Error: tiny.yaml:6: train.steps: this field is required",
        "tiny.yaml:6: train.step: unknown field; did you mean steps?",
    ]


def test_recipe_schema_is_json() -> None:
    assert json.loads(done("recipe", "schema").stdout)["title"] == "Recipe"


# ------------------------------------------------------------------------------------------------ version, help, speed


def test_version() -> None:
    assert done("--version").stdout == f"gdetkd {__version__}\n"


def test_nothing_typed_shows_where_to_start() -> None:
    shown = done().stdout
    assert "gdetkd demo" in shown and "gdetkd init --teacher" in shown and "gdetkd distill recipe.yaml" in shown
    assert "Commands:" not in shown
    assert "Commands:" in done("--help").stdout


def list_commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    for own, command in group.commands.items():
        full = f"{name} {own}".strip()
        yield from list_commands(command, full) if hasattr(command, "commands") else [(full, command)]


@pytest.mark.parametrize("name", [name for name, _ in list_commands(typer.main.get_command(app))])
def test_every_help_shows_an_example(name: str) -> None:
    assert f"Example: gdetkd {name}" in done(*name.split(), "--help").output


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = """
import sys
from gdetkd_cli.cli.app import main
sys.argv = ["gdetkd", "--help"]
try:
    main()
except SystemExit as ending:
    assert ending.code == 0
heavy = {"torch", "torchvision", "matplotlib", "onnx", "accelerate", "pydantic", "numpy", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    before = getrusage(RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = getrusage(RUSAGE_CHILDREN)  # the processor's time: other programs on the machine hardly change it
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_a_wrong_recipe_needs_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from gdetkd_cli.cli.app import main
sys.argv = ["gdetkd", "distill", "--recipe", "nowhere.yaml"]
try:
    main()
except SystemExit as ending:
    assert ending.code == 2
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_python_dash_m() -> None:
    environment = {**os.environ, "NO_COLOR": "1"}
    command = [sys.executable, "-m", "gdetkd_cli", "recipe", "show", "nowhere"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("Error: no recipe file or built-in recipe is named nowhere")
