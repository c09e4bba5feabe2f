"""train, distill, eval, export and eval again through the command line, on real files at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import invoke
import pytest

RECIPE = """\
name: toy
data: {format: synthetic, train_images: 12, val_images: 6, size: 64}
student: &small
  arch: composed
  backbone: resnet18
  width: 8
  blocks: [1, 1, 1, 1]
  head: faster-rcnn
  pyramid_channels: 16
  image_size: [64, 64]
  arguments:
    representation_size: 32
    box_score_thresh: 0.001
    anchor_sizes: [[8], [16], [24], [32], [48]]
    rpn_pre_nms_top_n_train: 40
    rpn_post_nms_top_n_train: 40
    rpn_pre_nms_top_n_test: 40
    rpn_post_nms_top_n_test: 40
    box_batch_size_per_image: 16
teacher: {arch: checkpoint, path: teacher}
distill: {regions: {per_image: 8}}
train: {steps: 4, batch_size: 2, log_every: 2, checkpoint_every: 2}
runtime: {device: cpu, threads: 1}
"""


def gdetkd(*arguments: str) -> dict[str, Any]:
    """Runs a command with --json; its exit code must be 0 and its stdout one JSON document."""
    return json.loads(invoke.done(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def test_the_whole_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("toy.yaml").write_text(RECIPE)
    teacher = gdetkd("train", "--recipe", "toy.yaml", "--output", "teacher")
    assert teacher["run"] == "teacher"

    plan = gdetkd("distill", "--recipe", "toy.yaml", "--dry-run")
    assert plan["pair"].startswith("homogeneous")
    assert [p.name for p in folder.iterdir() if p.is_dir()] == ["teacher"]

    distilled = gdetkd("distill", "--recipe", "toy.yaml", "--output", "student")
    assert distilled["steps"] == 4
    evaluated = gdetkd("eval", "student")
    assert evaluated["AP"] == pytest.approx(distilled["AP"])
    assert set(evaluated["per_class"]) >= {"disc-dot", "triangle-ring"}

    exported = gdetkd("export", "student", "--onnx")
    (file,) = exported["files"]
    assert file["parity"]["passed"]
    assert Path(file["path"]).exists()
    again = gdetkd("eval", file["path"])
    assert again["format"] == "onnx"
    assert again["AP"] == pytest.approx(evaluated["AP"], abs=0.1)

    probed = gdetkd("probe", "student", "--size", "64x64")
    assert [level["stride"] for level in probed["levels"]] == [[s, s] for s in (4.0, 8.0, 16.0, 32.0, 64.0)]
    assert [level["shape"] for level in probed["levels"]] == [[16, 16], [8, 8], [4, 4], [2, 2], [1, 1]]


def test_mistakes_are_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "text.pt").write_text("not a model")
    empty = folder / "empty"
    empty.mkdir()
    (empty / "train.json").write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}')
    (empty / "val.json").write_text((empty / "train.json").read_text())
    (empty / "images").mkdir()
    for arguments, code, words in (
        (["eval", "text.pt"], 2, "text.pt"),
        (
            ["probe", "nothing.pt"],
            2,
            "expected a file, a run folder, package.module:function, or a torchvision detector",
        ),
        (["distill", "--recipe", "toy.yaml", "--set", "teacher=null"], 2, "no `teacher:` block"),
        (["train", "--recipe", "toy.yaml", "--set", "train.steps=0"], 2, "greater than 0"),
        (["train", "--recipe", "toy.yaml", "--set", "data={format: coco, root: empty}"], 2, "empty"),
        (["distill", "--recipe", "toy.yaml", "--set", "teacher.path=gone"], 2, "gone"),
    ):
        result = invoke.gdetkd(*arguments)
        assert result.exit_code == code, (arguments, result.stderr)
        assert words in result.stderr, (arguments, result.stderr)
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
