"""DETR-like detectors of Hugging Face transformers, an optional dependency."""

from gdetkd_cli.detectors.transformers.build import (
    build,
    describe_fresh,
    list_class_layers,
    load_pretrained,
    save_pretrained,
)

__all__ = ["build", "describe_fresh", "list_class_layers", "load_pretrained", "save_pretrained"]
