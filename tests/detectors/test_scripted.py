"""TorchScript files as students, rebuilt from their weights if the detections are equal."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn
from torchvision.models.detection import (
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fasterrcnn_mobilenet_v3_large_fpn,
    fcos_resnet50_fpn,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from twins import NoNeck

from gdetkd_cli.commands import run_distill, run_export
from gdetkd_cli.detectors.scripted import load_scripted
from gdetkd_cli.errors import ModelError
from gdetkd_cli.recipe.schema import CheckpointDetector

NAMES = tuple("abcdefghi")  # as many as the built-in scenes have


def script_module(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(module.eval()).save(path)
    return path


def faster_rcnn(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, num_classes=10, min_size=64, max_size=96, **arguments
    )


def student(path: Path) -> CheckpointDetector:
    return CheckpointDetector(arch="checkpoint", path=str(path))


def export_student(folder: Path) -> tuple[Path, Path]:
    """Exports a run's student as TorchScript; returns both files."""
    run = run_distill(toy.recipe(steps=1), output=folder / "first").run
    path = folder / "exported.ts"
    run_export(str(run), onnx=False, torchscript=True, output=path)
    return run, path


def test_a_scripted_torchvision_detector_trains(tmp_path: Path) -> None:
    path = script_module(faster_rcnn(), tmp_path / "student.pt")
    loaded = load_scripted(path, NAMES)
    assert loaded.description["name"] == "fasterrcnn_mobilenet_v3_large_fpn"
    assert loaded.description["arguments"] == {"min_size": [64], "max_size": 96}
    assert loaded.detector.class_names == NAMES
    assert "which detects the same" in loaded.notes[-1]

    run = run_distill(toy.recipe(steps=1).model_copy(update={"student": student(path)}), output=tmp_path / "run").run
    trained = torch.load(run / "student.pt", weights_only=True)["model"]
    assert trained.keys() == faster_rcnn().state_dict().keys()


def test_a_scripted_torchvision_detector_teaches_a_dense_student(tmp_path: Path) -> None:
    path = script_module(faster_rcnn(), tmp_path / "teacher.pt")
    recipe = toy.recipe(steps=1, student="retinanet").model_copy(update={"teacher": student(path)})
    run = run_distill(recipe, output=tmp_path / "run").run
    lines = (run / "metrics.jsonl").read_text()
    assert all(f'"{term}"' in lines for term in ("sgfi", "ckd"))
    probed = json.loads((run / "probe.json").read_text())
    assert probed["teacher"]["family"] == "two-stage"
    assert probed["teacher"]["region_embedding"]["channels"] == 1024


def test_settings_that_are_not_torchvisions_teach_by_their_features(tmp_path: Path) -> None:
    path = script_module(faster_rcnn(box_detections_per_img=7), tmp_path / "odd.pt")
    told: list[str] = []
    recipe = toy.recipe(steps=1, student="retinanet").model_copy(update={"teacher": student(path)})
    run = run_distill(recipe, output=tmp_path / "run", observer=lambda event: told.append(str(event))).run
    assert any("only its features can teach: " in note for note in told)
    assert '"sgfi"' in (run / "metrics.jsonl").read_text()


def test_an_ssd(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ssd = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=10)
    path = script_module(ssd, tmp_path / "ssd.pt")
    assert load_scripted(path, NAMES).description["name"] == "ssdlite320_mobilenet_v3_large"


def test_other_settings_are_not_taken_for_torchvisions(tmp_path: Path) -> None:
    path = script_module(faster_rcnn(box_detections_per_img=7), tmp_path / "odd.pt")
    with pytest.raises(ModelError, match=r"but other settings, because the rebuilt detector gives other"):
        load_scripted(path, NAMES)


def test_another_preparation_of_images_is_kept(tmp_path: Path) -> None:
    own = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
    loaded = load_scripted(script_module(faster_rcnn(**own), tmp_path / "plain.pt"), NAMES)
    assert loaded.description["arguments"] == {"min_size": [64], "max_size": 96, **own}
    module: Any = loaded.detector.module
    assert module.transform.image_mean == own["image_mean"]


def test_a_detector_that_finds_nothing_proves_nothing(tmp_path: Path) -> None:
    """Other anchors cannot be seen in the weights, and with torchvision's threshold an untrained FCOS is silent."""
    torch.manual_seed(0)
    anchors = AnchorGenerator(sizes=((16,), (32,), (64,), (128,), (256,)), aspect_ratios=((1.0,),) * 5)
    module = fcos_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=10, min_size=64, max_size=96, anchor_generator=anchors
    ).eval()
    assert not len(module([torch.rand(3, 64, 96)])[0]["scores"])
    with pytest.raises(ModelError, match=r"but other settings, because the rebuilt detector gives other"):
        load_scripted(script_module(module, tmp_path / "silent.pt"), NAMES)


def test_detectors_with_equal_weights_are_told_apart(tmp_path: Path) -> None:
    """Both forms of this detector have the same weights, and neither finds anything yet."""
    torch.manual_seed(0)
    silent = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=30)
    loaded = load_scripted(script_module(silent, tmp_path / "s.pt"), ())
    assert loaded.description["name"] == "fasterrcnn_mobilenet_v3_large_320_fpn"
    assert silent.roi_heads.score_thresh == 0.05


def test_a_scripted_detector_of_other_maps_is_not_rebuilt(tmp_path: Path) -> None:
    module: Any = faster_rcnn()
    module.backbone.fpn.extra_blocks = None  # a level less, without a weight less
    sizes = module.rpn.anchor_generator.sizes[:2]
    module.rpn.anchor_generator = AnchorGenerator(sizes, (module.rpn.anchor_generator.aspect_ratios[0],) * 2)
    with pytest.raises(ModelError, match=r"but other settings, because the rebuilt detector gives other"):
        load_scripted(script_module(module, tmp_path / "fewer.pt"), NAMES)


def test_what_gdetkd_exported_trains_again(tmp_path: Path) -> None:
    run, path = export_student(tmp_path)
    recipe = toy.recipe(steps=1).model_copy(update={"student": student(path)})
    again = run_distill(recipe, output=tmp_path / "second").run
    first, second = (torch.load(r / "student.pt", weights_only=True) for r in (run, again))
    assert first["architecture"] == second["architecture"]
    assert first["classes"] == second["classes"]


def test_what_gdetkd_exported_teaches_by_its_head_as_well(tmp_path: Path) -> None:
    _, path = export_student(tmp_path)
    recipe = toy.recipe(steps=1).model_copy(update={"teacher": student(path)})
    again = run_distill(recipe, output=tmp_path / "second").run
    lines = (again / "metrics.jsonl").read_text()
    assert all(f'"{term}"' in lines for term in ("sgfi", "ckd", "class_kd", "box_kd"))
    assert '"family": "two-stage"' in (again / "probe.json").read_text()


def test_frozen_and_foreign_files_cannot_be_trained(tmp_path: Path) -> None:
    network = NoNeck().eval()
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(network, torch.rand(1, 3, 64, 64))
        traced.save(tmp_path / "traced.pt")
        torch.jit.freeze(traced).save(tmp_path / "frozen.pt")
    with pytest.raises(ModelError, match=r"traced\.pt can teach but cannot be trained: it is neither"):
        load_scripted(tmp_path / "traced.pt", NAMES)
    with pytest.raises(ModelError, match=r"frozen\.pt can teach .* it is frozen TorchScript and has no parameters"):
        load_scripted(tmp_path / "frozen.pt", NAMES)
