"""Builds detectors of transformers from a configuration, a folder or the hub, and writes them as transformers does.

Descriptions may come from a stranger's ``student.pt``. They are data: a configuration of a model in transformers
itself, without code, names of other files, or downloads.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.detectors.transformers.detector import QueryDetector
from gdetkd_cli.detectors.transformers.model import QueryModel
from gdetkd_cli.detectors.transformers.preparation import Preparation
from gdetkd_cli.errors import ModelError, NoPyramidError, get_first_line
from gdetkd_cli.memory import check_memory

# transformers loads code or kernels by these fields, or files by name; what they name is unknown here.
_LEFT_OUT = re.compile(
    r"auto_map|custom_pipelines|quantization_config|_?attn_implementation\w*|_?experts_implementation\w*|use_kernels"
    r"|_name_or_path|transformers_version|architectures|dtype|torch_dtype|id2label|label2id|use_pretrained_backbone"
)
_REPEATED = re.compile(r"layers|blocks|depths|levels|stages")
_PREPARATION_FIELDS = (
    *("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    "max_size",
)
# What transformers raises for files and configurations that it cannot use.
_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError, ImportError),
    *(ArithmeticError, AssertionError),
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' progress bars and warnings; what a user must know is in our own notes."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def require_transformers() -> None:
    """Raises a ModelError if transformers cannot be imported."""
    try:
        import scipy  # noqa: F401  # the matching in all losses
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"arch: transformers needs the package {error.name}; in gdetkd's folder, run: pip install '.[transformers]'"
        ) from error


def describe_fresh(config: Mapping[str, Any], image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Describes a detector with fresh weights.

    Args:
        config: of transformers, with its ``model_type``.
        image_size: (height, width) pixels to which images are resized; None: 640 x 640.
    """
    height, width = image_size or (640, 640)
    return {
        "kind": "transformers",
        # As JSON gives it, so that equal descriptions are written as equal bytes.
        "config": json.loads(json.dumps(dict(config))),
        "preprocessor": {"size": {"height": height, "width": width}, "do_normalize": True},
        "train_batch_norms": True,
    }


def build(description: Mapping[str, Any], class_names: Sequence[str]) -> QueryDetector:
    """Builds the detector of a description with fresh weights.

    Raises:
        ModelError: the configuration is not one of transformers' detectors, or cannot be built.
        NoPyramidError: it has no feature maps.
    """
    require_transformers()
    from transformers import AutoModelForObjectDetection

    config = _read_config(description["config"], class_names)
    with _quiet():
        try:
            size = sum(values.nbytes for values in _list_weights(config).values())
            check_memory(f"this configuration of {config.model_type}", size)
            model = AutoModelForObjectDetection.from_config(config)
        except _ERRORS as error:
            raise ModelError(f"transformers cannot build {config.model_type}: {get_first_line(error)}") from error
    # transformers freezes the body of some detectors, or its batch normalization, which suits trained weights only.
    model.requires_grad_(True)
    if description.get("train_batch_norms"):
        _train_batch_norms(model)
    return _wrap(model, description["preprocessor"], class_names)


def load_pretrained(
    source: str, class_names: Sequence[str], *, keep_classes: bool, image_size: tuple[int, int] | None
) -> tuple[QueryDetector, dict[str, Any], bool]:
    """Loads a folder of ``save_pretrained``, or downloads a model of the hub by its name.

    Args:
        source: the folder, or a name such as ``PekingU/rtdetr_r18vd``.
        class_names: the data's K names.
        keep_classes: keep the model's own classes; else a class layer for other classes starts fresh.
        image_size: (height, width) pixels instead of the model's own size.

    Returns:
        The detector, its description, and whether its class layer is the trained one.

    Raises:
        ModelError: it is missing, is no detector, or holds weights that only pickle could read.
    """
    require_transformers()
    from transformers import AutoConfig, AutoModelForObjectDetection

    folder = Path(source)
    if not folder.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ModelError(
            f"there is no folder {source}; give one with config.json and model.safetensors, or a name on the hub such "
            "as PekingU/rtdetr_r18vd"
        )
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": folder.is_dir()}
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(source, **options)
            own = tuple(str(config.id2label[i]) for i in range(config.num_labels))
            # For the same classes in another order, the data's labels follow the model's order.
            names = own if keep_classes or sorted(own) == sorted(class_names) else tuple(class_names)
            _name_classes(config, names)
            model = AutoModelForObjectDetection.from_pretrained(
                source, config=config, use_safetensors=True, ignore_mismatched_sizes=names != own, **options
            )
            if names != own and len(names) == len(own):
                _start_classes_afresh(model)
            preprocessor = _read_preprocessor(source, options)
        except _ERRORS as error:
            where = "" if folder.is_dir() else "; a name on the hub needs a network connection, a folder does not"
            raise ModelError(
                f"transformers cannot load {source}: {get_first_line(error).rstrip('.')}{where}"
            ) from error
    if image_size is not None:
        preprocessor["size"] = {"height": image_size[0], "width": image_size[1]}
    plain = _filter(json.loads(config.to_json_string(use_diff=False)))
    description = {"kind": "transformers", "config": plain, "preprocessor": preprocessor}
    return _wrap(model.float(), preprocessor, names), description, names == own


def list_class_layers(description: Mapping[str, Any]) -> frozenset[str]:
    """Lists the tensors of a detector's module whose shape depends on the number of classes."""
    require_transformers()
    few, many = (
        {name: value.shape for name, value in _list_weights(_read_config(description["config"], names)).items()}
        for names in (("a", "b"), ("a", "b", "c"))
    )
    return frozenset(f"model.{name}" for name, shape in few.items() if many[name] != shape)


def save_pretrained(detector: Detector, description: Mapping[str, Any], folder: Path) -> None:
    """Writes a folder that ``AutoModelForObjectDetection.from_pretrained`` loads without this package."""
    assert isinstance(detector, QueryDetector), "a detector of transformers"
    model, state = detector.module.model, None
    softmax = detector.exclusive_classes
    preprocessor = {
        **description["preprocessor"],
        # The processor whose post-processing reads these outputs.
        "image_processor_type": "DetrImageProcessor" if softmax else "RTDetrImageProcessor",
        "do_pad": "shortest_edge" in description["preprocessor"].get("size", {}),
    }
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    with _quiet():
        if description.get("train_batch_norms"):  # trained layers count batches, and transformers' frozen ones do not
            known = _list_weights(model.config)
            state = {name: value for name, value in model.state_dict().items() if name in known}
        model.save_pretrained(fresh, state_dict=state)
    (fresh / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def _wrap(model: Any, preprocessor: Mapping[str, Any], class_names: Sequence[str]) -> QueryDetector:
    module = QueryModel(model, Preparation.read(preprocessor))
    name = str(model.config.model_type)
    fixed = getattr(model.config, "anchor_image_size", None) is not None
    try:
        return QueryDetector(module=module, source=name, class_names=tuple(class_names), fixed_size=fixed)
    except NoPyramidError as error:
        raise NoPyramidError(f"{name} has no feature maps to distil: {error}") from error


def _list_weights(config: Any) -> dict[str, torch.Tensor]:
    """The names and shapes of the tensors of a configuration; takes no memory, and no random numbers."""
    from transformers import AutoModelForObjectDetection

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        weights: dict[str, torch.Tensor] = AutoModelForObjectDetection.from_config(config).state_dict()
    return weights


def _start_classes_afresh(model: Any) -> None:
    """Gives fresh values to the tensors whose shape depends on the number of classes."""
    from transformers import AutoModelForObjectDetection

    larger: Any = copy.deepcopy(model.config)
    _name_classes(larger, [*model.config.id2label.values(), "one more"])
    shapes = {name: value.shape for name, value in _list_weights(larger).items()}
    fresh = AutoModelForObjectDetection.from_config(model.config).state_dict()
    model.load_state_dict({n: v for n, v in fresh.items() if v.shape != shapes[n]}, strict=False)


def _train_batch_norms(model: torch.nn.Module) -> None:
    """Replaces frozen batch normalization in place, by layers that measure the statistics of what they normalize.

    A frozen layer of a model without trained weights has mean 0 and variance 1, so it normalizes nothing: after four
    stages of a small body, features can differ by 1e-11. The names of parameters and buffers stay the same, so
    ``from_pretrained`` reads the trained statistics into frozen layers.
    """
    for name, frozen in list(model.named_modules()):
        if type(frozen).__name__.endswith("FrozenBatchNorm2d"):
            layer = torch.nn.BatchNorm2d(frozen.weight.numel())
            layer.load_state_dict(frozen.state_dict())
            model.set_submodule(name, layer)


def _read_config(fields: Mapping[str, Any], class_names: Sequence[str]) -> Any:
    """Builds transformers' configuration object from plain values."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as KNOWN

    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in KNOWN:
        raise ModelError(
            f"unknown model_type {repr(kind)[:80]}; transformers' detectors are {', '.join(sorted(KNOWN))}"
        )
    plain = _filter(fields)
    _check_backbone(plain)
    _check_counts(plain)
    plain.pop("model_type")
    try:
        config = AutoConfig.for_model(kind, **plain)
    except (*_ERRORS, StrictDataclassError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ModelError(
            f"transformers does not accept this configuration of {kind}: {get_first_line(cause)}"
        ) from error
    _name_classes(config, class_names)
    return config


def _filter(value: Any) -> Any:
    """The configuration without the fields that load code or files."""
    if isinstance(value, Mapping):
        return {key: _filter(item) for key, item in value.items() if not _LEFT_OUT.fullmatch(str(key))}
    return [_filter(item) for item in value] if isinstance(value, list | tuple) else value


def _check_backbone(fields: Mapping[str, Any]) -> None:
    """Refuses a body by name, which transformers would look up on the hub."""
    name = fields.get("backbone")
    if name is not None and (not fields.get("use_timm_backbone") or ":" in str(name) or "/" in str(name)):
        raise ModelError(
            f"the configuration names the backbone {repr(name)[:80]}, which would be downloaded; describe it with "
            "backbone_config, for example {model_type: resnet, ...}"
        )


def _check_counts(value: Any, name: str = "") -> None:
    """Refuses numbers of layers that would take hours to build, and sizes beyond any model's."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_counts(item, str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            _check_counts(item, name)
    elif isinstance(value, int) and abs(value) > (most := 1000 if _REPEATED.search(name) else 2**20):
        raise ModelError(f"the configuration's {name} is {repr(value)[:80]}; expected at most {most}")


def _name_classes(config: Any, class_names: Sequence[str]) -> None:
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: i for i, name in enumerate(class_names)}


def _read_preprocessor(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model's ``preprocessor_config.json`` that decide how images are prepared."""
    from transformers import AutoImageProcessor

    fields = AutoImageProcessor.from_pretrained(source, **options).to_dict()
    return dict(json.loads(json.dumps({name: fields[name] for name in _PREPARATION_FIELDS if name in fields})))
