"""A bounded part of the fuzzer: the inputs of `make fuzz` with the lowest numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzzing import FAILURES, fuzz
from targets import TARGETS

_COUNTS = {"student-field": 12, "student-tree": 8, "student-bytes": 8, "onnx": 30, "probe": 15, "state-dict": 3}
_SLOW = ("torchscript", "exported", "arguments", "coco-training", "image-size")  # `make fuzz` runs them


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in _SLOW])
def test_no_input_fails(tmp_path: Path, name: str) -> None:
    outcomes = fuzz(TARGETS[name], range(_COUNTS.get(name, 30)), seed=0, folder=tmp_path)
    failed = {number: outcome for number, outcome in outcomes if outcome.kind in FAILURES}
    assert not failed, f"to repeat one: python tests/fuzz --target {name} --number N\n{failed}"
    assert any(outcome.kind == "refused" for _, outcome in outcomes)
