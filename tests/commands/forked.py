"""Runs trials in forks of a process that has imported everything; a new interpreter needs seconds for that."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

from gdetkd_cli.compare.trials import Children

# Not a fork of the test's own process: autograd's threads do not survive that.
_SERVER = get_context("forkserver")
_SERVER.set_forkserver_preload(["gdetkd_cli.cli.app", "gdetkd_cli.commands", "gdetkd_cli.cli.render"])


def run(_children: Children, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Stands for ``Children.run``: the same process in every respect that a trial can notice."""
    assert command[:3] == [sys.executable, "-m", "gdetkd_cli"]
    child = _SERVER.Process(target=_work, args=(list(command[2:]), log, dict(environment)))
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def _work(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    from gdetkd_cli.cli.app import main

    main()
