"""Starts a student's head from the teacher's, if it fits."""

from __future__ import annotations

import re

from torch import Tensor, nn

from gdetkd_cli.detectors.compatibility import check_anchors, match_class_maps, match_predictions, match_queries
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import PairError

# Modules of transformers' detectors that come before the decoder.
_BEFORE_DECODER = re.compile(
    r"\.(backbone|vit|encoder|encoder_input_proj|input_proj|input_projection|level_embed)(\.|$)"
)


def transfer_head(student: Detector, teacher: Detector) -> list[str]:
    """Copies the teacher's head into the student's; returns the names of the copied parameters.

    It copies the RoI head between two-stage detectors, the whole head between two RetinaNets or two FCOS, and the
    decoder with its heads between two detectors with queries. Class rows are put into the student's order.

    Raises:
        PairError: the kind of head, a shape, the anchors or the class lists differ; nothing is copied then.
    """
    copies = match_head(student, teacher)
    student.module.load_state_dict(copies, strict=False)
    return sorted(name.removeprefix("roi_heads.") for name in copies)


def match_head(student: Detector, teacher: Detector) -> dict[str, Tensor]:
    """Values for ``transfer_head`` by name in the student; copies nothing.

    Raises:
        PairError: see ``transfer_head``.
    """
    if student.family == teacher.family and student.family in _MATCHERS:
        return _MATCHERS[student.family](student, teacher)
    raise PairError(
        "a head can be copied only between two two-stage detectors, two RetinaNets, two FCOS or two DETR-like "
        f"detectors; this pair is {teacher.family} -> {student.family}"
    )


def _match_dense_head(student: Detector, teacher: Detector) -> dict[str, Tensor]:
    """The teacher's values for a dense student's head, by name."""
    columns = match_class_maps(student, teacher)
    check_anchors(student, teacher)
    copies = {}
    for name, value in _match_part("head", student.module, teacher.module).items():
        if name.startswith("head.classification_head.cls_logits."):  # rows: anchors x (K + 1) classes
            value = value.unflatten(0, (-1, len(columns)))[:, columns.to(value.device)].flatten(0, 1)
        copies[name] = value
    return copies


def _match_roi_heads(student: Detector, teacher: Detector) -> dict[str, Tensor]:
    """The teacher's values for a two-stage student's RoI heads, by name."""
    columns = match_predictions(student, teacher)
    copies: dict[str, Tensor] = {}
    heads = {
        name.rpartition(".")[0]
        for d in (student, teacher)
        for name, _ in d.module.named_modules()
        if name.endswith(".box_head")
    }
    for part in (f"{head}.{layer}" for head in sorted(heads) for layer in ("box_head", "box_predictor")):
        for name, value in _match_part(part, student.module, teacher.module).items():
            # Rows: K + 1 classes, or K + 1 classes x 4 coordinates; a cascade has 4 coordinates for all classes.
            if part.endswith("box_predictor") and (".cls_score." in name or len(value) != 4):
                value = value.unflatten(0, (len(columns), -1))[columns.to(value.device)].flatten(0, 1)
            copies[name] = value
    return copies


def _match_decoders(student: Detector, teacher: Detector) -> dict[str, Tensor]:
    """The teacher's values for a student's decoder and everything after its encoder, by name."""
    match_queries(student, teacher)
    if student.class_names != teacher.class_names:
        raise PairError("the decoders list the classes in different orders")
    ours, theirs = (
        {name: value for name, value in d.module.state_dict().items() if not _BEFORE_DECODER.search(name)}
        for d in (student, teacher)
    )
    _check_shapes(ours, theirs)
    return theirs


_MATCHERS = {"two-stage": _match_roi_heads, "dense": _match_dense_head, "query": _match_decoders}


def _match_part(part: str, student: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    """The teacher's parameters under ``part``, by name; raises a PairError if the student's differ in name or shape."""
    source, target = (
        {} if part not in dict(d.named_modules()) else d.get_submodule(part).state_dict() for d in (teacher, student)
    )
    _check_shapes(target, source, f"{part.removeprefix('roi_heads.')}.")
    return {f"{part}.{name}": value for name, value in source.items()}


def _check_shapes(student: dict[str, Tensor], teacher: dict[str, Tensor], prefix: str = "") -> None:
    for name in sorted(student.keys() | teacher.keys()):
        ours, theirs = (tuple(state[name].shape) if name in state else None for state in (student, teacher))
        if ours != theirs:
            raise PairError(f"{prefix}{name} is {theirs} in the teacher and {ours} in the student")
