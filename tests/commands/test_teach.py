"""`gdetkd teach`: a teacher's answers teach without the teacher's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from PIL import Image
from twins import SharedHead

from gdetkd_cli.commands import run_distill, run_eval, run_teach
from gdetkd_cli.engine.events import Event, Note
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import DiskError, KnowledgeError, ModelError, PairError
from gdetkd_cli.knowledge.teacher import RememberedTeacher
from gdetkd_cli.recipe.load import dump_recipe
from gdetkd_cli.recipe.schema import Recipe


def vary(recipe: Recipe, **fields: Any) -> Recipe:
    return Recipe.model_validate(recipe.model_dump(mode="json") | fields)


def use(folder: Path) -> dict[str, Any]:
    return {"arch": "knowledge", "path": str(folder)}


def move_weights(recipe: Recipe, folder: Path) -> tuple[Recipe, Path]:
    """Gives the teacher a weights file of its own, which a test may remove."""
    assert recipe.teacher is not None
    block = recipe.teacher.model_dump(mode="json")
    path = folder / "teacher.pt"
    path.write_bytes(Path(block["weights"]).read_bytes())
    return vary(recipe, teacher=block | {"weights": str(path)}), path


@pytest.mark.parametrize(
    ("teacher", "student"), [("faster-rcnn", "faster-rcnn"), ("faster-rcnn", "fcos"), ("fcos", "retinanet")]
)
def test_a_run_without_the_teacher_equals_the_live_run(teacher: str, student: str, tmp_path: Path) -> None:
    recipe, weights = move_weights(toy.recipe(teacher=teacher, student=student), tmp_path)
    run_distill(recipe, output=tmp_path / "live")
    taught = run_teach(recipe, output=tmp_path / "knowledge")
    weights.unlink()
    run_distill(vary(recipe, teacher=use(tmp_path / "knowledge")), output=tmp_path / "stored")

    assert (taught.images, taught.views, taught.detections) == (10, 2, True)
    assert max(taught.errors.values()) < 2**-11
    toy.assert_same_training(tmp_path / "live", tmp_path / "stored")
    reports = [json.loads(RunFolder(tmp_path / name).probe.read_text()) for name in ("live", "stored")]
    assert reports[0]["teacher"]["parameters"] == reports[1]["teacher"]["parameters"]
    for before, now in zip(*(one["teacher"]["levels"] for one in reports), strict=True):
        # A live teacher is described on a pattern, a stored one on the first image.
        assert all(one.pop(name) is not None for one in (before, now) for name in ("mean", "std"))
        assert now == before


def test_a_subset_of_the_taught_images_can_be_used(tmp_path: Path) -> None:
    """Images of two sizes, of which the subset has the second alone; and a later call that adds no mirrored images."""
    names = [f"{i}.png" for i in range(4)]
    toy.write_images(tmp_path / "images", names)
    for name in names[2:]:
        image = Image.open(tmp_path / "images" / name)
        image.resize((80, 64)).save(tmp_path / "images" / name)
    for split, chosen in (("train", range(4)), ("val", [0]), ("subset", [2, 3])):
        tables = {
            "images": [{"id": i, "file_name": names[i]} for i in chosen],
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(toy.CLASS_NAMES)],
            "annotations": [{"image_id": i, "category_id": 1, "bbox": [9, 9, 30, 30]} for i in chosen],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(tables))
    data = {"format": "coco", "root": str(tmp_path)}
    recipe = vary(toy.recipe(steps=1), data=data)
    run_teach(recipe, output=tmp_path / "knowledge")
    run_teach(vary(recipe, augment={"flip": 0.0}), output=tmp_path / "knowledge")
    subset = vary(recipe, data=data | {"train": "subset.json"}, teacher=use(tmp_path / "knowledge"))
    assert run_distill(subset, output=tmp_path / "run").steps == 1


def test_a_torchscript_teacher_teaches_without_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    script = torch.jit.script(SharedHead().eval())
    script.save(str(tmp_path / "model.pt"))
    block = {"arch": "checkpoint", "path": str(tmp_path / "model.pt"), "input": {"size": [96, 128]}}
    recipe = vary(toy.recipe(student="fcos", steps=3), teacher=block)
    notes: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    run_distill(recipe, output=tmp_path / "live")
    taught = run_teach(recipe, output=tmp_path / "knowledge", observer=note)
    (tmp_path / "model.pt").unlink()
    stored = vary(recipe, teacher=use(tmp_path / "knowledge"))
    run_distill(stored, output=tmp_path / "stored")

    toy.assert_same_training(tmp_path / "live", tmp_path / "stored")
    assert not taught.detections
    assert any("only features are stored" in text for text in notes)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(stored))
    with pytest.raises(PairError, match="has no detections"):
        run_eval(str(tmp_path / "recipe.yaml"), data=None)


def test_an_interrupted_call_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy.recipe()
    compute, calls = RememberedTeacher.compute, []

    def stop(self: RememberedTeacher, images: Any) -> Any:
        calls.append(len(images))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return compute(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(RememberedTeacher, "compute", stop)
        with pytest.raises(KeyboardInterrupt):
            run_teach(recipe, output=tmp_path / "knowledge")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "knowledge" / "views").rglob("*.safetensors")}
    with pytest.raises(KnowledgeError, match="is incomplete, because `gdetkd teach` did not finish"):
        run_distill(vary(recipe, teacher=use(tmp_path / "knowledge")), output=tmp_path / "run")
    taught = run_teach(recipe, output=tmp_path / "knowledge")
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "knowledge" / "views").rglob("*.safetensors")}

    assert len(kept) > 0
    assert kept.items() <= files.items()  # what was there was not computed again
    assert taught.added == len(files) - len(kept)
    assert run_teach(recipe, output=tmp_path / "knowledge").added == 0


def test_stored_detections_give_the_same_ap(tmp_path: Path) -> None:
    recipe = vary(toy.recipe(), teacher={"arch": "checkpoint", "path": "builtin:shapes-teacher"})
    run_teach(recipe, output=tmp_path / "knowledge")
    results = []
    for name, own in (("live", recipe), ("stored", vary(recipe, teacher=use(tmp_path / "knowledge")))):
        (tmp_path / f"{name}.yaml").write_text(dump_recipe(own))
        results.append(run_eval(str(tmp_path / f"{name}.yaml"), data=None).metrics)
    assert results[0].ap is not None
    assert results[0].ap > 0
    assert results[0] == results[1]


@pytest.mark.reports
def test_the_report_needs_no_teacher(tmp_path: Path) -> None:
    recipe, weights = move_weights(toy.recipe(steps=2), tmp_path)
    run_teach(recipe, output=tmp_path / "knowledge")
    weights.unlink()
    run_distill(vary(recipe, teacher=use(tmp_path / "knowledge")), output=tmp_path / "run")
    measured = json.loads((tmp_path / "run" / "measured.json").read_text())

    assert measured["pair"] is not None
    assert measured["teacher"]["ms_per_image"] is None  # it did not run
    assert (tmp_path / "run" / "teacher.npz").exists()
    assert (tmp_path / "run" / "pyramids" / "teacher.jpg").exists()
    assert (tmp_path / "run" / "report.html").exists()


def test_int8_is_half_the_size_and_states_its_error(tmp_path: Path) -> None:
    half, small = (run_teach(toy.recipe(), output=tmp_path / str(int8), int8=int8) for int8 in (False, True))
    sizes = [sum(p.stat().st_size for p in (result.knowledge / "views").rglob("*.*")) for result in (half, small)]
    assert sizes[1] < 0.7 * sizes[0]
    assert 2**-11 < max(small.errors.values()) < 0.02
    run_distill(vary(toy.recipe(steps=2), teacher=use(small.knowledge)), output=tmp_path / "run")
    with pytest.raises(KnowledgeError, match="the answers of another teacher: values changed"):
        run_teach(toy.recipe(), output=small.knowledge)


def test_what_the_folder_lacks_is_named(tmp_path: Path) -> None:
    one_view = vary(toy.recipe(), augment={"flip": 0.0})
    folder = tmp_path / "knowledge"
    assert run_teach(one_view, output=folder).views == 1
    run_distill(vary(one_view, teacher=use(folder)), output=tmp_path / "run")
    with pytest.raises(KnowledgeError, match=r"has no mirrored images; set augment\.flip to 0"):
        run_distill(vary(toy.recipe(), teacher=use(folder)), output=tmp_path / "other")
    more = vary(one_view, data={"format": "synthetic", "train_images": 12, "val_images": 4, "size": 64})
    with pytest.raises(KnowledgeError, match=r"has no answer about image \d+ of .* \(64 x 64 pixels\)"):
        run_distill(vary(more, teacher=use(folder)), output=tmp_path / "more")
    assert run_teach(more, output=folder).added > 0
    run_distill(vary(more, teacher=use(folder)), output=tmp_path / "more")
    for augment in ({"copy_paste": 0.5}, {"scale_jitter": 0.5}, {"multi_scale": [48, 64]}):
        with pytest.raises(KnowledgeError, match="answers about given images, but"):
            run_distill(vary(more, teacher=use(folder), augment=augment), output=tmp_path / "countless")


def test_what_cannot_be_taught_is_refused(tmp_path: Path) -> None:
    recipe, folder = toy.recipe(), tmp_path / "knowledge"
    with pytest.raises(KnowledgeError, match="already holds a teacher's answers"):
        run_teach(vary(recipe, teacher=use(folder)), output=folder)
    with pytest.raises(KnowledgeError, match="has no teacher to ask"):
        run_teach(vary(recipe, teacher=None, distill=None), output=folder)
    with pytest.raises(KnowledgeError, match=r"has no key\.json; expected a folder that `gdetkd teach` wrote"):
        run_distill(vary(recipe, teacher=use(folder)), output=tmp_path / "run")
    with pytest.raises(ModelError, match="cannot be trained; choose another student"):
        run_distill(vary(recipe, student=use(folder)), output=tmp_path / "run")
    assert not folder.exists()


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "knowledge"
    run_teach(toy.recipe(), output=folder)
    recipe = vary(toy.recipe(), teacher=use(folder))
    heads = (folder / "heads.safetensors").read_bytes()
    facts = (folder / "teacher.json").read_text()
    for name, content in (("heads.safetensors", heads[:-4]), ("teacher.json", facts[:50].encode())):
        (folder / name).write_bytes(content)
        with pytest.raises(KnowledgeError, match=r"is damaged \("):
            run_distill(recipe, output=tmp_path / name)
    hostile = json.loads(facts) | {"architecture": {"kind": "factory", "factory": "os:getcwd", "arguments": {}}}
    (folder / "teacher.json").write_text(json.dumps(hostile))
    with pytest.raises(KnowledgeError, match="an architecture of unknown kind"):
        run_distill(recipe, output=tmp_path / "hostile")


def test_a_disk_that_is_too_small_is_an_error_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdetkd_cli.commands.teach.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DiskError, match=r"needs about .* GB more, and 1e-06 GB are free; .* --int8"):
        run_teach(toy.recipe(), output=tmp_path / "knowledge")
    assert not (tmp_path / "knowledge" / "views").exists()


def test_stored_detections_label_images(tmp_path: Path) -> None:
    """Images without annotations: the teacher's labels come from the folder."""
    toy.write_images(tmp_path / "images", [f"{i}.png" for i in range(12)])
    own = toy.recipe(steps=2).model_dump(mode="json") | {
        "data": {"format": "folder", "root": str(tmp_path), "train_images": "images", "labels": {"score": 0.3}},
        "teacher": {"arch": "checkpoint", "path": "builtin:shapes-teacher"},
    }
    recipe = Recipe.model_validate(own)
    run_distill(recipe, output=tmp_path / "live")
    run_teach(recipe, output=tmp_path / "knowledge")
    run_distill(vary(recipe, teacher=use(tmp_path / "knowledge")), output=tmp_path / "stored")
    labels = [json.loads((tmp_path / name / "labels" / "train.json").read_text()) for name in ("live", "stored")]
    boxes = [[one["bbox"] for one in tables["annotations"]] for tables in labels]
    assert len(boxes[0]) > 0
    assert boxes[1] == [pytest.approx(box, abs=1e-3) for box in boxes[0]]
