"""Rebuilds an eager detector from a TorchScript file, so that it can be trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.recognise import Recognised, recognise
from gdetkd_cli.detectors.torchvision.common import predict
from gdetkd_cli.detectors.weights import list_torchvision_categories, load_state
from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.formats.files import DESCRIPTION_FILE, load_torchscript
from gdetkd_cli.probing.formats.metadata import ARCHITECTURE, parse_notes, read_class_names
from gdetkd_cli.probing.pyramid import probe_image

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # torchvision's default
_SIZE = (256, 320)  # pixels of the image on which both forms are compared


class NotRebuiltError(ModelError):
    """The eager detector of a TorchScript file is unknown; its features can still teach.

    Attributes:
        reason: why not, without the file's name.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} can teach but cannot be trained: {reason}")
        self.reason = reason


def load_scripted(path: Path, class_names: tuple[str, ...]) -> catalog.Loaded:
    """Rebuilds the eager detector of a file that gdetkd exported, or of a scripted torchvision detector.

    A scripted detector is rebuilt with torchvision's settings and the file's preparation of images. It must then
    compute the same features and the same detections.

    Args:
        class_names: names for a file without names, used if their number fits.

    Raises:
        NotRebuiltError: it is neither of these, or the rebuilt detector gives other detections.
        ModelError: the file is not complete TorchScript.
    """
    files = {DESCRIPTION_FILE: ""}
    module = load_torchscript(path, extra_files=files).eval()
    state = module.state_dict()
    entries = parse_notes(files[DESCRIPTION_FILE])
    description, names = parse_notes(str(entries.get(ARCHITECTURE, ""))), read_class_names(entries)
    if description:
        state = {name.removeprefix("detector."): value for name, value in state.items()}
        detector = catalog.build(description, names)
        load_state(detector.module, state, str(path))
        detector.module.eval()
        return catalog.Loaded(detector, description, "run", (f"{path}: rebuilt as the detector that was exported",))
    if not state:
        raise NotRebuiltError(path, "it is frozen TorchScript and has no parameters")
    try:
        found = recognise(state, str(path))
    except ModelError as error:
        reason = "it is neither a file that gdetkd exported nor a scripted torchvision detector"
        raise NotRebuiltError(path, reason) from error
    for description in _list_descriptions(found, module):
        published = list_torchvision_categories("DEFAULT", description["name"])
        names = catalog.name_classes(state, description, class_names, published)
        detector = catalog.build(description, names)
        notes = load_state(detector.module, state, str(path))
        detector.module.eval()
        if _detect_alike(module, detector.module):
            title = f"torchvision's {description['name']}, {len(names)} classes"
            notes.append(f"{path}: rebuilt as {title}, which detects the same")
            return catalog.Loaded(detector, description, "state_dict", tuple(notes))
    raise NotRebuiltError(
        path,
        f"it has the weights of torchvision's {found.description['name']} but other settings, because the rebuilt "
        "detector gives other detections; name the architecture and its arguments in a recipe, and in `weights:` a "
        "file with only the weights",
    )


def _list_descriptions(found: Recognised, module: Any) -> Iterator[dict[str, Any]]:
    """Descriptions with these weights and possibly the file's settings."""
    # Some of torchvision's own weights need another epsilon for frozen normalisation, which no tensor shows.
    epsilons: list[dict[str, Any]] = [{}, {"norm_eps": 0.0}] if found.description["norm"] == "frozen" else [{}]
    for name, epsilon in product((found.description["name"], *found.alternatives), epsilons):
        arguments = {} if name.startswith("ssd") else _read_preparation(module)  # an SSD's architecture fixes it
        yield found.description | {"name": name, "arguments": arguments} | epsilon


def _read_preparation(module: Any) -> dict[str, Any]:
    """How a scripted detector resizes and normalises images, as arguments of torchvision's builder."""
    try:
        transform = module.transform
        size = {"min_size": list(transform.min_size), "max_size": int(transform.max_size)}
        own = {"image_mean": list(transform.image_mean), "image_std": list(transform.image_std)}
    except (AttributeError, TypeError):
        return {}
    return size if own == _IMAGENET else size | own


@torch.no_grad()
def _detect_alike(scripted: Any, eager: Any) -> bool:
    """Whether both prepare an image alike, and compute the same maps and the same detections from it."""
    image = probe_image(_SIZE)
    try:
        prepared, ours = (module.transform([image])[0].tensors for module in (scripted, eager))
        theirs, own = (list(module.backbone(prepared).values()) for module in (scripted, eager))
    except (AttributeError, RuntimeError):
        return False
    pairs = list(zip([prepared, *theirs], [ours, *own], strict=False))
    if len(theirs) != len(own) or not all(a.shape == b.shape for a, b in pairs):
        return False
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs):
        return False
    if not _give_same_detections(scripted, eager, image):
        return False
    heads = [getattr(module, "roi_heads", module) for module in (scripted, eager)]
    thresholds = [head.score_thresh for head in heads]
    try:
        for head in heads:
            head.score_thresh = 0.0  # with their own threshold, both may detect nothing
        return _give_same_detections(scripted, eager, image)
    finally:
        for head, threshold in zip(heads, thresholds, strict=True):
            head.score_thresh = threshold


def _give_same_detections(scripted: Any, eager: nn.Module, image: Tensor) -> bool:
    with warnings.catch_warnings(action="ignore"):  # a scripted detector warns that it returns a pair
        theirs = scripted([image])[1][0]
    ours, kept = predict(eager, [image])[0], theirs["labels"] > 0
    scores, boxes, labels = (theirs[name][kept] for name in ("scores", "boxes", "labels"))
    return (
        len(scores) == len(ours.scores)
        and torch.allclose(scores, ours.scores, rtol=1e-3, atol=1e-4)
        and torch.allclose(boxes, ours.boxes, rtol=1e-3, atol=0.1)
        and torch.equal(labels, ours.labels)
    )
