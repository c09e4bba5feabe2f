"""What people read: numbers, tables, and the narration on a terminal and elsewhere."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console, RenderableType

from gdetkd_cli.cli import render
from gdetkd_cli.cli.live import narration
from gdetkd_cli.cli.terminal import console, is_first_process
from gdetkd_cli.training.events import Evaluated, Event, Note, Phase, StepDone
