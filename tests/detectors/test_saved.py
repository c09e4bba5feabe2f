"""Detectors in files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue import CLASSES, SPECS

from gdetkd_cli import portable
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import ModelError
from gdetkd_cli.structures import Batch

pytestmark = pytest.mark.usefixtures("small")


REBUILD = """
import importlib.abc, sys


class NoGDetKD(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gdetkd_cli":
            raise ImportError("gdetkd_cli is not installed here")


sys.meta_path.insert(0, NoGDetKD())
sys.path.insert(0, sys.argv[1])
import torch
from student import load

torch.set_num_threads(1)
images = torch.load("images.pt", weights_only=True)
for name in sys.argv[2:]:
    with torch.no_grad():
        found = load(name + ".pt")(images)
    torch.save(found, name + "-found.pt")
try:
    import gdetkd_cli
except ImportError:
    print("done")
"""


def test_a_saved_detector_can_be_rebuilt_without_this_package(batch: Batch, tmp_path: Path) -> None:
    """``portable`` is enough, and the file needs no pickled code."""
    shutil.copytree(Path(portable.__file__).parent, tmp_path / "student")
    torch.save(batch.images, tmp_path / "images.pt")
    expected = {}
    for key in (
        "faster-rcnn on mobilenet_v3_small, levels 3-5, frozen",
        "cascade-rcnn on resnet18, levels 2-6, batch",
        "retinanet on resnext50_32x4d, levels 4-6, batch",
        "fcos on resnet18, levels 3-7, batch",
        "fcos on timm/test_mambaout, levels 3-7, batch",
    ):
        name = key.split(",")[0].replace(" ", "-").replace("/", "-")
        detector = catalog.build(SPECS[key].description, CLASSES)
        catalog.save(tmp_path / f"{name}.pt", detector, SPECS[key].description)
        with torch.no_grad():
            expected[name] = detector.module.eval()(batch.images)
        saved = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert saved["classes"] == list(CLASSES)

    done = subprocess.run(
        [sys.executable, "-I", "-c", REBUILD, str(tmp_path), *expected],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr
    for name, ours in expected.items():
        theirs = torch.load(tmp_path / f"{name}-found.pt", weights_only=True)
        for one, other in zip(ours, theirs, strict=True):
            assert len(one["boxes"]) > 0
            assert all(torch.equal(one[key], other[key]) for key in ("boxes", "scores", "labels"))


@pytest.fixture
def saved(tiny_detector: Callable[..., Detector], tiny_description: Callable[..., Any], tmp_path: Path) -> Path:
    path = tmp_path / "student.pt"
    catalog.save(path, tiny_detector("fcos"), tiny_description("fcos"))
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_half_precision_files_load_in_float32(saved: Path) -> None:
    def halve(content: dict[str, Any]) -> None:
        content["model"] = {n: v.half() if v.is_floating_point() else v for n, v in content["model"].items()}

    rewrite(saved, halve)
    detector = catalog.load(saved).detector

    assert {p.dtype for p in detector.module.parameters()} == {torch.float32}


def test_what_holds_no_weights_is_no_detector(saved: Path) -> None:
    torch.save({"a": torch.ones(1), "b": "text"}, saved)
    with pytest.raises(ModelError, match="holds no state_dict"):
        catalog.load(saved)
    torch.save(torch.ones(2), saved)
    with pytest.raises(ModelError, match="holds no state_dict"):
        catalog.load(saved)


def test_a_newer_file_says_so(saved: Path) -> None:
    rewrite(saved, lambda content: content.update(gdetkd=catalog.FILE_VERSION + 1))
    with pytest.raises(ModelError, match="written by a newer gdetkd"):
        catalog.load(saved)


def test_weights_that_do_not_fit_their_architecture(saved: Path) -> None:
    rewrite(saved, lambda content: content["architecture"].update(pyramid_channels=24))
    with pytest.raises(ModelError, match="the weights do not fit the file's own architecture"):
        catalog.load(saved)


def test_locate(saved: Path, tmp_path: Path) -> None:
    assert catalog.locate(str(saved)) == saved
    assert catalog.locate(str(tmp_path)) == saved  # a run folder
    saved.unlink()
    with pytest.raises(ModelError, match=r"has no student\.pt and no config\.json; expected the folder of a"):
        catalog.locate(str(tmp_path))
    with pytest.raises(ModelError, match="does not exist; expected a run folder"):
        catalog.locate(str(saved))
    with pytest.raises(ModelError, match="no built-in detector 'builtin:nothing'; expected one of: "):
        catalog.locate("builtin:nothing")
