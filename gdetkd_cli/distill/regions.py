"""Which boxes student and teacher are compared on.

Boxes are xyxy in batch-image pixels. The choice is drawn from its own seeded generator, so that adding distillation
leaves every other random number of the run as it was.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torchvision.ops import box_iou

from gdetkd_cli.detectors.protocol import Candidates
from gdetkd_cli.structures import Batch, Regions


def choose_regions(
    candidates: Candidates,
    batch: Batch,
    *,
    per_image: int,
    positive_iou: float,
    negatives_per_positive: float,
    generator: Generator,
) -> Regions:
    """At most ``per_image`` regions of each image.

    A two-stage student's sampled proposals are taken as they are, thinned out at random. A dense student's predictions
    are sampled: those that overlap the truth are positives, and each positive brings negatives. The true boxes are
    among the positives always, since a dense student's own boxes are poor early in training.
    """
    boxes, image_index, candidate = [], [], []
    for i, target in enumerate(batch.targets):
        rows = (candidates.image_index == i).nonzero().squeeze(1)
        if candidates.sampled:
            chosen = _random_rows(rows, per_image, generator)
            truth = target.boxes[:0]
        else:
            truth = target.boxes[_random_rows(torch.arange(len(target.boxes)), per_image, generator)]
            room = max(0, per_image - len(truth))
            chosen = _balanced_rows(
                rows,
                candidates.boxes[rows],
                target.boxes,
                len(truth),
                room,
                positive_iou,
                negatives_per_positive,
                generator,
            )
        boxes.append(torch.cat([candidates.boxes[chosen], truth]))
        candidate.append(torch.cat([chosen, torch.full((len(truth),), -1, device=chosen.device)]))
        image_index.append(torch.full((len(chosen) + len(truth),), i, device=chosen.device))
    return Regions(boxes=torch.cat(boxes).detach(), image_index=torch.cat(image_index), candidate=torch.cat(candidate))


def _random_rows(rows: Tensor, count: int, generator: Generator) -> Tensor:
    """``count`` of the rows at random, in their order; all of them where there are no more."""
    if len(rows) <= count:
        return rows
    picked = torch.randperm(len(rows), generator=generator)[:count].sort().values
    return rows[picked.to(rows.device)]


def _balanced_rows(
    rows: Tensor,
    boxes: Tensor,
    truth: Tensor,
    already: int,
    room: int,
    positive_iou: float,
    negatives_per_positive: float,
    generator: Generator,
) -> Tensor:
    """Positives and negatives of one image, in rows of the candidates; ``already`` positives were chosen before."""
    overlap = box_iou(boxes, truth).amax(dim=1) if len(truth) else boxes.new_zeros(len(boxes))
    positive, negative = rows[overlap > positive_iou], rows[overlap <= positive_iou]
    # With p positives in all, (1 + negatives_per_positive) p = the whole budget.
    share = int((room + already) / (1 + negatives_per_positive))
    positive = _random_rows(positive, max(0, share - already), generator)
    # A picture without objects still offers as many negatives as one positive would bring.
    wanted = int(negatives_per_positive * max(1, len(positive) + already))
    negative = _random_rows(negative, min(wanted, room - len(positive)), generator)
    return torch.cat([positive, negative])
