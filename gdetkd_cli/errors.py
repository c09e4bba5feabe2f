"""The errors shown to the user. Each message names what was expected, what came, and what to do."""


class GDetKDError(Exception):
    """Base class of the errors that the command line prints as one sentence before a non-zero exit."""

    exit_code: int = 1


class _InputError(GDetKDError):
    """Something that the user named cannot be used."""

    exit_code = 2


class RecipeError(_InputError):
    """A recipe is missing, unreadable or invalid."""


class DataError(_InputError):
    """A data set is missing, unreadable, or unusable for the task."""


class ModelError(_InputError):
    """A detector cannot be built, or a model file cannot be read."""


class NoPyramidError(GDetKDError):
    """A model has no feature pyramid."""

    exit_code = 3


class PairError(_InputError):
    """A distillation term does not fit this pair of detectors."""


class KnowledgeError(_InputError):
    """A teacher's stored answers are missing, damaged, or those of another teacher."""


class RunFolderError(_InputError):
    """A run folder already exists, is incomplete, or belongs to another recipe."""


class OutputError(_InputError):
    """A file that a command would write exists already, or cannot have this name."""


class DiskError(GDetKDError):
    """A file does not fit on the disk."""


class MemoryLimitError(_InputError):
    """Something needs more memory than is free."""


class LoaderError(GDetKDError):
    """A data loader process ended before its work was done."""


class StoppedError(KeyboardInterrupt):
    """A signal stopped the command. Not an ``Exception``, so that no handler of errors continues after it.

    Args:
        number: of the signal; the exit code is 128 + number, as shells and schedulers expect.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class LostProcessError(GDetKDError):
    """Another process of the run ended or cannot be reached."""


class TapError(GDetKDError):
    """A tapped module is missing, did not run, or ran more than once."""


class TermNotComputedError(GDetKDError):
    """A configured distillation term was not computed in a step."""


class NonFiniteLossError(GDetKDError):
    """The loss is NaN or infinite."""

    exit_code = 4


class ComparisonError(GDetKDError):
    """A comparison of methods lacks trials."""


class LauncherError(_InputError):
    """A launcher of trials is not installed, is not available here, or refuses its settings."""


class ExportError(GDetKDError):
    """An export failed, or the exported file's results differ from the detector's."""

    exit_code = 5


NO_CONVOLUTION = "no convolution reads an image in this model, so it has no feature maps"


def get_first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
