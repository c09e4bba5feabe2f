"""What short runs say of the whole ones: the rules by hand-made numbers, and the command on a toy."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy

from gdetkd_cli.commands import run_advise
from gdetkd_cli.compare.table import MethodRow
from gdetkd_cli.compare.trials import find_finished_trials
from gdetkd_cli.compare.verdict import judge, predict
from gdetkd_cli.recipe.load import load_recipe


def rows(plain: float, seeds: int = 1, **methods: float) -> list[MethodRow]:
    aps = {"none": plain, **methods}
    return [
        MethodRow(
            method=name,
            steps=200,
            ap=dict.fromkeys(range(seeds), ap),
            mean=ap,
            difference=None if name == "none" else ap - plain,
            image_deviation=None if name == "none" else 0.0,
        )
        for name, ap in aps.items()
    ]


def test_a_gain_is_predicted_along_the_logistic_curve() -> None:
    """The teacher's 78.6 AP times 1.05 is 82.53. Odds of plain and distilled AP times exp(1.2 ln 10) = 15.849:
    2.0 / 80.53 gives 82.53 x 0.39362 / 1.39362 = 23.310; 8.3 / 74.23 gives 82.53 x 1.77214 / 2.77214 = 52.759."""
    gain, low, high = predict(2.0, (6.3, 1.8, 10.8), 78.6, 10)
    assert gain == pytest.approx(52.759 - 23.310, abs=1e-2)
    assert low < gain < high
    assert predict(2.0, (6.3, 6.3, 6.3), 78.6, 1) == pytest.approx((6.3, 6.3, 6.3))


def test_a_gain_needs_an_interval_above_zero() -> None:
    """Half of the interval is 1.96 x 2.3 = 4.51 with one seed, and 1.96 x 2.3 / 2 = 2.25 with four."""
    found = judge(rows(20.0, roi_imitation=23.0, gdetkd=25.0), 60.0, 10)
    assert (found.kind, found.method) == ("gain", "gdetkd")
    assert found.seen == pytest.approx((5.0, 0.49, 9.51), abs=0.01)
    assert found.expected is not None
    assert "gdetkd gains +5.0 AP over plain training (+0.5 to +9.5)" in found.sentence
    unclear = judge(rows(20.0, gdetkd=24.0), 60.0, 10)
    assert (unclear.kind, unclear.expected) == ("unclear", None)
    assert judge(rows(20.0, seeds=4, gdetkd=24.0), 60.0, 10).kind == "gain"
    early = judge(rows(3.0, gdetkd=6.0), 60.0, 10)  # 1.96 x 0.2 x 6.0 = 2.35
    assert early.seen == pytest.approx((3.0, 0.65, 5.35), abs=0.01)


@pytest.mark.parametrize(
    ("plain", "teacher", "kind", "words"),
    [
        (30.0, 29.0, "weak teacher", "too weak: it has 29.0 AP, and plain training 30.0"),
        (30.0, 31.5, "no gain", "within 1.5 AP of the teacher (31.5)"),
        (0.5, 60.0, "too early", "Repeat with a larger --share"),
        (30.0, 60.0, "gain", "Expect a gain"),
    ],
)
def test_kinds(plain: float, teacher: float, kind: str, words: str) -> None:
    found = judge(rows(plain, gdetkd=plain + (8.0 if kind == "gain" else 3.0)), teacher, 10)
    assert found.kind == kind
    assert words in found.sentence


def test_an_unknown_teacher_gives_no_size() -> None:
    found = judge(rows(20.0, gdetkd=30.0), None, 10)
    assert (found.kind, found.expected) == ("gain", None)
    assert "With all steps" not in found.sentence


def test_without_plain_training_or_a_method_there_is_no_answer() -> None:
    assert judge([], 50.0, 10).method is None
    assert judge(rows(20.0), 50.0, 10).kind == "unclear"


def test_a_larger_share_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its warm-up is longer, so its runs cannot continue the others."""
    monkeypatch.chdir(tmp_path)
    for share in (0.1, 0.2):
        run_advise(toy.recipe(steps=10, schedule={"warmup_steps": 10}), share=share, methods=("sgfi",))
    assert sorted(path.name for path in Path("runs").iterdir()) == ["advise-toy-1", "advise-toy-2"]


def test_the_command_runs_a_share_of_the_steps_and_writes_the_whole_recipe(tmp_path: Path) -> None:
    recipe = toy.recipe(steps=20)
    found = run_advise(recipe, share=0.1, methods=("sgfi",), output=tmp_path / "out")
    assert (found.steps, found.full_steps) == (2, 20)
    assert [(trial.method, trial.steps) for trial in find_finished_trials(tmp_path / "out")] == [
        ("none", 2),
        ("sgfi", 2),
    ]
    short = load_recipe(tmp_path / "out" / "none-2-0" / "recipe.yaml")
    assert short.train.schedule.warmup_steps == -(-recipe.train.schedule.warmup_steps // 10)
    assert found.recommended is not None
    whole = load_recipe(found.recommended)
    assert whole.train.steps == 20
    assert whole.train.schedule == recipe.train.schedule
    assert whole.distill is not None and whole.distill.sgfi and not whole.distill.ckd
