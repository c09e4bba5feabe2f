"""A confusion matrix of detections: which class is found where which class is.

Shapes: G objects and D detections of an image, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torchvision.ops import box_iou

from gdetkd_cli.data.split import Record
from gdetkd_cli.evaluation.errors import FOREGROUND, read_truth
from gdetkd_cli.structures import Detections


def count_confusions(
    records: Sequence[Record], classes: int, predictions: Mapping[int, Detections], *, min_score: float
) -> NDArray[np.int64]:
    """Pairs objects and detections of any class at IoU 0.5, the largest overlap first, each at most once.

    Args:
        records: the images and their truth; crowds are left out.
        classes: K.
        predictions: by image id; a missing image has no detections.
        min_score: detections below it are left out.

    Returns:
        (K + 1, K + 1) counts: rows are true classes, columns are found classes; the last row and column are background.
    """
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for record in records:
        boxes, labels, crowds = read_truth(record)
        boxes, truth = boxes[~crowds], (labels[~crowds] - 1).tolist()
        found = predictions.get(record.image_id)
        sure = found.scores >= min_score if found is not None else None
        predicted = [] if found is None else (found.labels[sure] - 1).tolist()
        rows, columns = set(range(len(truth))), set(range(len(predicted)))
        if found is not None and rows and columns:
            iou = box_iou(boxes, found.boxes[sure].float())
            pairs = (iou >= FOREGROUND).nonzero()
            for row, column in pairs[iou[tuple(pairs.T)].argsort(descending=True, stable=True)].tolist():
                if row in rows and column in columns:
                    rows.remove(row)
                    columns.remove(column)
                    counts[truth[row], predicted[column]] += 1
        for row in rows:
            counts[truth[row], classes] += 1
        for column in columns:
            counts[classes, predicted[column]] += 1
    return counts
