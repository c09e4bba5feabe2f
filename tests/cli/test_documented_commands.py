"""The commands in the documentation run, in the order of each page, on small stand-ins for the files that it names."""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import invoke
import pytest
import torch
import toy
import yaml
from documents import ROOT, blocks, shown_commands
from PIL import Image
from twins import TwoWay

from gdetkd_cli.compare import trials
from gdetkd_cli.data.synthetic import draw_split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.export.onnx import export_onnx
from gdetkd_cli.export.torchscript import export_torchscript
from gdetkd_cli.trust import trust_code

COMMANDS: dict[str, list[str]] = {}
for _page, _command in shown_commands():
    COMMANDS.setdefault(_page, []).append(_command)

NOT_RUN = {  # page: why its commands only have to parse
    "docs/benchmarks/photographs.md": "hundreds of trials",
    "docs/benchmarks/scenes.md": "hundreds of trials",
    "docs/benchmarks/speed.md": "detectors of full size",
}
BCCD = ("RBC", "WBC", "Platelets")
OWN_CODE = """\
import toy

from gdetkd_cli import portable


def detector(width=8):
    return portable.build(toy.detector("fcos", width) | {"kind": "composed"}, 3)
"""
SMALL = ["train.steps=2", "train.batch_size=2", "runtime.threads=1", "runtime.workers=0"]

# ------------------------------------------------------------------------------------------------------ stand-ins


def write_coco(root: Path, classes: tuple[str, ...], names: list[str]) -> None:
    """Scenes with their objects; the last four are for validation. Classes beyond those given are left out."""
    split = draw_split(split="train", images=len(names), size=64, seed=0)
    toy.write_images(root / "images", names)
    for which, chosen in (("train", range(len(names) - 4)), ("val", range(len(names) - 4, len(names)))):
        truth = [(i, item) for i in chosen for item in split.records[i].truth if item["category_id"] <= len(classes)]
        tables = {
            "images": [{"id": i, "file_name": names[i], "height": 64, "width": 64} for i in chosen],
            "annotations": [{**item, "id": n, "image_id": i} for n, (i, item) in enumerate(truth, start=1)],
            "categories": [{"id": n, "name": name} for n, name in enumerate(classes, start=1)],
        }
        (root / f"{which}.json").write_text(json.dumps(tables))


def write_voc(root: Path, coco: Path) -> None:
    """The data set of a COCO folder in VOC's layout."""
    shutil.copytree(coco / "images", root / "JPEGImages")
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for which, listing in (("train", "trainval"), ("val", "test")):
        tables = json.loads((coco / f"{which}.json").read_text())
        names = {category["id"]: category["name"] for category in tables["categories"]}
        stems = {image["id"]: Path(image["file_name"]).stem for image in tables["images"]}
        (root / "ImageSets" / "Main" / f"{listing}.txt").write_text("\n".join(stems.values()))
        for number, stem in stems.items():
            objects = ""
            for one in (item for item in tables["annotations"] if item["image_id"] == number):
                x, y, width, height = one["bbox"]
                corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
                box = "".join(f"<{name}>{value}</{name}>" for name, value in corners.items())
                objects += f"<object><name>{names[one['category_id']]}</name><bndbox>{box}</bndbox></object>"
            (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{objects}</annotation>")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small version of every file that the pages name."""
    kit: Path = tmp_path_factory.mktemp("kit")
    description = toy.detector() | {"kind": "composed", "norm": "batch"}
    classes = ("circle", "square", "triangle")
    torch.manual_seed(0)
    detector = catalog.build(description, classes)
    detector.module.eval()
    for folder in ("DIR", "data"):
        write_coco(kit / folder, classes, [f"{i}.png" for i in range(10)])
    (kit / "runs" / "my-teacher").mkdir(parents=True)
    for name in ("teacher.pt", "runs/my-teacher/student.pt"):
        catalog.save(kit / name, detector, description)
    export_onnx(detector, kit / "teacher.onnx", architecture=description)
    Image.open(kit / "DIR" / "images" / "0.png").save(kit / "street.jpg")
    own = toy.recipe().model_dump(mode="json") | {
        "data": {"format": "coco", "root": "DIR"},
        "teacher": {"arch": "checkpoint", "path": "teacher.pt"},
    }
    (kit / "my.yaml").write_text(yaml.safe_dump(own))
    shrink(kit / "my.yaml")

    (kit / "my_package").mkdir()
    (kit / "my_package" / "models.py").write_text(OWN_CODE)
    bccd = catalog.build(description, BCCD)
    bccd.module.eval()
    write_coco(kit / "PATH/TO/bccd", BCCD, [f"BloodImage_{i:05}.jpg" for i in range(4, 14)])
    write_voc(kit / "BCCD_Dataset/BCCD", kit / "PATH/TO/bccd")
    export_torchscript(bccd, kit / "last.torchscript", architecture=description)
    return kit


def shrink(recipe: Path, **blocks: Any) -> None:
    """Makes a recipe's detectors and its training small, and sets whole blocks, as a user would by hand."""
    content = yaml.safe_load(recipe.read_text()) | blocks
    for detector in (content["student"], content["teacher"]):
        if detector["arch"] == "composed":
            detector |= {"width": 8, "blocks": [1, 1, 1, 1], "pyramid_channels": 16, "image_size": [64, 64]}
            detector["backbone_weights"] = None
    content["train"] |= {"steps": 2, "batch_size": 2}
    content["runtime"] = {"threads": 1, "workers": 0}
    recipe.write_text(yaml.safe_dump(content))


def prepare_page(page: str) -> None:
    """Adapts the stand-ins in the working directory to a page."""
    if page in ("docs/guides/foreign-teacher.md", "docs/concepts/probing.md"):
        torch.manual_seed(0)
        with warnings.catch_warnings(action="ignore"):
            torch.jit.trace(TwoWay().eval(), torch.rand(1, 3, 96, 128)).save("teacher.pt")
    if page == "docs/guides/own-student.md":
        block = next(text for document, text in blocks("yaml") if document == page)
        shrink(Path("my.yaml"), **yaml.safe_load(block))
        sys.path.insert(0, ".")
        models = importlib.import_module("my_package.models")
        torch.save(models.detector(width=32).state_dict(), "start.pt")
    if page in (
        "docs/guides/export.md",
        "docs/guides/predict.md",
        "docs/guides/report.md",
        "docs/guides/stop-and-resume.md",
        "docs/reference/run-folder.md",
    ):
        invoke.done("distill", "--recipe", "my.yaml", "--output", "runs/student")
        invoke.done("train", "--recipe", "my.yaml", "--output", "runs/teacher")


# -------------------------------------------------------------------------------------------------------- commands

OUTPUTS = ("--output", "--plot", "--save", "--coco", "--csv", "--yolo")


def shorten(words: list[str]) -> list[str]:
    """The same command at toy size."""
    values = {"--seeds": "1", "--steps": "3", "--folds": "2"}
    for option, value in values.items():
        if option in words:
            words = [value if before == option else word for before, word in zip(["", *words], words, strict=False)]
    launching = {"--launcher", "--set-launcher"}  # trials of a scheduler run here
    pairs = zip(["", *words], words, strict=False)
    words = [word for before, word in pairs if not launching & {before, word}]
    command = next(word for word in words if not word.startswith("-"))
    if command == "bench" and "--steps" not in words:
        words = [*words, "--steps", "1"]
    if command == "compare":
        for option, value in (("--seeds", "1"), ("--methods", "none,gdetkd")):
            words = words if option in words else [*words, option, value]
    if command == "probe" and "--size" not in words:
        words = [*words, "--size", "96x128"]
    if any(word.startswith("bccd/") for word in words):
        words = [*words, *(word for value in SMALL for word in ("--set", value))]
    return words


def find_outputs(words: list[str]) -> list[Path]:
    """The files and folders that a command writes where it says."""
    named = [Path(after) for word, after in pairwise(words) if word in OUTPUTS]
    if words[0] == "probe" and "--recipe" in words:
        named.append(Path(words[words.index("--recipe") + 1]))
    return named + ([Path(words[2])] if words[:2] == ["recipe", "init"] else [])


def run_trial_here(children: trials.Children, command: list[str], log: Path, environment: dict[str, str]) -> int:
    """Runs a trial of ``compare`` in this process: another one would import torch for several seconds."""
    result = invoke.gdetkd(*command[command.index("gdetkd_cli") + 1 :])
    with log.open("a") as file:
        file.write(result.stderr)
    return int(result.exit_code)


@pytest.fixture
def folder(tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the stand-ins as the working directory."""
    shutil.copytree(stand_ins, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(trials.Children, "run", run_trial_here)
    yield tmp_path
    trust_code(False)
    for name in ("my_package", "my_package.models"):
        sys.modules.pop(name, None)
    shutil.rmtree(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in COMMANDS if page not in NOT_RUN])
def test_commands_run(page: str, folder: Path) -> None:
    prepare_page(page)
    for command in COMMANDS[page]:
        words = shlex.split(command)
        outputs = find_outputs(words)
        if words[0] != "compare" and "--resume" not in words:  # these continue; other commands refuse to overwrite
            for path in (path for path in outputs if path.exists()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        result = invoke.gdetkd(*(words if words == ["--help"] else shorten(words)))
        assert result.exit_code == 0, f"{page}: gdetkd {command}\n{result.output}"
        assert result.stdout
        assert all(path.exists() for path in outputs), f"{page}: gdetkd {command}"
        if Path("my.yaml") in outputs:
            shrink(Path("my.yaml"))
        if "--detector teacher" in command:  # the page's next step
            shrink(Path("my.yaml"), teacher={"arch": "checkpoint", "path": "runs/teacher"})


def test_pages_that_are_not_run_exist() -> None:
    assert all((ROOT / page).is_file() and page in COMMANDS for page in NOT_RUN)
