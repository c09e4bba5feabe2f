"""The trackers of a run, such as TensorBoard: accelerate calls them by name."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from gdetkd_cli.errors import RecipeError, get_first_line
from gdetkd_cli.recipe.differences import find_changed_fields
from gdetkd_cli.recipe.schema import Recipe


def check_trackers(recipe: Recipe) -> None:
    """Checks that the recipe's trackers are installed; accelerate would go on without them.

    Raises:
        RecipeError: one is not.
    """
    installed = list(map(str, get_available_trackers()))
    for name in recipe.runtime.trackers:
        if name not in installed:
            raise RecipeError(
                f"runtime.trackers names {name}, which is not installed; install its package, or choose from the "
                f"installed ones: {', '.join(installed) or 'none'} (`[]` for no tracker)"
            )


def start_trackers(accelerator: Accelerator, recipe: Recipe, *, name: str, folder: Path) -> None:
    """Starts the accelerator's trackers. The recipe is the project, and its fields are the run's settings.

    Args:
        accelerator: built with the recipe's trackers.
        name: of the run, for trackers that take one.
        folder: of the files that TensorBoard reads.

    Raises:
        RecipeError: a tracker does not start.
    """
    accelerator.project_configuration.logging_dir = str(folder)
    options = {"wandb": {"name": name}, "trackio": {"name": name}, "mlflow": {"run_name": name}}
    settings = {field: new for field, (_, new) in find_changed_fields({}, recipe.model_dump(mode="json")).items()}
    try:
        accelerator.init_trackers(recipe.name, init_kwargs=options)
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # it would show the settings as another run
                tracker.store_init_configuration(settings)
    except Exception as error:  # the trackers' errors have no common base
        raise RecipeError(
            f"a tracker of runtime.trackers ({', '.join(recipe.runtime.trackers)}) does not start "
            f"({type(error).__name__}: {get_first_line(error)}); set it up as its documentation says, or leave it out"
        ) from error
