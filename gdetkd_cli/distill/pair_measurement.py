"""Measures a trained pair on validation images: matched levels (SGFI), and similarity of region embeddings (CKD).

Shapes: R objects, L student levels, T teacher levels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from gdetkd_cli.distill.distiller import Distiller
from gdetkd_cli.methods.ckd import CKDTerm
from gdetkd_cli.methods.sgfi import SGFITerm
from gdetkd_cli.structures import Batch, LevelSpec

SIZES = {"small": 0.0, "medium": 32.0**2, "large": 96.0**2}  # least area, square pixels
_BINS = 40  # of cosines from -1 to 1


@dataclass(frozen=True)
class Matching:
    """Mean weights of the student's levels in SGFI's match.

    Attributes:
        student_levels, teacher_levels: titles, fine to coarse.
        weights: T rows of L mean weights that sum to 1; a row without objects is empty.
        objects: (T,) number of objects that the teacher reads from each level.
        by_size: by ``small``, ``medium`` and ``large``: number of objects, and L mean weights, empty without objects.
    """

    student_levels: list[str]
    teacher_levels: list[str]
    weights: list[list[float]]
    objects: list[int]
    by_size: dict[str, tuple[int, list[float]]]


@dataclass(frozen=True)
class Similarity:
    """Cosines between student and teacher in CKD's common space.

    Attributes:
        edges: of the bins.
        matched, unmatched: counts per bin, for the same region and for two regions that are negatives.
        matched_mean, unmatched_mean: means; None without such pairs.
    """

    edges: list[float]
    matched: list[int]
    unmatched: list[int]
    matched_mean: float | None
    unmatched_mean: float | None


@dataclass(frozen=True)
class PairMeasurement:
    """What a pair does on some images; a part is None if the pair has no such term."""

    images: int
    objects: int
    matching: Matching | None
    similarity: Similarity | None


def measure_pair(distiller: Distiller, batches: Iterable[Batch], *, seconds: float) -> PairMeasurement:
    """Measures the terms SGFI and CKD on the true boxes of images.

    Args:
        distiller: trained, with a teacher; it is left as it was.
        batches: on the distiller's device.
        seconds: no further batch is read after this time.
    """
    sgfi, ckd = _find_terms(distiller)
    weights, levels, areas, matched, unmatched = [], [], [], [], []
    images, started = 0, perf_counter()
    student: tuple[LevelSpec, ...] = ()
    teacher: tuple[LevelSpec, ...] = ()
    training = distiller.training
    distiller.eval()
    try:
        for batch in batches:
            pair = distiller.observe_objects(batch)
            images += len(batch)
            student, teacher = pair.student_seen.pyramid.levels, pair.teacher_seen.pyramid.levels
            if len(pair.regions):
                sides = pair.regions.boxes[:, 2:] - pair.regions.boxes[:, :2]
                areas.append(sides.prod(dim=1).cpu())
                assert pair.teacher_view.level is not None
                levels.append(pair.teacher_view.level.cpu())
                weights += [sgfi.match_levels(pair).cpu()] if sgfi else []
                if ckd:
                    own, others = ckd.compare_regions(pair)
                    matched.append(own.cpu())
                    unmatched.append(others.cpu())
            if perf_counter() - started > seconds:
                break
    finally:
        distiller.train(training)
    objects = sum(map(len, areas))
    matching = None
    if weights:
        matching = _average(torch.cat(weights), torch.cat(levels), torch.cat(areas), student, teacher)
    return PairMeasurement(images, objects, matching, _count(matched, unmatched) if matched else None)


def _find_terms(distiller: Distiller) -> tuple[SGFITerm | None, CKDTerm | None]:
    terms = list(distiller.terms.values())
    sgfi = [term for term in terms if isinstance(term, SGFITerm)]
    ckd = [term for term in terms if isinstance(term, CKDTerm)]
    return next(iter(sgfi), None), next(iter(ckd), None)


def _average(
    weights: Tensor, level: Tensor, area: Tensor, student: tuple[LevelSpec, ...], teacher: tuple[LevelSpec, ...]
) -> Matching:
    """Averages (R, L) weights by teacher level (R,) and by object area (R,)."""
    least = torch.tensor(list(SIZES.values()))
    size = torch.bucketize(area, least, right=True) - 1

    def mean(rows: Tensor) -> list[float]:
        return weights[rows].mean(dim=0).tolist() if rows.any() else []

    return Matching(
        student_levels=[f"stride {one.stride[0]:.3g}" for one in student],
        teacher_levels=[f"stride {one.stride[0]:.3g}" for one in teacher],
        weights=[mean(level == place) for place in range(len(teacher))],
        objects=[int((level == place).sum()) for place in range(len(teacher))],
        by_size={name: (int((size == place).sum()), mean(size == place)) for place, name in enumerate(SIZES)},
    )


def _count(matched: list[Tensor], unmatched: list[Tensor]) -> Similarity:
    """Counts cosines in bins from -1 to 1."""
    edges = torch.linspace(-1, 1, _BINS + 1)
    same, other = torch.cat(matched), torch.cat(unmatched)

    def count(values: Tensor) -> list[int]:
        return torch.histogram(values.clamp(-1, 1).float(), edges).hist.long().tolist()

    return Similarity(
        edges=edges.tolist(),
        matched=count(same),
        unmatched=count(other),
        matched_mean=float(same.mean()) if len(same) else None,
        unmatched_mean=float(other.mean()) if len(other) else None,
    )
