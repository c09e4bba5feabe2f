"""Measures a detector's AP far from the image's corner: in float32, in half precision, and in half precision without
the guard that keeps coordinates in float32.

    python benchmarks/precision.py                             # the shipped teacher
    python benchmarks/precision.py --model runs/fcos --dtype float16

The built-in scenes are placed at (1060, 600) in images of 1,216 x 736 pixels, where bfloat16 resolves 8 and 4 pixels.
The model must be trained on scenes of their own size (128 pixels).
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from gdetkd_cli.data.synthetic import CLASS_NAMES, draw_split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.torchvision import common
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco
from gdetkd_cli.evaluation.predict import predict_split
from gdetkd_cli.structures import Batch, Detections

SIZE, CORNER, SIDE = (736, 1216), (1060, 600), 128  # (height, width), (x, y), pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:shapes-teacher", help="run folder or student.pt")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    detector = load_for_large_images(options.model, device)
    dtype = getattr(torch, options.dtype)
    furthest, share = compare_anchors(dtype)
    print(f"anchors in {options.dtype}: up to {furthest:.0f} pixels off, {share:.0%} by one pixel or more")
    print(f"regression targets in {options.dtype}: error {compare_targets(dtype):.0%} of their deviation")
    print(f"{options.model}, {options.scenes} scenes at {CORNER}, {device}")
    print(f"float32                        {measure_ap(detector, options.scenes, device, None):.1f} AP")
    print(f"{options.dtype:30} {measure_ap(detector, options.scenes, device, dtype):.1f} AP")
    with patch.object(common, "exact_boxes", lambda _: nullcontext()):
        print(f"{options.dtype + ', boxes too':30} {measure_ap(detector, options.scenes, device, dtype):.1f} AP")


def compare_anchors(dtype: torch.dtype) -> tuple[float, float]:
    """Largest error in pixels, and the share of errors of a pixel or more, of a Faster R-CNN's anchors in an image of
    800 x 1,216 pixels, which torchvision makes in the dtype of the features."""
    levels = [(-(-800 // stride), -(-1216 // stride)) for stride in (4, 8, 16, 32, 64)]

    def make(dtype: torch.dtype) -> Tensor:
        generator = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
        images = ImageList(torch.zeros(1, 3, 800, 1216, dtype=dtype), [(800, 1216)])
        return generator(images, [torch.zeros(1, 1, *size, dtype=dtype) for size in levels])[0].float()

    error = (make(torch.float32) - make(dtype)).abs().amax(dim=1)
    return float(error.max()), float((error >= 1).float().mean())


def compare_targets(dtype: torch.dtype) -> float:
    """Error of a RoI head's regression targets over their deviation: objects of 24 pixels anywhere in 800 x 1,216
    pixels, proposals that are off by 3 pixels (one standard deviation) at each side."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(20_000, 2, generator=generator) * torch.tensor([1216 - 24.0, 800 - 24.0])
    truth = torch.cat([corner, corner + 24], dim=1)
    proposals = truth + 3 * torch.randn(truth.shape, generator=generator)
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    exact = coder.encode_single(truth, proposals)
    return float((coder.encode_single(truth.to(dtype), proposals.to(dtype)).float() - exact).std() / exact.std())


def load_for_large_images(model: str, device: str) -> Any:
    """Loads a detector and changes it to take images of ``SIZE`` without resizing."""
    detector = catalog.load(catalog.locate(model)).detector
    module: Any = detector.module.to(device)
    module.transform.min_size, module.transform.max_size = (SIZE[0],), SIZE[1]
    return detector


def measure_ap(detector: Any, scenes: int, device: str, dtype: torch.dtype | None) -> float:
    """Measures COCO box AP in 0-100 on the moved scenes, under autocast if a dtype is given."""
    split = draw_split(split="val", images=scenes, size=SIDE, seed=0)
    batches = (
        Batch([paste_on_canvas(split.read(i))], [], torch.tensor([record.image_id]))
        for i, record in enumerate(split.records)
    )
    with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        found = predict_split(detector, batches, device)
    shift = torch.tensor([*CORNER, *CORNER])
    moved = {n: Detections(boxes=d.boxes.float() - shift, scores=d.scores, labels=d.labels) for n, d in found.items()}
    ap = evaluate_coco(split.records, CLASS_NAMES, moved).ap
    assert ap is not None
    return ap


def paste_on_canvas(scene: Tensor) -> Tensor:
    """Pastes a scene (3, 128, 128) uint8 on a grey image (3, 736, 1216) in 0..1."""
    image = torch.full((3, *SIZE), 0.5)
    x, y = CORNER
    image[:, y : y + SIDE, x : x + SIDE] = scene / 255
    return image


if __name__ == "__main__":
    main()
