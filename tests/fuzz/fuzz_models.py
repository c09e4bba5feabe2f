"""ONNX, TorchScript, exported programs, and the values of `gdetkd probe`."""

from __future__ import annotations

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
from fuzzing import AcceptedSilentlyError, Target
from mutate import list_places, mutate_bytes, mutate_tree
from onnx import TensorProto, helper
from torch import Tensor, nn

from gdetkd_cli.commands.probe import ProbeOptions, run_probe
from gdetkd_cli.errors import GDetKDError
from gdetkd_cli.evaluation.exported import NotOursError, OnnxDetector, ScriptedDetector

_CLASSES = ("car", "bus", "bike")
warnings.filterwarnings("ignore", category=UserWarning, module="torch|fuzz_models")


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


TARGETS = [
    Target("onnx", 2000, _prepare_onnx, run_onnx, isolated=True),
    Target("torchscript", 800, _prepare_script, run_script, isolated=True),
    Target("exported", 500, _prepare_exported, run_exported, isolated=True),
    Target("probe", 500, _prepare_onnx, run_probe_values, isolated=True),
]
