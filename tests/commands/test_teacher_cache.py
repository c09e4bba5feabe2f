"""`distill.teacher_cache`: the same run with fewer passes of the teacher."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy

from gdetkd_cli.assembly import count_teacher_runs
from gdetkd_cli.commands import plan_distill, run_compare, run_distill
from gdetkd_cli.detectors.torchvision.two_stage import TwoStageDetector
from gdetkd_cli.engine.events import Event, Note
from gdetkd_cli.errors import KnowledgeError
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.overrides import apply_overrides, parse_override
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.structures import Batch


def recipe(*changes: str, **train: Any) -> Recipe:
    fields = apply_overrides(toy.recipe(**train).model_dump(mode="json"), [parse_override(text) for text in changes])
    return Recipe.model_validate(fields)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images in each pass of a detector that computes features alone, as only the teacher does."""
    counts: list[int] = []
    extract = TwoStageDetector.extract_features

    def count(self: TwoStageDetector, batch: Batch) -> object:
        if not batch.image_ids.is_floating_point():  # a step's, and not the image on which levels are described
            counts.append(len(batch))
        return extract(self, batch)

    monkeypatch.setattr(TwoStageDetector, "extract_features", count)
    return counts


@pytest.mark.parametrize("mode", ["memory", "disk", "auto"])
def test_a_run_with_a_cache_equals_the_live_run(mode: str, tmp_path: Path, passes: list[int]) -> None:
    run_distill(recipe(), output=tmp_path / "live")
    assert sum(passes) == 12
    passes.clear()
    run_distill(recipe(f"distill.teacher_cache={mode}"), output=tmp_path / "cached")

    assert sum(passes) < 12 + (mode == "auto")  # some views came twice; auto measures one image first
    toy.assert_same_training(tmp_path / "live", tmp_path / "cached")
    views = list((tmp_path / "cached" / "knowledge").rglob("*.safetensors"))
    assert len(views) == (sum(passes) if mode == "disk" else 0)


def test_runs_share_a_folder(tmp_path: Path, passes: list[int]) -> None:
    shared = [f"distill.teacher_cache_dir={tmp_path / 'shared'}", "distill.teacher_cache=disk"]
    run_distill(recipe(*shared), output=tmp_path / "first")
    seen = sum(passes)
    passes.clear()
    run_distill(recipe(*shared), output=tmp_path / "again")
    run_distill(recipe(*shared, "distill.sgfi.weight=1.0"), output=tmp_path / "another-weight")

    assert seen > 0
    assert passes == []
    assert not (tmp_path / "first" / "knowledge").exists()
    # The second run read everything, the first what came twice: both see the same rounded values.
    assert toy.read_losses(tmp_path / "first") == toy.read_losses(tmp_path / "again")


def test_another_teacher_is_an_error_that_names_the_change(tmp_path: Path) -> None:
    shared = [f"distill.teacher_cache_dir={tmp_path / 'shared'}", "distill.teacher_cache=disk"]
    run_distill(recipe(*shared), output=tmp_path / "first")
    own = recipe(*shared)
    assert own.teacher is not None
    weights = torch.load(own.teacher.weights)  # type: ignore[union-attr]
    weights["backbone.body.conv1.weight"] += 0.01
    torch.save(weights, tmp_path / "changed.pt")

    with pytest.raises(KnowledgeError, match=r"the answers of another teacher: file, weights changed"):
        run_distill(recipe(*shared, f"teacher.weights={tmp_path / 'changed.pt'}"), output=tmp_path / "second")
    with pytest.raises(KnowledgeError, match=r"teacher\.image_size changed"):
        run_distill(recipe(*shared, "teacher.image_size=[96, 96]"), output=tmp_path / "third")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("augment.copy_paste=0.5", "copy_paste draws new"),
        ("augment.scale_jitter=0.5", "scale_jitter draws new"),
        ("augment.multi_scale=[48, 64]", "follows augment.multi_scale"),
    ],
)
def test_countless_views_are_refused_and_auto_runs_live(
    change: str, reason: str, tmp_path: Path, passes: list[int]
) -> None:
    for mode in ("memory", "disk"):
        with pytest.raises(KnowledgeError, match=f"distill.teacher_cache is {mode}, but .*{reason}"):
            run_distill(recipe(change, f"distill.teacher_cache={mode}"), output=tmp_path / mode)
    notes: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    run_distill(recipe(change, "distill.teacher_cache=auto"), output=tmp_path / "auto", observer=note)
    assert sum(passes) == 12
    assert any("teacher cache: off, because" in text and reason in text for text in notes)


def test_jitter_and_a_teacher_of_another_size_have_few_views(tmp_path: Path, passes: list[int]) -> None:
    changes = ["augment.photometric=true", "augment.multi_scale=[48, 64]", "student.image_size=[56, 64]"]
    run_distill(recipe(*changes, "distill.teacher_cache=memory", steps=12), output=tmp_path / "run")
    assert sum(passes) <= 20  # views of ten images


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on with the live teacher and says so once; no part of a file is left."""
    opened = Path.open

    def refuse(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "views" in self.parts and mode == "wb":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return opened(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", refuse)
    notes: list[str] = []
    run_distill(
        recipe("distill.teacher_cache=disk"),
        output=tmp_path / "run",
        observer=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert (tmp_path / "run" / "student.pt").exists()
    assert sum("could not be written" in note for note in notes) == 1
    assert not [path for path in (tmp_path / "run" / "knowledge" / "views").rglob("*") if path.is_file()]


def test_the_quota_covers_what_is_there(tmp_path: Path) -> None:
    shared = [f"distill.teacher_cache_dir={tmp_path / 'shared'}", "distill.teacher_cache=disk"]
    small = "distill.teacher_cache_gb=1e-4"  # 100 kB: a few views
    notes: list[str] = []
    run_distill(
        recipe(*shared, small),
        output=tmp_path / "run",
        observer=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    files = list((tmp_path / "shared" / "views").rglob("*.safetensors"))
    assert 0 < sum(path.stat().st_size for path in files) <= 100_000
    assert sum("has reached 0.0001 GB" in note for note in notes) == 1
    before = len(files)
    run_distill(recipe(*shared, small), output=tmp_path / "again")
    assert len(list((tmp_path / "shared" / "views").rglob("*.safetensors"))) == before


def test_what_is_stored_does_not_shrink_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr("gdetkd_cli.assembly.knowledge.shutil.disk_usage", lambda _: SimpleNamespace(free=sizes[-1]))
    store = f"distill.teacher_cache_dir={tmp_path / 'shared'}"
    sizes.append(10**9)
    run_distill(recipe(store, "distill.teacher_cache=disk"), output=tmp_path / "run")
    files = list((tmp_path / "shared" / "views").rglob("*.safetensors"))
    sizes.append(sum(path.stat().st_size for path in files) // 4)  # half of it would be less than what is stored
    notes: list[str] = []
    run_distill(
        recipe(store, "distill.teacher_cache=disk"),
        output=tmp_path / "again",
        observer=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert not [note for note in notes if "has reached" in note]


def test_auto_keeps_in_memory_what_fits_the_memory_whatever_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=10_000))
    monkeypatch.setattr("gdetkd_cli.assembly.knowledge.psutil", little)
    notes: list[str] = []
    run_distill(
        recipe("distill.teacher_cache=auto", "distill.teacher_cache_gb=500"),
        output=tmp_path / "run",
        observer=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert any(note.startswith("teacher cache: disk") for note in notes)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    shared = [f"distill.teacher_cache_dir={tmp_path / 'shared'}", "distill.teacher_cache=disk"]
    run_distill(recipe(*shared), output=tmp_path / "run")
    for path in (tmp_path / "shared" / "views").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(KnowledgeError, match=r"views/../[0-9a-f]{32}\.safetensors is damaged .*; remove it"):
        run_distill(recipe(*shared), output=tmp_path / "again")
    (tmp_path / "shared" / "key.json").write_text("{")
    with pytest.raises(KnowledgeError, match=r"key\.json is damaged"):
        run_distill(recipe(*shared), output=tmp_path / "third")


def test_the_key_is_readable(tmp_path: Path) -> None:
    run_distill(recipe("distill.teacher_cache=disk"), output=tmp_path / "run")
    key = json.loads((tmp_path / "run" / "knowledge" / "key.json").read_text())
    assert key["values"] == "float16"
    assert key["teacher"]["image_size"] == [64, 64]
    assert "weights" not in key["teacher"]  # a file may move
    assert len(key["levels"]) == 5


def test_trials_share_one_teacher(tmp_path: Path) -> None:
    """One folder for all trials: the number of files is that of the views, and no trial keeps its own."""
    folder = tmp_path / "table"
    table = run_compare(
        recipe("distill.teacher_cache=auto"), methods=["none", "sgfi", "fitnet"], seeds=1, output=folder
    )
    assert table.failures == ()
    views = list((folder / "knowledge" / "views").rglob("*.safetensors"))
    assert 0 < len(views) <= 20
    assert not list(folder.glob("*/run/knowledge"))
    own = load_recipe(folder / "fitnet-6-0" / "recipe.yaml")
    assert own.distill is not None
    assert own.distill.teacher_cache_dir == str((folder / "knowledge").resolve())


def test_a_dry_run_states_size_and_saving() -> None:
    plans = {mode: plan_distill(recipe(f"distill.teacher_cache={mode}", steps=60)) for mode in ("off", "memory")}
    for mode, plan in plans.items():
        assert plan.cache is not None
        assert (plan.cache.mode, plan.cache.views) == (mode, 20)
        # 16 x 16 cells and four smaller levels of 16 channels in two bytes
        assert plan.cache.gigabytes * 1e9 / 20 == pytest.approx(2 * 16 * (256 + 64 + 16 + 4 + 1), rel=0.01)
        assert plan.cache.saved_per_step is not None
        assert plan.cache.saved_seconds is not None
        # 60 steps show 120 images; 20 of them are computed
        assert plan.cache.saved_seconds == pytest.approx(plan.cache.saved_per_step / 2 * 100, rel=0.01)
    assert plan_distill(recipe("augment.copy_paste=0.5")).cache is None


def test_expected_runs_of_the_teacher() -> None:
    def count(flip: float, steps: int, **train: int) -> float:
        return count_teacher_runs(recipe(f"augment.flip={flip}", steps=steps, **train), images=10)

    assert count(0.0, 5) == 10  # one pass, one view
    assert count(0.5, 5) == pytest.approx(10)
    assert count(0.5, 10) == pytest.approx(15)  # after two passes, an image was seen in both views half of the time
    assert count(0.5, 10_000) == pytest.approx(20)
    assert count(0.5, 5, accumulate=2) == count(0.5, 10)


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan_distill(recipe("distill.teacher_cache=disk", f"distill.teacher_cache_dir={tmp_path / 'shared'}"))
    assert list(tmp_path.iterdir()) == []
