"""``gdetkd probe`` at the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from invoke import done

from gdetkd_cli.commands.probe import ProbeOptions
from gdetkd_cli.report.pyramid import Alternative


def test_probe(runs: Any) -> None:
    done("probe", "fasterrcnn_resnet50_fpn", "--size", "320x512")
    assert runs.call == ("run_probe", ("fasterrcnn_resnet50_fpn", ProbeOptions(size=(320, 512))), {})
    done("probe", "t.onnx", "--range", "0-255", "--mean", "1", "2", "3", "--image", "a.jpg", "--plot", "b.png")
    options = ProbeOptions(scale=255.0, mean=(1.0, 2.0, 3.0), image=Path("a.jpg"), plot=Path("b.png"))
    assert runs.calls[-1] == ("run_probe", ("t.onnx", options), {})
    done(
        "probe",
        "t.pt",
        "--channels",
        "bgr",
        "--layout",
        "hwc",
        "--levels",
        "neck.0, neck.1",
        "--recipe",
        "r.yaml",
        "--classes",
        "a,b",
    )
    options = ProbeOptions(bgr=True, last=True, levels=("neck.0", "neck.1"), classes=("a", "b"))
    assert runs.calls[-1] == ("run_probe_to_recipe", ("t.pt", options, Path("r.yaml")), {})


def test_probe_shows_the_alternatives_with_verbose(runs: Any) -> None:
    other = Alternative(("body.2", "body.3"), "the body's last map of each size")
    runs.results["run_probe"] = dataclasses.replace(
        runs.results["run_probe"], reason="a head reads them", confidence=0.95, alternatives=(other,)
    )
    plain, verbose = done("probe", "t.pt").stdout, done("probe", "t.pt", "--verbose").stdout
    assert "a head reads them (confidence 0.95)" in plain
    assert "body.2" not in plain
    assert "alternative: body.2, body.3: the body's last map of each size" in verbose


def test_json_of_a_probe(runs: Any) -> None:
    document = json.loads(done("probe", "teacher.pt", "--json").stdout)
    assert list(document) == [
        "schema",
        "source",
        "format",
        "call",
        "family",
        "levels",
        "region_embedding",
        "detections",
        "size",
        "classes",
        "parameters",
        "reason",
        "confidence",
        "alternatives",
    ]
    assert document["levels"][0] == {
        "name": "p2",
        "channels": 256,
        "shape": [120, 160],
        "stride": [4.0, 4.0],
        "offset": [2.0, 2.5],
        "mean": 0.1,
        "std": 1.5,
        "module": "",
    }
    assert (document["size"], document["classes"]) == ([480, 640], ["disc", "box"])
