"""Runs a detector over a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, distributed

from gdetkd_cli.data.split import Record, Split
from gdetkd_cli.errors import DataError
from gdetkd_cli.structures import Batch, Detections


class Predictor(Protocol):
    """A Detector or an exported file."""

    def predict(self, images: list[Tensor]) -> list[Detections]: ...


def predict_split(
    predictor: Predictor,
    batches: Iterable[Batch],
    device: torch.device | str,
    progress: Callable[[int], None] | None = None,
) -> dict[int, Detections]:
    """Predicts this process's batches: by image id, on the CPU. ``progress`` gets the number of images done."""
    predictions: dict[int, Detections] = {}
    for batch in batches:
        detections = predictor.predict([image.to(device) for image in batch.images])
        for image_id, d in zip(batch.image_ids.tolist(), detections, strict=True):
            predictions[image_id] = Detections(boxes=d.boxes.cpu(), scores=d.scores.cpu(), labels=d.labels.cpu())
        if progress is not None:
            progress(len(predictions))
    return predictions


def list_predicted(split: Split, predictions: Mapping[int, Detections]) -> Sequence[Record]:
    """Returns the records of the images that were predicted: all but those left out (``Split.bad``).

    Raises:
        DataError: all are left out.
    """
    kept = [record for record in split.records if split.bad is None or record.image_id in predictions]
    if split.records and not kept:
        raise DataError(f"no image of {split.name} can be read; give other data")
    return kept


def gather_predictions(own: dict[int, Detections]) -> dict[int, Detections]:
    """Gathers the detections of all processes, each of which predicted its own images."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return own
    everyone: list[dict[int, Detections] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    return {image_id: detections for part in everyone if part for image_id, detections in part.items()}
