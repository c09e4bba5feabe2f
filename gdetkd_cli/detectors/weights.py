"""Loads weights into a detector: from files, by torchvision's names, and with heads that do not fit."""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights, get_weight, list_models

from gdetkd_cli.detectors.saved import FILE_VERSION
from gdetkd_cli.errors import ModelError, get_first_line
from gdetkd_cli.files import name_kind
from gdetkd_cli.probing.formats.files import is_safetensors
from gdetkd_cli.probing.formats.metadata import ARCHITECTURE, parse_notes, read_class_names

# Prefixes of the parameters whose shape depends on the number of classes.
CLASS_LAYERS = (
    "roi_heads.box_predictor.",
    "roi_heads.later.0.box_predictor.cls_score.",
    "roi_heads.later.1.box_predictor.cls_score.",
    "head.classification_head.cls_logits.",
    "head.classification_head.module_list.",
)
BATCH_COUNT = "num_batches_tracked"  # trained normalisation has it, frozen normalisation does not
# Averaged weights come first: if a checkpoint has both, its published figures belong to them.
_NESTING = ("model_ema", "ema_state_dict", "model", "state_dict", "model_state_dict")

# torch's errors for a damaged file.
_DAMAGED = (
    *(RuntimeError, EOFError, ValueError, LookupError, OSError, TypeError, AttributeError, AssertionError),
    struct.error,
)

# Trained before FrozenBatchNorm2d had an epsilon; torchvision's builders set it to 0 for them.
_WITHOUT_EPS = (
    "FasterRCNN_ResNet50_FPN_Weights.COCO_V1",
    "MaskRCNN_ResNet50_FPN_Weights.COCO_V1",
    "RetinaNet_ResNet50_FPN_Weights.COCO_V1",
)


def read_torch_file(path: Path) -> Any:
    """Reads a file written by ``torch.save`` or safetensors without executing anything in it.

    A safetensors file that gdetkd wrote has the content of a ``student.pt``, another one is a state_dict.

    Raises:
        ModelError: the file is missing, of another kind, cut short, or needs pickled code.
    """
    if not path.is_file():
        raise ModelError(
            f"{path}{name_kind(path)} does not exist or is not a file; expected a file written by torch.save"
        )
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise ModelError(f"{path} cannot be opened: {error.strerror}") from error
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a git-LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if path.suffix == ".safetensors" or is_safetensors(start, path.stat().st_size):
        return _read_safetensors(path)
    words = start.decode(errors="replace").split()
    if start.isascii() and words and all(word.isprintable() for word in words):
        raise ModelError(
            f"{path} is no model: it begins with the text {start[:20].decode()!r}; expected a file of torch.save, "
            "TorchScript, safetensors, torch.export or ONNX"
        )
    try:
        # torchvision's reference scripts save the Namespace of their command line: plain data, no code.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message recommends executing the file's code.
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ModelError(f"{path}{name_kind(path)} is not a file written by torch.save") from error
        raise ModelError(
            f"{path} cannot be read without executing code from it ({code[1]}), which gdetkd never does; expected "
            "only weights, as written by torch.save(model.state_dict(), path)"
        ) from error
    except _DAMAGED as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else "it is empty"
        raise ModelError(f"{path}{name_kind(path)} is not a complete file written by torch.save ({reason})") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, *_DAMAGED) as error:
        raise ModelError(f"{path} is not a complete safetensors file ({get_first_line(error)})") from error
    if ARCHITECTURE not in notes:
        return state
    architecture, names = parse_notes(notes[ARCHITECTURE]), read_class_names(notes)
    return {"gdetkd": FILE_VERSION, "architecture": architecture, "classes": list(names), "model": state}


def extract_state_dict(saved: Any, source: str) -> dict[str, Tensor]:
    """Finds the weights in a file's content: at the top, or nested like in reference scripts.

    Raises:
        ModelError: there are no weights.
    """
    for _ in _NESTING:  # not for ever: a file can contain itself
        key = next((k for k in _NESTING if isinstance(saved, dict) and isinstance(saved.get(k), dict)), None)
        saved = saved if key is None else saved[key]
    if isinstance(saved, dict):  # AveragedModel counts its updates beside the weights
        saved = {name: value for name, value in saved.items() if name != "n_averaged"}
    named = isinstance(saved, dict) and all(isinstance(name, str) for name in saved)
    if not named or not saved or not all(isinstance(value, Tensor) for value in saved.values()):
        raise ModelError(
            f"{source} holds no state_dict; expected tensors by parameter name, at the top or under 'model'"
        )
    odd = next((name for name, value in saved.items() if not _is_plain(value)), None)
    if odd is not None:
        raise ModelError(f"{source}: {odd[:100]!r} is not a plain tensor of real numbers; save the weights as such")
    if all(name.startswith("module.") for name in saved):  # saved from a DDP wrapper
        saved = {name.removeprefix("module."): value for name, value in saved.items()}
    return dict(saved)


def _is_plain(value: Tensor) -> bool:
    kinds = value.is_quantized, value.is_complex(), value.is_meta, value.is_nested
    return value.layout == torch.strided and not any(kinds)


def load_body(body: nn.Module, state: dict[str, Tensor], *, weights: str, backbone: str, kind: str) -> list[str]:
    """Loads a classifier's weights, without the classifier, into a body; returns notes.

    Args:
        state: by the body's own names.
        backbone: the body's name, for messages.
        kind: of the bodies that have such weights, for messages.

    Raises:
        ModelError: the weights do not fit.
    """
    own = body.state_dict()
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    absent = [key for key in own if key not in fitting and not key.endswith(BATCH_COUNT)]
    if absent:
        raise ModelError(
            f"backbone_weights {weights!r} do not fit {backbone}: {len(absent)} of {len(own)} tensors are missing or "
            f"have another shape (the first is {absent[0]}); choose weights of the same {kind}"
        )
    body.load_state_dict(fitting, strict=False)
    return [f"{weights}: loaded {len(fitting)} tensors into the backbone"]


def convert_to_float(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts weights in half or double precision to float32."""
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def read_torchvision_weights(name: str, model: str | None) -> dict[str, Tensor]:
    """The state_dict of a torchvision weights name; downloads it when it is not on disk.

    Args:
        name: ``COCO_V1``, ``DEFAULT`` (with ``model``), or a full name such as ``ResNet50_Weights.IMAGENET1K_V2``.
        model: the torchvision function that a short name belongs to.

    Raises:
        ModelError: the weights do not exist, or are not on disk and cannot be downloaded.
    """
    weights = _get_entry(name, model)
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if target.exists():
        return extract_state_dict(read_torch_file(target), str(target))
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a hash mismatch is a RuntimeError
        raise ModelError(
            f"weights {name!r} are not on disk and could not be downloaded ({error}); put the file at {target}, "
            "or name a file in the recipe"
        ) from error


def list_torchvision_categories(name: str, model: str | None) -> tuple[str, ...] | None:
    """The classes that torchvision weights were trained on, without background; None if none are listed."""
    categories = _get_entry(name, model).meta.get("categories")
    if not categories:
        return None
    return tuple(categories[1:] if categories[0] == "__background__" else categories)


def has_frozen_norms(state: dict[str, Tensor]) -> bool:
    """Whether weights have no count of batches, so were trained with frozen normalisation like torchvision's own."""
    return not any(name.endswith(BATCH_COUNT) for name in state)


def find_norm_eps(name: str, model: str | None) -> float | None:
    """Epsilon of frozen normalisation that torchvision sets for these weights; None: the layer's own."""
    return 0.0 if str(_get_entry(name, model)) in _WITHOUT_EPS else None


def find_norm_eps_of_file(name: str) -> float | None:
    """Like ``find_norm_eps``, by the name of torchvision's file."""
    return 0.0 if name in {Path(get_weight(weights).url).name for weights in _WITHOUT_EPS} else None


def _get_entry(name: str, model: str | None) -> WeightsEnum:
    try:
        entry: WeightsEnum = get_weight(name) if "." in name else get_model_weights(model or "")[name]
    except (ValueError, KeyError, AttributeError) as error:
        known = ", ".join(own.name for own in get_model_weights(model)) if model in list_models() else ""
        raise ModelError(
            f"there is no file and there are no torchvision weights named {name!r}"
            + (f"; {model} has: {known}" if known else "")
        ) from error
    return entry


def find_refitted_layers(module: nn.Module, state: dict[str, Tensor], class_layers: Collection[str] = ()) -> list[str]:
    """Names of the layers that were trained for another number of classes; ``class_layers``: see ``load_state``."""
    own = module.state_dict()
    return [
        name
        for name, value in state.items()
        if name in own and value.shape != own[name].shape and (name.startswith(CLASS_LAYERS) or name in class_layers)
    ]


def load_state(
    module: nn.Module,
    state: dict[str, Tensor],
    source: str,
    *,
    other_classes: bool = False,
    class_layers: Collection[str] = (),
) -> list[str]:
    """Loads weights; layers trained for other classes keep their fresh values.

    Args:
        source: names the weights in messages.
        other_classes: the weights are known to be for other classes, even if their number is the same.
        class_layers: tensors that depend on the classes, besides those of torchvision's heads.

    Returns:
        One sentence for each kind of tensor that was left out.

    Raises:
        ModelError: another tensor does not fit.
    """
    own = module.state_dict()
    notes: list[str] = []
    dropped = [name for name in state if ".mask_" in f".{name}" and name not in own]
    if dropped:
        notes.append(f"{source}: the mask branch ({len(dropped)} tensors) is not used")
    wanted = {name: value for name, value in state.items() if name not in dropped}
    refitted, why = find_refitted_layers(module, wanted, class_layers), "another number of classes"
    if other_classes and not refitted:
        refitted = [n for n in wanted if n in own and (n.startswith(CLASS_LAYERS) or n in class_layers)]
        why = "other classes"
        if not refitted:
            notes.append(f"{source}: trained for other classes; it is unknown which layers depend on them, so all stay")
    if refitted:
        notes.append(f"{source}: trained for {why}; these layers start fresh: {', '.join(sorted(refitted))}")
    wanted = {name: value for name, value in wanted.items() if name not in refitted}
    differing = [n for n, v in wanted.items() if n in own and v.shape != own[n].shape]
    missing = [n for n in own if n not in state and not n.endswith(BATCH_COUNT)]
    unexpected = [n for n in wanted if n not in own and not n.endswith(BATCH_COUNT)]
    if differing or missing or unexpected:
        raise ModelError(
            f"{source} does not fit this detector: {_describe_mismatch(own, wanted, differing, missing, unexpected)}"
        )
    module.load_state_dict(wanted, strict=False)
    return notes


def _describe_mismatch(
    own: dict[str, Tensor], state: dict[str, Tensor], differing: list[str], missing: list[str], unexpected: list[str]
) -> str:
    parts = []
    if differing:
        name = differing[0]
        shapes = f"file {tuple(state[name].shape)}, detector {tuple(own[name].shape)}"
        parts.append(f"{len(differing)} shapes differ (first {name}: {shapes})")
    if missing:
        parts.append(f"{len(missing)} tensors are missing (first {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} are unknown (first {unexpected[0]})")
    return ", ".join(parts)
