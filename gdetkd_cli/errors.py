"""The errors a user can meet. Each message says what was expected, what came, and what to do."""


class GDetKDError(Exception):
    """Base of every error that the command line turns into one sentence and a non-zero exit."""

    exit_code: int = 1


class RecipeError(GDetKDError):
    """A recipe is missing, unreadable, or does not validate."""

    exit_code = 2


class DataError(GDetKDError):
    """A data set is missing, unreadable, or unusable for the task."""

    exit_code = 2


class ModelError(GDetKDError):
    """A detector cannot be built, or a model file cannot be read."""

    exit_code = 2


class NoPyramidError(GDetKDError):
    """The model was read, but it has no feature pyramid."""

    exit_code = 3


class PairError(GDetKDError):
    """A distillation term does not fit this pair of detectors."""

    exit_code = 2


class RunFolderError(GDetKDError):
    """A run folder exists already, is incomplete, or does not belong to the recipe."""

    exit_code = 2


class TapError(GDetKDError):
    """A tap named a module that is missing, did not run, or ran more than once."""


class TermNotComputedError(GDetKDError):
    """A configured distillation term was not computed in a step."""


class NonFiniteLossError(GDetKDError):
    """The loss is NaN or infinite."""

    exit_code = 4


class ComparisonError(GDetKDError):
    """A table of methods lacks some runs."""


class ExportError(GDetKDError):
    """An export failed, or the exported file disagrees with the detector it came from."""

    exit_code = 5


NO_CONVOLUTION = "no convolution reads an image in this model, so it has no feature maps"


def first_line(error: Exception) -> str:
    """Of an error's message; its type where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
