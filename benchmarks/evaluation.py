"""Times an evaluation of COCO's size with gdetkd and with pycocotools.

    python benchmarks/evaluation.py

5,000 images, 80 classes, about 36,000 objects and 100 detections per image, a few of them true. Also prints the largest
difference of a metric.
"""

from __future__ import annotations

import contextlib
import io
from time import perf_counter

import torch

from gdetkd_cli.data.split import Record
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco, match_images
from gdetkd_cli.structures import Detections

IMAGES, CLASSES, OBJECTS, DETECTIONS = 5000, 80, 7.2, 100


def main() -> None:
    records, predictions = draw_scenes()
    names = [str(label) for label in range(1, CLASSES + 1)]
    start = perf_counter()
    ours = evaluate_coco(records, names, predictions)
    middle = perf_counter()
    theirs = match_images(records, names, predictions)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs.accumulate()
        theirs.summarize()
    seconds, reference = middle - start, perf_counter() - middle
    found = (ours.ap, ours.ap50, ours.ap75, ours.ap_small, ours.ap_medium, ours.ap_large)
    off = max(abs((value or 0.0) - 100 * stat) for value, stat in zip(found, theirs.stats[:6], strict=True))
    print(f"{sum(len(r.truth) for r in records)} objects, {ours.detections} detections")
    print(f"gdetkd {seconds:.1f} s, pycocotools {reference:.1f} s, ratio {seconds / reference:.3f}")
    print(f"largest difference of a metric {off:.1e} AP")


def draw_scenes() -> tuple[list[Record], dict[int, Detections]]:
    """Draws records and detections, always the same."""
    generator = torch.Generator().manual_seed(0)

    def draw_boxes(count: int) -> torch.Tensor:
        corners = torch.rand(count, 2, generator=generator) * 500
        return torch.cat([corners, corners + (4 + 0.9 * torch.randn(count, 2, generator=generator)).exp()], dim=1)

    records, predictions = [], {}
    for image_id in range(1, IMAGES + 1):
        count = int(torch.poisson(torch.tensor(OBJECTS), generator=generator))
        truth, labels = draw_boxes(count), torch.randint(1, CLASSES + 1, (count,), generator=generator)
        items: list[dict[str, object]] = [
            {
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "category_id": label,
                "iscrowd": int(number % 100 == 99),
            }
            for number, ((x1, y1, x2, y2), label) in enumerate(zip(truth.tolist(), labels.tolist(), strict=True))
        ]
        records.append(Record(image_id, (640, 640), truth, labels, items))
        false = DETECTIONS - count
        sides = truth[:, 2:] - truth[:, :2]
        near = truth + (0.1 * torch.randn(count, 2, generator=generator) * sides).repeat(1, 2)
        predictions[image_id] = Detections(
            boxes=torch.cat([near, draw_boxes(false)]),
            scores=torch.cat([torch.rand(count, generator=generator), 0.7 * torch.rand(false, generator=generator)]),
            labels=torch.cat([labels, torch.randint(1, CLASSES + 1, (false,), generator=generator)]),
        )
    return records, predictions


if __name__ == "__main__":
    main()
