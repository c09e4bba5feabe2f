"""What passes between the command line and each ``run_*``: plain data; results are rendered, or printed as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gdetkd_cli.evaluation.coco_metrics import CocoMetrics


@dataclass(frozen=True)
class ProbeOptions:
    """How to probe.

    Attributes:
        size: (height, width) pixels of the picture; None: the only size that the model takes, else 480 x 640.
        scale, mean, std, bgr: what a model of unknown code wants its pictures to be, as ``ModelInput`` has it.
        last: a model of unknown code takes its pictures as (H, W, 3).
        levels: names of the levels, where someone knows better.
        image: file of the picture that the levels' values are looked at on; None: a built-in pattern.
        plot: file to draw the levels' activations over the picture into.
    """

    size: tuple[int, int] | None = None
    scale: float | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    bgr: bool = False
    last: bool = False
    levels: tuple[str, ...] = ()
    image: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class LevelReport:
    """One pyramid level.

    ``stride`` and ``offset`` are (y, x) in pixels; ``shape`` is (H, W) cells; ``mean`` and ``std`` are of its values on
    the picture that was looked at, None where they are not finite.
    """

    name: str
    channels: int
    shape: tuple[int, int]
    stride: tuple[float, float]
    offset: tuple[float, float]
    mean: float | None
    std: float | None


@dataclass(frozen=True)
class Alternative:
    """Other maps that might be meant as the levels, by name, and why."""

    levels: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class PyramidReport:
    """What probing found.

    Attributes:
        source: what was probed, as the user named it.
        format: ``torchvision``, ``torchscript``, ``exported``, ``onnx``, ``factory`` or ``run``.
        call: how the model takes its input.
        family: ``two-stage``, ``dense``, or ``unknown``.
        levels: fine to coarse.
        region_embedding: channels of the region embedding, and where it is read.
        detections: in which form it returns what it detects; None where that is not known.
        size: (height, width) pixels of the probe image.
        classes: class names; empty where they are unknown.
        parameters: number of parameters.
        reason: why these are the levels.
        confidence: how often this reason was right over the detectors in docs/probe.md, in 0..1; 1 where the
            architecture is known.
        alternatives: runners-up.
    """

    source: str
    format: str
    call: str
    family: str
    levels: tuple[LevelReport, ...]
    region_embedding: dict[str, object] | None
    detections: str | None
    size: tuple[int, int]
    classes: tuple[str, ...]
    parameters: int
    reason: str = "the architecture is known"
    confidence: float = 1.0
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class TermPlan:
    """One distillation term of a plan: computed with this weight, or left out and why."""

    name: str
    weight: float | None
    reason: str


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe whose detectors were built and probed as a pair.

    Attributes:
        recipe: the file, or the built-in recipe's name.
        pair: ``homogeneous`` or ``heterogeneous``.
        student, teacher: the pyramids, at the recipe's image size.
        terms: each term, its weight or why it is left out.
        head_transfer: what was copied from the teacher's head, or why nothing was; one sentence.
        changes: what ``--set`` changed in it.
    """

    recipe: str
    pair: str
    student: PyramidReport
    teacher: PyramidReport
    terms: tuple[TermPlan, ...]
    head_transfer: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a distillation would do, after everything was built and one step was run.

    Attributes:
        pair: ``homogeneous`` or ``heterogeneous``, with the families: "two-stage -> dense".
        student, teacher: the pyramids.
        terms: each term, its weight or why it is left out.
        head_transfer: what was copied from the teacher's head, or why nothing was; one sentence.
        losses: the one step's losses by name.
        device, precision: as resolved. threads: CPU threads.
        peak_memory_mb: of the process (CPU) or the device (CUDA).
        seconds_per_step: the median of the few steps that were timed.
        estimated_seconds: seconds_per_step times the recipe's steps.
        notes: what was said while building.
    """

    recipe: str
    pair: str
    student: PyramidReport
    teacher: PyramidReport
    terms: tuple[TermPlan, ...]
    head_transfer: str
    losses: dict[str, float]
    device: str
    precision: str
    threads: int
    steps: int
    batch_size: int
    train_images: int
    val_images: int
    peak_memory_mb: float
    seconds_per_step: float
    estimated_seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profile:
    """Where the time of a distillation step goes.

    Attributes:
        steps: steps measured, after a warm-up.
        seconds: median seconds per step and phase: data, teacher, student forward, each term, backward, optimizer.
        step: median seconds of the whole distillation step, data included.
        images_per_second: of distillation.
        loader_images_per_second: of the loader alone, with its ``workers`` processes (0: in this one).
        peak_memory_mb: of the process (CPU) or the device (CUDA).
        recipe_steps, recipe_hours: of the whole recipe at this speed, evaluations not counted.
        floor: median seconds of teacher features plus a plain supervised student step, measured in the same run,
            alternating with the distillation steps.
        ratio: step / floor, both without data.
    """

    steps: int
    seconds: dict[str, float]
    step: float
    images_per_second: float
    loader_images_per_second: float
    workers: int
    peak_memory_mb: float
    recipe_steps: int
    recipe_hours: float
    floor: float
    ratio: float
    device: str
    threads: int


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        metrics: the student's last evaluation.
        seconds: wall time of the whole run; of its last part, where it was resumed.
        seconds_per_step: the median over the run, data included.
        peak_memory_mb: of the process (CPU) or the device (CUDA).
    """

    run: Path
    steps: int
    metrics: CocoMetrics
    seconds: float
    seconds_per_step: float
    peak_memory_mb: float


@dataclass(frozen=True)
class MethodRow:
    """One method at one budget, over seeds.

    Attributes:
        ap: by seed; with folds, of the detections of all folds together.
        mean, deviation: of these; the deviation is None of a single seed.
        ap_small, ap_medium, ap_large: means over seeds.
        difference: mean over seeds of AP minus the baseline's of the same seed.
        interval: 95 % of that difference, over seeds and images together; with folds, over folds. None: too few of
            them to know, one seed for example.
        seed_deviation: standard deviation of the difference over seeds.
        image_deviation: standard deviation of the mean difference over validation images drawn again; None with folds.
        fold_deviation: standard deviation of the difference over folds, each a mean over seeds; None without folds.
        seconds_per_step, peak_memory_mb: medians over seeds.
    """

    method: str
    steps: int
    ap: dict[int, float]
    mean: float | None = None
    deviation: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    seed_deviation: float | None = None
    image_deviation: float | None = None
    fold_deviation: float | None = None
    seconds_per_step: float | None = None
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What ``gdetkd compare`` found.

    Attributes:
        baseline: the method that the rows' differences are to.
        teacher_ap: the teacher's own, on the same pictures; None where its detections cannot be read.
        rows: by budget and method, in the order asked for; a row without AP was not run.
        notes: what the table can show and what it cannot.
        failures: cells that did not finish, and why.
        cells, table, plot: files written.
        folds: of the cross-validation; None: one training and one validation split.
        interval_over: what the rows' intervals cover: ``seeds and images``, or ``folds``.
    """

    recipe: str
    baseline: str
    teacher_ap: float | None
    rows: tuple[MethodRow, ...]
    notes: tuple[str, ...]
    failures: tuple[str, ...]
    cells: Path
    table: Path
    plot: Path
    folds: int | None = None
    interval_over: str = "seeds and images"


@dataclass(frozen=True)
class EvalResult:
    """An evaluated detector. ``format`` is ``run``, ``checkpoint``, ``onnx``, ``torchscript``, ``exported``, …"""

    source: str
    format: str
    data: str
    metrics: CocoMetrics
    parameters: int | None
    size_mb: float
    ms_per_image: float


@dataclass(frozen=True)
class Parity:
    """An exported file against the eager detector.

    Attributes:
        images: pictures compared, of different sizes. empty: how many of them had no detection.
        detections: boxes compared in all.
        max_box_error: largest difference of a box coordinate, pixels.
        max_score_error: largest difference of a score.
        passed: within tolerance, same number of boxes and same labels on every picture.
        unmatched: boxes without a counterpart of the same class on the other side.
    """

    images: int
    empty: int
    detections: int
    max_box_error: float
    max_score_error: float
    passed: bool
    unmatched: int = 0


@dataclass(frozen=True)
class ExportedFile:
    """One written file. ``exporter`` names the path used, for example ``torch.onnx TorchScript, opset 17``."""

    path: Path
    format: str
    exporter: str
    size_mb: float
    parity: Parity


@dataclass(frozen=True)
class ExportResult:
    """What ``gdetkd export`` wrote."""

    source: str
    files: tuple[ExportedFile, ...]


@dataclass(frozen=True)
class DemoRow:
    """One detector of the demo's table."""

    metrics: CocoMetrics
    parameters: int
    size_mb: float
    ms_per_image: float


@dataclass(frozen=True)
class DemoResult:
    """The demo's outcome. ``gain`` is distilled AP minus plain AP; ``steps`` of each student training.

    ``verdict`` says in one or two sentences what the table shows: faster at a short budget, or better in the end.
    """

    teacher: DemoRow
    student: DemoRow
    distilled: DemoRow
    gain: float
    onnx_parity: bool
    seconds: float
    steps: int
    seed: int
    output: Path
    picture: Path
    verdict: str
    notes: tuple[str, ...] = field(default=())
