"""Loads the weights of timm's classifiers into a student's body: from a file, or by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gdetkd_cli.detectors.weights import extract_state_dict, load_body, read_torch_file
from gdetkd_cli.errors import ModelError, get_first_line
from gdetkd_cli.portable.timm_bodies import find_model, import_timm

_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_TIMEOUT = 10  # seconds


def load_timm_weights(body: nn.Module, backbone: str, weights: str) -> list[str]:
    """Loads a classifier's weights, without the classifier, into the body; returns notes.

    Args:
        body: a ``portable`` TimmBody.
        backbone: its name, ``timm/NAME``.
        weights: a file (.safetensors, or written by torch.save), ``DEFAULT``, or the tag of timm's weights, such as
            ``d2_in1k``.

    Raises:
        ModelError: the weights do not exist, cannot be read or downloaded, or do not fit the body.
    """
    if Path(weights).exists() or Path(weights).suffix in _SUFFIXES:
        state = extract_state_dict(read_torch_file(Path(weights)), weights)
    else:
        state = _read_named(find_model(backbone), weights)
    names = {key: next((name for name in _list_names(key) if name in state), None) for key in body.state_dict()}
    found = {key: state[name] for key, name in names.items() if name is not None}
    return load_body(body, found, weights=weights, backbone=backbone, kind="timm model")


def _list_names(key: str) -> list[str]:
    """Lists the names that a body's tensor may have in the classifier.

    timm joins the names of modules that it takes out of a container: ``stages.0`` becomes ``stages_0``.
    """
    name = key.removeprefix("net.")
    first, _, rest = name.partition(".")
    parts = [f"{first[:i]}.{first[i + 1 :]}.{rest}" for i, letter in enumerate(first) if letter == "_"]
    return [name, name.removeprefix("model."), *parts]


def _read_named(name: str, weights: str) -> dict[str, Tensor]:
    """Reads timm's own weights; downloads them if they are not on disk."""
    timm = import_timm()
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    known += ["DEFAULT"] if timm.models.is_model_pretrained(name) else []
    tag = weights.removeprefix(f"{name}.")
    if tag not in known:
        raise ModelError(
            f"timm has no weights {weights!r} for {name}; expected a file, or one of: {', '.join(known) or 'none'}"
        )
    full = name if tag == "DEFAULT" else f"{name}.{tag}"
    try:
        with _silence("timm", "huggingface_hub"):
            overlay = _find_cached(timm.get_pretrained_cfg(full).hf_hub_id)
            model = timm.create_model(full, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # of timm, of the hub's client, or of the HTTP library that it uses
        raise ModelError(
            f"timm's weights {full!r} are not on disk and could not be downloaded ({get_first_line(error)}); download "
            "the file elsewhere and name it as backbone_weights, or leave backbone_weights out"
        ) from error
    state: dict[str, Tensor] = model.state_dict()
    return state


def _find_cached(repository: str | None) -> dict[str, Any] | None:
    """Returns timm's settings for a file of the hub that is on disk; None if it must be downloaded."""
    from huggingface_hub import HfApi, try_to_load_from_cache  # a requirement of timm

    if repository is None:
        return None
    for file in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return {"file": cached}
    HfApi().model_info(repository, timeout=_TIMEOUT)  # fails at once without a network; a download waits
    return None


@contextmanager
def _silence(*names: str) -> Iterator[None]:
    """Hides messages below errors of the named loggers inside the block."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
