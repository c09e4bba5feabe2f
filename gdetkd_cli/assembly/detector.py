"""Builds detectors from a recipe's student and teacher blocks, and loads their weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import nn

from gdetkd_cli.assembly.warnings import warn_about_weights
from gdetkd_cli.detectors import catalog, transformers
from gdetkd_cli.detectors.probed import ProbedDetector
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.detectors.saved import read_saved
from gdetkd_cli.detectors.scripted import NotRebuiltError, load_scripted
from gdetkd_cli.detectors.timm_weights import load_timm_weights
from gdetkd_cli.detectors.weights import (
    extract_state_dict,
    find_norm_eps,
    find_refitted_layers,
    has_frozen_norms,
    list_torchvision_categories,
    load_body,
    load_state,
    read_torch_file,
    read_torchvision_weights,
)
from gdetkd_cli.errors import ModelError
from gdetkd_cli.knowledge.folder import open_knowledge
from gdetkd_cli.portable import TIMM
from gdetkd_cli.probing.formats.files import Kind, detect_kind, open_runner
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.recipe import schema
from gdetkd_cli.recipe.schema import (
    CheckpointDetector,
    ComposedDetector,
    FactoryDetector,
    KnowledgeDetector,
    TorchvisionDetector,
    TransformersDetector,
)

_KINDS = {"torchscript": "TorchScript", "exported": "an exported program", "onnx": "ONNX"}

DetectorSpec = schema.Detector


@dataclass(frozen=True)
class BuiltDetector:
    """A detector, the description that rebuilds it, and notes for the user.

    Attributes:
        trained_head: whether the head's weights were trained for these classes.
    """

    detector: Detector
    description: dict[str, Any]
    notes: tuple[str, ...]
    trained_head: bool = False


def build_detector(
    spec: DetectorSpec, class_names: tuple[str, ...], seed: int, *, keep_classes: bool = False
) -> BuiltDetector:
    """Builds a detector with the recipe's weights, or with fresh weights drawn from ``seed``.

    Args:
        class_names: the K class names of the data.
        keep_classes: keep the classes of the weights, as for a teacher; else a head for other classes starts fresh.

    Raises:
        ModelError: the detector cannot be built, or its weights cannot be read or do not fit.
    """
    if isinstance(spec, CheckpointDetector):
        built = _build_from_file(spec, class_names, seed, keep_classes=keep_classes)
        named = (spec.classes or None) if keep_classes else None
        if keep_classes and (named is None or len(named) != len(built.detector.class_names)):
            built = _leave_out_placeholders(built)
        if named is not None:
            catalog.rename_classes(built.detector, named, spec.path)
    elif isinstance(spec, FactoryDetector):
        built = _build_custom(spec, class_names, seed, keep_classes=keep_classes)
    elif isinstance(spec, KnowledgeDetector):
        built = _build_knowledge(spec, is_teacher=keep_classes)
    elif isinstance(spec, TransformersDetector):
        built = _build_transformers(spec, class_names, seed, keep_classes=keep_classes)
    else:
        built = _build_named(spec, class_names, seed, keep_classes=keep_classes)
        built = _leave_out_placeholders(built) if keep_classes else built
    return replace(built, notes=(*built.notes, *warn_about_weights(built.detector)))


def _build_named(
    spec: TorchvisionDetector | ComposedDetector, class_names: tuple[str, ...], seed: int, *, keep_classes: bool
) -> BuiltDetector:
    """Builds one of torchvision's detectors, or one that is composed of torchvision's parts."""
    state, source, own_names = _read_weights(spec)
    norm = spec.norm
    if norm == "auto":
        frozen = state is not None and has_frozen_norms(state)
        norm = "frozen" if frozen or spec.backbone_weights else "batch"
    description = _describe(spec, norm)
    if norm == "frozen" and isinstance(spec, TorchvisionDetector) and spec.weights and not _is_file(spec.weights):
        eps = find_norm_eps(spec.weights, spec.name)
        if eps is not None:
            description["norm_eps"] = eps
    others = False
    if keep_classes and state is not None:
        class_names = catalog.name_classes(state, description, class_names, own_names)
    elif own_names is not None:
        class_names, others = _choose_classes(class_names, own_names)
    torch.manual_seed(seed)
    detector = catalog.build(description, class_names)
    notes: list[str] = []
    if spec.backbone_weights:
        notes += _load_backbone(detector, spec)
    if state is not None:
        notes += load_state(detector.module, state, source, other_classes=others)
    trained = state is not None and not others and not find_refitted_layers(detector.module, state)
    return BuiltDetector(detector, description, tuple(notes), trained_head=trained)


def _choose_classes(data: tuple[str, ...], own: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """Returns a student's class names, and whether its weights were trained for other classes.

    A detector for the same classes in another order keeps it; the data's labels follow (``relabel``).
    """
    return (own, False) if sorted(own) == sorted(data) else (data, True)


def _leave_out_placeholders(built: BuiltDetector) -> BuiltDetector:
    """Returns a detector with torchvision's published classes without those that stand for none."""
    names = built.detector.class_names
    count = names.count(catalog.PLACEHOLDER)
    if not count or built.description.get("kind") != "torchvision":
        return built
    if names != list_torchvision_categories("DEFAULT", built.description["name"]):
        return built
    detector = catalog.drop_placeholders(built.detector, built.description)
    note = f"{count} outputs named {catalog.PLACEHOLDER}, which were trained for no class, are left out"
    return replace(built, detector=detector, notes=(*built.notes, note))


def _build_from_file(
    spec: CheckpointDetector, class_names: tuple[str, ...], seed: int, *, keep_classes: bool
) -> BuiltDetector:
    path = catalog.locate(spec.path)
    kind = detect_kind(path)
    if kind in ("onnx", "exported"):
        return _build_probed(spec, path, kind, is_teacher=keep_classes)
    if kind == "checkpoint":
        loaded = catalog.load(path, class_names)
        if loaded.origin == "transformers" and not keep_classes:
            block = TransformersDetector(arch="transformers", model=str(path.parent))
            return _build_transformers(block, class_names, seed, keep_classes=False)
    else:
        try:
            loaded = load_scripted(path, class_names)
        except NotRebuiltError as error:
            if not keep_classes:
                raise
            built = _build_probed(spec, path, kind, is_teacher=True)
            note = f"{path}: only its features can teach: {error.reason}"
            return replace(built, notes=(note, *built.notes))
    if keep_classes or not _choose_classes(class_names, loaded.detector.class_names)[1]:
        return BuiltDetector(loaded.detector, loaded.description, loaded.notes, trained_head=True)
    torch.manual_seed(seed)
    refitted, state = catalog.build(loaded.description, class_names), loaded.detector.module.state_dict()
    layers = transformers.list_class_layers(loaded.description) if loaded.description["kind"] == "transformers" else ()
    refits = load_state(refitted.module, state, spec.path, other_classes=True, class_layers=layers)
    return BuiltDetector(refitted, loaded.description, (*loaded.notes, *refits))


def _build_transformers(
    spec: TransformersDetector, class_names: tuple[str, ...], seed: int, *, keep_classes: bool
) -> BuiltDetector:
    """Builds a detector of transformers, from a configuration or with the weights of a folder or of the hub."""
    torch.manual_seed(seed)
    if spec.config is not None:
        description = transformers.describe_fresh(spec.config, spec.image_size)
        return BuiltDetector(catalog.build(description, class_names), description, ())
    assert spec.model is not None
    detector, description, trained = transformers.load_pretrained(
        spec.model, class_names, keep_classes=keep_classes, image_size=spec.image_size
    )
    notes = () if trained else (f"{spec.model}: the class layer starts fresh for the data's classes",)
    return BuiltDetector(detector, description, notes, trained_head=trained)


def _build_custom(
    spec: FactoryDetector, class_names: tuple[str, ...], seed: int, *, keep_classes: bool
) -> BuiltDetector:
    """Builds a detector from the user's own code."""
    options = spec.input
    description = {
        "kind": "factory",
        "factory": spec.factory,
        "arguments": spec.arguments,
        "input": asdict(_build_input(options)),
        "last": options.layout == "hwc",
        "levels": spec.levels,
        "size": list(options.size),
    }
    notes, state, others = [f"made by {spec.factory}"], None, False
    if spec.weights is not None:
        state, own_names = _read_file(path := catalog.locate(spec.weights))
        if own_names is not None:
            class_names, others = (own_names, False) if keep_classes else _choose_classes(class_names, own_names)
    torch.manual_seed(seed)
    detector = catalog.build(description, class_names)
    if state is not None:
        notes += load_state(detector.module, state, str(path), other_classes=others)
    trained = state is not None and not others and not find_refitted_layers(detector.module, state)
    return BuiltDetector(detector, description, tuple(notes), trained_head=trained)


def _build_knowledge(spec: KnowledgeDetector, *, is_teacher: bool) -> BuiltDetector:
    """Opens a folder that ``gdetkd teach`` wrote."""
    if not is_teacher:
        raise ModelError(f"{spec.path} holds a teacher's answers and cannot be trained; choose another student")
    notes: list[str] = []
    detector = open_knowledge(Path(spec.path), notes.append)
    return BuiltDetector(detector, {}, (*notes, f"{spec.path}: the teacher's stored answers; the teacher does not run"))


def _build_probed(spec: CheckpointDetector, path: Path, kind: Kind, *, is_teacher: bool) -> BuiltDetector:
    """Builds a detector from another tool's file by probing it."""
    if not is_teacher:
        raise ModelError(
            f"{path} is {_KINDS[kind]}; gdetkd can use it as a teacher but cannot train it, so choose another student"
        )
    options = spec.input
    runner = open_runner(path, kind, last=options.layout == "hwc")
    detector = ProbedDetector(
        runner=runner,
        source=str(path),
        kind=kind,
        model_input=_build_input(options),
        size=options.size,
        class_names=tuple(spec.classes or ()),
        levels=tuple(spec.levels or ()),
    )
    notes = [f"{path}: called with a {detector.probed.call.name}", f"{path}: {detector.probed.reason}"]
    padded = detector.accept_any_size()
    notes += [f"{path}: {note}" for note in (*detector.probed.notes, *([padded] if padded else []))]
    return BuiltDetector(detector, {}, tuple(notes))


def _build_input(options: schema.ModelInput) -> ModelInput:
    """Builds a model's input format from the recipe's block."""
    return ModelInput(
        scale=255.0 if options.range == "0-255" else 1.0,
        mean=options.mean,
        std=options.std,
        fit=options.size if options.fit else None,
        bgr=options.channels == "bgr",
    )


def _describe(spec: TorchvisionDetector | ComposedDetector, norm: str) -> dict[str, Any]:
    """Returns the description from which the catalog rebuilds the detector."""
    if isinstance(spec, TorchvisionDetector):
        return {"kind": "torchvision", "name": spec.name, "arguments": spec.arguments, "norm": norm}
    return {
        "kind": "composed",
        "backbone": spec.backbone,
        "width": spec.width,
        "blocks": spec.blocks,
        "head": spec.head,
        "pyramid_channels": spec.pyramid_channels,
        "pyramid_levels": list(spec.pyramid_levels) if spec.pyramid_levels else None,
        "image_size": list(spec.image_size),
        "arguments": spec.arguments,
        "norm": norm,
    }


def _read_weights(
    spec: TorchvisionDetector | ComposedDetector,
) -> tuple[dict[str, Any] | None, str, tuple[str, ...] | None]:
    """Returns the state dict, None for fresh weights, its source, and the names of its classes, if they are known."""
    if spec.weights is None:
        return None, "", None
    if _is_file(spec.weights):
        state, names = _read_file(path := catalog.locate(spec.weights))
        return state, str(path), names
    model = spec.name if isinstance(spec, TorchvisionDetector) else None
    published = list_torchvision_categories(spec.weights, model) if model else None
    return read_torchvision_weights(spec.weights, model), spec.weights, published


def _read_file(path: Path) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """Reads the weights of a file, and their classes if gdetkd wrote it."""
    content = read_torch_file(path)
    names = tuple(read_saved(content, str(path)).classes) if isinstance(content, dict) and "gdetkd" in content else None
    return extract_state_dict(content, str(path)), names


def _is_file(weights: str) -> bool:
    """Whether ``weights`` is a file and not a torchvision weights name."""
    return Path(weights).exists() or Path(weights).suffix in (".pt", ".pth")


def format_title(spec: DetectorSpec) -> str:
    """Returns a short title of a detector's block."""
    match spec:
        case TorchvisionDetector():
            return spec.name
        case ComposedDetector():
            return f"{spec.backbone} {spec.head}"
        case CheckpointDetector() | KnowledgeDetector():
            return spec.path
        case FactoryDetector():
            return spec.factory
        case TransformersDetector():
            return spec.model or str((spec.config or {}).get("model_type"))
        case _:
            assert_never(spec)


def _load_backbone(detector: Detector, spec: TorchvisionDetector | ComposedDetector) -> list[str]:
    """Loads classification weights without the classifier into the body; returns notes."""
    assert spec.backbone_weights is not None
    name = spec.backbone_weights
    if isinstance(spec, ComposedDetector) and spec.backbone.startswith(TIMM):
        return load_timm_weights(detector.module.backbone.body, spec.backbone, name)  # type: ignore[union-attr, arg-type]
    if _is_file(name):
        state = extract_state_dict(read_torch_file(Path(name)), name)
    else:
        state = read_torchvision_weights(name, spec.backbone if isinstance(spec, ComposedDetector) else None)
    body: nn.Module = detector.module.backbone  # type: ignore[assignment]  # torchvision's detectors have one
    body = getattr(body, "body", body)
    state = {key.removeprefix("features."): value for key, value in state.items()}
    return load_body(body, state, weights=name, backbone="this backbone", kind="backbone")
