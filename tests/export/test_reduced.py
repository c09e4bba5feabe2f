"""ONNX files with float16 and 8-bit layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from gdetkd_cli.commands import run_eval, run_export
from gdetkd_cli.errors import OutputError
from gdetkd_cli.evaluation.exported import OnnxDetector
from gdetkd_cli.export.onnx import export_onnx
from gdetkd_cli.export.reduced import CalibrationImages, write_half, write_int8
from gdetkd_cli.recipe.schema import SyntheticData

TEACHER = "builtin:shapes-teacher"


def run(path: Path, **feed: np.ndarray) -> np.ndarray:
    (found,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)
    return np.asarray(found)


def test_half_layers_and_whole_coordinates(tmp_path: Path) -> None:
    """A layer rounds its weight to float16; the coordinate that is added afterwards keeps its float32 digits."""
    weight, far = np.array([[0.1]], np.float32), np.array([[2000.3]], np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["d"]), helper.make_node("Add", ["d", "far"], ["y"])],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(far, "far")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "whole.onnx")
    write_half(tmp_path / "whole.onnx", tmp_path / "half.onnx")
    (found,) = run(tmp_path / "half.onnx", x=np.array([[1.0]], np.float32))
    assert found == pytest.approx(2000.3 + float(np.float16(0.1)), abs=2e-4)  # float16 would give 2000.0 or 2001.0
    names = {one.name: one.data_type for one in onnx.load(tmp_path / "half.onnx").graph.initializer}
    assert names == {"w half": TensorProto.FLOAT16, "far": TensorProto.FLOAT}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("reduced")
    return run_export(TEACHER, onnx=True, torchscript=False, half=True, int8=True, opset=18, output=folder / "t.onnx")


def test_reduced_files_are_smaller_and_as_good(exported: Any) -> None:
    whole, half, int8 = exported.files
    assert [file.path.name for file in exported.files] == ["t.onnx", "t.fp16.onnx", "t.int8.onnx"]
    assert [file.reduced for file in exported.files] == [False, True, True]
    assert half.size_mb < 0.6 * whole.size_mb
    assert int8.size_mb < 0.4 * whole.size_mb
    assert onnx.load(whole.path).opset_import[0].version == 18
    data = SyntheticData(format="synthetic", val_images=40)
    expected, halved, quantised = (run_eval(str(file.path), data=data).metrics.ap for file in exported.files)
    assert expected is not None and expected > 70
    assert halved == pytest.approx(expected, abs=0.3)
    assert quantised == pytest.approx(expected, abs=8)


def draw_images() -> CalibrationImages:
    """Two images, and one that cannot be read."""
    return CalibrationImages([(64, 96)] * 3, lambda place: torch.rand(3, 64, 96) if place != 1 else None)


def test_an_image_without_detections(tmp_path: Path, tiny_detector: Callable[..., Any]) -> None:
    detector = tiny_detector("fcos")
    detector.module.score_thresh = 0.0
    export_onnx(detector, tmp_path / "whole.onnx", architecture={})
    write_half(tmp_path / "whole.onnx", tmp_path / "half.onnx")
    write_int8(tmp_path / "whole.onnx", tmp_path / "int8.onnx", draw_images())
    detector.module.score_thresh = 1.0
    export_onnx(detector, tmp_path / "silent.onnx", architecture={})
    write_half(tmp_path / "silent.onnx", tmp_path / "silent-half.onnx")
    done: list[int] = []
    beside = tmp_path / "silent-inferred.onnx"  # the name that onnxruntime writes and deletes, if it gets a path
    beside.write_text("mine")
    write_int8(tmp_path / "silent.onnx", tmp_path / "silent-int8.onnx", draw_images(), done.append)
    assert done == [1, 2, 3]
    assert beside.read_text() == "mine"
    for name, count in (("half", True), ("int8", True), ("silent-half", False), ("silent-int8", False)):
        (found,) = OnnxDetector(tmp_path / f"{name}.onnx").predict([torch.rand(3, 80, 72)])
        assert bool(len(found.scores)) is count, name


def test_metadata_that_other_runtimes_read(exported: Any) -> None:
    for file in exported.files:
        entries = {entry.key: entry.value for entry in onnx.load(file.path).metadata_props}
        assert entries["names"].startswith("{0: 'disc-dot', 1: ")
        assert (entries["task"], entries["batch"], entries["stride"]) == ("detect", "1", "64")


def test_a_file_that_exists_is_kept(exported: Any, tiny_detector: Callable[..., Any]) -> None:
    exported.files[0].path.rename(exported.files[0].path.with_name("kept.onnx"))
    before = exported.files[2].path.read_bytes()
    with pytest.raises(OutputError, match=r"t\.int8\.onnx already exists"):
        run_export(TEACHER, onnx=True, torchscript=False, int8=True, output=exported.files[0].path)
    assert exported.files[2].path.read_bytes() == before
    assert not exported.files[0].path.exists()
    assert torch.is_grad_enabled()
