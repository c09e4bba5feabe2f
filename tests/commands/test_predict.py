"""``run_predict``: images, folders, patterns and videos in; boxes, COCO, CSV and YOLO files out."""

from __future__ import annotations

import csv
import json
import resource
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

from gdetkd_cli.commands import run_export, run_predict
from gdetkd_cli.commands.predict import PredictOptions
from gdetkd_cli.data.readers.coco import read_coco
from gdetkd_cli.data.sources import find_sources
from gdetkd_cli.data.synthetic import draw_split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.errors import DataError, DiskError, GDetKDError, ModelError
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.report.predictions import PredictedImage, draw_detections, write_csv
from gdetkd_cli.structures import Detections

TEACHER = "builtin:shapes-teacher"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two scenes, one of them in a subfolder."""
    scenes = draw_split(split="val", images=2, size=128, seed=3)
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    save_image(scenes.read(0).float() / 255, root / "a.png")
    save_image(scenes.read(1).float() / 255, root / "more" / "b.png")
    return root


def test_the_files_hold_what_the_detector_finds(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = PredictOptions(save=out / "drawn", coco=out / "found.json", csv=out / "found.csv", yolo=out / "labels")
    result = run_predict(TEACHER, [str(photos)], options)

    detector = catalog.load(catalog.locate(TEACHER)).detector
    expected = []
    for name in ("a.png", "more/b.png"):
        pixels = torch.from_numpy(np.array(Image.open(photos / name))).permute(2, 0, 1).float() / 255
        (found,) = detector.predict([pixels])
        for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
            if score >= 0.3:
                expected.append((name, detector.class_names[label - 1], score, box))
    assert len(expected) > 4
    assert sum(result.per_class.values()) == len(expected)
    assert [(image.image, image.size) for image in result.images] == [("a.png", (128, 128)), ("more/b.png", (128, 128))]
    assert result.written == (out / "drawn", out / "found.json", out / "found.csv", out / "labels")

    rows = list(csv.DictReader((out / "found.csv").open()))
    assert [(row["image"], row["class"]) for row in rows] == [(name, label) for name, label, _, _ in expected]
    for row, (_, _, score, box) in zip(rows, expected, strict=True):
        assert float(row["score"]) == pytest.approx(score, abs=1e-4)
        assert [float(row[key]) for key in ("x0", "y0", "x1", "y1")] == pytest.approx(box, abs=0.01)

    split = read_coco(annotations=out / "found.json", images=photos)  # its own reader takes it as annotations
    boxes = torch.cat([record.boxes for record in split.records])
    assert boxes.tolist() == [pytest.approx(box, abs=0.02) for *_, box in expected]
    assert json.loads((out / "found.json").read_text())["annotations"][0]["score"] == pytest.approx(
        expected[0][2], abs=1e-4
    )

    lines = (out / "labels" / "a.txt").read_text().splitlines() + (out / "labels/more/b.txt").read_text().splitlines()
    for line, (_, label, score, (x0, y0, x1, y1)) in zip(lines, expected, strict=True):
        number, *values = line.split()
        assert detector.class_names[int(number)] == label
        whole = [(x0 + x1) / 256, (y0 + y1) / 256, (x1 - x0) / 128, (y1 - y0) / 128, score]
        assert [float(value) for value in values] == pytest.approx(whole, abs=1e-4)

    drawn, plain = (np.array(Image.open(root / "a.png")).astype(int) for root in (out / "drawn", photos))
    assert drawn.shape == plain.shape
    assert (drawn != plain).any()


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_no_drawn_image_is_cut_off_by_a_full_disk(name: str, tmp_path: Path) -> None:
    """Pillow writes a JPEG past Python, and does not notice."""
    pixels = draw_split(split="val", images=1, size=128, seed=3).read(0)
    found = Detections(torch.tensor([[8.0, 8.0, 60.0, 60.0]]), torch.tensor([0.9]), torch.tensor([1]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DiskError, match=rf"{name} could not be written: it needs"):
            draw_detections(pixels, found, ("cat",), tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_scores_and_classes_are_filtered(photos: Path) -> None:
    every = run_predict(TEACHER, [str(photos)], PredictOptions(min_score=0.05))
    assert sum(every.per_class.values()) > sum(run_predict(TEACHER, [str(photos)]).per_class.values())
    name = next(iter(every.per_class))
    only = run_predict(TEACHER, [str(photos)], PredictOptions(min_score=0.05, only=(name,)))
    assert only.per_class == {name: every.per_class[name]}
    with pytest.raises(ModelError, match=rf"has no class '{name[:-1]}'; did you mean '?{name}"):
        run_predict(TEACHER, [str(photos)], PredictOptions(only=(name[:-1],)))


def test_exported_files_find_the_same(photos: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1, 3000)).save(tmp_path / "thin.png")
    assert run_predict(TEACHER, [str(photos), str(tmp_path / "thin.png")]).unreadable[0].startswith("thin.png: ")
    exported = run_export(TEACHER, onnx=True, torchscript=True, output=tmp_path)
    expected = run_predict(TEACHER, [str(photos / "a.png")], PredictOptions(min_score=0.5)).images
    for file in exported.files:
        places = [str(photos / "*.png"), str(tmp_path / "thin.png")]  # on which the detector fails
        result = run_predict(str(file.path), places, PredictOptions(min_score=0.5))
        assert [text.partition(": ")[0] for text in result.unreadable] == ["thin.png"]
        found = result.images
        assert [d.name for d in found[0].detections] == [d.name for d in expected[0].detections]
        for ours, theirs in zip(found[0].detections, expected[0].detections, strict=True):
            assert ours.box == pytest.approx(theirs.box, abs=0.1)


def test_a_video_is_read_frame_by_frame(photos: Path, tmp_path: Path) -> None:
    with av.open(str(photos / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p"
        for value in (40, 90, 140):
            frame = av.VideoFrame.from_ndarray(np.full((128, 128, 3), value, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    options = PredictOptions(save=tmp_path / "drawn")
    result = run_predict(TEACHER, [str(photos / "clip.mp4")], options)
    assert [image.image for image in result.images] == [f"clip.mp4/{n:06d}.jpg" for n in (1, 2, 3)]
    means = [np.array(Image.open(tmp_path / "drawn" / image.image)).mean() for image in result.images]
    assert means == pytest.approx([40, 90, 140], abs=4)
    (photos / "broken.mp4").write_bytes(b"no video")
    Image.new("RGB", (16, 16)).save(photos / "clip.png")
    run_predict(TEACHER, [str(photos / "clip.*")], PredictOptions(yolo=tmp_path / "labels"))
    written = sorted(path.relative_to(tmp_path / "labels").as_posix() for path in (tmp_path / "labels").rglob("*.txt"))
    assert written == ["clip.mp4/000001.txt", "clip.mp4/000002.txt", "clip.mp4/000003.txt", "clip.txt"]
    (photos / "clip.png").unlink()
    with pytest.raises(DataError, match=r"broken\.mp4 cannot be read as a video"):
        run_predict(TEACHER, [str(photos / "broken.mp4")])
    assert len(run_predict(TEACHER, [str(photos)]).images) == 5


def test_a_video_without_a_decoder(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "clip.mp4").write_bytes(b"video")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"neither PyAV nor OpenCV is installed; in gdetkd's folder, run: pip install"):
        list(find_sources([str(photos / "clip.mp4")])[0].read())


def test_an_unreadable_image_is_left_out_and_named(photos: Path) -> None:
    (photos / "broken.png").write_bytes(b"no image")
    notes: list[str] = []
    result = run_predict(TEACHER, [str(photos)], observer=lambda event: notes.append(str(event)))
    assert [image.image for image in result.images] == ["a.png", "more/b.png"]
    assert "broken.png" in result.unreadable[0]
    assert any("left out" in note and "broken.png" in note for note in notes)
    with pytest.raises(DataError, match=r"no image could be used; the first problem: .*broken\.png"):
        run_predict(TEACHER, [str(photos / "broken.png")])


def test_a_name_that_is_not_utf8_is_kept(tmp_path: Path) -> None:
    found = Detections(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0.5]), torch.tensor([1]))
    write_csv(tmp_path / "a.csv", [PredictedImage("caf\udce9.jpg", (9, 9), found)], ("cat",))
    assert b"\ncaf\xe9.jpg,cat,0.5000,1.00,2.00,3.00,4.00\n" in (tmp_path / "a.csv").read_bytes()


def test_an_image_of_another_ending_is_drawn_as_png(photos: Path, tmp_path: Path) -> None:
    (photos / "more" / "b.png").rename(photos / "b.jpg_large")
    run_predict(TEACHER, [str(photos / "*.*")], PredictOptions(save=tmp_path / "drawn"))
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["a.png", "b.jpg_large.png"]


def test_a_recipe_names_its_classes_by_its_data(photos: Path, tmp_path: Path) -> None:
    """Weights of a state_dict have no class names."""
    loaded = catalog.load(catalog.locate(TEACHER))
    torch.save(loaded.detector.module.state_dict(), tmp_path / "weights.pt")
    recipe = load_recipe("shapes/frcnn-frcnn").model_dump(mode="json")
    block = loaded.description | {"arch": "composed", "weights": str(tmp_path / "weights.pt")}
    recipe["teacher"] = {name: value for name, value in block.items() if name != "kind"}
    (tmp_path / "my.yaml").write_text(json.dumps(recipe))
    found = run_predict(str(tmp_path / "my.yaml"), [str(photos)])
    assert found.per_class == run_predict(TEACHER, [str(photos)]).per_class


def test_mistakes(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing/\*\.jpg holds no image and no video; give a file, a folder"):
        run_predict(TEACHER, ["nothing/*.jpg"])
    (photos / "more" / "a.png").write_bytes((photos / "a.png").read_bytes())
    with pytest.raises(DataError, match=r"would both be called a\.png; name a folder that holds both"):
        run_predict(TEACHER, [str(photos / "a.png"), str(photos / "more" / "a.png")])
    Image.open(photos / "a.png").save(photos / "a.jpg")
    with pytest.raises(DataError, match=r"a\.jpg and a\.png would share one text file"):
        run_predict(TEACHER, [str(photos)], PredictOptions(yolo=tmp_path / "labels"))
    (tmp_path / "here.csv").touch()
    with pytest.raises(GDetKDError, match=r"here\.csv already exists; choose another one with --csv"):
        run_predict(TEACHER, [str(photos)], PredictOptions(csv=tmp_path / "here.csv"))
    with pytest.raises(GDetKDError, match=r"--coco and --csv both name .*one; name two different ones"):
        run_predict(TEACHER, [str(photos)], PredictOptions(coco=tmp_path / "one", csv=tmp_path / "x" / ".." / "one"))
    with pytest.raises(GDetKDError, match=r"here\.csv/in cannot be created \(Not a directory\); change --coco"):
        run_predict(TEACHER, [str(photos)], PredictOptions(coco=tmp_path / "here.csv" / "in" / "found.json"))
    with pytest.raises(GDetKDError, match="photos already exists; choose another one with --save"):
        run_predict(TEACHER, [str(photos)], PredictOptions(save=photos))
