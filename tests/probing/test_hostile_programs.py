"""Exported programs from strangers: what would run code, when it is read or later, is refused before torch reads it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.formats.exported import load_exported
from tests.probing.archives import read_files, write_files, write_with_two_tables

CODE = "__import__('pathlib').Path('victim').touch()"
MODEL = "model/models/model.json"


class Maps(nn.Module):
    """A model that computes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).relu()


class Branches(Maps):
    """A model with sizes to compute, a condition and named outputs."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        maps = torch.cond(maps.sum() > 0, lambda m: m + 1, lambda m: m - 1, (maps,))
        maps = maps[:, :, : maps.shape[2] // 2, : (maps.shape[3] + 1) // 2]
        return {"maps": maps, "mean": nn.functional.interpolate(maps, size=(x.shape[2], x.shape[3]))}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An exported program that computes, in the working directory, where no file ``victim`` may appear."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Maps().eval(), (torch.zeros(1, 3, 8, 8),)), path)
    yield path
    assert not (tmp_path / "victim").exists()


def call(target: str, *arguments: dict[str, Any]) -> dict[str, Any]:
    """A node without outputs."""
    inputs = [{"name": "", "arg": argument, "kind": 1} for argument in arguments]
    return {"target": target, "inputs": inputs, "outputs": [{"as_none": True}], "metadata": {}, "name": "called"}


def refuse(path: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        load_exported(path).module(torch.zeros(1, 3, 8, 8))


def test_a_program_that_computes_is_read(program: Path) -> None:
    assert load_exported(program).module(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)


def test_sizes_conditions_and_named_outputs_are_read(program: Path) -> None:
    sides = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    torch.export.save(torch.export.export(Branches(), (torch.zeros(1, 3, 32, 40),), dynamic_shapes=(sides,)), program)
    outputs = load_exported(program).module(torch.zeros(1, 3, 24, 16))
    assert outputs["maps"].shape == (1, 4, 11, 7)
    assert outputs["mean"].shape == (1, 4, 24, 16)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("torch.ops.aten.relu.default", "torch.ops.aten.from_file.default", "a node calls torch.ops.aten.from_file"),
        ("torch.ops.aten.relu.default", "torch.ops.aten.relu.__class__", "a node calls torch.ops.aten.relu.__class__"),
        ("relu", f"relu = {CODE}; relu", "named? "),
        ("x", f"x=({CODE})", "named? "),
        ("body.bias", f'body.bias"), ({CODE}, "', "a name is 'body.bias"),
    ],
)
def test_names_that_torch_would_write_into_code(old: str, new: str, reason: str, program: Path) -> None:
    files = read_files(program)
    for name in (name for name in files if name.endswith(".json")):
        files[name] = files[name].replace(json.dumps(old).encode(), json.dumps(new).encode())
    write_files(program, files)
    refuse(program, reason)


def edit(program: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(read_files(program)[MODEL])
    return content


def put(program: Path, content: dict[str, Any]) -> None:
    write_files(program, read_files(program) | {MODEL: json.dumps(content).encode()})


def test_a_function_given_to_an_operator_that_calls_it(program: Path) -> None:
    content, system = edit(program), {"as_operator": "torch.os.system"}
    node = call("torch.ops.higher_order.cond", {"as_bool": True}, system, system, {"as_strings": ["touch victim"]})
    content["graph_module"]["graph"]["nodes"].insert(0, node)
    put(program, content)
    refuse(program, r"a node calls torch\.os\.system")


@pytest.mark.parametrize(
    ("kind", "context"),
    [
        (
            "collections.defaultdict",
            {"default_factory_module": "stranger", "default_factory_name": "list", "dict_context": []},
        ),
        ("builtins.dict", '[{"__enum__": true, "fqn": "stranger:A", "name": "B"}]'),
        ("builtins.dict", json.dumps([f"x':{CODE},'"])),
    ],
)
def test_arguments_that_import_a_module_or_become_code(
    kind: str, context: object, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (program.parent / "stranger.py").write_text("import pathlib\npathlib.Path('victim').touch()\n")
    monkeypatch.syspath_prepend(program.parent)
    content = edit(program)
    spec = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])
    signature = {"inputs": [], "outputs": [], "in_spec": spec, "out_spec": spec, "forward_arg_names": None}
    content["graph_module"]["module_call_graph"].append({"fqn": "part", "signature": signature})
    put(program, content)
    refuse(program, "arguments are")
    assert "stranger" not in sys.modules


@pytest.mark.parametrize("size", [CODE, "Max(1, eval)", "Matrix(1, 1, print)", "Symbol('s0').name", "[1]"])
def test_sizes_that_are_more_than_arithmetic(size: str, program: Path) -> None:
    content = edit(program)
    expression = {"as_expr": {"expr_str": size, "hint": {"as_int": 1}}}
    content["graph_module"]["graph"]["tensor_values"]["relu"]["sizes"][0] = expression
    put(program, content)
    refuse(program, "a size is")


@pytest.mark.parametrize(
    "name", ["model/models/model.jsox", "model/data/aotinductor/model/model.so", "model/data/constants/custom_obj_0.py"]
)
def test_files_that_torch_would_load_unchecked(name: str, program: Path) -> None:
    write_files(program, read_files(program) | {name: b""})
    refuse(program, f"it contains '{name.removeprefix('model/')}'")


def test_a_program_in_a_second_table_of_files_is_checked(program: Path) -> None:
    files = read_files(program)
    hostile = files[MODEL].replace(b"aten.relu.default", b"aten.save.default")
    write_with_two_tables(program, hostile=files | {MODEL: hostile}, benign=files)
    refuse(program, r"a node calls torch\.ops\.aten\.save")


def test_readers_that_see_other_files_are_refused(program: Path) -> None:
    """torch falls back to ``zipfile`` for the format of torch 2.7, whose files have other names."""
    files = read_files(program)
    write_with_two_tables(program, hostile=files, benign={f"model/!{name[7:]}": files[name] for name in files})
    refuse(program, "not a plain archive")
