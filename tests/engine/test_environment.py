"""The record of a run's environment."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from gdetkd_cli.engine.device import ComputeSettings, describe_environment

SETTINGS = ComputeSettings("cpu", "fp32", channels_last=True, compile=False, threads=1, workers=0)
GIT = shutil.which("git") or ""


def git(*arguments: str) -> str:
    return subprocess.run([GIT, *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(not GIT, reason="needs git")
def test_the_revision_is_read_without_the_folders_own_monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    (tmp_path / "a.txt").write_text("a")
    git("add", "a.txt")
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "-m", "x")
    (tmp_path / "evil.sh").write_text("#!/bin/sh\ntouch run\n")
    (tmp_path / "evil.sh").chmod(0o755)
    git("config", "core.fsmonitor", "./evil.sh")
    assert describe_environment(SETTINGS, 0, 1)["git_revision"] == git(
        "-c", "core.fsmonitor=false", "rev-parse", "HEAD"
    )
    assert not (tmp_path / "run").exists()
