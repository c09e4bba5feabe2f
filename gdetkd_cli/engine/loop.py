"""The training loop of plain and distilled students."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gdetkd_cli.distill.distiller import Distiller
from gdetkd_cli.engine.average import WeightAverage
from gdetkd_cli.engine.checkpoints import Checkpoint, Progress, read_random_state, restore_random_state
from gdetkd_cli.engine.events import Evaluated, Observer, StepDone
from gdetkd_cli.engine.readings import Reading, Readings, Window, average_reports, choose_interval
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.engine.schedule import load_optimizer, move_schedule
from gdetkd_cli.engine.signals import StopSignals
from gdetkd_cli.errors import NonFiniteLossError, RunFolderError, StoppedError, get_first_line
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics
from gdetkd_cli.structures import Batch, LossReport


@dataclass(frozen=True)
class LoopOptions:
    """Length and intervals in optimizer steps.

    Attributes:
        clip_norm: largest gradient norm; None: no limit.
        keep_checkpoints: number of checkpoints to keep.
        accumulate: batches per optimizer step.
        stop_after: evaluations without a better AP after which the run ends; None: it takes all steps.
    """

    steps: int
    clip_norm: float | None
    log_every: int
    evaluate_every: int | None
    checkpoint_every: int
    keep_checkpoints: int = 1
    accumulate: int = 1
    stop_after: int | None = None

    def logs(self, done: int) -> bool:
        # A run may end at any of its evaluations, and its last step is logged.
        return done % self.log_every == 0 or (self.evaluates(done) if self.stop_after else done == self.steps)

    def evaluates(self, done: int) -> bool:
        return done == self.steps or bool(self.evaluate_every and done % self.evaluate_every == 0)

    def saves(self, done: int) -> bool:
        """A step that is evaluated is saved first, so that nothing that happens in the evaluation loses steps."""
        return done % self.checkpoint_every == 0 or self.evaluates(done)


@dataclass(frozen=True)
class LoopResult:
    """The end of a run.

    Attributes:
        step: optimizer steps done; fewer than planned if the AP no longer rose.
        metrics: the last evaluation, on the main process.
    """

    step: int
    metrics: CocoMetrics | None


class Loop:
    """The training of one run: steps, logging, evaluation, checkpoints.

    Args:
        accelerator: devices, precision, processes and trackers.
        distiller: not yet prepared by the accelerator.
        optimizer, schedule: over the distiller's trainable parameters.
        batches: start step -> the batches from there to the end, ``options.accumulate`` per step.
        evaluate: metrics of the current student; called on every process, returns a result on the main one.
        write_student: writes the student into a file; called on the main process.
        folder: of the run's files.
        options: length and intervals.
        origin: what the run was made of, for its checkpoints.
        average: of the student's weights; it is what is evaluated and written. None: the student's last weights are.
        signals: signals that stop the run after a step.
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
        write_student: Callable[[Path], None],
        folder: RunFolder,
        options: LoopOptions,
        origin: Mapping[str, Any],
        average: WeightAverage | None,
        signals: StopSignals,
        observer: Observer,
    ) -> None:
        self._accelerator = accelerator
        self._distiller = distiller
        self._batches = batches
        self._evaluate = evaluate
        self._write_student = write_student
        self._folder = folder
        self._checkpoints = folder.checkpoints(options.keep_checkpoints)
        self._options = options
        self._origin = dict(origin)
        self._average = average
        self._signals = signals
        self._observer = observer
        self._schedule = schedule
        self._readings = Readings(choose_interval(accelerator.device, options.log_every))
        self._window = Window()
        self._forward, self._optimizer = accelerator.prepare(distiller, optimizer)
        # The schedule is not prepared, since accelerate would advance it once per process at every step.
        self._control = _build_control_group(accelerator)

    def run(self, checkpoint: Checkpoint | None = None) -> LoopResult:
        """Trains to the end, and leaves the student with the weights that were written.

        Args:
            checkpoint: where to continue; None: from the first step.

        Raises:
            NonFiniteLossError: a loss or gradient is NaN or infinite. Nothing is written after that step, so the last
                checkpoint is sound.
            StoppedError: a signal came. The run can be continued from the step it stopped at.
        """
        start = 0 if checkpoint is None else self._restore(checkpoint)
        if self._accelerator.is_main_process:
            self._folder.drop_log_after(start, evaluation=start < self._options.steps)  # the last one runs again
        result = self._finish_step(start) if start else None
        if result is None:
            result = self._take_steps(start)
        if self._average is not None:
            self._average.apply()
        return result

    def _take_steps(self, start: int) -> LoopResult:
        spent, taken = 0.0, 0  # since the last log line before this process started
        self._forward.train()
        batches = self._batches(start)
        for step in range(start, self._options.steps):
            with self._signals.deferred():
                weights = self.take_step(step, batches)
                done = step + 1
                # All processes stop after the same step, because a checkpoint needs all of them.
                stop = self._agree(self._signals.received)
                logs, saves = self._options.logs(done), self._options.saves(done) or bool(stop)
                if logs or saves:  # raises before anything is written after a fault
                    self._read()
                if logs:
                    spent, taken = spent + self._window.measure_seconds(), taken + self._window.steps
                    self._log(done, weights, spent / taken)
                    self._window = Window()
                if saves:
                    self._save(done)
            if stop:
                raise StoppedError(f"stopped by {Signals(stop).name} after step {done}", stop)
            if (result := self._finish_step(done)) is not None:
                return result
        raise AssertionError("the last step ends the run")

    def _finish_step(self, done: int) -> LoopResult | None:
        """Evaluates and keeps the student after a step that asks for it, unless an earlier call did.

        Returns:
            The result if the run ends here, else None.
        """
        if not self._options.evaluates(done):
            return None
        last, main = done == self._options.steps, self._accelerator.is_main_process
        self._window.seconds = self._window.measure_seconds()  # of the steps alone
        if self._average is None:
            # Until the next forward, a process has the running statistics of its own images.
            broadcast(list(self._distiller.student.buffers()))
        with nullcontext() if self._average is None else self._average.applied():
            if last and main:
                self._write_student(self._folder.student)  # before the evaluation, so that an error in it loses nothing
            metrics = None if last else self._folder.read_evaluation(done)
            if metrics is None:
                metrics = self._evaluate_student(done)
            if not last and self._agree(int(main and self._is_stale())):
                last = True
                if main:
                    self._write_student(self._folder.student)
        self._forward.train()
        self._window.started = perf_counter()
        return LoopResult(done, metrics) if last else None

    def _is_stale(self) -> bool:
        """Whether the AP has not risen for as many evaluations as the options allow."""
        most = self._options.stop_after
        return most is not None and self._folder.count_evaluations_since_best() >= most

    def take_step(self, step: int, batches: Iterator[Batch]) -> dict[str, float]:
        """Runs one step on the next batches; returns the weights of its terms."""
        try:
            return self._step(step, batches)
        except NonFiniteLossError:
            raise
        except Exception:
            self._read()  # an unread fault may be the reason
            raise

    def _step(self, step: int, batches: Iterator[Batch]) -> dict[str, float]:
        self._distiller.step = step
        count, images, reports = self._options.accumulate, 0, []
        for number in range(1, count + 1):
            batch = next(batches)
            # The processes add up their gradients once, in the last backward.
            with self._accelerator.no_sync(self._forward) if number < count else nullcontext():
                report: LossReport = self._forward(batch.to(self._accelerator.device))
                self._accelerator.backward(report.total / count)
            images += len(batch)
            reports.append(replace(report, total=report.total.detach()))  # without its graph
        report = average_reports(reports)
        self._accelerator.unscale_gradients()
        self._readings.add(
            step=step,
            images=images,
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
        if self._average is not None:
            self._average.update(step)
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

    def _log(self, done: int, weights: dict[str, float], seconds_per_step: float) -> None:
        window = self._window.average_over(self._accelerator.num_processes, self._control)
        if not self._accelerator.is_main_process:
            return
        rate = window.images / window.measure_seconds()
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
        self._accelerator.log({k: v for k, v in line.items() if k != "step" and v is not None}, step=done)
        self._observer(
            StepDone(
                step=done,
                steps=self._options.steps,
                loss=window.loss / window.steps,
                parts=parts,
                lr=lr,
                images_per_second=rate,
                eta_seconds=seconds_per_step * (self._options.steps - done),
            )
        )

    def _evaluate_student(self, done: int) -> CocoMetrics | None:
        metrics = self._evaluate()
        if metrics is not None and self._accelerator.is_main_process:
            if self._options.evaluate_every and self._is_best(metrics):
                self._write_student(self._folder.best)
            self._folder.log({"step": done, "evaluation": metrics.to_json()})
            scalars = {f"evaluation/{k}": v for k, v in metrics.to_json().items() if isinstance(v, float)}
            self._accelerator.log(scalars, step=done)
            self._observer(Evaluated(step=done, metrics=metrics))
        return metrics

    def _is_best(self, metrics: CocoMetrics) -> bool:
        """Whether the AP is above that of every earlier evaluation."""
        earlier = (line["evaluation"]["AP"] for line in self._folder.read_log() if "evaluation" in line)
        return metrics.ap is not None and max((ap for ap in earlier if ap is not None), default=-1.0) < metrics.ap

    def _agree(self, number: int) -> int:
        """The largest number of all processes."""
        if self._accelerator.num_processes == 1:
            return number
        largest = torch.tensor(number)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self._control)
        return int(largest)

    def _save(self, done: int) -> None:
        """Writes a checkpoint; every process writes its own part."""
        if self._accelerator.is_main_process:
            self._checkpoints.start()
        self._accelerator.wait_for_everyone()
        rank = self._accelerator.process_index
        self._checkpoints.write_rank(rank, {"random": read_random_state(), "window": self._window.to_state()})
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            scaler = self._accelerator.scaler
            self._checkpoints.finish(
                {
                    "distiller": self._distiller.state_dict(),
                    "average": None if self._average is None else self._average.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "scaler": None if scaler is None else scaler.state_dict(),
                },
                Progress(done, self._accelerator.num_processes, self._origin),
            )
        self._accelerator.wait_for_everyone()

    def _restore(self, checkpoint: Checkpoint) -> int:
        """Restores everything that the next steps depend on; returns the steps done."""
        progress, state = checkpoint.progress, checkpoint.read_state()
        own = checkpoint.read_rank(self._accelerator.process_index)
        try:
            self._distiller.load_state_dict(state["distiller"])
            if self._average is not None:  # after the student: the average may be new since the checkpoint
                self._average.load_state_dict(state["average"])
            load_optimizer(self._optimizer, state["optimizer"])
            if self._accelerator.scaler is not None:
                self._accelerator.scaler.load_state_dict(state["scaler"])
            move_schedule(self._schedule, progress.step)
            restore_random_state(own["random"])
            self._window = Window(**own["window"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(
                f"{checkpoint.path} does not fit this run: {get_first_line(error)}; start the run again"
            ) from error
        return progress.step


def _build_control_group(accelerator: Accelerator) -> Any:
    """A group of all processes for small messages between their hosts, which do not wait for the devices."""
    if accelerator.num_processes == 1:
        return None
    return torch.distributed.new_group(backend="gloo")


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
