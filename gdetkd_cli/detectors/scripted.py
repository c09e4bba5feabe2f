"""TorchScript files that can be trained: those of detectors whose eager form can be rebuilt from the weights."""

from __future__ import annotations

import json
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
from gdetkd_cli.detectors.weights import load_state, torchvision_categories
from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.formats.class_names import OWN
from gdetkd_cli.probing.formats.files import DESCRIPTION_FILE, load_torchscript
from gdetkd_cli.probing.pyramid import probe_image

CLASSES, ARCHITECTURE = OWN, "gdetkd.architecture"  # what gdetkd's own files say of themselves, each as JSON
_SIZE = (256, 320)  # pixels of the image that both forms are compared on


class NotRebuiltError(ModelError):
    """A TorchScript file whose eager detector is not known; its features can teach all the same.

    Attributes:
        reason: why not, without the file's name.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} can teach but not be trained here: {reason}")
        self.reason = reason


def load_scripted(path: Path, class_names: tuple[str, ...]) -> catalog.Loaded:
    """The eager detector of a TorchScript file: one that gdetkd exported, or a scripted torchvision detector.

    A scripted detector is rebuilt with torchvision's own settings and image size, and must then detect the same.

    Args:
        path: the file.
        class_names: names for a file that has none, taken where their number fits.

    Raises:
        NotRebuiltError: it is none of these, or what was rebuilt detects otherwise.
        ModelError: not a whole TorchScript file.
    """
    files = {DESCRIPTION_FILE: ""}
    module = load_torchscript(path, extra_files=files).eval()
    state = module.state_dict()
    if files[DESCRIPTION_FILE]:
        told = json.loads(files[DESCRIPTION_FILE])
        description, names = json.loads(told[ARCHITECTURE]), tuple(json.loads(told[CLASSES]))
        state = {name.removeprefix("detector."): value for name, value in state.items()}
        detector = catalog.build(description, names)
        load_state(detector.module, state, str(path))
        return catalog.Loaded(detector, description, "run", (f"{path}: rebuilt as the detector that it was made of",))
    if not state:
        raise NotRebuiltError(path, "it is frozen TorchScript without parameters")
    try:
        found = recognise(state, str(path))
    except ModelError as error:
        reason = "it is neither a file that gdetkd exported nor a scripted torchvision detector"
        raise NotRebuiltError(path, reason) from error
    for description in _settings(found, module):
        published = torchvision_categories("DEFAULT", description["name"])
        names = catalog.classes_of(state, description, class_names, published)
        detector = catalog.build(description, names)
        notes = load_state(detector.module, state, str(path))
        detector.module.eval()
        if _detect_alike(module, detector.module):
            title = f"torchvision's {description['name']}, {len(names)} classes"
            notes.append(f"{path}: rebuilt as {title}, which detects the same")
            return catalog.Loaded(detector, description, "state_dict", tuple(notes))
    raise NotRebuiltError(
        path,
        f"it has the weights of torchvision's {found.description['name']}, but other settings, since that detects "
        "otherwise; name the architecture and its arguments in a recipe, with `weights:` a file of the weights alone",
    )


def _settings(found: Recognised, module: Any) -> Iterator[dict[str, Any]]:
    """Descriptions that have these weights, and may have the file's settings."""
    # The epsilon of frozen normalisation is another one for some of torchvision's own weights; no tensor tells.
    epsilons: list[dict[str, Any]] = [{}, {"norm_eps": 0.0}] if found.description["norm"] == "frozen" else [{}]
    for name, epsilon in product((found.description["name"], *found.alternatives), epsilons):
        arguments = {} if name.startswith("ssd") else _image_size(module)  # an SSD's size is its architecture's
        yield found.description | {"name": name, "arguments": arguments} | epsilon


def _image_size(module: Any) -> dict[str, Any]:
    """The sizes that a scripted detector brings its images to, as arguments of torchvision's builder."""
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
