"""Rebuilds an eager detector from a TorchScript file, so that it can be trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.recognise import Recognised, recognise
from gdetkd_cli.detectors.torchvision.common import predict
from gdetkd_cli.detectors.weights import list_torchvision_categories, load_state
from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.formats.files import DESCRIPTION_FILE, load_torchscript
from gdetkd_cli.probing.formats.metadata import ARCHITECTURE, parse_notes, read_class_names
from gdetkd_cli.probing.pyramid import probe_image

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

    A scripted detector is rebuilt with torchvision's settings and the file's image size, and must detect the same.

    Args:
        path: the file.
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
        arguments = {} if name.startswith("ssd") else _read_image_size(module)  # an SSD's architecture fixes its size
        yield found.description | {"name": name, "arguments": arguments} | epsilon


def _read_image_size(module: Any) -> dict[str, Any]:
    """The size to which a scripted detector resizes images, as arguments of torchvision's builder."""
    try:
        return {"min_size": list(module.transform.min_size), "max_size": int(module.transform.max_size)}
    except (AttributeError, TypeError):
        return {}


@torch.no_grad()
def _detect_alike(scripted: Any, eager: nn.Module) -> bool:
    image = probe_image(_SIZE)
    with warnings.catch_warnings(action="ignore"):  # a scripted detector warns that it returns a pair
        theirs = scripted([image])[1][0]
    ours = predict(eager, [image])[0]
    keep = theirs["labels"] > 0
    scores = theirs["scores"][keep]
    return len(scores) == len(ours.scores) and torch.allclose(scores, ours.scores, rtol=1e-3, atol=1e-4)
