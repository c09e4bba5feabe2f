"""DETR-like detectors of transformers: how images are prepared, and which configurations are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from query_models import CLASSES, SIZE, build_detector, make_config
from transformers import DetrImageProcessor, RTDetrImageProcessor

from gdetkd_cli.detectors import transformers
from gdetkd_cli.detectors.transformers.preparation import Preparation, resize_in_graph
from gdetkd_cli.errors import GDetKDError, ModelError


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (333, 100), (50, 50), (97, 131)])
@pytest.mark.parametrize(
    "processor",
    [
        RTDetrImageProcessor(size={"height": 64, "width": 96}),
        RTDetrImageProcessor(size={"height": 64, "width": 96}, do_normalize=True),
        DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 100}),
    ],
    ids=["fixed", "normalised", "shortest"],
)
def test_images_are_prepared_as_transformers_prepares_them(processor: Any, size: tuple[int, int]) -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8))
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    own = Preparation.read(processor.to_dict())([image.float() / 255]).pixels
    assert own.shape == expected.shape
    error = (own - expected).abs() * 255 * (0.22 if processor.do_normalize else 1)
    assert error.max() < 1.2 and error.mean() < 0.4  # transformers rounds a resized image to whole values, twice


def test_images_of_unlike_sizes_are_padded() -> None:
    preparation = Preparation.read({"size": {"shortest_edge": 32, "longest_edge": 64}})
    prepared = preparation([torch.ones(3, 32, 48), torch.ones(3, 48, 32)])
    assert prepared.pixels.shape == (2, 3, 48, 48)
    assert prepared.mask.sum(dim=(1, 2)).tolist() == [32 * 48, 48 * 32]
    assert prepared.is_padded and prepared.pixels[0, :, 32:].abs().max() == 0


@pytest.mark.parametrize(("before", "after"), [((50, 60), (64, 96)), ((301, 97), (64, 64)), ((64, 96), (64, 96))])
def test_the_resize_in_a_graph_equals_torchs(before: tuple[int, int], after: tuple[int, int]) -> None:
    image = torch.rand(3, *before)
    expected = torch.nn.functional.interpolate(image[None], size=after, mode="bilinear", antialias=True)[0]
    assert torch.allclose(resize_in_graph(image, after), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "bert"}, "unknown model_type 'bert'"),
        ({"model_type": None}, "unknown model_type None"),
        ({"backbone": "microsoft/resnet-50"}, "names the backbone 'microsoft/resnet-50', which would be downloaded"),
        ({"backbone": "hf-hub:x/y", "use_timm_backbone": True}, "which would be downloaded"),
        ({"d_model": "x"}, "detr"),
        ({"num_queries": -3}, "detr"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GDetKDError, match=sentence) as caught:
        transformers.build(transformers.describe_fresh(make_config("detr") | change, SIZE), CLASSES)
    assert "\n" not in str(caught.value)


def test_code_and_kernels_in_a_configuration_are_left_out() -> None:
    config = make_config("detr") | {
        "auto_map": {"AutoModelForObjectDetection": "evil.Model"},
        "_attn_implementation": "evil/kernels",
        "quantization_config": {"quant_method": "evil"},
        "backbone_config": make_config("detr")["backbone_config"] | {"auto_map": {"AutoConfig": "evil.C"}},
    }
    detector = transformers.build(transformers.describe_fresh(config, SIZE), CLASSES)
    assert "evil" not in json.dumps(detector.module.model.config.to_dict(), default=str)


def test_weights_that_only_pickle_reads_are_refused(tmp_path: Path) -> None:
    detector, description = build_detector("detr")
    transformers.save_pretrained(detector, description, tmp_path / "p")
    (tmp_path / "p" / "model.safetensors").unlink()
    torch.save(detector.module.model.state_dict(), tmp_path / "p" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="transformers cannot load"):
        transformers.load_pretrained(str(tmp_path / "p"), CLASSES, keep_classes=True, image_size=None)


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        transformers.load_pretrained(str(tmp_path / "x"), CLASSES, keep_classes=True, image_size=None)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"in gdetkd's folder, run: pip install '\.\[transformers\]'"):
        transformers.build(transformers.describe_fresh(make_config("detr"), SIZE), CLASSES)
