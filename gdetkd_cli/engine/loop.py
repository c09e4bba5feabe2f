"""The training loop of plain and distilled students."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pickle import UnpicklingError
from time import perf_counter

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gdetkd_cli.distill.distiller import Distiller
from gdetkd_cli.engine.events import Evaluated, Observer, StepDone
from gdetkd_cli.engine.readings import Reading, Readings, choose_interval
from gdetkd_cli.engine.run_folder import RunFolder, write_text
from gdetkd_cli.errors import NonFiniteLossError, RunFolderError, first_line
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics
from gdetkd_cli.structures import Batch, LossReport


@dataclass(frozen=True)
class LoopOptions:
    """Length and intervals in optimizer steps; ``clip_norm`` is the largest gradient norm, None: no limit."""

    steps: int
    clip_norm: float | None
    log_every: int
    evaluate_every: int | None
    checkpoint_every: int


@dataclass
class _Window:
    """Sums over the steps since the last log line."""

    started: float = field(default_factory=perf_counter)
    steps: int = 0
    images: int = 0
    loss: float = 0.0
    norm: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, reading: Reading) -> None:
        self.steps += 1
        self.images += reading.images
        self.loss += reading.loss
        self.norm = reading.student_norm
        for name, value in reading.parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value


class Loop:
    """The training of one run: steps, logging, evaluation, checkpoints.

    Args:
        accelerator: devices, precision, processes and trackers.
        distiller: not yet prepared by the accelerator.
        optimizer, schedule: over the distiller's trainable parameters.
        batches: start step -> the batches from there to the end.
        evaluate: metrics of the current student; called on every process, returns a result on the main one.
        finish: writes the trained student; called on the main process after the last step.
        folder: of the run's files.
        options: length and intervals.
        observer: receives events, on the main process only.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        distiller: Distiller,
        optimizer: Optimizer,
        schedule: LambdaLR,
        batches: Callable[[int], Iterator[Batch]],
        evaluate: Callable[[], CocoMetrics | None],
        finish: Callable[[], None],
        folder: RunFolder,
        options: LoopOptions,
        observer: Observer,
    ) -> None:
        self._accelerator = accelerator
        self._distiller = distiller
        self._batches = batches
        self._evaluate = evaluate
        self._finish = finish
        self._folder = folder
        self._options = options
        self._observer = observer
        self._schedule = schedule
        self._readings = Readings(choose_interval(accelerator.device, options.log_every))
        self._window = _Window()
        self._forward, self._optimizer = accelerator.prepare(distiller, optimizer)
        # The schedule is neither prepared, since accelerate would advance it once per process at every step, nor
        # registered for checkpoints, since accelerate would unpickle its state.

    def run(self, resume: bool) -> CocoMetrics | None:
        """Trains to the end; returns the last evaluation (on the main process).

        Raises:
            NonFiniteLossError: a loss or gradient is NaN or infinite. Nothing is written after that step, so the last
                checkpoint is sound.
        """
        start = self._restore() if resume else 0
        metrics, spent = None, 0.0
        self._window = _Window()
        self._forward.train()
        for step, batch in enumerate(self._batches(start), start=start):
            weights = self.take_step(step, batch)
            done = step + 1
            last = done == self._options.steps
            logs = done % self._options.log_every == 0 or last
            saves = done % self._options.checkpoint_every == 0 and not last
            evaluates = last or bool(self._options.evaluate_every and done % self._options.evaluate_every == 0)
            if logs or saves or evaluates:  # raises before anything is written after a fault
                self._read()
            if logs:
                spent += perf_counter() - self._window.started
                self._log(done, start, weights, spent)
                self._window = _Window()
            if saves:
                self._save(done)
            if last and self._accelerator.is_main_process:
                self._finish()  # before the last evaluation, so that an error in it loses nothing
            if evaluates:
                metrics = self._evaluate_student(done)
                self._forward.train()
                self._window.started = perf_counter()
        return metrics

    def take_step(self, step: int, batch: Batch) -> dict[str, float]:
        """Runs one step; returns the weights of its terms."""
        try:
            return self._step(step, batch)
        except NonFiniteLossError:
            raise
        except Exception:
            self._read()  # an unread fault may be the reason
            raise

    def _step(self, step: int, batch: Batch) -> dict[str, float]:
        self._distiller.step = step
        report: LossReport = self._forward(batch.to(self._accelerator.device))
        self._accelerator.backward(report.total)
        self._accelerator.unscale_gradients()
        self._readings.add(
            step=step,
            images=len(batch),
            loss=report.total,
            norms=clip_apart(self._distiller, self._options.clip_norm),
            scale=self._get_scale(report.total),
            parts=report.parts,
        )
        if self._readings.due:
            self._read()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
        return report.weights

    def _get_scale(self, like: Tensor) -> Tensor:
        """The scale of half precision's gradients, on the device, since ``get_scale`` would wait for it."""
        one = torch.ones((), device=like.device)
        scaler = self._accelerator.scaler
        return one if scaler is None else scaler.scale(one)

    def _read(self) -> None:
        """Adds the numbers of the steps since the last call to the window.

        Raises:
            NonFiniteLossError: one of them is NaN or infinite.
        """
        for reading in self._readings.read():
            fault = reading.fault()
            if fault is not None:
                raise self._build_error(*fault, reading)
            self._window.add(reading)

    def _build_error(self, what: str, value: float, reading: Reading) -> NonFiniteLossError:
        parts = ", ".join(f"{name} {part:.4g}" for name, part in reading.parts.items())
        return NonFiniteLossError(
            f"the {what} is {value} at step {reading.step} ({parts}). Try a lower train.optimizer.lr, a longer "
            "train.schedule.warmup_steps, train.clip_norm, or runtime.precision=fp32. The last checkpoint, if any, "
            f"is in {self._folder.resume}"
        )

    def _log(self, done: int, start: int, weights: dict[str, float], spent: float) -> None:
        if not self._accelerator.is_main_process:
            return
        window = self._window
        seconds = perf_counter() - window.started
        rate = window.images * self._accelerator.num_processes / seconds
        parts = {name: value / window.steps for name, value in window.parts.items()}
        lr = float(self._schedule.get_last_lr()[0])
        line = {
            "step": done,
            "loss": window.loss / window.steps,
            **parts,
            **{f"weight/{name}": weight for name, weight in weights.items()},
            "lr": lr,
            "gradient_norm": window.norm if math.isfinite(window.norm) else None,  # JSON has no infinity
            "images_per_second": rate,
        }
        self._folder.log(line)
        self._accelerator.log({k: v for k, v in line.items() if k != "step"}, step=done)
        eta = spent / (done - start) * (self._options.steps - done)
        self._observer(
            StepDone(
                step=done,
                steps=self._options.steps,
                loss=window.loss / window.steps,
                parts=parts,
                lr=lr,
                images_per_second=rate,
                eta_seconds=eta,
            )
        )

    def _evaluate_student(self, done: int) -> CocoMetrics | None:
        metrics = self._evaluate()
        if metrics is not None and self._accelerator.is_main_process:
            self._folder.log({"step": done, "evaluation": metrics.to_json()})
            scalars = {f"evaluation/{k}": v for k, v in metrics.to_json().items() if isinstance(v, float)}
            self._accelerator.log(scalars, step=done)
            self._observer(Evaluated(step=done, metrics=metrics))
        return metrics

    def _save(self, done: int) -> None:
        """Writes the resume checkpoint beside the old one, then replaces the old one."""
        fresh = self._folder.path / "resume.new"
        if self._accelerator.is_main_process:
            shutil.rmtree(fresh, ignore_errors=True)
        self._accelerator.wait_for_everyone()
        self._accelerator.save_state(str(fresh), safe_serialization=False)
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            progress = {"step": done, "schedule": self._schedule.state_dict()}
            write_text(fresh / "progress.json", json.dumps(progress))
            self._folder.replace_resume(fresh)
        self._accelerator.wait_for_everyone()

    def _restore(self) -> int:
        self._folder.check_resume()
        step, schedule = self._folder.progress()
        try:
            self._accelerator.load_state(str(self._folder.resume))  # weights only: no pickle is executed
        except (RuntimeError, ValueError, UnpicklingError) as error:
            raise RunFolderError(f"{self._folder.resume} cannot be resumed from: {first_line(error)}") from error
        self._schedule.load_state_dict(schedule)
        if self._accelerator.is_main_process:
            self._folder.drop_log_after(step)
        return step


def clip_apart(distiller: Distiller, limit: float | None) -> tuple[Tensor, Tensor]:
    """Clips the gradients of the student and of the added parts separately, so that adapters do not slow the student.

    Returns:
        Both norms before clipping, on the device; the second is 0 without added parts.
    """
    most = limit or float("inf")
    student_parts, added_parts = list(distiller.student.parameters()), list(distiller.added_parameters())
    student = clip_grad_norm_(student_parts, most)
    return student, clip_grad_norm_(added_parts, most) if added_parts else torch.zeros_like(student)


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seeds torch's generators, differently on each process; the order of the data has its own generator."""
    torch.manual_seed(seed + 1_000_003 * rank)
