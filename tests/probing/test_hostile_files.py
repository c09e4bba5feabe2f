"""Model files from strangers: what could write files, load code or reach a network is refused before anything runs."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.formats.exported import load_exported
from gdetkd_cli.probing.formats.files import load_torchscript
from gdetkd_cli.probing.formats.operators import allows_operator, allows_target
from gdetkd_cli.trust import trust_code

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


def rewrite(path: Path, old: str, new: str) -> None:
    """Changes the code inside a TorchScript file."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    changed = {name: content.replace(old.encode(), new.encode()) for name, content in files.items()}
    assert changed != files
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in changed.items():
            archive.writestr(name, content)


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
    ],
)
def test_ways_to_call_other_operators(code: str, refused: str, script: Path) -> None:
    rewrite(script, "    body = self.body\n", f"    input = x\n    found = {code}\n    body = self.body\n")
    with pytest.raises(ModelError, match=rf"calls {refused}, which can do more than compute"):
        load_torchscript(script)


def test_code_under_another_case_is_checked(script: Path) -> None:
    torch.jit.script(Overwrites()).save(str(script))
    with zipfile.ZipFile(script) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(script, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name.removesuffix(".py") + ".PY" if name.endswith(".py") else name, content)
    with pytest.raises(ModelError, match="calls aten::from_file"):
        load_torchscript(script)


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
    ],
)
def test_what_a_node_of_an_exported_program_may_call(target: str, allowed: bool) -> None:
    assert allows_target(target) is allowed


def test_an_exported_program_that_calls_another_operator(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Maps().eval(), (torch.zeros(1, 3, 8, 8),)), path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in files if name.endswith(".json") and b"torch.ops.aten.relu" in files[name])
    files[name] = files[name].replace(b"torch.ops.aten.relu.default", b"torch.ops.aten.from_file.default")
    json.loads(files[name])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, content in files.items():
            archive.writestr(key, content)
    with pytest.raises(ModelError, match=r"a node calls torch\.ops\.aten\.from_file"):
        load_exported(path)


def test_no_allowed_operator_takes_a_file_name() -> None:
    """Every operator that takes a string is on the list by hand; these are the ones that would be wrong there."""
    for namespace, name in (("aten", "from_file"), ("aten", "save"), ("image", "read_file"), ("prim", "rpc_sync")):
        assert not allows_operator(namespace, name)
    assert allows_operator("aten", "einsum")
