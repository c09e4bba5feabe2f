"""What is usable, but probably a mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gdetkd_cli.assembly.warnings import warn_about_normalization
from gdetkd_cli.detectors import catalog


def test_frozen_batch_normalization_without_statistics(tiny_description: Callable[..., dict[str, Any]]) -> None:
    frozen = catalog.build(tiny_description("fcos", norm="frozen"), ("a",))
    (warning,) = warn_about_normalization(frozen)
    assert "are frozen with mean 0 and variance 1, so they normalize nothing; start from trained weights" in warning

    for name, values in frozen.module.named_buffers():
        if name.endswith("running_mean"):
            torch.nn.init.normal_(values)
    assert warn_about_normalization(frozen) == []
    assert warn_about_normalization(catalog.build(tiny_description("fcos"), ("a",))) == []
