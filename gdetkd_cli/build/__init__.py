"""From a recipe to objects: the only place where configuration meets code."""

from gdetkd_cli.build.data import build_batches, build_split, relabel
from gdetkd_cli.build.detector import BuiltDetector, build_detector, title_of
from gdetkd_cli.build.pair import BuiltPair, build_pair
from gdetkd_cli.build.runtime import apply_runtime, resolve_runtime

__all__ = [
    "BuiltDetector",
    "BuiltPair",
    "apply_runtime",
    "build_batches",
    "build_detector",
    "build_pair",
    "build_split",
    "relabel",
    "resolve_runtime",
    "title_of",
]
