"""From a recipe to objects: the only place where configuration meets code."""

from gdetkd_cli.assembly.data import (
    SPLITS,
    Which,
    all_folds,
    build_batches,
    build_split,
    needs_labels,
    read_split,
    relabel,
    unlabelled_split,
)
from gdetkd_cli.assembly.detector import BuiltDetector, build_detector, title_of
from gdetkd_cli.assembly.distillation import BuiltPair, TermPlan, build_pair
from gdetkd_cli.assembly.runtime import apply_runtime, resolve_runtime
from gdetkd_cli.assembly.setup import (
    Compute,
    TrainingSetup,
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
    "TermPlan",
    "TrainingSetup",
    "Which",
    "all_folds",
    "apply_runtime",
    "build_accelerator",
    "build_batches",
    "build_detector",
    "build_pair",
    "build_recipe_pair",
    "build_setup",
    "build_split",
    "needs_labels",
    "read_split",
    "relabel",
    "resolve_runtime",
    "start_compute",
    "title_of",
    "unlabelled_split",
]
