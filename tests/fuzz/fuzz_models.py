"""`student.pt`, state_dicts, ONNX, TorchScript, exported programs, and the values of `gdetkd probe`."""

from __future__ import annotations

import copy
import io
import json
import random
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
import torch
import toy
from fuzzing import AcceptedSilentlyError, Target
from mutate import ODD_VALUES, get, list_places, mutate_bytes, mutate_tree
from onnx import TensorProto, helper
from query_models import CONFIGS, make_config
from torch import Tensor, nn

from gdetkd_cli import portable
from gdetkd_cli.assembly import build_detector
from gdetkd_cli.commands.probe import ProbeOptions, run_probe
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.transformers import describe_fresh
from gdetkd_cli.errors import GDetKDError
from gdetkd_cli.evaluation.exported import NotOursError, OnnxDetector, ScriptedDetector
from gdetkd_cli.recipe.schema import ComposedDetector

_CLASSES = ("car", "bus", "bike")
warnings.filterwarnings("ignore", category=UserWarning, module="torch|fuzz_models")
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


class _Net(nn.Module):
    """A small network with a pyramid of three levels, on which probing works."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.downs = nn.ModuleList(nn.Conv2d(8, 8, 3, stride=2, padding=1) for _ in range(3))
        self.head = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        found = []
        for down in self.downs:
            x = torch.relu(down(x))
            found.append(self.head(x))
        return found[0], found[1], found[2]


def _prepare_onnx(folder: Path) -> list[bytes]:
    torch.manual_seed(0)
    path, made = folder / "net.onnx", []
    for axes in (None, {"x": {0: "n", 2: "h", 3: "w"}}):
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(_Net(), (torch.rand(1, 3, 64, 64),), str(path), dynamo=False, input_names=["x"],
                              dynamic_axes=axes)  # fmt: skip
        made.append(path.read_bytes())
    return made


_DIMENSIONS = (0, -1, 1, 3, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63), 10**6)


def _mutate_onnx(rng: random.Random, content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    graph = model.graph
    node, weight, value = (
        rng.choice(graph.node),
        rng.choice(graph.initializer),
        rng.choice((graph.input[0], *graph.output)),
    )
    match rng.randrange(12):
        case 0:
            weight.dims[rng.randrange(len(weight.dims))] = rng.choice(_DIMENSIONS)
        case 1:
            shape = value.type.tensor_type.shape.dim
            rng.choice(shape).dim_value = rng.choice(_DIMENSIONS)
        case 2:
            del value.type.tensor_type.shape.dim[:]
        case 3:
            integers = [attribute for each in graph.node for attribute in each.attribute if len(attribute.ints)]
            attribute = rng.choice(integers)
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(_DIMENSIONS)
        case 4:
            node.op_type = rng.choice(
                ("Conv", "MaxPool", "Pad", "Loop", "If", "x", "", "RoiAlign", "Resize", "Reshape")
            )
        case 5:
            node.input[0] = rng.choice(("", "x", node.output[0], weight.name, "nothing"))
        case 6:
            weight.data_type = rng.randrange(-1, 25)
        case 7:
            weight.raw_data = weight.raw_data[: rng.randrange(len(weight.raw_data))]
        case 8:
            size = helper.make_tensor("size", TensorProto.INT64, [4], [1, 8, rng.choice(_DIMENSIONS), 10**5])
            graph.initializer.append(size)
            graph.node.append(helper.make_node("ConstantOfShape", ["size"], ["huge"]))
            graph.output.append(helper.make_tensor_value_info("huge", TensorProto.FLOAT, None))
        case 9:
            entry = model.metadata_props.add()
            entry.key = rng.choice(("gdetkd.classes", "gdetkd.architecture", "names"))
            entry.value = rng.choice(("", "[", "[1, 2]", "{}", "null", '{"a": 1}', "[" * 5000, "{0: 'a'", "1" * 5000))
        case 10:
            weight.data_location = TensorProto.EXTERNAL
            pair = weight.external_data.add()
            pair.key, pair.value = "location", rng.choice(("/etc/passwd", "../x", "net.onnx", ""))
            weight.ClearField("raw_data")
        case 11:
            model.opset_import[0].version = rng.choice((0, 1, 7, 2**31, -1))
    return model.SerializeToString()


def _probe(path: Path, options: ProbeOptions | None = None) -> None:
    with warnings.catch_warnings(action="ignore"):
        report = run_probe(str(path), options)
    if not report.levels or any(level.channels < 1 or min(level.shape) < 1 for level in report.levels):
        raise AcceptedSilentlyError(f"levels {report.levels}")


def run_onnx(rng: random.Random, folder: Path, files: list[bytes]) -> None:
    content = rng.choice(files)
    path = folder / "model.onnx"
    path.write_bytes(_mutate_onnx(rng, content) if rng.random() < 0.6 else mutate_bytes(rng, content))
    _open_exported(path)
    _probe(path)


def _open_exported(path: Path) -> None:
    """Reads the file as `gdetkd eval` does."""
    try:
        OnnxDetector(path).predict([torch.rand(3, 64, 64)])
    except (NotOursError, GDetKDError):
        return


def _prepare_script(folder: Path) -> list[bytes]:
    torch.manual_seed(0)
    made = []
    for module in (torch.jit.script(_Net()), torch.jit.trace(_Net(), torch.rand(1, 3, 64, 64))):
        for extra in ({}, {"gdetkd.json": "{}"}, {"config.txt": '{"imgsz": [64, 64], "names": {"0": "a"}}'}):
            file = io.BytesIO()
            torch.jit.save(module, file, _extra_files=extra)
            made.append(file.getvalue())
    return made


_SCRIPTS = (
    b"128",
    b"-1",
    b"1" * 30,
    b"torch.zeros([100000, 100000, 100])",
    b"((((",
    b"None",
    b"[]",
    b"9223372036854775807",
)


def _mutate_archive(rng: random.Random, content: bytes, endings: tuple[str, ...]) -> bytes:
    """Mutates one file of an archive, or the archive."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([name for name in files if name.endswith(endings) and files[name]])
    data = files[name]
    if name.endswith(".py") and rng.random() < 0.6:
        words = data.split(b" ")
        words[rng.randrange(len(words))] = rng.choice(_SCRIPTS)
        files[name] = b" ".join(words)
    elif name.endswith(".json") and data[:1] in b"{[" and rng.random() < 0.8:
        tree = json.loads(data)
        places = list(list_places(tree))
        files[name] = json.dumps(mutate_tree(rng, tree) if places else tree).encode()
    else:
        files[name] = mutate_bytes(rng, data)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for each, written in files.items():
            archive.writestr(each, written)
    return file.getvalue()


def run_script(rng: random.Random, folder: Path, files: list[bytes]) -> None:
    path = folder / "model.torchscript"
    path.write_bytes(_mutate_archive(rng, rng.choice(files), (".py", ".pkl", ".json", ".txt", "version")))
    with suppress(NotOursError, GDetKDError):
        ScriptedDetector(path).predict([torch.rand(3, 64, 64)])
    _probe(path)


def _prepare_exported(folder: Path) -> list[bytes]:
    torch.manual_seed(0)
    file = folder / "net.pt2"
    torch.export.save(torch.export.export(_Net().eval(), (torch.rand(1, 3, 64, 64),)), file)
    return [file.read_bytes()]


def run_exported(rng: random.Random, folder: Path, files: list[bytes]) -> None:
    path = folder / "model.pt2"
    path.write_bytes(_mutate_archive(rng, rng.choice(files), (".json", ".pt", "version", "byteorder")))
    _probe(path)


_TRIPLES: tuple[Any, ...] = (None, None, (0.5, 0.5, 0.5), (0.0, 0.0, 0.0), (1e30, -1e30, 0.0), (1e-30, 1.0, 1.0))


def run_probe_values(rng: random.Random, folder: Path, files: list[bytes]) -> None:
    """Probes a valid file with odd options."""
    path = folder / "model.onnx"
    path.write_bytes(rng.choice(files))
    sides = (1, 2, 7, 31, 32, 64, 65, 640, 20_000, 99_999)
    size = None if rng.random() < 0.1 else (rng.choice(sides), rng.choice(sides))
    options = ProbeOptions(
        size=size,
        scale=rng.choice((None, 1.0, 255.0)),
        mean=rng.choice(_TRIPLES),
        std=rng.choice(_TRIPLES[:3]),
        bgr=rng.random() < 0.5,
        last=rng.random() < 0.2,
        levels=rng.choice(((), (), (), ("x",), ("", ""), ("/head/Conv_output_0",), ("/stem/Conv_output_0",) * 2)),
    )
    _probe(path, options)


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
    Target("onnx", 2000, _prepare_onnx, run_onnx, isolated=True),
    Target("torchscript", 800, _prepare_script, run_script, isolated=True),
    Target("exported", 500, _prepare_exported, run_exported, isolated=True),
    Target("probe", 500, _prepare_onnx, run_probe_values, isolated=True),
    Target("arguments", 600, lambda _: None, run_numbers, isolated=True),
    Target("query-config", 600, lambda _: None, run_query_config, isolated=True),
]
