"""Builds, saves and loads a ``Detector``. Only this file decides which family a module belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from gdetkd_cli import portable
from gdetkd_cli.detectors import transformers
from gdetkd_cli.detectors.factory import make
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.detectors.recognise import recognise
from gdetkd_cli.detectors.saved import FILE_VERSION, check_description, read_saved
from gdetkd_cli.detectors.torchvision.dense import DenseDetector
from gdetkd_cli.detectors.torchvision.two_stage import TwoStageDetector
from gdetkd_cli.detectors.trainable import TrainableDetector
from gdetkd_cli.detectors.weights import (
    CLASS_LAYERS,
    convert_to_float,
    extract_state_dict,
    list_torchvision_categories,
    load_state,
    read_torch_file,
)
from gdetkd_cli.errors import ModelError
from gdetkd_cli.files import name_kind, write_file
from gdetkd_cli.memory import check_memory
from gdetkd_cli.probing.inputs import ModelInput

_SIZES = ("backbone", "width", "blocks", "pyramid_channels", "arguments")  # fields that decide about the memory
PLACEHOLDER = "N/A"  # in torchvision's list of COCO's classes, an output that was trained for no class
FOLDER_CONFIG = "config.json"  # of a folder that transformers wrote
BUILTIN = Path(__file__).parent / "builtin"


def wrap(module: nn.Module, class_names: Sequence[str]) -> Detector:
    """Wraps a torchvision module.

    Raises:
        ModelError: the module belongs to no supported family.
    """
    names = tuple(class_names)
    if isinstance(module, FasterRCNN):
        return TwoStageDetector(module=module, class_names=names)
    if isinstance(module, RetinaNet | FCOS | SSD):
        return DenseDetector(module=module, class_names=names)
    raise ModelError(
        f"{type(module).__name__} is not a supported detector; expected torchvision's Faster R-CNN, Mask R-CNN, "
        "RetinaNet, FCOS or SSD"
    )


def build(description: dict[str, Any], class_names: Sequence[str]) -> Detector:
    """Builds a detector with fresh weights from a description (see ``portable``; for the user's own code: ``factory``).

    Raises:
        ModelError: the description cannot be built.
    """
    check_description(description)
    if description["kind"] == "factory":
        return _build_custom(description, tuple(class_names))
    if description["kind"] == "transformers":
        return transformers.build(description, tuple(class_names))
    try:
        _check_memory(description, len(class_names))
        module = portable.build(description, len(class_names))
    except ValueError as error:
        raise ModelError(str(error)) from error
    return wrap(module, class_names)


def _check_memory(description: dict[str, Any], num_classes: int) -> None:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # takes no memory, and no random numbers
        sizes = [tensor.nbytes for tensor in portable.build(description, num_classes).state_dict().values()]
    named = ", ".join(f"{key} {value}" for key, value in description.items() if key in _SIZES and value is not None)
    check_memory(f"a detector with {named or description.get('name')} and {num_classes} classes", sum(sizes))


def _build_custom(description: dict[str, Any], class_names: tuple[str, ...]) -> Detector:
    """Calls the user's function, which returns a torchvision detector, a ``Detector``, or a module called like one."""
    reference = description["factory"]
    custom = make(reference, description["arguments"])
    if isinstance(custom, FasterRCNN | RetinaNet | FCOS | SSD):
        outputs = _count_outputs(custom)
        if outputs != len(class_names) + 1:
            raise ModelError(
                f"{reference} has {outputs} class outputs, but {len(class_names) + 1} were expected: background and "
                f"the {len(class_names)} classes of the data; set torchvision's num_classes"
            )
        return wrap(custom, class_names)
    if isinstance(custom, nn.Module):
        return TrainableDetector(
            module=custom,
            source=reference,
            class_names=class_names,
            model_input=ModelInput(**description["input"]),
            size=tuple(description["size"]),
            last=description.get("last", False),
            levels=tuple(description.get("levels") or ()),
        )
    detector: Detector = custom
    return detector


def _count_outputs(module: Any) -> int:
    """Counts the classes of a torchvision detector, background included."""
    if isinstance(module, FasterRCNN):
        return int(module.roi_heads.box_predictor.cls_score.out_features)
    head = module.head.classification_head
    return int(head.num_columns if isinstance(module, SSD) else head.num_classes)


def name_classes(
    state: dict[str, Tensor], description: dict[str, Any], data: tuple[str, ...], published: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Names the classes that weights were trained on.

    Args:
        description: of the detector they belong to.
        published: names that came with the weights.

    Returns:
        ``published`` or ``data``, whichever fits in number first; else numbered names.
    """
    with torch.device("meta"):  # only shapes are needed
        own = portable.build(description, 1).state_dict()
    # SSDlite's class layers begin with convolutions that do not depend on the classes, so the last one counts.
    name = [n for n in own if n.startswith(CLASS_LAYERS) and n.endswith("weight")][-1]
    if name not in state:
        return data  # loading reports what does not fit
    outputs = state[name].shape[0] * 2 // own[name].shape[0]  # with one class there are two outputs per anchor
    for names in (published, data):
        if names is not None and len(names) + 1 == outputs:
            return names
    return tuple(f"class {i}" for i in range(1, outputs))


def drop_placeholders(detector: Detector, description: dict[str, Any]) -> Detector:
    """Returns a torchvision detector without the outputs of its placeholder classes, in evaluation mode.

    torchvision's COCO weights have 90 outputs for 80 classes, because COCO's ids have gaps.

    Args:
        detector: with at least one other class.
    """
    kept = [i for i, name in enumerate(detector.class_names) if name != PLACEHOLDER]
    smaller = build(description, [detector.class_names[i] for i in kept])
    columns, outputs = torch.tensor([0, *(i + 1 for i in kept)]), len(detector.class_names) + 1
    own, state = smaller.module.state_dict(), {}
    for name, value in detector.module.state_dict().items():
        if value.shape != own[name].shape:
            # Rows of a RoI head: classes x coordinates. Of a dense head: anchors x classes.
            order, axis = ((outputs, -1), 0) if name.startswith("roi_heads.") else ((-1, outputs), 1)
            value = value.unflatten(0, order).index_select(axis, columns).flatten(0, 1)
        state[name] = value
    smaller.module.load_state_dict(state)
    smaller.module.eval()
    return smaller


class _HasClasses(Protocol):
    class_names: tuple[str, ...]


def rename_classes(detector: _HasClasses, names: Sequence[str], source: str) -> None:
    """Gives a detector the names that the user chose for its classes.

    Args:
        names: K names in the order of its labels.
        source: the detector's name in messages.

    Raises:
        ModelError: their number is not the detector's.
    """
    own = detector.class_names
    if len(names) != len(own):
        raise ModelError(
            f"{source} has {len(own)} classes ({_abbreviate(own)}), but {len(names)} are named ({_abbreviate(names)}); "
            "name each class once, in the order of the labels"
        )
    detector.class_names = tuple(names)


def _abbreviate(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def save(path: Path, detector: Detector, description: dict[str, Any]) -> None:
    """Writes only the detector: weights, description and class names; no pickled code."""
    state = {name: value.detach().cpu().contiguous() for name, value in detector.module.state_dict().items()}
    content = {
        "gdetkd": FILE_VERSION,
        "architecture": description,
        "classes": list(detector.class_names),
        "model": state,
    }
    size = sum(value.nbytes for value in state.values())
    write_file(path, lambda file: torch.save(content, file), size=size)


@dataclass(frozen=True)
class Loaded:
    """A detector from a file.

    Attributes:
        detector: in evaluation mode.
        description: rebuilds it (see ``portable``).
        origin: ``run`` if gdetkd wrote the file, ``state_dict`` if its architecture was recognised, ``transformers``
            for a folder that transformers wrote.
        notes: what was recognised and what was left out.
    """

    detector: Detector
    description: dict[str, Any]
    origin: Literal["run", "state_dict", "transformers"]
    notes: tuple[str, ...] = ()


def load(path: Path, class_names: tuple[str, ...] | None = None) -> Loaded:
    """Reads a file written by ``save``, or a state_dict of a torchvision detector.

    Args:
        class_names: names for a file without names, used if their number fits.

    Raises:
        ModelError: the file is missing or unreadable, or its architecture is unknown.
    """
    if path.name == FOLDER_CONFIG:
        loaded, description, _ = transformers.load_pretrained(
            str(path.parent), class_names or (), keep_classes=True, image_size=None
        )
        return Loaded(loaded, description, "transformers")
    content = read_torch_file(path)
    if not isinstance(content, dict) or "gdetkd" not in content:
        return _load_state_dict(extract_state_dict(content, str(path)), path, class_names)
    saved = read_saved(content, str(path))
    state = extract_state_dict(saved.model, str(path))
    try:
        detector = build(saved.architecture, saved.classes)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    own = detector.module.state_dict()
    wrong = [n for n in (*own, *state) if n not in own or n not in state or own[n].shape != state[n].shape]
    if wrong:
        raise ModelError(
            f"{path}: the weights do not fit the file's own architecture ({len(wrong)} of {len(own)} tensors, first "
            f"{wrong[0]})"
        )
    detector.module.load_state_dict(convert_to_float(state))
    detector.module.eval()
    return Loaded(detector, saved.architecture, "run")


def _load_state_dict(state: dict[str, Tensor], path: Path, class_names: tuple[str, ...] | None) -> Loaded:
    found = recognise(state, str(path))
    name = found.description["name"]
    names = name_classes(state, found.description, class_names or (), list_torchvision_categories("DEFAULT", name))
    detector = build(found.description, names)
    notes = [f"{path}: recognised as torchvision's {name}, {len(names)} classes"]
    if found.alternatives:
        notes.append(
            f"{path}: {', '.join(found.alternatives)} has the same parameters; if you mean it, name it in a recipe"
        )
    notes += load_state(detector.module, convert_to_float(state), str(path))
    detector.module.eval()
    return Loaded(detector, found.description, "state_dict", tuple(notes))


def locate(reference: str) -> Path:
    """Finds the file of a reference: ``builtin:NAME``, a run folder, a folder that transformers wrote, or a file.

    Raises:
        ModelError: the file does not exist.
    """
    if reference.startswith("builtin:"):
        path = BUILTIN / f"{reference.removeprefix('builtin:')}.pt"
        if not path.exists():
            known = sorted(f"builtin:{p.stem}" for p in BUILTIN.glob("*.pt"))
            near = portable.suggest(reference, known)
            raise ModelError(f"there is no built-in detector {reference!r}; expected one of: {', '.join(known)}{near}")
        return path
    path = Path(reference)
    if path.is_dir():
        names = ("student.pt", FOLDER_CONFIG)
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise ModelError(
                f"{path} has no student.pt and no {FOLDER_CONFIG}; expected the folder of a finished run, or one that "
                "transformers wrote"
            )
        return found
    if not path.exists():
        raise ModelError(
            f"{path}{name_kind(path)} does not exist; expected a run folder, a detector's file, or builtin:NAME"
        )
    if not path.is_file():
        raise ModelError(
            f"{path}{name_kind(path)} is not a regular file; expected a run folder, a detector's file, or builtin:NAME"
        )
    return path
