"""A small recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

MINIMAL = """\
# gdetkd train --recipe tiny
# A tiny recipe
name: tiny
data:
  format: synthetic
student:
  arch: composed
  backbone: resnet18
  head: fcos
train:
  steps: 10
  optimizer: {lr: 3e-4}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL)
    return path
