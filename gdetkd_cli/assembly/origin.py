"""What a run was made of, so that a resumed run is the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.errors import RecipeError
from gdetkd_cli.knowledge.folder import KEY_FILE
from gdetkd_cli.recipe.differences import find_changed_fields
from gdetkd_cli.recipe.load import validate_recipe
from gdetkd_cli.recipe.schema import CheckpointDetector, Detector, KnowledgeDetector, Recipe, TransformersDetector

# Fields that do not change the student, or whose content is compared instead: a folder may move.
_MAY_DIFFER = {
    "data.root",
    "data.train",
    "data.val",
    "data.train_images",
    "data.val_images",
    "data.on_bad_sample",
    "data.max_bad_samples",
    "teacher.path",
    "distill.teacher_cache_dir",
    "distill.teacher_cache_gb",
    "train.checkpoint_every",
    "train.evaluate_every",
    "train.keep_checkpoints",
    "train.stop_after",
    "runtime.threads",
    "runtime.workers",
    "runtime.cache_mb",
    "runtime.trackers",
}


def describe_origin(recipe: Recipe, train: Split, val: Split) -> dict[str, Any]:
    """The recipe and ``hash_sources``, as JSON."""
    return {"recipe": recipe.model_dump(mode="json"), **hash_sources(recipe, train, val)}


def hash_sources(recipe: Recipe, train: Split, val: Split) -> dict[str, str | None]:
    """Hashes both splits' annotations and the teacher's file, by what they are."""
    return {
        "training images and annotations": _hash_split(train),
        "validation images and annotations": _hash_split(val),
        "teacher's file": hash_detector(recipe.teacher),
    }


def list_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes each difference between two origins; an empty list if the run is the same."""
    found = list_recipe_differences(_complete(before.get("recipe", {})), now["recipe"])
    return found + [f"{name} changed" for name in now if name != "recipe" and before.get(name) != now[name]]


def _complete(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds the fields that the version which wrote them did not have, with their defaults, which change no run."""
    try:
        return validate_recipe(fields).model_dump(mode="json")
    except RecipeError:  # it has fields that this version does not have; they are differences
        return fields


def list_recipe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes each field that differs between two dumped recipes and can change the run's numbers."""
    return [
        f"{name} was {json.dumps(old)} and is {json.dumps(new)}"
        for name, (old, new) in find_changed_fields(before, now).items()
        if name not in _MAY_DIFFER
    ]


def _hash_split(split: Split) -> str:
    """Hashes names of classes, and ids, sizes and annotations of the images."""
    digest = hashlib.sha256(json.dumps(split.class_names).encode())
    for record in split.records:
        truth = [[one["bbox"], one["category_id"], one["iscrowd"]] for one in record.truth]
        digest.update(json.dumps([record.image_id, record.size, truth]).encode())
        digest.update(record.boxes.numpy().tobytes() + record.labels.numpy().tobytes())
    return digest.hexdigest()


def hash_detector(spec: Detector | None) -> str | None:
    """Hashes the file of a detector's weights, or the files of a folder of transformers; None without a file."""
    if isinstance(spec, KnowledgeDetector):
        return hashlib.sha256((Path(spec.path) / KEY_FILE).read_bytes()).hexdigest()
    if isinstance(spec, TransformersDetector):
        return _hash_folder(Path(spec.model)) if spec.model and Path(spec.model).is_dir() else None
    name = spec.path if isinstance(spec, CheckpointDetector) else getattr(spec, "weights", None)
    if name is None or not (name.startswith("builtin:") or Path(name).exists()):
        return None  # fresh weights, or a name that torchvision publishes
    path = catalog.locate(name)
    return _hash_folder(path.parent) if path.name == catalog.FOLDER_CONFIG else _hash_file(path)


def _hash_folder(folder: Path) -> str:
    """Hashes the configuration and the weights in a folder of transformers."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return hashlib.sha256(json.dumps([[path.name, _hash_file(path)] for path in files]).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
