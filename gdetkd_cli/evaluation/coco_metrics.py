"""COCO box metrics by faster-coco-eval, a faster drop-in for pycocotools with the same numbers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from gdetkd_cli.errors import DataError

if TYPE_CHECKING:  # the command line imports CocoMetrics and must start without torch
    import numpy as np
    from numpy.typing import NDArray
    from pycocotools.cocoeval import COCOeval

    from gdetkd_cli.data.split import Record
    from gdetkd_cli.structures import Detections


_USUAL = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP_S",
    "ap_medium": "AP_M",
    "ap_large": "AP_L",
    "ar": "AR",
}


@dataclass(frozen=True)
class CocoMetrics:
    """COCO box metrics, AP and AR in 0-100; None if the split has no such object.

    Attributes:
        ap: mean over IoU 0.50:0.95, all areas, 100 detections per image.
        ap50, ap75: at one IoU.
        ap_small, ap_medium, ap_large: by object area in the annotations (32 x 32 and 96 x 96 pixels).
        ar: average recall with 100 detections per image.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar: float | None
    per_class: dict[str, float | None]
    images: int
    detections: int

    def to_json(self) -> dict[str, object]:
        """The metrics under their usual names in tables."""
        return {_USUAL.get(name, name): value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> CocoMetrics:
        """Reads what ``to_json`` returned."""
        return cls(**{field.name: stored[_USUAL.get(field.name, field.name)] for field in fields(cls)})


def evaluate_coco(
    records: Sequence[Record], class_names: Sequence[str], predictions: Mapping[int, Detections]
) -> CocoMetrics:
    """Compares predictions with the truth like the COCO benchmark (crowds are neither hits nor misses).

    Args:
        class_names: K names; label k is ``class_names[k - 1]``.
        predictions: by image id, boxes in pixels of the stored image; a missing image has no detections.

    Raises:
        DataError: a prediction's image is not among the records, or its label is not in 1..K.
    """
    evaluation, detections = _accumulate(records, class_names, predictions)
    ap, ap50, ap75, ap_small, ap_medium, ap_large, _, _, ar, *_ = (_to_percent(value) for value in evaluation.stats)
    # (IoU, recall, class, area, detections per image): "all areas" is the first, 100 detections the last.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return CocoMetrics(
        ap=ap,
        ap50=ap50,
        ap75=ap75,
        ap_small=ap_small,
        ap_medium=ap_medium,
        ap_large=ap_large,
        ar=ar,
        per_class={name: _to_percent(precision[:, :, k].mean()) for k, name in enumerate(class_names)},
        images=len(records),
        detections=detections,
    )


def compute_precision(
    records: Sequence[Record], class_names: Sequence[str], predictions: Mapping[int, Detections]
) -> dict[float, NDArray[np.float64]]:
    """Computes precision over recall, at IoU 0.5 and 0.75; arguments and errors as in ``evaluate_coco``.

    Returns:
        By IoU, (101, K) precision in 0..1 at the recalls 0, 0.01, ..., 1; -1 for a class without objects.
    """
    evaluation, _ = _accumulate(records, class_names, predictions)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return {0.5: precision[0], 0.75: precision[5]}


def _accumulate(
    records: Sequence[Record], class_names: Sequence[str], predictions: Mapping[int, Detections]
) -> tuple[Any, int]:
    """Runs the whole evaluation; returns it and the number of detections."""
    # Imported here to keep the start fast, see TYPE_CHECKING.
    from faster_coco_eval import COCO, COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        truth, detections = _build_indices(COCO, records, class_names, predictions)
        evaluation = COCOeval_faster(truth, detections, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation, len(detections.dataset["annotations"])


def match_images(
    records: Sequence[Record], class_names: Sequence[str], predictions: Mapping[int, Detections]
) -> COCOeval:
    """Matches each image's detections with pycocotools, without accumulating.

    Arguments and errors: see ``evaluate_coco``.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(*_build_indices(COCO, records, class_names, predictions), "bbox")
        evaluation.evaluate()
    return evaluation


def _build_indices(
    kind: type[Any], records: Sequence[Record], class_names: Sequence[str], predictions: Mapping[int, Detections]
) -> tuple[Any, Any]:
    """Truth and detections as COCO objects of either package."""
    strangers = sorted(set(predictions) - {record.image_id for record in records})
    if strangers:
        raise DataError(
            f"expected predictions for the {len(records)} images of the split, got some for {len(strangers)} others "
            f"(image id {strangers[0]} first); evaluate on the split on which they were made"
        )
    classes = len(class_names)
    detections = [
        item for image_id, found in predictions.items() for item in _list_items(image_id, found, classes=classes)
    ]
    truth = [{**item, "image_id": record.image_id} for record in records for item in record.truth]
    return _build_index(kind, records, class_names, truth), _build_index(kind, records, class_names, detections)


def _build_index(
    kind: type[Any], records: Sequence[Record], class_names: Sequence[str], annotations: list[dict[str, object]]
) -> Any:
    coco = kind()
    coco.dataset = {
        "images": [{"id": record.image_id} for record in records],
        "categories": [{"id": label, "name": name} for label, name in enumerate(class_names, start=1)],
        # Ids start at 1, because pycocotools reads a match with annotation 0 as no match.
        "annotations": [{**item, "id": number} for number, item in enumerate(annotations, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _list_items(image_id: int, detections: Detections, *, classes: int) -> Iterator[dict[str, object]]:
    """One image's detections as COCO annotations.

    Args:
        image_id: the data set's own id.
        detections: xyxy, pixels of the stored image.
        classes: K.
    """
    rows = zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    for (x1, y1, x2, y2), score, label in rows:
        if not 1 <= label <= classes:
            raise DataError(
                f"expected labels 1 to {classes}, got {label} for the image with image id {image_id}; "
                "evaluate with the class list of the detector's training"
            )
        yield {
            "image_id": image_id,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "score": score,
            "iscrowd": 0,
        }


def _to_percent(value: float) -> float | None:
    """Converts 0..1 to 0-100; pycocotools' -1 (no objects) becomes None."""
    return None if value < 0 else 100.0 * float(value)
