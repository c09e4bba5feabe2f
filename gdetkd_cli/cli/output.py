"""Runs a command: progress on stderr, then the result on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import typer
from rich.console import RenderableType

from gdetkd_cli.cli.live import narration
from gdetkd_cli.cli.terminal import build_console, is_first_process
from gdetkd_cli.engine.events import Observer

Result = TypeVar("Result")
Done_co = TypeVar("Done_co", covariant=True)


class Work(Protocol[Done_co]):
    """A ``run_*`` function that lacks only its observer."""

    def __call__(self, *, observer: Observer) -> Done_co: ...


def perform(work: Work[Result], render: Callable[[Result], RenderableType], *, as_json: bool) -> Result | None:
    """Runs a command and prints its result, in the first of several processes only.

    Args:
        work: returns the command's result, a dataclass.
        as_json: print one JSON document instead of tables.

    Returns:
        The result in the first process, None in the others.
    """
    with narration() as observer:
        result = work(observer=observer)
    if not is_first_process():
        return None
    if as_json:
        typer.echo(json.dumps({"schema": 1, **to_json(result)}, indent=2, allow_nan=False))
    else:
        build_console().print(render(result), crop=False)
    return result


def to_json(value: object) -> Any:
    """A result as plain data: ``metrics`` merged into their parent, paths as text, NaN and infinity as null."""
    if is_dataclass(value):
        plain: dict[str, Any] = {}
        for field in fields(value):
            item = getattr(value, field.name)
            plain |= to_json(item.to_json()) if field.name == "metrics" else {field.name: to_json(item)}
        return plain
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
