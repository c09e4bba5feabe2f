"""Builds objects from a recipe. No other package turns configuration into objects."""

from gdetkd_cli.assembly.data import (
    SPLITS,
    Which,
    build_all_folds,
    build_split,
    needs_labels,
    read_split,
    report_bad_images,
)
from gdetkd_cli.assembly.detector import BuiltDetector, build_detector, format_title
from gdetkd_cli.assembly.distillation import TermPlan, build_pair
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
from gdetkd_cli.assembly.origin import describe_origin, hash_sources, list_differences, list_recipe_differences
from gdetkd_cli.assembly.runtime import apply_runtime, resize_again, resolve_runtime
from gdetkd_cli.assembly.setup import (
    Pair,
    TrainingSetup,
    adopt_runtime,
    build_recipe_pair,
    build_setup,
    start_compute,
)

__all__ = [
    "SPLITS",
    "BuiltDetector",
    "Pair",
    "TermPlan",
    "TrainingSetup",
    "Which",
    "adopt_runtime",
    "apply_runtime",
    "build_all_folds",
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
    "hash_sources",
    "list_differences",
    "list_recipe_differences",
    "list_views",
    "needs_labels",
    "read_split",
    "report_bad_images",
    "resize_again",
    "resolve_runtime",
    "start_compute",
]
