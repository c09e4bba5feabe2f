"""Two processes with four images each compute the gradient of one process with eight, where each part allows it."""

from __future__ import annotations

from pathlib import Path

import torch
from distilling import TinyDetector
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from two_processes import run_in_two_processes

from gdetkd_cli.detectors.protocol import Detector, Observation
from gdetkd_cli.distill.distiller import Distiller, WeightedTerm
from gdetkd_cli.methods import BUILDERS
from gdetkd_cli.methods.base import Detectors
from gdetkd_cli.recipe.distillation import CWD, FGD, SGFI, FitNet, RoIImitation
from gdetkd_cli.structures import Batch, Regions, Target

OBJECTS = (2, 0, 1, 3, 0, 0, 0, 0)  # by image: the second process has none
REGIONS = (5, 1, 3, 0, 2, 0, 0, 1)
EXACT = {"sgfi": SGFI(), "roi_imitation": RoIImitation(), "fitnet": FitNet(), "cwd": CWD(), "fgd": FGD()}


def make_batch() -> Batch:
    """Eight images of one size, since an image that is padded to a larger neighbour has other features."""
    generator = torch.Generator().manual_seed(0)
    boxes = [torch.tensor([[4.0 + 5 * k, 6, 30 + 6 * k, 38] for k in range(count)]).reshape(-1, 4) for count in OBJECTS]
    return Batch(
        images=list(torch.rand(8, 3, 64, 96, generator=generator)),
        targets=[Target(boxes=one, labels=torch.ones(len(one), dtype=torch.int64)) for one in boxes],
        image_ids=torch.arange(8),
    )


def choose(seen: Observation, batch: Batch, step: int) -> Regions:
    """Fixed boxes, another number for each image."""
    counts = [REGIONS[number] for number in batch.image_ids.tolist()]
    boxes = [[2.0 + 3 * k, 4, 30 + 8 * k, 28 + 6 * k] for count in counts for k in range(count)]
    index = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts))
    return Regions(
        boxes=torch.tensor(boxes).reshape(-1, 4),
        image_index=index,
        candidate=torch.full_like(index, -1),
        counts=tuple(counts),
    )


def make_distiller(student: Detector, teacher: Detector) -> Distiller:
    teacher.module.eval().requires_grad_(False)
    pair = Detectors(student, teacher)
    torch.manual_seed(0)
    terms = {
        name: WeightedTerm(BUILDERS[name](pair, **block.model_dump(exclude={"weight", "warmup_steps"})), 1.0)
        for name, block in EXACT.items()
    }
    return Distiller(student=student, teacher=teacher, terms=terms, choose_regions=choose).train()


def test_the_gradient_is_that_of_one_process(tiny_detector: TinyDetector, tmp_path: Path) -> None:
    batch = make_batch()

    def compute_gradients(part: slice, *, joined: bool) -> dict[str, Tensor]:
        student = tiny_detector("retinanet", norm="frozen")
        distiller = make_distiller(student, tiny_detector("faster-rcnn", seed=1))
        forward = DistributedDataParallel(distiller) if joined else distiller
        own = Batch(images=batch.images[part], targets=batch.targets[part], image_ids=batch.image_ids[part])
        report = forward(own)
        report.total.backward()
        found = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
        return (
            found
            | {f"loss {name}": loss for name, loss in report.parts.items()}
            | dict(distiller.terms.named_buffers())
        )

    expected = compute_gradients(slice(0, 8), joined=False)
    both = run_in_two_processes(lambda rank: compute_gradients(slice(4 * rank, 4 * rank + 4), joined=True), tmp_path)
    for name, value in expected.items():
        found = torch.stack([one[name].float() for one in both])
        if name.startswith("loss"):  # of one process; the mean is logged
            found = found.mean(dim=0, keepdim=True)
        difference = (found - value.float()).abs().max()
        assert difference <= 1e-4 * value.float().abs().max() + 1e-7, (name, float(difference))
