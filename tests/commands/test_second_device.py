"""Runs on a device that is not the CPU: no tensor is made on, or left on, the wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import torch
import toy
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from distilling import ALL_TERMS

from gdetkd_cli.assembly import setup
from gdetkd_cli.commands import profile_distill, run_distill
from gdetkd_cli.engine.device import ComputeSettings
from gdetkd_cli.engine.events import Event
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.recipe.distillation import Logit
from gdetkd_cli.recipe.methods import TERMS
from gdetkd_cli.recipe.schema import CheckpointDetector, FolderData, Recipe

# Of any pair; logits need two dense heads.
OTHERS = {name: settings() for name, settings in TERMS.items() if name not in (*ALL_TERMS, "logit")}


@contextmanager
def runs_elsewhere() -> Iterator[None]:
    """Every run in this block uses the second device."""
    resolve = setup.resolve_runtime

    def resolved(*args: Any, **kwargs: Any) -> ComputeSettings:
        return replace(resolve(*args, **kwargs), device=elsewhere.ELSEWHERE.type)

    with pytest.MonkeyPatch.context() as patch, elsewhere.machine():
        patch.setattr(setup, "resolve_runtime", resolved)
        patch.setattr(Accelerator, "device", elsewhere.ELSEWHERE)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def with_student(head: str, *, teacher: str = "faster-rcnn", **distill: Any) -> Recipe:
    recipe = toy.recipe(steps=2, student=head, teacher=teacher)
    assert recipe.distill is not None
    changed: dict[str, Any] = {
        "distill": recipe.distill.model_copy(update=distill),
        # Elsewhere sums have another order in that layout, and one in the last bit chooses other regions.
        "runtime": recipe.runtime.model_copy(update={"channels_last": False}),
    }
    return recipe.model_copy(update=changed)


def _without_annotations(folder: Path) -> Recipe:
    """The teacher's own detections are the truth."""
    toy.write_images(folder, [f"{i}.png" for i in range(10)])
    data = FolderData.model_validate({"format": "folder", "root": folder})
    teacher = CheckpointDetector(arch="checkpoint", path="builtin:shapes-teacher")
    return with_student("fcos").model_copy(update={"data": data, "teacher": teacher})


def _losses(run: Path) -> list[dict[str, float]]:
    lines = (line for line in RunFolder(run).read_log() if "loss" in line)
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def test_tensors_of_two_devices_do_not_mix() -> None:
    with elsewhere.machine():
        away = torch.arange(4.0, device=elsewhere.ELSEWHERE)
        with pytest.raises(RuntimeError, match=r"a tensor of the CPU, \(4,\), among others that are elsewhere"):
            away + torch.ones(4)
        with pytest.raises(RuntimeError, match="a tensor of the CPU"):
            torch.ones(4)[away.long()]
        assert (away + torch.tensor(1.0)).tolist() == [1.0, 2.0, 3.0, 4.0]  # a scalar, as with CUDA
        assert away[torch.tensor([3, 0])].cpu().tolist() == [3.0, 0.0]  # and an index
        assert (away.new_tensor([2.0]) * away[[1]]).device == elsewhere.ELSEWHERE


# PyTorch's own "meta" tensors have no values; these do, and are copied.
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")
@pytest.mark.parametrize(
    "case", ["faster-rcnn", "cascade-rcnn", "retinanet", "fcos", "other methods", "two RetinaNets", "no annotations"]
)
def test_a_run_elsewhere_is_the_run_on_a_cpu(case: str, tmp_path: Path) -> None:
    if case == "other methods":
        recipe = with_student("fcos", sgfi=None, **OTHERS)
    elif case == "two RetinaNets":
        recipe = with_student("retinanet", teacher="retinanet", logit=Logit(), head_transfer=True)
    elif case == "no annotations":
        recipe = _without_annotations(tmp_path / "images")
    else:
        recipe = with_student(case)
    here = run_distill(recipe, output=tmp_path / "here")
    with runs_elsewhere():
        away = run_distill(recipe, output=tmp_path / "away")
    for mine, other in zip(_losses(here.run), _losses(away.run), strict=True):
        assert other == pytest.approx(mine, rel=1e-5)
    assert away.metrics == here.metrics
    weights = [torch.load(one.run / "student.pt", weights_only=True)["model"] for one in (here, away)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")
def test_a_step_is_timed_elsewhere() -> None:
    with runs_elsewhere():
        profile = profile_distill(with_student("faster-rcnn"), steps=1)
    assert {"student forward", "teacher", "term sgfi", "backward", "optimizer"} <= profile.seconds.keys()


@pytest.mark.reports
@pytest.mark.parametrize("student", ["faster-rcnn", "retinanet"])
def test_a_run_is_measured_elsewhere(student: str, tmp_path: Path) -> None:
    notes: list[Event] = []
    recipe = with_student(student)
    with runs_elsewhere():
        run = run_distill(recipe, output=tmp_path / "run", observer=notes.append).run

    assert RunFolder(run).measured.exists(), notes
    assert RunFolder(run).report.exists(), notes
