"""Running a detector over a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, distributed

from gdetkd_cli.structures import Batch, Detections


class Predictor(Protocol):
    """Anything that detects: a Detector, or an exported file."""

    def predict(self, images: list[Tensor]) -> list[Detections]: ...


def predict_split(
    predictor: Predictor,
    batches: Iterable[Batch],
    device: torch.device | str,
    progress: Callable[[int], None] | None = None,
) -> dict[int, Detections]:
    """Detections by image id, on the CPU, of the batches of this process; ``progress`` hears how many there are."""
    found: dict[int, Detections] = {}
    for batch in batches:
        detections = predictor.predict([image.to(device) for image in batch.images])
        for image_id, one in zip(batch.image_ids.tolist(), detections, strict=True):
            found[image_id] = Detections(boxes=one.boxes.cpu(), scores=one.scores.cpu(), labels=one.labels.cpu())
        if progress is not None:
            progress(len(found))
    return found


def gather_predictions(own: dict[int, Detections]) -> dict[int, Detections]:
    """The detections of every process; each image was predicted by one of them."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return own
    everyone: list[dict[int, Detections] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    return {image_id: one for part in everyone if part is not None for image_id, one in part.items()}
