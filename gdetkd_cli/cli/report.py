"""``gdetkd report``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gdetkd_cli.cli import options


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN…",
            help="Folder of a distilled run, of a plain run of the same student, of both, of compare, or of demo.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="HTML file. Default: report.html in the run's folder."),
    ] = None,
    teacher: Annotated[
        bool,
        typer.Option("--teacher", help="Evaluate the teacher on all validation images first, and keep its detections."),
    ] = False,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Write a report of a run as one HTML file that needs no network.

    Example: gdetkd report runs/student runs/alone
    """
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform
    from gdetkd_cli.commands import run_report

    work = partial(run_report, tuple(runs), output=output, teacher=teacher)
    perform(work, render.format_report, as_json=as_json)
