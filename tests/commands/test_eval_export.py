"""``run_eval`` and ``run_export`` on a run folder: what is written, measured, refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import toy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.utils import save_image

from gdetkd_cli.commands import export, run_eval, run_export
from gdetkd_cli.data.synthetic import draw_split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.engine.events import Event, Note
from gdetkd_cli.errors import DataError, ExportError, ModelError, OutputError, PairError, RecipeError
from gdetkd_cli.export.onnx import export_onnx
from gdetkd_cli.export.safetensors import export_safetensors
from gdetkd_cli.probing.formats.files import detect_kind, is_safetensors
from gdetkd_cli.recipe.load import dump_recipe
from gdetkd_cli.recipe.schema import CheckpointDetector, CocoData, Recipe, SyntheticData

DRAWN_IMAGES = 5
OBJECTS = 6  # per image


@pytest.fixture(scope="module")
def detector(tiny_detector: Callable[..., Detector]) -> Detector:
    made = tiny_detector("faster-rcnn")
    network: Any = made.module
    with torch.no_grad():
        network.roi_heads.box_predictor.cls_score.weight.mul_(20)  # fresh weights say nearly the same everywhere
    return made


@pytest.fixture(scope="module")
def data(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> CocoData:
    """ImageFiles whose truth is what the detector is surest of: its AP is high, and falls when it changes."""
    root = tmp_path_factory.mktemp("data")
    scenes = draw_split(split="val", images=DRAWN_IMAGES, size=64, seed=3)
    images, annotations = [], []
    (root / "images").mkdir()
    for index in range(DRAWN_IMAGES):
        image = scenes.read(index).float() / 255
        save_image(image, root / "images" / f"{index}.png")
        images.append({"id": index + 1, "file_name": f"{index}.png", "height": 64, "width": 64})
        (found,) = detector.predict([image])
        for box, label in list(zip(found.boxes.tolist(), found.labels.tolist(), strict=True))[:OBJECTS]:
            width, height = box[2] - box[0], box[3] - box[1]
            item = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": label, "iscrowd": 0}
            annotations.append({**item, "bbox": [*box[:2], width, height], "area": width * height})
    categories = [{"id": label, "name": name} for label, name in enumerate(detector.class_names, start=1)]
    tables = {"images": images, "annotations": annotations, "categories": categories}
    (root / "val.json").write_text(json.dumps(tables))
    return CocoData(format="coco", root=root)


@pytest.fixture(scope="module")
def finished(
    detector: Detector,
    data: CocoData,
    tiny_description: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run folder with both exported files: to be read, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    _write_run(folder, detector, data, tiny_description("faster-rcnn"))
    run_export(str(folder), onnx=True, torchscript=True, output=None)
    return folder


@pytest.fixture
def run(detector: Detector, data: CocoData, tiny_description: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """A run folder of the test's own."""
    folder = tmp_path / "run"
    folder.mkdir()
    _write_run(folder, detector, data, tiny_description("faster-rcnn"))
    return folder


def _write_run(folder: Path, detector: Detector, data: CocoData, description: dict[str, Any]) -> None:
    """The parts of a run that matter here."""
    catalog.save(folder / "student.pt", detector, description)
    student = {"arch": "composed", "backbone": "resnet18", "head": "faster-rcnn"}
    recipe = Recipe.model_validate({"name": "toy", "data": data, "student": student, "train": {"steps": 1}})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------------------------- export


def test_another_tools_file_is_read_by_the_form_of_its_output(finished: Path, data: CocoData, tmp_path: Path) -> None:
    model = onnx.load(finished / "student.onnx")
    names = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "gdetkd.classes"))
    del model.metadata_props[:]
    foreign = tmp_path / "foreign.onnx"
    onnx.save(model, foreign)
    with pytest.raises(
        PairError, match=r"the classes of .*foreign\.onnx are unknown; name them .*add --classes"
    ) as caught:
        run_eval(str(foreign), data=data)
    assert str(caught.value).endswith(f"add --classes {','.join(names)}")

    teacher = CheckpointDetector(arch="checkpoint", path=str(foreign), classes=names)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(dump_recipe(toy.recipe().model_copy(update={"teacher": teacher, "data": data})))
    expected = run_eval(str(finished), data=None)
    for target in (str(recipe), str(_named(foreign, names))):
        found = run_eval(target, data=data if target.endswith(".onnx") else None)
        assert found.format == "onnx"
        assert found.parameters == pytest.approx(expected.parameters, rel=0.02)  # norms are folded into convolutions
        assert found.metrics.ap == pytest.approx(expected.metrics.ap, abs=0.1)
    typed = run_eval(str(foreign), data=data, classes=names)
    assert typed.metrics.ap == found.metrics.ap
    with pytest.raises(RecipeError, match=r"in the recipe .*mine\.yaml, set teacher.classes instead"):
        run_eval(str(recipe), data=None, classes=names)
    assert expected.metrics.ap is not None
    assert expected.metrics.ap > 50


def test_classes_that_the_user_names_replace_those_of_the_file(finished: Path, data: CocoData, tmp_path: Path) -> None:
    names = catalog.load(finished / "student.pt").detector.class_names
    with pytest.raises(ModelError, match=rf"has {len(names)} classes .*, but 1 are named \(cat\)"):
        run_eval(str(finished), data=data, classes=["cat"])
    for file in (finished, finished / "student.onnx"):
        with pytest.raises(DataError, match=f"in the same order, add --classes {','.join(names)}, or in a recipe"):
            run_eval(str(file), data=data, classes=[f"other {name}" for name in names])
        expected, turned = (run_eval(str(file), data=data, classes=c).metrics.ap for c in (names, names[::-1]))
        assert expected is not None and turned is not None
        assert turned < expected - 20


def _named(path: Path, names: list[str]) -> Path:
    """The file with its classes noted as ultralytics does it."""
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"names": str(dict(enumerate(names)))})
    named = path.with_name("named.onnx")
    onnx.save(model, named)
    return named


def test_writes_both_formats_beside_the_detector(run: Path, detector: Detector) -> None:
    heard: list[Event] = []
    result = run_export(str(run), onnx=True, torchscript=True, output=None, observer=heard.append)
    assert result.source == str(run)
    assert [(file.path, file.format) for file in result.files] == [
        (run / "student.onnx", "onnx"),
        (run / "student.torchscript", "torchscript"),
    ]
    assert _names(run) == {"student.pt", "recipe.yaml", "student.onnx", "student.torchscript"}
    for file in result.files:
        assert file.parity.passed
        assert file.parity.empty == 1
        assert file.parity.images == 7
        assert file.parity.detections > 20
        assert file.size_mb == pytest.approx(file.path.stat().st_size / 1e6)
    assert not [event for event in heard if isinstance(event, Note) and "cannot be read" in event.text]


@pytest.mark.parametrize(
    ("output", "formats", "written"),
    [
        ("a/small.bin", ("onnx",), {"a/small.bin"}),
        ("small.bin", ("onnx", "torchscript"), {"small.onnx", "small.torchscript"}),
        ("there", ("onnx",), {"there/student.onnx"}),
    ],
)
def test_writes_where_output_says(
    output: str, formats: tuple[str, ...], written: set[str], run: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    wanted = {name: name in formats for name in ("onnx", "torchscript")}
    result = run_export(str(run / "student.pt"), output=tmp_path / output, **wanted)
    assert {str(file.path.relative_to(tmp_path)) for file in result.files} == written
    assert all(file.path.exists() for file in result.files)
    assert _names(run) == {"student.pt", "recipe.yaml"}


def test_a_file_with_dots_keeps_its_name(run: Path) -> None:
    (run / "student.pt").rename(run / "model.v1.pt")
    result = run_export(str(run / "model.v1.pt"), onnx=False, torchscript=False, safetensors=True, output=None)
    assert [file.path for file in result.files] == [run / "model.v1.safetensors"]


def test_a_builtin_detector_is_written_to_the_working_directory(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (run / "student.pt").rename(folder / "toy.pt")
    monkeypatch.setattr(catalog, "BUILTIN", folder)
    monkeypatch.chdir(tmp_path)
    result = run_export("builtin:toy", onnx=True, torchscript=False, output=None)
    assert [file.path for file in result.files] == [Path("toy.onnx")]
    assert _names(folder) == {"toy.pt"}


def test_never_overwrites(run: Path) -> None:
    (run / "student.torchscript").write_text("mine")
    with pytest.raises(OutputError, match=r"student\.torchscript already exists; .* --output"):
        run_export(str(run), onnx=True, torchscript=True, output=None)
    assert (run / "student.torchscript").read_text() == "mine"
    assert not (run / "student.onnx").exists()


def test_a_file_that_disagrees_is_not_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_another(detector: Detector, path: Path, **options: Any) -> str:
        other = copy.deepcopy(detector)
        with torch.no_grad():
            for parameter in other.module.parameters():
                parameter.mul_(1.01)
        return export_onnx(other, path, **options)

    monkeypatch.setattr(export, "export_onnx", write_another)
    with pytest.raises(
        ExportError, match=r"student\.onnx was not written: .* scores by up to 0\.\d+ \(allowed: 0\.001\)"
    ):
        run_export(str(run), onnx=True, torchscript=False, output=None)
    assert _names(run) == {"student.pt", "recipe.yaml"}


def test_synthetic_scenes_take_the_place_of_data_that_cannot_be_read(run: Path) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("val.json", "gone.json"))
    assert "gone.json" in recipe.read_text()
    heard: list[Event] = []
    result = run_export(str(run), onnx=False, torchscript=True, output=None, observer=heard.append)
    assert result.files[0].parity.detections > 20
    assert any(isinstance(event, Note) and "synthetic scenes" in event.text for event in heard)


# ------------------------------------------------------------------------------------------------------- evaluation


def test_every_file_of_a_detector_has_the_same_ap(finished: Path, detector: Detector) -> None:
    whole = run_eval(str(finished), data=None)
    assert whole.format == "run"
    assert whole.data.endswith("val.json")
    assert whole.parameters == sum(p.numel() for p in detector.module.parameters())
    assert whole.metrics.images == DRAWN_IMAGES
    assert whole.metrics.ap is not None
    assert whole.metrics.ap > 50
    assert whole.ms_per_image > 0
    assert whole.size_mb == pytest.approx((finished / "student.pt").stat().st_size / 1e6)
    for kind in ("onnx", "torchscript"):
        exported = run_eval(str(finished / f"student.{kind}"), data=None)
        assert exported.format == kind
        assert exported.parameters is None
        assert exported.metrics.ap == pytest.approx(whole.metrics.ap, abs=0.1)


@pytest.mark.parametrize(
    ("file", "suffix", "kind"),
    [
        ("student.pt", ".onnx", "checkpoint"),
        ("student.onnx", ".pt", "onnx"),
        ("student.torchscript", "", "torchscript"),
    ],
)
def test_the_content_decides_what_a_file_is(
    file: str, suffix: str, kind: str, finished: Path, data: CocoData, tmp_path: Path
) -> None:
    renamed = tmp_path / f"renamed{suffix}"
    renamed.symlink_to(finished / file)
    assert run_eval(str(renamed), data=data).format == kind


def test_data_have_to_come_from_somewhere(run: Path, data: CocoData) -> None:
    (run / "recipe.yaml").unlink()
    with pytest.raises(DataError, match="--data"):
        run_eval(str(run), data=None)
    assert run_eval(str(run), data=data).metrics.images == DRAWN_IMAGES


def test_a_folder_of_any_layout_that_is_found(run: Path, data: CocoData, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_bytes((data.root / data.val).read_bytes())
    (root / "val2017").symlink_to((data.root / data.val_images).absolute())
    assert run_eval(str(run), data=root).metrics.images == DRAWN_IMAGES


def test_data_of_other_classes_are_refused(run: Path) -> None:
    with pytest.raises(DataError, match="disc-dot"):
        run_eval(str(run), data=SyntheticData(val_images=1, size=64))


def test_files_that_are_no_detector_are_refused(run: Path, data: CocoData) -> None:
    files = {"empty": b"", "text": b"hello", "half.onnx": b"\x08\x08\x12", "zip": b"PK\x03\x04"}
    for name, content in files.items():
        (run / name).write_bytes(content)
        with pytest.raises(ModelError, match=name):
            run_eval(str(run / name), data=data)


def test_safetensors_hold_the_weights_the_classes_and_the_description(run: Path, detector: Detector) -> None:
    (file,) = run_export(str(run), onnx=False, torchscript=False, safetensors=True, output=None).files
    assert (file.path, file.format) == (run / "student.safetensors", "safetensors")
    assert (file.parity.passed, file.parity.max_box_error, file.parity.max_score_error) == (True, 0.0, 0.0)
    assert file.path.stat().st_mode == (run / "student.pt").stat().st_mode
    state, saved = load_file(file.path), torch.load(run / "student.pt", weights_only=True)
    assert state.keys() == saved["model"].keys()
    assert all(torch.equal(state[name], value) for name, value in saved["model"].items())
    with safe_open(file.path, framework="pt") as opened:
        notes = opened.metadata()
    assert (notes["format"], notes["task"]) == ("pt", "detect")
    assert notes["names"] == str(dict(enumerate(detector.class_names)))
    assert json.loads(notes["gdetkd.classes"]) == saved["classes"]
    assert json.loads(notes["gdetkd.architecture"]) == saved["architecture"]

    # The file is a detector of its own, under any name.
    assert run_eval(str(file.path), data=None).metrics == run_eval(str(run), data=None).metrics
    renamed = file.path.rename(run / "weights")
    assert run_eval(str(renamed), data=None).format == "checkpoint"


def test_shared_tensors_are_written_under_each_of_their_names(detector: Detector, tmp_path: Path) -> None:
    shared = copy.deepcopy(detector)
    network: Any = shared.module
    network.backbone.fpn.layer_blocks[1] = network.backbone.fpn.layer_blocks[0]
    export_safetensors(shared, tmp_path / "shared.safetensors", architecture={})
    state = load_file(tmp_path / "shared.safetensors")
    first, second = (f"backbone.fpn.layer_blocks.{i}.0.weight" for i in (0, 1))
    assert torch.equal(state[first], state[second])
    network.load_state_dict(state)


def test_safetensors_of_a_size_whose_first_byte_is_that_of_onnx(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    header = json.dumps({"__metadata__": {"note": ""}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    header = header.replace('""', f'"{"x" * (0x208 - len(header))}"')
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    start = path.read_bytes()[:9]
    assert start[:1] == b"\x08"
    assert load_file(path)["a"].tolist() == [0]
    assert is_safetensors(start, path.stat().st_size)
    assert not is_safetensors(start, 8)
    assert detect_kind(path) == "checkpoint"


def test_damaged_safetensors_are_refused(run: Path) -> None:
    (file,) = run_export(str(run), onnx=False, torchscript=False, safetensors=True, output=None).files
    content = file.path.read_bytes()
    file.path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"student\.safetensors is not a complete safetensors file"):
        run_eval(str(file.path), data=None)
    save_file({"a": torch.zeros(1)}, file.path, {"gdetkd.architecture": '{"kind": "odd"}', "gdetkd.classes": '["a"]'})
    with pytest.raises(ModelError, match="unknown architecture kind 'odd'"):
        run_eval(str(file.path), data=None)
