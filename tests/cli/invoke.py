"""Commands as a user types them, run within this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from gdetkd_cli.cli.app import app


def gdetkd(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="gdetkd")


def done(*arguments: str) -> Result:
    result = gdetkd(*arguments)
    assert result.exit_code == 0, result.output
    return result
