"""The folder of a run: a new one, or one that holds a run to continue, which must still be the same run."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gdetkd_cli import assembly
from gdetkd_cli.engine import run_folder
from gdetkd_cli.engine.checkpoints import Checkpoint
from gdetkd_cli.engine.events import Note, Observer
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import RunFolderError
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Target:
    """The folder of a run, and what to do with a run that is there already.

    Attributes:
        path: the folder; None: choose one.
        resume: continue the run in the folder.
        requeue: continue the run in the folder, or start one.
        steps, force: as in ``resume_run``.
    """

    path: Path | None
    resume: bool = False
    requeue: bool = False
    steps: int | None = None
    force: bool = False


def open_folder(recipe: Recipe, target: Target, accelerator: Accelerator, stack: ExitStack) -> tuple[RunFolder, bool]:
    """Chooses and locks the run's folder in the main process, and sends the choice to the others.

    Returns:
        The folder, and whether it holds a run to continue.
    """
    choice: list[tuple[str, bool] | None] = [None]
    if accelerator.is_main_process:
        path = target.path or Path("runs") / recipe.name
        resume = target.resume or (target.requeue and RunFolder(path).recipe.exists())
        if resume:
            folder = stack.enter_context(run_folder.reopen(path))
        else:
            folder = stack.enter_context(run_folder.start_new(path if target.requeue else target.path, recipe.name))
        choice = [(str(folder.path), resume)]
    broadcast_object_list(choice)
    assert choice[0] is not None
    folder, resume = RunFolder(Path(choice[0][0])), choice[0][1]
    folder.check_shared()
    return folder, resume


def read_own_recipe(folder: RunFolder, given: Recipe, target: Target) -> Recipe:
    """Reads the recipe in the folder of a run that is continued.

    A recipe that was given may name other places of data and teacher, whose content is compared later.

    Raises:
        RunFolderError: it differs from the one that was given.
    """
    own = load_recipe(folder.recipe)
    if target.requeue:
        differences = assembly.list_recipe_differences(own.model_dump(mode="json"), given.model_dump(mode="json"))
        if differences:
            raise RunFolderError(
                f"{folder.path} holds a run of another recipe ({'; '.join(differences)}); choose another --output"
            )
        threads = own.runtime.threads  # the run's own number, because sums depend on it
        own = given.model_copy(update={"runtime": given.runtime.model_copy(update={"threads": threads})})
    if target.steps is None:
        return own
    return own.model_copy(update={"train": own.train.model_copy(update={"steps": target.steps})})


def open_checkpoint(
    folder: RunFolder, setup: assembly.TrainingSetup, origin: dict[str, Any], target: Target, observer: Observer
) -> Checkpoint | None:
    """Opens the newest checkpoint, and checks that it belongs to this run; None if the run has to start anew."""
    checkpoint = folder.checkpoints().open_latest()
    if checkpoint is None:
        observer(Note(f"{folder.path} has no checkpoint yet, so the run starts at its first step"))
        return None
    step, steps = checkpoint.progress.step, setup.recipe.train.steps
    if step > steps:
        raise RunFolderError(
            f"{folder.path} has done {step} steps, but its recipe has {steps}; to train it further, add --steps N "
            f"with N above {step}"
        )
    before, now = checkpoint.progress.processes, setup.compute.accelerator.num_processes
    if before != now:
        raise RunFolderError(f"{folder.path} was trained by {before} processes; continue it with {before}, not {now}")
    own = {**checkpoint.progress.origin, "recipe": dict(checkpoint.progress.origin.get("recipe", {}))}
    # An extended run that was killed before its next checkpoint has the new number in its recipe alone.
    own["recipe"]["train"] = {**own["recipe"].get("train", {}), "steps": steps}
    differences = assembly.list_differences(own, origin)
    if differences and not target.force:
        raise RunFolderError(
            f"{folder.path} is not the same run any more since its checkpoint of step {step}: "
            f"{'; '.join(differences)}. Undo this, or add --force to continue with the change"
        )
    for difference in differences:
        observer(Note(f"changed since the checkpoint: {difference}"))
    return checkpoint
