"""Builds objects from a recipe. No other package turns configuration into objects."""

from gdetkd_cli.assembly.data import (
    SPLITS,
    Which,
    build_all_folds,
    build_batches,
    build_split,
    needs_labels,
    read_split,
    read_unlabelled_split,
    relabel,
    report_bad_images,
)
from gdetkd_cli.assembly.detector import BuiltDetector, build_detector, format_title
from gdetkd_cli.assembly.distillation import BuiltPair, TermPlan, build_pair
from gdetkd_cli.assembly.knowledge import (
    build_views,
    check_taught,
    claim_folder,
    count_teacher_runs,
    describe_countless_views,
    describe_teacher,
    estimate_bytes,
    list_views,
)
from gdetkd_cli.assembly.origin import describe_origin, list_differences, list_recipe_differences
from gdetkd_cli.assembly.runtime import apply_runtime, resolve_runtime, set_memory_format
from gdetkd_cli.assembly.setup import (
    Compute,
    Pair,
    TrainingSetup,
    adopt_runtime,
    build_accelerator,
    build_recipe_pair,
    build_setup,
    start_compute,
)

__all__ = [
    "SPLITS",
    "BuiltDetector",
    "BuiltPair",
    "Compute",
    "Pair",
    "TermPlan",
    "TrainingSetup",
    "Which",
    "adopt_runtime",
    "apply_runtime",
    "build_accelerator",
    "build_all_folds",
    "build_batches",
    "build_detector",
    "build_pair",
    "build_recipe_pair",
    "build_setup",
    "build_split",
    "build_views",
    "check_taught",
    "claim_folder",
    "count_teacher_runs",
    "describe_countless_views",
    "describe_origin",
    "describe_teacher",
    "estimate_bytes",
    "format_title",
    "list_differences",
    "list_recipe_differences",
    "list_views",
    "needs_labels",
    "read_split",
    "read_unlabelled_split",
    "relabel",
    "report_bad_images",
    "resolve_runtime",
    "set_memory_format",
    "start_compute",
]
