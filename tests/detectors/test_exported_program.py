"""Exported programs are read or refused without executing their content."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import SharedHead

from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.formats.exported import load_exported


class Touches:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    free = {2: 32 * torch.export.Dim("h"), 3: 32 * torch.export.Dim("w")}
    exported = torch.export.export(SharedHead().eval(), (torch.rand(1, 3, 64, 96),), dynamic_shapes=(free,))
    torch.export.save(exported, path)
    return path


def rewrite_program(program: Path, path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return path


def test_a_program_of_free_sizes_is_read(program: Path) -> None:
    runner = load_exported(program)
    assert runner.size is None
    recorded = runner.record(torch.rand(3, 64, 128))
    call, values = recorded.call, recorded.values
    assert call.takes == "one"
    assert len(values) > 10
    runner.module.train()  # has one mode
    assert runner.record(torch.rand(3, 64, 128)).values == values


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("member", ["/sample_inputs/", "/constants/model_constants_config.json"])
def test_pickled_code_is_refused(program: Path, member: str, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    config = {"config": {"x": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}}}

    def change(name: str, content: bytes) -> bytes:
        if member not in name:
            return content
        return json.dumps(config).encode() if name.endswith(".json") else pickle.dumps(Touches(touched))

    bad = rewrite_program(program, tmp_path / "bad.pt2", change)
    with pytest.raises(ModelError, match=r"bad\.pt2 cannot be read without executing code from it"):
        load_exported(bad)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("pattern", "replacement", "reason"),
    [
        (r"torch\.ops\.aten\.conv2d\.default", "torch.hub.load", "a node calls torch.hub.load"),
        (r"torch\.ops\.aten\.conv2d\.default", "#other:thing", "a node calls #other:thing"),
        (r"Integer\(32\)", "open('touched','w')", "a size is"),
        (r"Integer\(32\)", "Integer.__class__", "a size is"),
        (r"Integer\(32\)", "Integer(32).func", "a size is"),
    ],
)
def test_more_than_operators_is_refused(
    program: Path, pattern: str, replacement: str, reason: str, tmp_path: Path
) -> None:
    changed = 0

    def change(name: str, content: bytes) -> bytes:
        nonlocal changed
        if not name.endswith("models/model.json"):
            return content
        text, count = re.subn(pattern, replacement, content.decode())
        changed += count
        return text.encode()

    bad = rewrite_program(program, tmp_path / "bad.pt2", change)
    assert changed
    with pytest.raises(ModelError, match=re.escape(reason)):
        load_exported(bad)


def test_what_is_not_whole(program: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(program.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cut\.pt2"):
        load_exported(cut)
    bad = rewrite_program(
        program, tmp_path / "bad.pt2", lambda name, data: b"{}" if name.endswith("model.json") else data
    )
    with pytest.raises(ModelError, match=r"cannot read the program in .*bad\.pt2"):
        load_exported(bad)


def test_an_input_that_is_no_image(tmp_path: Path) -> None:
    class Reshaped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = SharedHead()

        def forward(self, x: torch.Tensor) -> Any:
            return self.network(x.reshape(-1, 3, 64, 64))

    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Reshaped().eval(), (torch.rand(1, 12288),)), path)
    with pytest.raises(ModelError, match=r"one \(N, 3, H, W\) tensor or one"):
        load_exported(path)
