"""Images with objects and detections that are shifted or made up, for several tests of metrics."""

from __future__ import annotations

import torch

from gdetkd_cli.data.split import Record
from gdetkd_cli.structures import Detections

CLASSES = ("cat", "dog", "bird")


def scenes(images: int = 12, quality: float = 6.0) -> tuple[list[Record], dict[int, Detections]]:
    """Images with a few objects, one of them a crowd, and detections that are shifted or made up."""
    generator = torch.Generator().manual_seed(0)
    records, predictions = [], {}
    for image_id in range(10, 10 + images):
        count = int(torch.randint(1, 6, (1,), generator=generator))
        corner = torch.rand(count, 2, generator=generator) * 100
        boxes = torch.cat([corner, corner + 12 + torch.rand(count, 2, generator=generator) * 60], dim=1)
        labels = torch.randint(1, 3, (count,), generator=generator)
        truth: list[dict[str, object]] = [
            {
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "category_id": label,
                "iscrowd": int(image_id == 10),
            }
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True)
        ]
        records.append(Record(image_id, (200, 200), torch.zeros(0, 4), labels[:0], truth))
        off = boxes + torch.randn(boxes.shape, generator=generator) * quality
        predictions[image_id] = Detections(
            boxes=torch.cat([off, off[:2] + 7]),
            scores=torch.rand(count + len(off[:2]), generator=generator),
            labels=torch.cat([labels, labels[:2]]),
        )
    return records, predictions
