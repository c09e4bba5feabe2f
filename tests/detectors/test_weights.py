"""Weights from files and by name: read, left out or refused."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.detectors.weights import (
    extract_state_dict,
    list_torchvision_categories,
    load_state,
    read_torch_file,
    read_torchvision_weights,
)
from gdetkd_cli.errors import ModelError

TinyDetector = Callable[..., Detector]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def test_a_reference_scripts_checkpoint(path: Path) -> None:
    """torchvision's own scripts save the state as 'model', with the optimizer and the command line."""
    state = {"a.weight": torch.ones(2), "a.bias": torch.zeros(1)}
    torch.save(
        {"model": state, "optimizer": {"state": {}}, "epoch": 25, "args": argparse.Namespace(lr=0.02, name="x")}, path
    )
    read = extract_state_dict(read_torch_file(path), str(path))

    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    "saved",
    [
        {"a": torch.ones(1)},
        {"model": {"a": torch.ones(1)}, "epoch": 3},
        {"state_dict": {"a": torch.ones(1)}},
        {"model_state_dict": {"module.a": torch.ones(1)}},
        {"model": {"state_dict": {"a": torch.ones(1)}}},
        {"module.a": torch.ones(1)},  # saved from a DDP wrapper
    ],
)
def test_where_the_state_is_found(saved: dict[str, Any]) -> None:
    assert extract_state_dict(saved, "x.pth") == {"a": torch.ones(1)}


def test_a_submodule_named_module_is_no_wrapper() -> None:
    state = {"module.a": torch.ones(1), "head.a": torch.ones(1)}

    assert extract_state_dict(state, "x.pth").keys() == state.keys()


@pytest.mark.parametrize("saved", [{}, {"epoch": 3}, {"model": {}}, [torch.ones(1)], torch.ones(2), {"a": {"b": 1}}])
def test_files_without_a_state(saved: object) -> None:
    with pytest.raises(ModelError, match=r"x\.pth holds no state_dict; expected tensors by parameter name"):
        extract_state_dict(saved, "x.pth")


class Malicious:
    """Makes a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_is_refused_and_not_executed(zipped: bool, path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "executed"
    torch.save({"model": {"a": torch.ones(1)}, "args": Malicious(folder)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"without executing code from it \((posix|nt)\.mkdir\)") as raised:
        read_torch_file(path)

    assert not folder.exists()
    assert "weights_only" not in str(raised.value)  # torch advises to switch the protection off; we do not repeat that


def test_a_bare_pickle_is_refused_and_not_executed(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "executed"
    path.write_bytes(pickle.dumps(Malicious(folder), protocol=2))
    with pytest.raises(ModelError):
        read_torch_file(path)

    assert not folder.exists()


def test_a_pickled_module_is_refused(path: Path) -> None:
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(
        ModelError, match=r"\(torch\.nn\.modules\.linear\.Linear\).*expected only weights, as written by"
    ):
        read_torch_file(path)


@pytest.mark.parametrize("text", ["some text\n", "<!DOCTYPE html>\n<html>not found</html>\n", "weights"])
def test_a_text_is_said_to_be_one(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ModelError, match=f"is no model: it begins with the text '{text[:5]}.*; expected a file of"):
        read_torch_file(path)


def test_a_git_lfs_pointer_names_the_command(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 167502836\n")
    with pytest.raises(ModelError, match="git-LFS pointer, not the file itself; fetch it with `git lfs pull`"):
        read_torch_file(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.99])
def test_a_file_that_was_cut_short(kept: float, zipped: bool, path: Path) -> None:
    torch.save({"a": torch.ones(2000)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ModelError, match=r"weights\.pth (is not a|cannot be read)") as raised:
        read_torch_file(path)

    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"<html>Not found</html>", b"hello\n", b"\x89PNG\r\n\x1a\n" + bytes(50), b"PK\x03\x04"]
)
def test_a_file_of_another_kind(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(
        ModelError, match=r"is not a (complete )?file written by torch\.save|is no model: it begins with"
    ):
        read_torch_file(path)


def test_a_file_that_cannot_be_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path.touch()
    monkeypatch.setattr(Path, "open", refuse)  # not chmod: root may read anything
    with pytest.raises(ModelError, match=r"weights\.pth cannot be opened: Permission denied"):
        read_torch_file(path)


def test_no_file(path: Path) -> None:
    for missing in (path, path.parent):
        with pytest.raises(ModelError, match="does not exist or is not a file"):
            read_torch_file(missing)


def state_of(detector: Detector) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in detector.module.state_dict().items()}


def find_differing(detector: Detector, state: dict[str, Tensor]) -> set[str]:
    return {name for name, value in detector.module.state_dict().items() if not torch.equal(value, state[name])}


@pytest.mark.parametrize("head", ["faster-rcnn", "cascade-rcnn", "retinanet", "fcos"])
def test_weights_that_fit(head: str, tiny_detector: TinyDetector) -> None:
    detector, state = tiny_detector(head), state_of(tiny_detector(head, seed=1))

    assert load_state(detector.module, state, "x.pth") == []
    assert not find_differing(detector, state)


@pytest.mark.parametrize(
    ("head", "layers"),
    [
        (
            "faster-rcnn",
            {f"roi_heads.box_predictor.{n}.{k}" for n in ("cls_score", "bbox_pred") for k in ("bias", "weight")},
        ),
        (  # its boxes are of no class, so they stay
            "cascade-rcnn",
            {
                f"roi_heads.{stage}box_predictor.cls_score.{k}"
                for stage in ("", "later.0.", "later.1.")
                for k in ("bias", "weight")
            },
        ),
        ("retinanet", {f"head.classification_head.cls_logits.{k}" for k in ("bias", "weight")}),
        ("fcos", {f"head.classification_head.cls_logits.{k}" for k in ("bias", "weight")}),
    ],
)
def test_another_number_of_classes_gets_a_fresh_head(head: str, layers: set[str], tiny_detector: TinyDetector) -> None:
    detector = tiny_detector(head)
    fresh = state_of(detector)
    (note,) = load_state(detector.module, state := state_of(tiny_detector(head, seed=1, classes=("a", "b"))), "x.pth")

    assert note.startswith("x.pth: trained for another number of classes; these layers start fresh: ")
    assert set(note.rpartition(": ")[2].split(", ")) == layers
    loaded = detector.module.state_dict()
    for name, value in loaded.items():
        assert torch.equal(value, fresh[name] if name in layers else state[name])


def test_a_mask_branch_is_left_out(tiny_detector: TinyDetector) -> None:
    detector, state = tiny_detector("faster-rcnn"), state_of(tiny_detector("faster-rcnn", seed=1))
    masks = {f"roi_heads.mask_{part}.weight": torch.ones(2) for part in ("head.mask_fcn1", "predictor.conv5_mask")}

    assert load_state(detector.module, state | masks, "x.pth") == ["x.pth: the mask branch (2 tensors) is not used"]
    assert not find_differing(detector, state)


def test_frozen_norms_count_no_batches(tiny_detector: TinyDetector) -> None:
    """Weights of frozen norms lack ``num_batches_tracked``; a batch norm starts counting at 0."""
    detector = tiny_detector("retinanet")
    state = state_of(tiny_detector("retinanet", seed=1, norm="frozen"))
    assert not any(name.endswith("num_batches_tracked") for name in state)

    assert load_state(detector.module, state, "x.pth") == []
    frozen = tiny_detector("retinanet", norm="frozen")
    assert load_state(frozen.module, state_of(tiny_detector("retinanet", seed=2)), "x.pth") == []


def test_as_many_other_classes_get_a_fresh_head(tiny_detector: TinyDetector) -> None:
    detector = tiny_detector("fcos")
    fresh, state = state_of(detector), state_of(tiny_detector("fcos", seed=1))
    (note,) = load_state(detector.module, state, "x.pth", other_classes=True)
    assert note.startswith("x.pth: trained for other classes; these layers start fresh: head.classification_head.cls_")
    for name, value in detector.module.state_dict().items():
        assert torch.equal(value, (fresh if ".cls_logits." in name else state)[name])


def test_weights_that_do_not_fit_change_nothing(tiny_detector: TinyDetector) -> None:
    detector = tiny_detector("retinanet")
    before = state_of(detector)
    state = state_of(tiny_detector("retinanet", seed=1))
    body = "backbone.body.conv1.weight"

    with pytest.raises(
        ModelError,
        match=rf"x\.pth does not fit this detector: 1 shapes differ \(first {body}: file \(4, 3, 7, 7\), "
        r"detector \(8, 3, 7, 7\)\)$",
    ):
        load_state(detector.module, state | {body: state[body][:4]}, "x.pth")
    with pytest.raises(ModelError, match=rf"1 tensors are missing \(first {body}\)$"):
        load_state(detector.module, {name: value for name, value in state.items() if name != body}, "x.pth")
    with pytest.raises(ModelError, match=r"1 are unknown \(first extra\.weight\)$"):
        load_state(detector.module, state | {"extra.weight": torch.ones(1)}, "x.pth")
    with pytest.raises(ModelError, match=r"tensors are missing .*are unknown"):
        load_state(detector.module, state_of(tiny_detector("fcos")) | {"x": torch.ones(1)}, "x.pth")
    assert not find_differing(detector, before)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for downloads, and no network."""

    def offline(url: str, *_: object, **__: object) -> None:
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def test_names_that_are_unknown_list_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"named 'COCO_V9'; fasterrcnn_resnet50_fpn has: COCO_V1$"):
        read_torchvision_weights("COCO_V9", "fasterrcnn_resnet50_fpn")
    with pytest.raises(ModelError, match=r"named 'best'; resnet50 has: IMAGENET1K_V1, IMAGENET1K_V2$"):
        read_torchvision_weights("best", "resnet50")


@pytest.mark.parametrize("name", ["COCO_V1", "ResNet18_Weights.BEST", "NoNet_Weights.DEFAULT", "weights.ckpt", ""])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises(ModelError, match=f"there are no torchvision weights named '{name}'$"):
        read_torchvision_weights(name, None)


def test_weights_that_cannot_be_downloaded_say_where_to_put_them(hub: Path) -> None:
    target = hub / "resnet18-f37072fd.pth"
    with pytest.raises(ModelError, match=r"could not be downloaded .*name resolution") as raised:
        read_torchvision_weights("IMAGENET1K_V1", "resnet18")

    assert f"put the file at {target}" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "model"),
    [("ResNet18_Weights.IMAGENET1K_V1", None), ("IMAGENET1K_V1", "resnet18"), ("DEFAULT", "resnet18")],
)
def test_weights_on_disk_are_read(name: str, model: str | None, hub: Path) -> None:
    hub.mkdir(parents=True)
    torch.save({"a": torch.ones(3)}, hub / Path(ResNet18_Weights.IMAGENET1K_V1.url).name)

    assert read_torchvision_weights(name, model) == {"a": pytest.approx(torch.ones(3))}


def test_weights_on_disk_are_not_executed(hub: Path) -> None:
    hub.mkdir(parents=True)
    torch.save({"a": Malicious(hub / "executed")}, hub / Path(ResNet18_Weights.IMAGENET1K_V1.url).name)
    with pytest.raises(ModelError, match="without executing code"):
        read_torchvision_weights("IMAGENET1K_V1", "resnet18")

    assert not (hub / "executed").exists()


def test_categories() -> None:
    coco = list_torchvision_categories("COCO_V1", "retinanet_resnet50_fpn")
    assert coco is not None
    assert (len(coco), coco[0], coco[-1]) == (90, "person", "toothbrush")  # background left out
    imagenet = list_torchvision_categories("ResNet18_Weights.DEFAULT", None)
    assert imagenet is not None
    assert (len(imagenet), imagenet[0]) == (1000, "tench")
