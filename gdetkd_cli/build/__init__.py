"""From a recipe to objects: the only place where configuration meets code."""

from gdetkd_cli.build.data import (
    SPLITS,
    Which,
    all_folds,
    build_batches,
    build_split,
    needs_labels,
    relabel,
    unlabelled_split,
)
from gdetkd_cli.build.detector import BuiltDetector, build_detector, title_of
from gdetkd_cli.build.pair import BuiltPair, build_pair
from gdetkd_cli.build.runtime import apply_runtime, resolve_runtime

__all__ = [
    "SPLITS",
    "BuiltDetector",
    "BuiltPair",
    "Which",
    "all_folds",
    "apply_runtime",
    "build_batches",
    "build_detector",
    "build_pair",
    "build_split",
    "needs_labels",
    "relabel",
    "resolve_runtime",
    "title_of",
    "unlabelled_split",
]
