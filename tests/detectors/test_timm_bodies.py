"""timm's models as bodies: what cannot be one, frozen normalization, and weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from catalogue import CLASSES
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import nn

from gdetkd_cli.assembly.detector import build_detector
from gdetkd_cli.detectors import catalog, measure
from gdetkd_cli.errors import ModelError
from gdetkd_cli.recipe.schema import ComposedDetector

Describe = Callable[..., dict[str, Any]]
PLAIN: dict[str, Any] = {"width": None, "blocks": None, "pyramid_levels": [3, 5]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backbone": "timm/convnext_ato"},
            r"timm [\d.]+ has no model 'convnext_ato'; .*; did you mean convnext_atto\?$",
        ),
        ({"backbone": "timm/hf-hub:someone/model"}, "timm .* has no model 'hf-hub:someone/model'"),
        (
            {"backbone": "timm/convnext_atto.d2_in1k"},
            "write backbone: timm/convnext_atto and backbone_weights: d2_in1k",
        ),
        (
            {"backbone": "timm/test_convnext", "pyramid_levels": [2, 5], "width": 16},
            "'width' and 'blocks' apply to torchvision's backbones only, not to timm/test_convnext; remove them",
        ),
        (
            {"backbone": "timm/test_vit"},
            "test_vit has feature maps with strides 16, but the pyramid needs 8, 32; change pyramid_levels",
        ),
        (
            {"backbone": "timm/efficientvit_m0"},
            "efficientvit_m0 has feature maps with strides 16, 32, 64, but the pyramid needs 8; change pyramid_levels",
        ),
        ({"backbone": "timm/hiera_tiny_224"}, "hiera_tiny_224 has no feature maps for images of any size, which"),
        (
            {"backbone": "timm/inception_v3"},
            r"inception_v3 returns a map of shape \(288, 9, 17\) at stride 8 for 96 x 160 pixels; expected 12 x 20",
        ),
    ],
)
def test_models_that_cannot_be_a_body(change: dict[str, Any], message: str, tiny_description: Describe) -> None:
    with pytest.raises(ModelError, match=message):
        catalog.build(tiny_description("fcos", **PLAIN | change), CLASSES)


def test_without_timm(tiny_description: Describe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"timm is not installed; run `pip install timm`"):
        catalog.build(tiny_description("fcos", **PLAIN, backbone="timm/test_convnext"), CLASSES)


def test_a_model_of_windows_reads_images_of_any_size(
    tiny_description: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swin was made for one size, returns channels last, and joins its patches by reshaping them."""
    monkeypatch.setattr(measure, "SIDES", (128, 192))
    described = tiny_description("retinanet", **PLAIN, backbone="timm/swin_tiny_patch4_window7_224")
    detector = catalog.build(described, CLASSES)

    assert [level.stride for level in detector.levels] == [(8.0, 8.0), (16.0, 16.0), (32.0, 32.0)]
    assert [level.offset for level in detector.levels] == [(4.0, 4.0), (8.0, 8.0), (16.0, 16.0)]
    image = [torch.rand(3, 50, 90)]
    assert len(detector.predict(image)) == 1


def test_frozen_normalization(tiny_description: Describe) -> None:
    described = tiny_description("fcos", **PLAIN, backbone="timm/test_efficientnet")
    trained = catalog.build(described, CLASSES).module
    frozen = catalog.build(described | {"norm": "frozen"}, CLASSES).module
    without = catalog.build(described | {"norm": "frozen", "backbone": "timm/test_convnext"}, CLASSES).module

    assert any(isinstance(module, nn.BatchNorm2d) for module in trained.modules())
    for module in (frozen, without):
        assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
        assert not any(name.endswith("num_batches_tracked") for name in module.state_dict())
    assert any(isinstance(part, nn.LayerNorm) for part in without.modules())  # stays as it is


def spec(backbone: str, weights: str | Path | None) -> ComposedDetector:
    return ComposedDetector.model_validate(
        {
            "arch": "composed",
            "backbone": f"timm/{backbone}",
            "head": "retinanet",
            "pyramid_channels": 16,
            "pyramid_levels": [3, 5],
            "image_size": [64, 64],
            "backbone_weights": None if weights is None else str(weights),
        }
    )


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_byobnet"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_from_a_file(name: str, suffix: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    state = {
        key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in timm.create_model(name).state_dict().items()
    }
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    built = build_detector(spec(name, path), CLASSES, seed=0)
    assert any(f"{path}: loaded" in note for note in built.notes)
    assert built.description["norm"] == "frozen"

    overlay = {"file": str(path)}
    expected = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    body: Any = built.detector.module.backbone.body  # type: ignore[union-attr]
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(body.eval()(image).values(), expected(image)[-3:], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(timm.create_model("test_efficientnet").state_dict(), path)
    with pytest.raises(
        ModelError, match=r"do not fit timm/test_convnext: \d+ of \d+ tensors are missing or have another"
    ):
        build_detector(spec("test_convnext", path), CLASSES, seed=0)

    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ModelError, match="is not a complete safetensors file"):
        build_detector(spec("test_convnext", path), CLASSES, seed=0)
    with pytest.raises(ModelError, match=r"absent\.safetensors does not exist"):
        build_detector(spec("test_convnext", tmp_path / "absent.safetensors"), CLASSES, seed=0)


def test_weights_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", fail)
    with pytest.raises(
        ModelError, match="timm has no weights 'd3_in1k' for convnext_atto; expected a file, or one of: d2_"
    ):
        build_detector(spec("convnext_atto", "d3_in1k"), CLASSES, seed=0)
    for name in ("DEFAULT", "d2_in1k", "convnext_atto.d2_in1k"):
        with pytest.raises(
            ModelError, match=r"are not on disk and could not be downloaded \(Name or service not known\)"
        ):
            build_detector(spec("convnext_atto", name), CLASSES, seed=0)
    build_detector(spec("test_convnext", None), CLASSES, seed=0)  # downloads nothing
