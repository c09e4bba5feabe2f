"""A teacher of unknown code: the maps that are read equal the model's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import toy
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.ops import roi_align
from twins import NoNeck, SharedHead, TwoWay

from gdetkd_cli.assembly import build_detector
from gdetkd_cli.assembly.distillation import build_pair
from gdetkd_cli.commands import run_distill
from gdetkd_cli.detectors.probed import ProbedDetector
from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.formats.files import detect_kind, open_runner
from gdetkd_cli.probing.formats.onnx import OnnxRunner
from gdetkd_cli.probing.formats.runner import ModuleRunner
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.pyramid import probe
from gdetkd_cli.recipe.distillation import Distill
from gdetkd_cli.recipe.schema import CheckpointDetector
from gdetkd_cli.structures import Batch, Regions

SIZE = (96, 128)
# twin -> the submodules whose outputs are its levels
LEVELS = {
    SharedHead: ("neck.out3", "neck.out4", "neck.out5"),
    TwoWay: ("up3", "n4", "n5"),
    NoNeck: ("body.c3", "body.c4", "body.c5"),
}


class TakesList(nn.Module):
    """Resizes each image to half its size, like a detector's own transform."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.network(
            torch.stack([interpolate(i[None] - 0.5, scale_factor=0.5, mode="bilinear")[0] for i in images])
        )


def build_twin(twin: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return twin().eval()


def trace(network: nn.Module) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.trace(network, torch.rand(1, 3, *SIZE))


def detector(module: nn.Module, model_input: ModelInput | None = None) -> ProbedDetector:
    return ProbedDetector(
        runner=ModuleRunner(module),
        source="model.pt",
        kind="torchscript",
        model_input=model_input or ModelInput(),
        size=SIZE,
    )


def batch(*sizes: tuple[int, int]) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    return Batch(images=images, targets=[], image_ids=torch.arange(len(images)))


def outputs(network: nn.Module, names: tuple[str, ...], images: Tensor) -> list[Tensor]:
    """Outputs of submodules, read by hooks."""
    kept: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: kept.update({name: out.clone()})
        )
        for name in names
    ]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return [kept[name] for name in names]


@pytest.mark.parametrize("twin", LEVELS, ids=lambda twin: twin.__name__)
def test_the_maps_are_those_of_the_model(twin: type[nn.Module]) -> None:
    network, images = build_twin(twin), batch(SIZE, SIZE)
    seen = detector(trace(network)).extract_features(images)

    expected = outputs(network, LEVELS[twin], torch.stack(images.images))
    for ours, theirs in zip(seen.pyramid.maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_images_of_unlike_sizes_are_read_one_by_one() -> None:
    network, images = build_twin(NoNeck), batch((64, 96), (96, 64))
    seen = detector(trace(network)).extract_features(images)

    alone = [outputs(network, LEVELS[NoNeck], image[None]) for image in images.images]
    for level, ours in enumerate(seen.pyramid.maps):
        for i, single in enumerate(alone):
            height, width = single[level].shape[-2:]
            torch.testing.assert_close(ours[i, :, :height, :width], single[level][0])
            assert ours[i, :, height:].abs().sum() == ours[i, :, :, width:].abs().sum() == 0


def test_regions_lie_where_they_do_in_the_image_through_the_models_own_resize() -> None:
    network, images = build_twin(NoNeck), batch((128, 192))
    probed = detector(TakesList(network).eval())
    assert probed.probed.call.takes == "any"
    seen = probed.extract_features(images)
    torch.testing.assert_close(seen.pyramid.frame.scale, torch.full((1, 2), 0.5), rtol=1e-3, atol=0)
    boxes = torch.tensor([[16.0, 24, 60, 80]])
    regions = Regions(boxes=boxes, image_index=torch.zeros(1, dtype=torch.int64), candidate=torch.full((1,), -1))
    view = probed.region_outputs(seen, regions, frozenset({"pooled", "embedding"}))

    # Half the size inside, strides 8 to 32: 14 cells a side are nearest on the finest level. Cell 0 is centred on the
    # first pixel, half a pixel from the corner, where RoIAlign puts the middle of its first cell.
    (level,) = outputs(
        network, ("body.c3",), interpolate(images.images[0][None] - 0.5, scale_factor=0.5, mode="bilinear")
    )
    rois = torch.cat([torch.zeros(1, 1), (boxes / 2 - 0.5) / 8 + 0.5], dim=1)
    expected = roi_align(level, rois, 7, sampling_ratio=2, aligned=True)
    assert view.pooled is not None
    torch.testing.assert_close(view.pooled[:, :8], expected, rtol=0, atol=2e-3)
    assert view.pooled_channels is not None
    assert view.pooled_channels.tolist() == [8]
    assert view.embedding is not None
    torch.testing.assert_close(view.embedding, view.pooled.mean(dim=(2, 3)))


def test_the_model_gets_what_it_wants() -> None:
    network = build_twin(SharedHead)
    wants = ModelInput(scale=255.0, mean=(100.0, 110.0, 120.0), std=(50.0, 60.0, 70.0))
    images = batch(SIZE)
    seen = detector(trace(network), wants).extract_features(images)

    mean, std = (torch.tensor(values)[:, None, None] for values in (wants.mean, wants.std))
    expected = outputs(network, LEVELS[SharedHead], ((images.images[0] * 255 - mean) / std)[None])
    for ours, theirs in zip(seen.pyramid.maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def write_model(form: str, path: Path, size: tuple[int, int] = SIZE) -> Path:
    """Writes a file of a two-way pyramid with its own heads."""
    network, example = build_twin(TwoWay), torch.rand(1, 3, *size)
    with warnings.catch_warnings(action="ignore"):
        match form:
            case "traced":
                torch.jit.save(trace(network), path)
            case "frozen":
                torch.jit.save(torch.jit.freeze(trace(network)), path)
            case "exported":
                torch.export.save(torch.export.export(network, (example,)), path)
            case "exported, any size":
                free = {0: torch.export.Dim("n"), 2: 32 * torch.export.Dim("h"), 3: 32 * torch.export.Dim("w")}
                many = torch.rand(2, 3, 2 * size[0], 2 * size[1])
                torch.export.save(torch.export.export(network, (many,), dynamic_shapes=(free,)), path)
            case "onnx":
                torch.onnx.export(network, (example,), str(path), dynamo=False)
            case "onnx, any size":
                axes = {"image": {0: "n", 2: "h", 3: "w"}}
                torch.onnx.export(
                    network, (example,), str(path), dynamo=False, input_names=["image"], dynamic_axes=axes
                )
    return path


FORMS = {
    "traced": "torchscript",
    "frozen": "torchscript",
    "exported": "exported",
    "exported, any size": "exported",
    "onnx": "onnx",
    "onnx, any size": "onnx",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_files_maps_are_those_of_the_model(form: str, tmp_path: Path) -> None:
    path = write_model(form, tmp_path / "teacher")
    kind = detect_kind(path)
    assert kind == FORMS[form]
    runner = open_runner(path, kind)
    teacher = ProbedDetector(runner=runner, source="t", kind=kind, model_input=ModelInput(fit=runner.size), size=SIZE)
    images = batch(SIZE, SIZE)
    seen = teacher.extract_features(images)

    expected = outputs(build_twin(TwoWay), LEVELS[TwoWay], torch.stack(images.images))
    for ours, theirs in zip(seen.pyramid.maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert seen.pyramid.frame.size == SIZE
    torch.testing.assert_close(seen.pyramid.frame.scale, torch.ones(2, 2), rtol=1e-3, atol=0)
    if form != "frozen":  # whose weights are constants of its graph
        assert teacher.parameter_count == pytest.approx(
            sum(p.numel() for p in build_twin(TwoWay).parameters()), rel=0.05
        )


@pytest.mark.parametrize("form", ["traced", "exported, any size", "onnx, any size"])
def test_images_of_sides_that_do_not_halve_are_padded(form: str, tmp_path: Path) -> None:
    """A coarse map is enlarged and joined with a finer one, which fails where a side was rounded."""
    path = write_model(form, tmp_path / "teacher.pt")
    spec = CheckpointDetector.model_validate({"arch": "checkpoint", "path": str(path), "input": {"size": SIZE}})
    built = build_detector(spec, ("a",), seed=0, keep_classes=True)
    assert any("multiples of 32 pixels, so images are padded" in note for note in built.notes)
    seen = built.detector.extract_features(batch((75, 125)))
    assert [tuple(m.shape[2:]) for m in seen.pyramid.maps] == [(12, 16), (6, 8), (3, 4)]
    torch.testing.assert_close(seen.pyramid.frame.scale, torch.ones(1, 2), rtol=1e-2, atol=0)
    torch.testing.assert_close(seen.pyramid.frame.shift, torch.zeros(1, 2), rtol=0, atol=0.1)


def test_a_size_that_fails_names_the_remedy(tmp_path: Path) -> None:
    for form, message in (("traced", "fails on an image of 75 x 125"), ("onnx, any size", "onnxruntime cannot run")):
        path = write_model(form, tmp_path / form)
        runner = open_runner(path, FORMS[form])
        teacher = ProbedDetector(runner=runner, source="t", kind=form, model_input=ModelInput(), size=SIZE)
        with pytest.raises(ModelError, match=f"{message}.*set input.size and input.fit: true"):
            teacher.extract_features(batch((75, 125)))


def test_each_session_of_onnxruntime_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    start = OnnxRunner._open
    monkeypatch.setattr(OnnxRunner, "_open", lambda self, model: opened.append(model) or start(self, model))
    path = write_model("onnx, any size", tmp_path / "teacher.onnx")
    runner = open_runner(path, "onnx")
    teacher = ProbedDetector(runner=runner, source="t", kind="onnx", model_input=ModelInput(), size=SIZE)
    before = len(opened)
    for size in ((64, 96), (96, 64), (64, 64)):
        teacher.extract_features(batch(size))
    assert len(opened) <= before + 1


def test_weights_in_constant_nodes_are_weights(tmp_path: Path) -> None:
    """As Paddle's exporter writes them."""
    path = write_model("onnx", tmp_path / "teacher.onnx")
    expected = open_runner(path, "onnx")
    model = onnx.load(path)
    nodes = [onnx.helper.make_node("Constant", [], [weight.name], value=weight) for weight in model.graph.initializer]
    rest = list(model.graph.node)
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    onnx.save(model, tmp_path / "constants.onnx")
    runner = open_runner(tmp_path / "constants.onnx", "onnx")
    found = probe(runner, SIZE, ModelInput(fit=SIZE))
    assert [level.name for level in found.levels] == [
        level.name for level in probe(expected, SIZE, ModelInput(fit=SIZE)).levels
    ]
    assert runner.parameters == pytest.approx(expected.parameters, rel=0.01)


@pytest.mark.parametrize("form", ["exported", "onnx"])
def test_images_are_fitted_into_a_fixed_size(form: str, tmp_path: Path) -> None:
    path = write_model(form, tmp_path / "teacher")
    runner = open_runner(path, detect_kind(path))
    assert runner.size == SIZE
    teacher = ProbedDetector(runner=runner, source="t", kind=form, model_input=ModelInput(fit=SIZE), size=SIZE)
    images = batch((192, 192), (48, 128))
    seen = teacher.extract_features(images)

    # 96 x 96 and 48 x 128 of 96 x 128 pixels.
    torch.testing.assert_close(seen.pyramid.frame.scale, torch.tensor([[0.5, 0.5], [1, 1]]), rtol=0.01, atol=0)
    torch.testing.assert_close(seen.pyramid.frame.shift, torch.zeros(2, 2), rtol=0, atol=0.2)
    assert [tuple(m.shape) for m in seen.pyramid.maps] == [(2, 8, 12, 16), (2, 12, 6, 8), (2, 16, 3, 4)]


@pytest.mark.parametrize(
    ("form", "student"),
    [*((form, "faster-rcnn") for form in FORMS), ("traced", "fcos"), ("exported", "retinanet"), ("onnx", "retinanet")],
)
def test_a_file_distils(form: str, student: str, tmp_path: Path) -> None:
    path = write_model(form, tmp_path / "teacher")
    recipe = toy.recipe(steps=2, student=student)
    teacher = CheckpointDetector.model_validate({"arch": "checkpoint", "path": str(path), "input": {"size": SIZE}})
    run = run_distill(recipe.model_copy(update={"teacher": teacher}), output=tmp_path / "run").run

    assert (run / "student.pt").exists()
    lines = (run / "metrics.jsonl").read_text()
    assert '"sgfi"' in lines
    assert '"ckd"' in lines
    assert '"class_kd"' not in lines
    assert f'"format": "{FORMS[form]}"' in (run / "probe.json").read_text()


def test_without_a_region_embedding_there_is_no_contrast_unless_asked_for() -> None:
    teacher, student = detector(trace(build_twin(TwoWay))), detector(build_twin(SharedHead))
    for ckd, names in (("auto", {"sgfi"}), ({}, {"sgfi", "ckd"}), (None, {"sgfi"})):
        config = Distill.model_validate({"ckd": ckd, "head_transfer": False})
        pair = build_pair(config, student, teacher, seed=0)
        assert {term.name for term in pair.terms if term.weight is not None} == names
        assert set(pair.distiller.terms) == names
    (reason,) = (term.reason for term in build_pair(Distill(), student, teacher, 0).terms if term.name == "ckd")
    assert reason.startswith("the teacher has no known region embedding")


def test_a_torchscript_file_cannot_be_the_student(tmp_path: Path) -> None:
    path = tmp_path / "student.pt"
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(trace(build_twin(NoNeck)), path)
    recipe = toy.recipe(steps=1)
    recipe = recipe.model_copy(update={"student": CheckpointDetector(arch="checkpoint", path=str(path))})
    with pytest.raises(ModelError, match="can teach but cannot be trained"):
        run_distill(recipe, output=tmp_path / "run")
