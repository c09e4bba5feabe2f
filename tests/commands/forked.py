"""Runs trials in forked processes, which have everything imported already; a new interpreter needs seconds for that."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from gdetkd_cli.compare.trials import Children


def run(_children: Children, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Stands for ``Children.run``: the same process in every respect that a trial can notice."""
    assert command[:3] == [sys.executable, "-m", "gdetkd_cli"]
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = list(command[2:])
        from gdetkd_cli.cli.app import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # nothing of pytest may run in this process
