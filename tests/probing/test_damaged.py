"""TorchScript files whose content changed after they were written."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from forms import build, to_trace
from twins import SharedHead

from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.formats.files import load_torchscript


@pytest.mark.filterwarnings("ignore")
def test_a_changed_byte_of_a_weight_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(to_trace(build(SharedHead)), path)
    load_torchscript(path)
    with zipfile.ZipFile(path) as archive:
        weights = max((e for e in archive.infolist() if "/data/" in e.filename), key=lambda e: e.file_size)
        stored = archive.read(weights)
    content = bytearray(path.read_bytes())
    content[content.index(stored) + len(stored) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        load_torchscript(path)
