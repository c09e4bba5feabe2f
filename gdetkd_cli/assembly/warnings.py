"""Warnings about data and detectors that can be used, but are probably a mistake."""

from __future__ import annotations

from typing import Protocol

from gdetkd_cli.data.repeats import find_repeated_images
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors.protocol import Detector


def warn_about_data(train: Split, val: Split) -> list[str]:
    """Warns about splits without objects, and about validation images that are also training images."""
    warnings = []
    for split, result in ((train, "the student learns only background"), (val, "there is no AP")):
        if not any(len(record.labels) for record in split.records):
            warnings.append(
                f"warning: no image of {split.name} has a usable object, so {result}; check the annotations and "
                "data.classes"
            )
    repeated = find_repeated_images(train, val)
    if repeated:
        warnings.append(
            f"warning: {len(repeated)} of {len(val)} validation images are training images, too ({repeated[0]} first), "
            "so the AP is too high; remove them from one split"
        )
    return warnings


class Weighted(Protocol):
    """A detector or an exported file."""

    def list_bad_weights(self) -> list[str]: ...


def warn_about_weights(detector: Weighted) -> list[str]:
    """Warns about NaN and infinity."""
    bad = detector.list_bad_weights()
    if not bad:
        return []
    return [
        f"warning: {len(bad)} of its weight tensors contain NaN or infinity ({bad[0]} first), so its results are "
        "meaningless; use an earlier checkpoint"
    ]


def warn_about_normalization(student: Detector) -> list[str]:
    """Warns about frozen batch normalization without statistics, in which the signal may vanish."""
    layers = [m for m in student.module.modules() if type(m).__name__.endswith("FrozenBatchNorm2d")]
    buffers = [dict(layer.named_buffers(recurse=False)) for layer in layers]
    fresh = [own for own in buffers if (own["running_mean"] == 0).all() and (own["running_var"] == 1).all()]
    if not fresh:
        return []
    return [
        f"warning: {len(fresh)} of the student's layers of batch normalization are frozen with mean 0 and variance 1, "
        "so they normalize nothing; start from trained weights, or let these layers train"
    ]


def warn_about_sizes(student: Detector, teacher: Detector) -> list[str]:
    """Warns about a student that is larger than its teacher."""
    own, other = student.parameter_count, teacher.parameter_count
    if own <= other:
        return []
    return [
        f"warning: the student has {own / 1e6:.2f} M parameters, more than the teacher's {other / 1e6:.2f} M; are the "
        "two exchanged?"
    ]
