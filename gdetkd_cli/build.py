"""From a recipe to objects: the only place where configuration meets code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import nn

from gdetkd_cli.data.coco import align_classes, read_coco
from gdetkd_cli.data.dataset import DetectionDataset
from gdetkd_cli.data.loader import training_batches
from gdetkd_cli.data.split import Split
from gdetkd_cli.data.synthetic import synthetic_split
from gdetkd_cli.data.transforms import build_augmentation
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.protocol import Detector, Observation
from gdetkd_cli.detectors.weights import (
    load_state,
    read_torch_file,
    state_dict_of,
    torchvision_categories,
    torchvision_weights,
)
from gdetkd_cli.distill.distiller import Distiller, WeightedTerm
from gdetkd_cli.distill.pair import PairKind, pair_kind, prediction_columns, transfer_head
from gdetkd_cli.distill.regions import choose_regions
from gdetkd_cli.distill.terms import BoxTerm, CKDTerm, ClassTerm, SGFITerm
from gdetkd_cli.errors import ModelError, PairError
from gdetkd_cli.recipe.schema import (
    CKD,
    SGFI,
    CheckpointDetector,
    CocoData,
    ComposedDetector,
    Distill,
    PredictionKD,
    Recipe,
    Runtime,
    SyntheticData,
    TorchvisionDetector,
)
from gdetkd_cli.results import TermPlan
from gdetkd_cli.structures import Batch, Regions
from gdetkd_cli.training.device import ComputeSettings, best_thread_count

DetectorSpec = TorchvisionDetector | ComposedDetector | CheckpointDetector


@dataclass(frozen=True)
class BuiltDetector:
    """A detector, the description that rebuilds it, and what there was to say while building it."""

    detector: Detector
    description: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BuiltPair:
    """A distiller and how it came about.

    Attributes:
        kind: homogeneous or heterogeneous.
        terms: every term, its weight or why it is left out.
        head_transfer: what was copied from the teacher's RoI head, or why nothing was.
    """

    distiller: Distiller
    kind: PairKind
    terms: tuple[TermPlan, ...]
    head_transfer: str


# ----------------------------------------------------------------------------------------------------------- data


def build_split(data: SyntheticData | CocoData, which: str) -> Split:
    """The ``train`` or ``val`` split."""
    if isinstance(data, SyntheticData):
        images = data.train_images if which == "train" else data.val_images
        return synthetic_split(split=which, images=images, size=data.size, seed=data.seed)
    if isinstance(data, CocoData):
        annotations, images_folder = (
            (data.train, data.train_images) if which == "train" else (data.val, data.val_images)
        )
        return read_coco(annotations=data.root / annotations, images=data.root / images_folder, classes=data.classes)
    assert_never(data)


def relabel(split: Split, detector: Detector) -> Split:
    """The split with its labels counted in the detector's class list."""
    return split if split.class_names == detector.class_names else align_classes(split, detector.class_names)


def build_batches(
    recipe: Recipe, split: Split, settings: ComputeSettings, *, rank: int, world_size: int
) -> Callable[[int], Iterator[Batch]]:
    """A function: start step -> the training batches from there to the recipe's last step."""
    augment = recipe.augment
    dataset = DetectionDataset(
        split=split,
        augmentation=build_augmentation(
            flip=augment.flip,
            photometric=augment.photometric,
            multi_scale=augment.multi_scale,
            max_size=augment.max_size,
        ),
        seed=recipe.seed,
        cache_mb=recipe.runtime.cache_mb,
    )

    def batches(start_step: int) -> Iterator[Batch]:
        return training_batches(
            dataset=dataset,
            batch_size=recipe.train.batch_size,
            steps=recipe.train.steps,
            start_step=start_step,
            seed=recipe.seed,
            rank=rank,
            world_size=world_size,
            workers=settings.workers,
            pin_memory=settings.device == "cuda",
        )

    return batches


# ------------------------------------------------------------------------------------------------------ detectors


def build_detector(
    spec: DetectorSpec, class_names: tuple[str, ...], seed: int, *, keep_classes: bool = False
) -> BuiltDetector:
    """A detector with fresh weights drawn from ``seed``, or with those that the recipe names.

    Args:
        spec: the recipe's block.
        class_names: K names of the data.
        seed: of the fresh weights.
        keep_classes: a teacher keeps the classes that its weights were made for; a student's head is made anew where
            they differ from the data's.

    Raises:
        ModelError: it cannot be built, or its weights cannot be read or do not fit.
    """
    if isinstance(spec, CheckpointDetector):
        detector, description = catalog.load(catalog.locate(spec.path))
        if keep_classes or detector.class_names == class_names:
            return BuiltDetector(detector, description, ())
        torch.manual_seed(seed)
        refitted = catalog.build(description, class_names)
        refits = load_state(refitted.module, detector.module.state_dict(), spec.path)
        return BuiltDetector(refitted, description, tuple(refits))

    state, source = _weights_of(spec)
    norm = spec.norm
    if norm == "auto":
        # Weights without a count of batches were trained with frozen normalisation, as torchvision's own are.
        frozen = state is not None and not any(name.endswith("num_batches_tracked") for name in state)
        norm = "frozen" if frozen or spec.backbone_weights else "batch"
    description = _description(spec, norm)
    if keep_classes and state is not None:
        class_names = catalog.classes_of(state, description, class_names, weights_classes(spec))
    torch.manual_seed(seed)
    detector = catalog.build(description, class_names)
    notes: list[str] = []
    if spec.backbone_weights:
        notes += _load_backbone(detector, spec)
    if state is not None:
        notes += load_state(detector.module, state, source)
    return BuiltDetector(detector, description, tuple(notes))


def _description(spec: TorchvisionDetector | ComposedDetector, norm: str) -> dict[str, Any]:
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


def _weights_of(spec: TorchvisionDetector | ComposedDetector) -> tuple[dict[str, Any] | None, str]:
    if spec.weights is None:
        return None, ""
    if _names_a_file(spec.weights):
        path = catalog.locate(spec.weights)
        return state_dict_of(read_torch_file(path), str(path)), str(path)
    model = spec.name if isinstance(spec, TorchvisionDetector) else None
    return torchvision_weights(spec.weights, model), spec.weights


def _names_a_file(weights: str) -> bool:
    """Whether ``weights`` is meant as a file; anything else is a torchvision weights name."""
    return Path(weights).exists() or Path(weights).suffix in (".pt", ".pth")


def title_of(spec: DetectorSpec) -> str:
    """A detector's block in a few words, for people."""
    match spec:
        case TorchvisionDetector():
            return spec.name
        case ComposedDetector():
            return f"{spec.backbone} {spec.head}"
        case CheckpointDetector():
            return spec.path
        case _:
            assert_never(spec)


def weights_classes(spec: TorchvisionDetector | ComposedDetector) -> tuple[str, ...] | None:
    """Class names that torchvision publishes with a weights name; None for files."""
    if not isinstance(spec, TorchvisionDetector) or spec.weights is None or _names_a_file(spec.weights):
        return None
    return torchvision_categories(spec.weights, spec.name)


def _load_backbone(detector: Detector, spec: TorchvisionDetector | ComposedDetector) -> list[str]:
    """Loads classification weights into the body, the classifier left out."""
    assert spec.backbone_weights is not None
    name = spec.backbone_weights
    if _names_a_file(name):
        state = state_dict_of(read_torch_file(Path(name)), name)
    else:
        state = torchvision_weights(name, spec.backbone if isinstance(spec, ComposedDetector) else None)
    body: nn.Module = detector.module.backbone  # type: ignore[assignment]  # torchvision's detectors have one
    body = getattr(body, "body", body)
    own = body.state_dict()
    state = {key.removeprefix("features."): value for key, value in state.items()}
    wanted = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    absent = [key for key in own if key not in wanted and not key.endswith("num_batches_tracked")]
    if absent:
        raise ModelError(
            f"backbone_weights {name!r} do not fit this backbone: {len(absent)} of {len(own)} tensors are missing or "
            f"have another shape (first {absent[0]})"
        )
    body.load_state_dict(wanted, strict=False)
    return [f"{name}: {len(wanted)} tensors into the backbone"]


# --------------------------------------------------------------------------------------------------- distillation


def build_pair(config: Distill, student: Detector, teacher: Detector, seed: int) -> BuiltPair:
    """The distiller of a pair, its terms chosen and checked.

    Raises:
        PairError: a term that the recipe asks for does not fit the pair.
    """
    kind = pair_kind(student, teacher)
    if config.pair not in ("auto", kind):
        raise PairError(
            f"distill.pair is {config.pair}, but {teacher.family} -> {student.family} is a {kind} pair; "
            "set distill.pair to auto"
        )
    transferred, head_transfer = _transfer(config, student, teacher)
    teacher.module.eval().requires_grad_(False)
    torch.manual_seed(seed)  # the terms' fresh weights
    plans: list[TermPlan] = []
    terms: dict[str, WeightedTerm] = {}

    def add(name: str, block: SGFI | CKD | PredictionKD | None, term: nn.Module | None, reason: str) -> None:
        plans.append(TermPlan(name=name, weight=block.weight if block and term else None, reason=reason))
        if block is not None and term is not None:
            terms[name] = WeightedTerm(term, block.weight, block.warmup_steps)

    add(
        "sgfi",
        config.sgfi,
        _sgfi(config.sgfi, student, teacher, transferred),
        "" if config.sgfi else "left out by the recipe",
    )
    add("ckd", config.ckd, _ckd(config.ckd, student, teacher), "" if config.ckd else "left out by the recipe")
    for name, block, term_class in (
        ("class_kd", config.class_kd, ClassTerm),
        ("box_kd", config.box_kd, BoxTerm),
    ):
        settled, reason, columns = _prediction(name, block, student, teacher)
        add(name, settled, term_class(columns=columns) if columns is not None else None, reason)
    if not terms:
        raise PairError("the recipe leaves out every distillation term; use `gdetkd train` for plain training")

    options = config.regions

    def choose(seen: Observation, batch: Batch, step: int) -> Regions:
        assert seen.candidates is not None
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return choose_regions(
            seen.candidates,
            batch,
            per_image=options.per_image,
            positive_iou=options.positive_iou,
            negatives_per_positive=options.negatives_per_positive,
            generator=generator,
        )

    distiller = Distiller(student=student, teacher=teacher, terms=terms, choose_regions=choose)
    return BuiltPair(distiller=distiller, kind=kind, terms=tuple(plans), head_transfer=head_transfer)


def _transfer(config: Distill, student: Detector, teacher: Detector) -> tuple[bool, str]:
    """Whether the teacher's RoI head was copied, and what there is to say of it."""
    if config.head_transfer is False:
        return False, "left out by the recipe"
    try:
        copied = transfer_head(student, teacher)
    except PairError as error:
        if config.head_transfer is True:
            raise PairError(f"distill.head_transfer: {error}; set it to auto or false") from error
        return False, f"nothing copied: {error}"
    return True, f"copied from the teacher: {', '.join(copied)}"


def _sgfi(block: SGFI | None, student: Detector, teacher: Detector, transferred: bool) -> SGFITerm | None:
    if block is None:
        return None
    student_channels = [level.channels for level in student.levels]
    teacher_channels = max(level.channels for level in teacher.levels)
    return SGFITerm(
        student_channels=student_channels,
        teacher_channels=teacher_channels,
        same_space=transferred and set(student_channels) == {teacher_channels},
        embed_channels=block.embed_channels,
        initial_tau=block.tau,
        normalize=block.normalize,
        sampling_ratio=block.sampling_ratio,
    )


def _ckd(block: CKD | None, student: Detector, teacher: Detector) -> CKDTerm | None:
    if block is None:
        return None
    return CKDTerm(
        student_channels=student.embedding_channels,
        teacher_channels=teacher.embedding_channels,
        project_channels=block.project_channels,
        gamma=block.gamma,
        negative_iou=block.negative_iou,
        queue=block.queue,
    )


def _prediction(
    name: str, block: PredictionKD | str | None, student: Detector, teacher: Detector
) -> tuple[PredictionKD | None, str, torch.Tensor | None]:
    """A prediction term's settings, why it is left out, and the class columns."""
    if block is None:
        return None, "left out by the recipe", None
    settled = block if isinstance(block, PredictionKD) else PredictionKD()
    try:
        return settled, "", prediction_columns(student, teacher)
    except PairError as error:
        if isinstance(block, PredictionKD):
            raise PairError(f"distill.{name}: {error}; set it to auto or null") from error
        return None, str(error), None


# -------------------------------------------------------------------------------------------------------- runtime


def resolve_runtime(runtime: Runtime) -> ComputeSettings:
    """Every ``auto`` decided.

    Raises:
        ModelError: CUDA is asked for where there is none.
    """
    cuda = torch.cuda.is_available()
    if runtime.device == "cuda" and not cuda:
        raise ModelError("runtime.device is cuda, but this machine has no usable CUDA device; set it to auto or cpu")
    device = "cuda" if cuda and runtime.device != "cpu" else "cpu"
    on_cuda = device == "cuda"
    return ComputeSettings(
        device=device,
        precision=("bf16" if on_cuda else "fp32") if runtime.precision == "auto" else runtime.precision,
        channels_last=on_cuda if runtime.channels_last == "auto" else runtime.channels_last,
        compile=runtime.compile,
        threads=best_thread_count() if runtime.threads == "auto" else runtime.threads,
        workers=(4 if on_cuda else 0) if runtime.workers == "auto" else runtime.workers,
    )


def apply_runtime(
    settings: ComputeSettings, recipe: Recipe, student: Detector, pair: BuiltPair | None, device: torch.device
) -> None:
    """Puts device, memory format and compilation into effect on the networks."""
    detectors = [student] + ([pair.distiller.teacher] if pair and pair.distiller.teacher else [])
    for detector in detectors:
        module: Any = detector.module.to(device)
        if settings.channels_last:
            module.to(memory_format=torch.channels_last)
        _ = detector.levels  # measured now: neither a compiled nor a wrapped network is easy to measure
        if settings.compile:
            module.backbone.compile(dynamic=True)
    if pair is not None:
        pair.distiller.to(device)
    if recipe.augment.multi_scale:
        # The loader sets each picture's size; the detector's own resize would undo it. It stays for inference.
        transform: Any = student.module.transform
        transform._skip_resize = True
