"""Model files from strangers: what could write files, load code or reach a network is refused before anything runs."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.formats.files import detect_kind, load_torchscript, open_runner
from gdetkd_cli.probing.formats.operators import allows_operator, allows_target
from gdetkd_cli.trust import trust_code
from tests.probing.archives import read_files, write_files, write_with_two_tables

VICTIM = "victim.bin"


class Maps(nn.Module):
    """A model that computes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Overwrites(Maps):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + torch.from_file("victim.bin", True, 4, dtype=torch.uint8).sum()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TorchScript file that computes, in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    torch.jit.script(Maps()).save(str(path))
    return path


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    """Changes bytes in the files inside a TorchScript file."""
    files = read_files(path)
    changed = {name: content.replace(old, new) for name, content in files.items()}
    assert changed != files
    write_files(path, changed)


def test_a_file_that_computes_is_read(script: Path) -> None:
    assert load_torchscript(script)(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)


def test_a_file_that_overwrites_another_is_refused_without_running(tmp_path: Path, script: Path) -> None:
    torch.jit.script(Overwrites()).save(str(script))
    (tmp_path / VICTIM).write_bytes(b"kept")
    with pytest.raises(ModelError, match=r"calls aten::from_file, which can do more than compute; .* --trust-code"):
        load_torchscript(script)
    assert (tmp_path / VICTIM).read_bytes() == b"kept"


def test_consent_lets_it_run(script: Path) -> None:
    torch.jit.script(Overwrites()).save(str(script))
    trust_code()
    try:
        load_torchscript(script)
    finally:
        trust_code(False)


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ('(torch.relu(input)).save("victim.bin")', "aten::save"),
        ('getattr(input, "save")("victim.bin")', "aten::save"),
        ('getattr(input, "\\x73ave")("victim.bin")', "aten::save"),
        ('ops.image.write_file("victim.bin", input)', "image::write_file"),
        ('ops.aten.save(input, "victim.bin")', "aten::save"),
        ('"text".save("victim.bin")', "aten::save"),
        ('{"key": input}.save("victim.bin")', "aten::save"),
        ('getattr(input, "sa" "ve")("victim.bin")', "aten::save"),
        ("torch", "torch"),
        ("ops.image", "ops"),
        ("ops.c10d.barrier(input)", "c10d::barrier"),
        ("ops.a_library.an_operator(input)", "a_library::an_operator"),
        ("__torch__.torch.classes.dist_rpc.WorkerInfo(input)", "torch.classes.dist_rpc"),
        ("__torch__.torch", "__torch__"),
        ("getattr(__torch__, 'torch')", "__torch__"),
        ("print(input)", "prim::Print"),
        ('ops.prim.Print("text")', "prim::Print"),
        ('torch._print("text")', "aten::_print"),
        ("torch.sparse_coo_tensor(input, input)", "aten::sparse_coo_tensor"),
    ],
)
def test_ways_to_call_other_operators(code: str, refused: str, script: Path) -> None:
    rewrite(script, b"    body = self.body\n", f"    input = x\n    found = {code}\n    body = self.body\n".encode())
    with pytest.raises(ModelError, match=rf"calls {refused}, which can do more than compute"):
        load_torchscript(script)


@pytest.mark.parametrize("code", ['"a" b"b"', "x ? y"])
def test_code_that_torch_could_read_differently(code: str, script: Path) -> None:
    rewrite(script, b"    body = self.body\n", f"    found = {code}\n    body = self.body\n".encode())
    with pytest.raises(ModelError, match="its code cannot be checked"):
        load_torchscript(script)


def test_code_under_another_case_is_checked(script: Path) -> None:
    torch.jit.script(Overwrites()).save(str(script))
    files = read_files(script)
    write_files(
        script, {name.removesuffix(".py") + ".PY" if name.endswith(".py") else name: files[name] for name in files}
    )
    with pytest.raises(ModelError, match="calls aten::from_file"):
        load_torchscript(script)


def test_code_in_a_second_table_of_files_is_checked(tmp_path: Path, script: Path) -> None:
    """Python would read the second table, torch the first."""
    benign = tmp_path / "benign.pt"
    benign.write_bytes(script.read_bytes())
    rewrite(script, b"    body = self.body\n", b'    ops.aten.save(x, "victim.bin")\n    body = self.body\n')
    write_with_two_tables(script, hostile=read_files(script), benign=read_files(benign))
    with pytest.raises(ModelError, match="calls aten::save"):
        load_torchscript(script)


def test_a_name_that_torch_lists_cut_off_is_refused(script: Path) -> None:
    write_files(script, read_files(script) | {"model/code/" + "a" * 600 + ".py": b"import"})
    with pytest.raises(ModelError, match="not a plain archive"):
        load_torchscript(script)


def test_files_that_fill_the_memory_are_refused(script: Path) -> None:
    with zipfile.ZipFile(script, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/code/large.py", b"#" * 2**25)
    with pytest.raises(ModelError, match="its files fill the memory"):
        load_torchscript(script)


def test_a_tensor_larger_than_its_bytes_is_refused(script: Path) -> None:
    """torch would read, and write, the memory beside it."""
    rewrite(script, b"K\x04tQ", b"J\x00\x00\x10\x00tQ")
    with pytest.raises(ModelError, match="storage 1 has fewer than the 4194304 bytes that data states"):
        load_torchscript(script)


@pytest.mark.parametrize("notes", ["{", "[1]", "[" * 100_000, '{"gdetkd.classes": "{"}', '{"names": {"a": "b"}}'])
def test_a_damaged_description_gives_no_class_names(notes: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(Maps()).save(str(path), _extra_files={"gdetkd.json": notes})
    assert open_runner(path, detect_kind(path)).class_names == ()


def test_a_damaged_table_of_files_is_no_model_file(script: Path) -> None:
    content = script.read_bytes()
    script.write_bytes(content.replace(b"PK\x01\x02", b"PK\x01\xff"))
    assert detect_kind(script) == "checkpoint"


def test_the_legacy_format_is_refused(script: Path) -> None:
    """It names the file of its code, so that the code need not end in .py."""
    with zipfile.ZipFile(script, "a") as archive:
        archive.writestr("model/model.json", "{}")
    with pytest.raises(ModelError, match="format of before 2019"):
        load_torchscript(script)


def test_two_files_of_one_name_are_refused(script: Path) -> None:
    """One reader could check the first and another one load the second."""
    with zipfile.ZipFile(script, "a") as archive:
        archive.writestr("model/DATA.PKL", b"")
    with pytest.raises(ModelError, match="two files of one name"):
        load_torchscript(script)


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("torch.ops.aten.conv2d.default", True),
        ("torch.ops.torchvision.nms.default", True),
        ("torch.ops.higher_order.cond", True),
        ("_operator.mul", True),
        ("math.ceil", True),
        ("torch.sym_max", True),
        ("torch.ops.aten.from_file.default", False),
        ("torch.ops.image.read_file.default", False),
        ("torch.ops.higher_order.call_torchbind", False),
        ("_operator.methodcaller", False),
        ("_operator.attrgetter", False),
        ("os.system", False),
        ("math.os.system", False),
        ("math.__loader__", False),
        ("torch.ops.aten.relu.__class__", False),
    ],
)
def test_what_a_node_of_an_exported_program_may_call(target: str, allowed: bool) -> None:
    assert allows_target(target) is allowed


def test_no_allowed_operator_takes_a_file_name() -> None:
    """Every operator that takes a string is on the list by hand; these are the ones that would be wrong there."""
    for namespace, name in (("aten", "from_file"), ("aten", "save"), ("image", "read_file"), ("prim", "rpc_sync")):
        assert not allows_operator(namespace, name)
    assert allows_operator("aten", "einsum")
