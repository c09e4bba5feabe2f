"""What a ``student.pt`` and the description in it must look like: both may come from a stranger."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gdetkd_cli.errors import ModelError

FILE_VERSION = 1

_Number = Annotated[float, Field(strict=True, gt=0, le=2**14)]
_Count = Annotated[int, Field(strict=True, ge=1, le=2**14)]
_Arguments = dict[Annotated[str, Field(strict=True)], Any]
_Norm = Literal["batch", "frozen"]


class _Block(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)


class _Torchvision(_Block):
    name: str
    arguments: _Arguments | None = None
    norm: _Norm = "batch"
    norm_eps: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None


class _Composed(_Block):
    backbone: str
    head: str
    width: _Number | None = None
    blocks: Annotated[list[Annotated[_Count, Field(le=200)]], Field(min_length=4, max_length=4)] | None = None
    pyramid_channels: _Count
    pyramid_levels: tuple[Annotated[_Count, Field(ge=2, le=5)], Annotated[_Count, Field(ge=5, le=7)]] | None = None
    image_size: tuple[_Count, _Count]
    arguments: _Arguments | None = None
    norm: _Norm = "batch"


class _Factory(_Block):
    factory: str
    arguments: _Arguments
    input: dict[str, Any]
    size: tuple[_Count, _Count]
    last: bool = False
    levels: list[str] | tuple[str, ...] | None = None


class _Transformers(_Block):
    config: _Arguments
    preprocessor: _Arguments
    train_batch_norms: Annotated[bool, Field(strict=True)] = False


class SavedStudent(_Block):
    """The content of a ``student.pt``.

    Attributes:
        gdetkd: version of the format.
        architecture: see ``portable``.
        classes: names of the labels 1..K.
    """

    gdetkd: Annotated[int, Field(strict=True, ge=1)]
    architecture: dict[str, Any]
    classes: list[str] = Field(min_length=1, max_length=100_000)
    model: dict[str, Any]


_KINDS: dict[str, type[_Block]] = {
    "torchvision": _Torchvision,
    "composed": _Composed,
    "factory": _Factory,
    "transformers": _Transformers,
}


def read_saved(content: dict[Any, Any], source: str) -> SavedStudent:
    """Checks the content of a ``student.pt``.

    Raises:
        ModelError: a newer gdetkd wrote it, or a field is missing or wrong.
    """
    version = content.get("gdetkd")
    if isinstance(version, int) and version > FILE_VERSION:
        raise ModelError(
            f"{source} was written by a newer gdetkd (format {version}); this version reads format {FILE_VERSION}"
        )
    try:
        return SavedStudent.model_validate(content)
    except ValidationError as error:
        raise ModelError(f"{source} is not a student that gdetkd wrote: {_describe(error)}") from error


def check_description(description: dict[str, Any]) -> None:
    """Checks the kinds of a description's fields.

    Raises:
        ModelError: the kind of the detector is unknown, or a field is missing or wrong.
    """
    kind = description.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ModelError(f"unknown architecture kind {repr(kind)[:80]}; expected {', '.join(map(repr, _KINDS))}")
    try:
        _KINDS[kind].model_validate(description)
    except ValidationError as error:
        raise ModelError(f"the detector's description cannot be used: {_describe(error)}") from error


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    field, message = ".".join(map(str, first["loc"])), first["msg"]
    others = error.error_count() - 1
    return f"{field}: {message[0].lower()}{message[1:]}"[:300] + (f", and {others} more" if others else "")
