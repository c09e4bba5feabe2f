"""Distillation of object detectors with G-DetKD."""

__version__ = "0.1.0"
