"""A stand-in for ``gdetkd_cli.commands`` that remembers how it was called, and the results that it returns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gdetkd_cli.assembly.distillation import TermPlan
from gdetkd_cli.commands.advise import Advice
from gdetkd_cli.commands.bench import Profile
from gdetkd_cli.commands.demo import DemoResult, DemoRow
from gdetkd_cli.commands.evaluate import EvalResult
from gdetkd_cli.commands.export import ExportedFile, ExportResult
from gdetkd_cli.commands.plan import Plan
from gdetkd_cli.commands.train import TrainResult
from gdetkd_cli.commands.validate import CheckedRecipe
from gdetkd_cli.compare.table import Comparison, MethodRow
from gdetkd_cli.compare.verdict import Verdict
from gdetkd_cli.engine.events import Evaluated, Note, Observer, Phase, StepDone
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics
from gdetkd_cli.export.parity import Parity
from gdetkd_cli.recipe import builtin
from gdetkd_cli.report.pyramid import LevelReport, PyramidReport

RECIPE = """\
# gdetkd distill --recipe tiny
# A tiny recipe
name: tiny
data: {format: synthetic}
student: {arch: composed, backbone: resnet18, head: fcos}
train: {steps: 10}
"""

METRICS = CocoMetrics(
    ap=31.24,
    ap50=50.1,
    ap75=33.0,
    ap_small=None,
    ap_medium=30.0,
    ap_large=40.5,
    ar=45.0,
    per_class={"disc": 40.0, "[bold]box": None},
    images=200,
    detections=1234,
)
ROW = DemoRow(metrics=METRICS, parameters=1_230_000, size_mb=4.9, ms_per_image=12.34)
PARITY = Parity(images=8, empty=1, detections=57, max_box_error=0.0004, max_score_error=2e-6, passed=True)


def pyramid(source: str = "teacher.pt") -> PyramidReport:
    level = LevelReport("p2", 256, (120, 160), (4.0, 4.0), (2.0, 2.5), mean=0.1, std=1.5)
    return PyramidReport(
        source=source,
        format="torchvision",
        call="list of images",
        family="two-stage",
        levels=(level, LevelReport("p3", 256, (60, 80), (8.0, 8.0), (4.0, 4.0), None, None)),
        region_embedding={"channels": 1024, "name": "roi_heads.box_head"},
        detections="boxes, scores and labels of each image",
        size=(480, 640),
        classes=("disc", "box"),
        parameters=41_000_000,
    )


def plan() -> Plan:
    return Plan(
        recipe="tiny",
        pair="homogeneous: two-stage -> two-stage",
        student=pyramid("student"),
        teacher=pyramid("teacher"),
        terms=(
            TermPlan("sgfi", 1.0, "configured"),
            TermPlan("class_kd", None, "the class lists differ"),
        ),
        head_transfer="nothing: shapes differ",
        losses={"loss": 3.21, "sgfi": 0.5},
        device="cpu",
        precision="fp32",
        threads=2,
        steps=600,
        batch_size=8,
        train_images=1200,
        val_images=200,
        peak_memory_mb=812.0,
        seconds_per_step=0.53,
        estimated_seconds=318.0,
        notes=("teacher: 91 classes",),
    )


TRAINED = TrainResult(
    run=Path("runs/tiny"), steps=600, metrics=METRICS, seconds=318.2, seconds_per_step=0.5, peak_memory_mb=800.0
)
EVALUATED = EvalResult(
    source="runs/tiny",
    format="run",
    data="synthetic",
    metrics=METRICS,
    parameters=1_230_000,
    size_mb=4.9,
    ms_per_image=12.34,
)
PROFILED = Profile(
    steps=20,
    seconds={"data": 0.01, "backward": 0.2},
    step=0.4,
    images_per_second=20.0,
    loader_images_per_second=312.5,
    workers=2,
    peak_memory_mb=812.0,
    recipe_steps=900,
    recipe_hours=0.1,
    floor=0.3,
    ratio=1.3,
    device="cpu",
    threads=2,
)
EXPORTED = ExportResult(
    source="runs/tiny",
    files=(ExportedFile(Path("runs/tiny/student.onnx"), "onnx", "torch.onnx, opset 17", 4.9, PARITY),),
)
DEMONSTRATED = DemoResult(
    teacher=ROW,
    student=ROW,
    distilled=ROW,
    gain=2.5,
    onnx_parity=True,
    seconds=181.0,
    steps=300,
    seed=0,
    output=Path("demo"),
    image=Path("demo/image.png"),
    verdict="Distillation helped.",
)

COMPARED = Comparison(
    recipe="tiny",
    baseline="none",
    teacher_ap=52.84,
    rows=(
        MethodRow("none", 500, {0: 30.0, 1: 32.0}, mean=31.0, deviation=1.41, ap_medium=33.3),
        MethodRow(
            "sgfi+ckd",
            500,
            {0: 36.0, 1: 37.0},
            mean=36.5,
            deviation=0.71,
            difference=5.5,
            interval=(4.24, 6.86),
            seconds_per_step=0.254,
            peak_memory_mb=812.4,
        ),
        MethodRow("pkd", 500, {}),
    ),
    notes=("plain training gains +0.4 AP from 250 to 500 steps: on its plateau",),
    failures=(),
    trials=Path("out/trials.csv"),
    table=Path("out/table.csv"),
    plot=Path("out/comparison.png"),
)


ADVISED = Advice(
    recipe="tiny",
    steps=500,
    full_steps=5000,
    verdict=Verdict(
        "gain", "sgfi+ckd", (5.5, 1.0, 10.0), (8.2, 1.2, 15.0), "Expect a gain: sgfi+ckd is +5.5 AP ahead."
    ),
    comparison=COMPARED,
    recommended=Path("out/recommended.yaml"),
)


RESULTS: dict[str, Any] = {
    "run_advise": ADVISED,
    "run_compare": COMPARED,
    "run_train": TRAINED,
    "run_distill": TRAINED,
    "resume_run": TRAINED,
    "plan_distill": plan(),
    "profile_distill": PROFILED,
    "run_eval": EVALUATED,
    "run_export": EXPORTED,
    "run_probe": pyramid(),
    "run_probe_to_recipe": pyramid(),
    "run_init": CheckedRecipe(
        "mine.yaml", "heterogeneous", pyramid("s"), pyramid("t"), plan().terms, plan().head_transfer
    ),
    "run_demo": DEMONSTRATED,
}


@dataclass
class FakeRuns:
    """What was called with what; ``fails`` is raised in place of a result."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=RESULTS.copy)
    fails: BaseException | None = None

    def function(self, name: str) -> Callable[..., Any]:
        def run(*args: Any, observer: Observer, **options: Any) -> Any:
            self.calls.append((name, args, options))
            observer(Phase("student"))
            observer(Note("wrote [bold]nothing"))
            observer(StepDone(20, 600, 1.234, {"sgfi": 0.5}, 1e-3, 35.25, 80.0))
            observer(Evaluated(20, METRICS))
            if self.fails is not None:
                raise self.fails
            return self.results[name]

        return run

    @property
    def call(self) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """The only call."""
        (only,) = self.calls
        return only


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    for variable in ("RANK", "LOCAL_RANK", "GDETKD_DEBUG"):
        monkeypatch.delenv(variable, raising=False)
    fake = FakeRuns()
    module = ModuleType("gdetkd_cli.commands")
    for name in RESULTS:
        setattr(module, name, fake.function(name))
    monkeypatch.setitem(sys.modules, "gdetkd_cli.commands", module)
    return fake


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe in the working directory, and another one that ships with gdetkd as ``shapes/tiny``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    shipped = tmp_path / "shipped" / "shapes"
    shipped.mkdir(parents=True)
    (shipped / "tiny.yaml").write_text(RECIPE)
    monkeypatch.setattr(builtin, "find_recipes_folder", lambda: shipped.parent)
    return "tiny.yaml"


@pytest.fixture
def metrics() -> CocoMetrics:
    return METRICS
