"""Student, frozen teacher and weighted terms: one step's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gdetkd_cli.detectors.protocol import Detector, Observation, RegionView, View
from gdetkd_cli.errors import TermNotComputedError
from gdetkd_cli.methods.base import ObservedPair, Term, averages_regions, collect_needs
from gdetkd_cli.methods.processes import compute_share
from gdetkd_cli.methods.queue import RegionQueue
from gdetkd_cli.structures import Batch, LossReport, Regions

ChooseRegions = Callable[[Observation, Batch, int], Regions]


@dataclass(frozen=True)
class WeightedTerm:
    """A term, its weight, and the steps over which the weight increases linearly from 0."""

    term: nn.Module
    weight: float
    warmup_steps: int = 0

    def weight_at(self, step: int) -> float:
        """The weight at ``step``, counted from 0."""
        if step >= self.warmup_steps:
            return self.weight
        return self.weight * (step + 1) / (self.warmup_steps + 1)


class Distiller(nn.Module):
    """Supervised training of a student, with distillation terms if there is a teacher.

    Plain and distilled runs both use this module. The teacher is not a submodule, so the optimizer, ``train()``, the
    checkpoint and DDP do not see it.

    Args:
        teacher: the detector to imitate; its module must be in evaluation mode and frozen.
        choose_regions: (the student's observation, the batch, the step) -> regions.
        task_loss: add the student's own losses to the total; they are always reported.
    """

    def __init__(
        self,
        *,
        student: Detector,
        teacher: Detector | None = None,
        terms: Mapping[str, WeightedTerm] | None = None,
        choose_regions: ChooseRegions | None = None,
        task_loss: bool = True,
    ) -> None:
        super().__init__()
        self.task_loss = task_loss
        self.student = student.module
        self.terms = nn.ModuleDict({name: weighted.term for name, weighted in (terms or {}).items()})
        self._detector = student
        self._teacher = [teacher]  # in a list, so that nn.Module does not register it
        self._weights = dict(terms or {})
        self._choose_regions = choose_regions
        self.step = 0  # set by the loop; regions and weights depend on it
        self.profile = False  # fill LossReport.seconds
        # DDP broadcasts every buffer at every forward. A queue is large and already the same on all processes.
        queues = (name for name, module in self.named_modules() if isinstance(module, RegionQueue))
        queued = [f"{name}.{buffer}" for name in queues for buffer, _ in self.get_submodule(name).named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, queued)

    @property
    def teacher(self) -> Detector | None:
        return self._teacher[0]

    def added_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that distillation adds: adapters, projections, tau."""
        return self.terms.parameters()

    def forward(self, batch: Batch) -> LossReport:
        """One training forward; the student must be in training mode.

        Raises:
            TermNotComputedError: a configured term has no gradient.
        """
        seconds: dict[str, float] = {}
        with self._time_phase("student forward", seconds, batch):
            seen = self._detector.forward_train(batch, candidates=bool(self._weights))
        # In a run's log, "loss" is the total.
        parts = {"own" if name == "loss" else name: loss.detach() for name, loss in seen.losses.items()}
        total: Tensor = batch.images[0].new_zeros(())
        if self.task_loss:
            total = torch.stack(list(seen.losses.values())).sum()
        weights: dict[str, float] = {}
        if self._weights:
            pair = self._observe_pair(batch, seen, seconds)
            share = compute_share(len(pair.regions), pair.regions.boxes.device)
            for name, weighted in self._weights.items():
                with self._time_phase(f"term {name}", seconds, batch):
                    value: Tensor = self.terms[name](pair)
                if torch.is_grad_enabled() and not value.requires_grad:
                    raise TermNotComputedError(f"the term {name!r} is configured but has no gradient")
                if share is not None and averages_regions(weighted.term):  # type: ignore[arg-type]  # modules are Terms
                    value = value * share
                weights[name] = weighted.weight_at(self.step)
                total = total + weights[name] * value
                parts[name] = value.detach()
        return LossReport(total=total, parts=parts, weights=weights, seconds=seconds)

    def _observe_pair(self, batch: Batch, seen: Observation, seconds: dict[str, float]) -> ObservedPair:
        assert self.teacher is not None and self._choose_regions is not None, "terms need a teacher and regions"
        terms: list[Term] = [self.terms[name] for name in self._weights]  # type: ignore[misc]  # modules are Terms
        student_needs, teacher_needs = collect_needs(terms)
        with self._time_phase("regions", seconds, batch):
            regions = self._choose_regions(seen, batch, self.step)
            student_view = _read_regions(self._detector, seen, regions, student_needs)
            regions = replace(regions, refined=tuple(stage.boxes for stage in student_view.later))
        # no_grad, not inference_mode: the adapters' graphs need these tensors.
        with self._time_phase("teacher", seconds, batch), torch.no_grad():
            teacher_seen = self.teacher.extract_features(batch)
            teacher_view = _read_regions(self.teacher, teacher_seen, regions, teacher_needs)
        return ObservedPair(
            regions=regions,
            image_ids=batch.image_ids[regions.image_index],
            batch=batch,
            student_seen=seen,
            teacher_seen=teacher_seen,
            student_view=student_view,
            teacher_view=teacher_view,
        )

    @torch.no_grad()
    def observe_objects(self, batch: Batch) -> ObservedPair:
        """Reads both detectors' outputs for the true boxes of a batch, with their levels; nothing is trained."""
        assert self.teacher is not None, "a pair has a teacher"
        terms: list[Term] = [self.terms[name] for name in self._weights]  # type: ignore[misc]  # modules are Terms
        level: frozenset[View] = frozenset({"level"})
        student_needs, teacher_needs = (
            (needs | level) - {"class_maps", "predictions"} for needs in collect_needs(terms)
        )
        counts = tuple(len(target.boxes) for target in batch.targets)
        boxes = torch.cat([target.boxes for target in batch.targets])
        index = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts)).to(boxes.device)
        regions = Regions(boxes, index, torch.full_like(index, -1), counts=counts, all_candidates=not len(index))
        seen, teacher_seen = self._detector.extract_features(batch), self.teacher.extract_features(batch)
        return ObservedPair(
            regions=regions,
            image_ids=batch.image_ids[index],
            batch=batch,
            student_seen=seen,
            teacher_seen=teacher_seen,
            student_view=_read_regions(self._detector, seen, regions, student_needs),
            teacher_view=_read_regions(self.teacher, teacher_seen, regions, teacher_needs),
        )

    @contextmanager
    def _time_phase(self, name: str, seconds: dict[str, float], batch: Batch) -> Iterator[None]:
        if not self.profile:
            yield
            return
        device = batch.image_ids.device
        synchronize(device)
        start = perf_counter()
        yield
        synchronize(device)
        seconds[name] = perf_counter() - start


def _read_regions(detector: Detector, seen: Observation, regions: Regions, needs: frozenset[View]) -> RegionView:
    """A detector's region outputs; empty if none are needed."""
    return detector.region_outputs(seen, regions, needs) if needs else RegionView()


def synchronize(device: torch.device) -> None:
    """Waits for a CUDA device, so that wall time can be measured; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
