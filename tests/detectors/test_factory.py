"""Detectors from the user's own code: consent, training, and the trained file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import own_code
import pytest
import torch
import toy
from own_code import Own
from torch import Tensor, nn

from gdetkd_cli.commands import run_compare, run_distill, run_eval, run_probe, run_train
from gdetkd_cli.commands.probe import ProbeOptions
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.factory import is_reference, make
from gdetkd_cli.detectors.trainable import TrainableDetector
from gdetkd_cli.errors import GDetKDError, ModelError, PairError, RecipeError
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.recipe.distillation import Distill
from gdetkd_cli.recipe.schema import FactoryDetector, Recipe
from gdetkd_cli.structures import Batch, Target
from gdetkd_cli.trust import trust_code

SIZE = (64, 64)
LEVELS = ("neck.out3", "neck.out4", "neck.out5")


@pytest.fixture
def consent() -> Iterator[None]:
    trust_code()
    yield
    trust_code(False)


def factory(name: str, **arguments: Any) -> FactoryDetector:
    return FactoryDetector.model_validate(
        {"arch": "factory", "factory": f"own_code:{name}", "arguments": arguments, "input": {"size": SIZE}}
    )


def recipe(student: FactoryDetector, steps: int = 2) -> Recipe:
    return toy.recipe(steps=steps).model_copy(update={"student": student})


def description(name: str) -> dict[str, Any]:
    return {
        "kind": "factory",
        "factory": f"own_code:{name}",
        "arguments": {},
        "input": {"scale": 1.0, "mean": None, "std": None},
        "size": list(SIZE),
    }


def test_without_consent_nothing_runs() -> None:
    with pytest.raises(ModelError, match=r"own_code:fails is Python code .*, add --trust-code"):
        make("own_code:fails", {})


@pytest.mark.usefixtures("consent")
@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("own_code", "is not the name of a function; expected package.module:function"),
        ("own_code:absent", "has no attribute 'absent'"),
        ("no_such_module:own", "no module named 'no_such_module'"),
        ("own_code:fails", "own_code:fails failed: KeyError: 'weights'"),
    ],
)
def test_what_cannot_be_made(reference: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make(reference, {})


@pytest.mark.parametrize(("text", "expected"), [("a.b:c", True), ("a:b", True), ("a.b", False), ("c:/x.pt", False)])
def test_references(text: str, expected: bool) -> None:
    assert is_reference(text) is expected


@pytest.mark.usefixtures("consent")
def test_what_is_no_detector() -> None:
    with pytest.raises(ModelError, match=r"own_code:nothing returned str; expected a torch\.nn\.Module"):
        catalog.build(description("nothing"), ("a",))
    with pytest.raises(ModelError, match=r"own_code:nothing returned str; expected a torch\.nn\.Module"):
        run_probe("own_code:nothing")


@pytest.mark.usefixtures("consent")
def test_classes_that_are_not_the_datas(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"own_code:fcos has 4 class outputs, but 10 were expected: background"):
        run_train(recipe(factory("fcos", classes=3)), output=tmp_path / "run")


@pytest.mark.usefixtures("consent")
def test_levels_have_gradients_and_are_those_that_a_look_reads() -> None:
    torch.manual_seed(0)
    detector = catalog.build(description("own"), ("a", "b", "c"))
    assert isinstance(detector, TrainableDetector)
    boxes = torch.tensor([[4.0, 8, 30, 40]])
    batch = Batch(
        images=[torch.rand(3, *SIZE), torch.rand(3, *SIZE)],
        targets=[Target(boxes, torch.tensor([2])), Target(boxes[:0], torch.zeros(0, dtype=torch.int64))],
        image_ids=torch.tensor([1, 2]),
    )
    detector.module.train()
    for module in detector.module.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # so that a look, in evaluation mode, computes the same
    seen, looked = detector.forward_train(batch), detector.extract_features(batch)

    assert sorted(seen.losses) == ["box", "class"]
    for level, ours, theirs in zip(LEVELS, seen.pyramid.maps, looked.pyramid.maps, strict=True):
        torch.testing.assert_close(ours, theirs)
        weight = detector.module.get_submodule(level).weight
        (gradient,) = torch.autograd.grad(ours.sum(), weight, retain_graph=True)
        assert gradient.abs().sum() > 0
    torch.testing.assert_close(seen.pyramid.frame.scale, torch.ones(2, 2), rtol=1e-3, atol=0)
    assert seen.pyramid.frame.size == SIZE
    candidates = seen.candidates
    assert candidates is not None
    assert not candidates.sampled
    assert set(candidates.image_index.tolist()) == {0, 1}
    sides = candidates.boxes[:, 2:] - candidates.boxes[:, :2]
    assert sides.min() >= 1
    assert candidates.boxes.min() >= 0
    assert candidates.boxes.max() <= 64
    again = detector.forward_train(batch).candidates
    assert again is not None
    assert torch.equal(again.boxes, candidates.boxes)


@pytest.mark.usefixtures("consent")
def test_levels_with_their_channels_last_are_turned_in_training_as_well() -> None:
    names = ["norms.0", "norms.1", "norms.2"]
    detector = catalog.build(description("channels_last") | {"levels": names}, ("a", "b"))
    detector.module.eval()  # so that batch norms compute the same
    no_boxes = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    batch = Batch(images=[torch.rand(3, *SIZE)], targets=[no_boxes], image_ids=torch.tensor([1]))
    seen, looked = detector.forward_train(batch), detector.extract_features(batch)

    assert [m.shape for m in seen.pyramid.maps] == [(1, 16, 8, 8), (1, 16, 4, 4), (1, 16, 2, 2)]
    for ours, theirs in zip(seen.pyramid.maps, looked.pyramid.maps, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("consent")
@pytest.mark.parametrize("name", ["own", "fcos", "stated"])
def test_a_student_of_ones_own_is_distilled(name: str, tmp_path: Path) -> None:
    run = run_distill(recipe(factory(name)), output=tmp_path / "run").run

    log = (run / "metrics.jsonl").read_text()
    assert '"sgfi"' in log
    assert '"ckd"' in log
    saved = torch.load(run / "student.pt", weights_only=True)
    made = getattr(own_code, name)()
    made.load_state_dict(saved["model"])  # plain weights of the user's own class
    assert not (run / "student").exists()  # which could not rebuild it
    assert run_eval(str(run), data=None).metrics.images > 0
    trust_code(False)
    with pytest.raises(ModelError, match="--trust-code"):
        run_eval(str(run), data=None)


def test_the_first_convolution_may_be_parametrised() -> None:
    parametrised, functional = Own(), Own()
    first = next(name for name, part in parametrised.named_modules() if isinstance(part, nn.Conv2d))
    nn.utils.parametrizations.weight_norm(parametrised.get_submodule(first))
    weight = functional.get_submodule(first).weight
    functional.set_submodule(first, Function(lambda x: nn.functional.conv2d(x, weight, None, 2, 1)))
    images = [torch.rand(3, 64, 96)]
    target = Target(torch.tensor([[4.0, 4, 30, 40]]), torch.tensor([1]))
    given = Batch(images, [target], torch.tensor([1]))
    for module in (parametrised, functional):
        detector = TrainableDetector(
            module=module, source="own", class_names=tuple("abcdefghi"), model_input=ModelInput(), size=(64, 96)
        )
        if module is parametrised:
            assert detector.forward_train(given).losses
        else:
            with pytest.raises(PairError, match="the first convolution of own is not a module"):
                detector.forward_train(given)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = function


@pytest.mark.usefixtures("consent")
def test_targets_of_another_form(tmp_path: Path) -> None:
    message = r"called with \(images, targets\), it raised TypeError: .*; if it has losses of another"
    with pytest.raises(PairError, match=message):
        run_train(recipe(factory("other_targets")), output=tmp_path / "run")


@pytest.mark.usefixtures("consent")
def test_losses_of_another_form(tmp_path: Path) -> None:
    message = (
        r"own_code:vectors cannot .* returned a tensor of shape \(4,\) without a gradient for 'box'; expected a dict"
    )
    with pytest.raises(PairError, match=message):
        run_train(recipe(factory("vectors")), output=tmp_path / "run")


@pytest.mark.usefixtures("consent")
def test_a_teacher_of_ones_own(tmp_path: Path) -> None:
    changed = toy.recipe(steps=2).model_copy(update={"teacher": factory("bare")})
    log = (run_distill(changed, output=tmp_path / "run").run / "metrics.jsonl").read_text()
    assert '"sgfi"' in log


@pytest.mark.usefixtures("consent")
def test_a_student_without_losses_learns_from_the_teacher_alone(tmp_path: Path) -> None:
    told: list[str] = []
    distill = Distill.model_validate({"regions": {"per_image": 8}, "task_loss": "none"})
    changed = recipe(factory("bare")).model_copy(update={"distill": distill})
    result = run_distill(changed, output=tmp_path / "run", observer=lambda event: told.append(str(event)))

    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["loss"] == pytest.approx(10 * line["sgfi"] + 0.05 * line["ckd"], rel=1e-4)
    assert result.metrics.ap is None
    assert any("trains with sgfi, ckd alone" in note for note in told)
    assert any("is not evaluated" in note for note in told)
    trained = torch.load(result.run / "student.pt", weights_only=True)["model"]
    fresh = catalog.build(description("bare"), ("a",)).module.state_dict()
    assert trained.keys() == fresh.keys()


@pytest.mark.usefixtures("consent")
def test_a_student_without_losses_is_refused_where_they_count(tmp_path: Path) -> None:
    with pytest.raises(PairError, match=r"own_code:bare accepts no targets, so it has no losses of its own"):
        run_train(recipe(factory("bare")), output=tmp_path / "run")
    changed = recipe(factory("bare")).model_copy(update={"distill": Distill.model_validate({"task_loss": "none"})})
    train = changed.train.model_copy(update={"evaluate_every": 1, "stop_after": 1})
    with pytest.raises(PairError, match=r"own_code:bare has no known detections, .*set train.stop_after to null"):
        run_distill(changed.model_copy(update={"train": train}), output=tmp_path / "run")


@pytest.mark.usefixtures("consent")
def test_a_student_without_detections_has_no_table(tmp_path: Path) -> None:
    distill = Distill.model_validate({"task_loss": "none"})
    changed = recipe(factory("bare")).model_copy(update={"distill": distill})
    with pytest.raises(RecipeError, match=r"own_code:bare accepts no targets, so it has no detections to compare"):
        run_compare(changed, methods=("gdetkd",), seeds=1, output=tmp_path / "table")
    assert not list((tmp_path / "table").glob("gdetkd-*"))


@pytest.mark.usefixtures("consent")
def test_probing_a_function(tmp_path: Path) -> None:
    with pytest.raises(GDetKDError, match=r"levels\.xyz: cannot draw a file with this suffix; expected one of .*png"):
        run_probe("own_code:own", ProbeOptions(size=SIZE, plot=tmp_path / "levels.xyz"))
    report = run_probe("own_code:own", ProbeOptions(size=SIZE, plot=tmp_path / "levels.png"))

    assert report.format == "factory"
    assert [level.name for level in report.levels] == list(LEVELS)
    assert all(level.std is not None and level.std > 0 for level in report.levels)
    assert (tmp_path / "levels.png").stat().st_size > 1000
