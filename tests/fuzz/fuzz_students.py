"""`student.pt`, state_dicts, and the descriptions of detectors."""

from __future__ import annotations

import copy
import io
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import toy
from fuzzing import AcceptedSilentlyError, Target
from mutate import ODD_VALUES, get, mutate_bytes, mutate_tree
from query_models import CONFIGS, make_config
from torch import Tensor, nn

from gdetkd_cli import portable
from gdetkd_cli.assembly import build_detector
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.transformers import describe_fresh
from gdetkd_cli.recipe.schema import ComposedDetector

_CLASSES = ("car", "bus", "bike")
warnings.filterwarnings("ignore", category=UserWarning, module="torch|fuzz_students")
_TENSORS: tuple[Any, ...] = (
    torch.zeros(0),
    torch.zeros(()),
    torch.zeros(3, dtype=torch.int64),
    torch.zeros(1).expand(10**9),
    torch.zeros(1, dtype=torch.float16).expand(2**20, 2**10),
    torch.full((4,), float("nan")),
    torch.zeros(2, 2).to_sparse(),
    torch.zeros(2, dtype=torch.complex64),
    torch.zeros(4, dtype=torch.bool),
    torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
    nn.Parameter(torch.zeros(2)),
)
_WRONG: dict[tuple[Any, ...], tuple[Any, ...]] = {  # values that must be refused
    ("gdetkd",): ("1", None, 0, -1, 2**70, [1], 1.5),
    ("architecture",): (None, [], "x", 1, {}),
    ("architecture", "kind"): (None, "hf", [], {}),
    ("architecture", "width"): ("8", True, -8, float("nan"), float("inf"), 10**9, []),
    ("architecture", "blocks"): ([1, 1, 1], [1, 1, 1, "1"], "1111", [0, 1, 1, 1], [10**6] * 4, 1),
    ("architecture", "pyramid_channels"): ("16", True, 0, -16, 10**9, 16.5, None),
    ("architecture", "pyramid_levels"): ([6, 2], [2], "26", [0, 9], [True, 6]),
    ("architecture", "image_size"): ([64], [0, 64], [64, float("inf")], "64", None, [10**9, 10**9]),
    ("architecture", "norm"): ("none", 1, None, []),
    ("architecture", "arguments"): ([], 1, {"min_size": "x"}, {1: 2}, {"colour": 1}, {"min_size": 10**9}),
    ("classes",): (None, [], "abc", [1, 2, 3], {"a": 1}, [["a"]], 3),
    ("model",): (None, [], {}, {1: torch.zeros(1)}, {"x": 1}, torch.zeros(3)),
}


def _prepare_students(folder: Path) -> list[dict[str, Any]]:
    made = []
    for head in ("faster-rcnn", "retinanet", "fcos"):
        built = build_detector(ComposedDetector.model_validate(toy.detector(head)), _CLASSES, seed=0)
        catalog.save(folder / "made.pt", built.detector, built.description)
        made.append(torch.load(folder / "made.pt", weights_only=True))
    return made


def _save(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _load_and_detect(path: Path) -> None:
    loaded = catalog.load(path)
    with warnings.catch_warnings(action="ignore"):
        found = loaded.detector.predict([torch.rand(3, 64, 64)])
    if len(found[0].boxes) != len(found[0].labels):
        raise AcceptedSilentlyError("a detector of a broken file detects")


def run_wrong_student(rng: random.Random, folder: Path, students: list[dict[str, Any]]) -> None:
    """Removes a field or gives it a wrong value; the file must be refused."""
    content = copy.deepcopy(rng.choice(students))
    place = rng.choice(list(_WRONG))
    parent = get(content, place[:-1])
    path = folder / "student.pt"
    if rng.random() < 0.15 and place not in (("gdetkd",), ("architecture", "arguments"), ("architecture", "width"),
                                             ("architecture", "blocks"), ("architecture", "norm"),
                                             ("architecture", "pyramid_levels")):  # fmt: skip
        del parent[place[-1]]
    elif rng.random() < 0.2:
        weights = content["model"]
        name = rng.choice(list(weights))
        value = weights.pop(name)
        others = (tensor for tensor in (*_TENSORS, value.flatten()[:1].repeat(2, 3)) if tensor.shape != value.shape)
        wrong = (None, "x", 1, *others)
        if rng.random() < 0.7:
            weights[name] = rng.choice(wrong)
        elif rng.random() < 0.5:
            weights[rng.choice((1, None, ("a",), name + "x", ""))] = value
    else:
        parent[place[-1]] = rng.choice(_WRONG[place])
    path.write_bytes(_save(content))
    _load_and_detect(path)
    raise AcceptedSilentlyError(f"{place}: {str(get(content, place[:-1]))[:200]}")


def run_student_tree(rng: random.Random, folder: Path, students: list[dict[str, Any]]) -> None:
    content = dict(rng.choice(students))
    weights = content.pop("model")
    mutated = mutate_tree(rng, content)
    if isinstance(mutated, dict):
        mutated["model"] = weights
    path = folder / "student.pt"
    path.write_bytes(_save(mutated))
    _load_and_detect(path)


def run_student_bytes(rng: random.Random, folder: Path, students: list[dict[str, Any]]) -> None:
    content = _save(rng.choice(students))
    path = folder / "student.pt"
    if rng.random() < 0.6:  # in the pickle, which names sizes
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        name = next(name for name in files if name.endswith("data.pkl"))
        files[name] = mutate_bytes(rng, files[name])
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for each, data in files.items():
                archive.writestr(each, data)
    else:
        path.write_bytes(mutate_bytes(rng, content))
    _load_and_detect(path)


def _prepare_states(folder: Path) -> list[dict[str, Tensor]]:
    with torch.device("meta"):
        names = ("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large")
        modules = [portable.build({"kind": "torchvision", "name": name}, 2) for name in names]
    return [
        {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in module.state_dict().items()}
        for module in modules
    ]


def run_state(rng: random.Random, folder: Path, states: list[dict[str, Tensor]]) -> None:
    """Odd keys and values in a state_dict of a torchvision detector."""
    state: dict[Any, Any] = dict(rng.choice(states))
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(state))
        match rng.randrange(5):
            case 0:
                state[rng.choice((1, None, ("a",), "", "module.", "x" * 5000, "roi_heads.mask_x"))] = state.pop(name)
            case 1:
                state[name] = rng.choice((*_TENSORS, None, "x", 1, {}))
            case 2:
                del state[name]
            case 3:
                state = {rng.choice(("model", "state_dict", "module", "x")): state}
            case 4:
                state["model"] = rng.choice(({}, [], 1, torch.zeros(1), state if rng.random() < 0.5 else {1: 2}))
    path = folder / "state.pth"
    path.write_bytes(_save(state))
    catalog.load(path)


def run_query_config(rng: random.Random, folder: Path, _: Any) -> None:
    """Builds a DETR-like detector from a configuration with odd values."""
    name = rng.choice(list(CONFIGS))
    description = describe_fresh(make_config(name), (64, 96))
    description["config"] = mutate_tree(rng, description["config"])
    if rng.random() < 0.3:
        description["preprocessor"] = mutate_tree(rng, description["preprocessor"])
    detector = catalog.build(description, _CLASSES)
    detector.module.eval()
    detector.predict([torch.rand(3, 64, 96)])


_ARGUMENTS = {
    "faster-rcnn": ("min_size", "max_size", "image_mean", "image_std", "rpn_head", "rpn_pre_nms_top_n_test",
                    "rpn_nms_thresh", "rpn_batch_size_per_image", "rpn_positive_fraction", "box_score_thresh",
                    "box_detections_per_img", "bbox_reg_weights", "size_divisible", "anchor_sizes",
                    "representation_size", "canonical_scale", "fixed_size"),
    "retinanet": ("min_size", "image_mean", "anchor_generator", "score_thresh", "detections_per_img",
                  "topk_candidates", "head_norm", "anchor_sizes", "size_divisible", "nms_thresh"),
    "fcos": ("max_size", "image_std", "center_sampling_radius", "score_thresh", "topk_candidates", "head_convs",
             "anchor_sizes", "head", "fixed_size"),
}  # fmt: skip
_ARGUMENTS["cascade-rcnn"] = _ARGUMENTS["faster-rcnn"]


def run_numbers(rng: random.Random, folder: Path, _: Any) -> None:
    """Builds a detector from a description with odd arguments."""
    description = {**toy.detector(rng.choice(("faster-rcnn", "cascade-rcnn", "retinanet", "fcos"))), "kind": "composed"}
    known = sorted(_ARGUMENTS[description["head"]])
    description["arguments"] = dict(description["arguments"]) | {rng.choice(known): rng.choice(ODD_VALUES)}
    detector = catalog.build(description, _CLASSES)
    detector.module.eval()
    detector.predict([torch.rand(3, 64, 64)])


TARGETS = [
    Target("student-field", 1500, _prepare_students, run_wrong_student, isolated=True),
    Target("student-tree", 1000, _prepare_students, run_student_tree, isolated=True),
    Target("student-bytes", 1500, _prepare_students, run_student_bytes, isolated=True),
    Target("state-dict", 300, _prepare_states, run_state, isolated=True),
    Target("arguments", 600, lambda _: None, run_numbers, isolated=True),
    Target("query-config", 600, lambda _: None, run_query_config, isolated=True),
]
