"""Chooses the boxes on which student and teacher are compared.

Boxes are xyxy in batch-image pixels. The choice has its own seeded generator, so distillation does not change any other
random number of the run. Shapes: P_i candidates of image i.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Generator, Tensor
from torchvision.ops import box_iou

from gdetkd_cli.detectors.protocol import Candidates
from gdetkd_cli.host import copy_tensor
from gdetkd_cli.structures import Batch, Regions, count_by_image


def choose_regions(
    candidates: Candidates,
    batch: Batch,
    *,
    per_image: int,
    positive_iou: float,
    negatives_per_positive: float,
    generator: Generator,
) -> Regions:
    """Chooses at most ``per_image`` regions of each image.

    Of a two-stage student, a random subset of the sampled proposals. Of a dense student, predictions that overlap the
    truth as positives, with a number of negatives for each. The true boxes come first among a dense student's
    positives, since its own boxes are poor early in training. In a crowded image, a random part of them does.
    """
    counts = candidates.counts or count_by_image(candidates.image_index, len(batch))
    starts = [0, *accumulate(counts)]
    overlaps = None if candidates.sampled else _compute_overlaps(candidates, batch, counts)
    rows, chosen_counts, candidate = [], [], []
    first_truth = starts[-1]  # true boxes follow the candidates
    negatives = per_image - max(1, int(per_image / (1 + negatives_per_positive)))  # of an image, at most
    for i, target in enumerate(batch.targets):
        own = torch.arange(starts[i], starts[i + 1])
        if overlaps is None:
            chosen, truth = _draw_rows(own, per_image, generator), own[:0]
        else:
            others = min(negatives, int((overlaps[i] <= positive_iou).sum()))
            truth = first_truth + _draw_rows(torch.arange(len(target.boxes)), per_image - others, generator)
            first_truth += len(target.boxes)
            room = max(0, per_image - len(truth))
            chosen = _draw_balanced_rows(
                own, overlaps[i], len(truth), room, positive_iou, negatives_per_positive, generator
            )
        rows += [chosen, truth]
        candidate += [chosen, torch.full_like(truth, -1)]
        chosen_counts.append(len(chosen) + len(truth))
    boxes = candidates.boxes if overlaps is None else torch.cat([candidates.boxes, *(t.boxes for t in batch.targets)])
    image_index = torch.arange(len(batch)).repeat_interleave(torch.tensor(chosen_counts))
    return Regions(
        boxes=boxes.detach()[copy_tensor(torch.cat(rows), boxes)],
        image_index=copy_tensor(image_index, boxes),
        candidate=copy_tensor(torch.cat(candidate), boxes),
        counts=tuple(chosen_counts),
        all_candidates=True if candidates.sampled else None,
    )


def _compute_overlaps(candidates: Candidates, batch: Batch, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """By image, (P_i,) on the host: each candidate's greatest overlap with an object; one wait for all images."""
    greatest = [
        box_iou(boxes, target.boxes).amax(dim=1) if len(target.boxes) else boxes.new_zeros(len(boxes))
        for boxes, target in zip(candidates.boxes.split(list(counts)), batch.targets, strict=True)
    ]
    return torch.cat(greatest).cpu().split(list(counts))


def _draw_rows(rows: Tensor, count: int, generator: Generator) -> Tensor:
    """Draws ``count`` rows at random and keeps their order; all rows if there are no more."""
    if len(rows) <= count:
        return rows
    picked = torch.randperm(len(rows), generator=generator)[:count].sort().values
    return rows[picked]


def _draw_balanced_rows(
    rows: Tensor,
    overlap: Tensor,
    already: int,
    room: int,
    positive_iou: float,
    negatives_per_positive: float,
    generator: Generator,
) -> Tensor:
    """Draws positives and negatives of one image, as rows of the candidates, beside ``already`` chosen positives."""
    positive, negative = rows[overlap > positive_iou], rows[overlap <= positive_iou]
    # The budget is (1 + negatives_per_positive) times the number of all positives.
    share = int((room + already) / (1 + negatives_per_positive))
    positive = _draw_rows(positive, max(0, share - already), generator)
    # An image without objects still gets the negatives of one positive.
    wanted = int(negatives_per_positive * max(1, len(positive) + already))
    negative = _draw_rows(negative, min(wanted, room - len(positive)), generator)
    return torch.cat([positive, negative])
