"""Settings chosen by experiments, with their evidence. ``auto`` in a recipe uses them."""

from __future__ import annotations

from typing import Literal

from gdetkd_cli.detectors.protocol import Detector

# A two-stage student has layers between its region embedding and its predictions. A dense student's embedding is the
# last feature of its class branch, and CKD with weight 1 reduces its class scores: an FCOS had 32.3 AP with SGFI
# alone, 26 with CKD of weight 1, and 32.7 with 0.05 (docs/experiments.md, "How much contrast for a dense student").
CKD_WEIGHTS = {"two-stage": 1.0, "dense": 0.05}
# As published for two-stage and for dense detectors (Cao et al., NeurIPS 2022).
PKD_WEIGHTS = {"two-stage": 6.0, "dense": 10.0}

# As many as a Faster R-CNN's head trains on (the paper). On an H100, ResNet-50 from ResNeXt-101 at 800 pixels, a step
# costs 1.41 times the floor with 512 regions, 1.26 with 256, 1.22 with 128 and 1.20 with 64 (docs/benchmarks/speed.md).
MOST_REGIONS = 512
# A CPU's step grows with the regions.
MOST_REGIONS_ON_CPU = 64

# A fresh head fits confident targets before its features can support them: 31.3 and 28.0 AP if prediction KD comes in
# over half of the run, 21.8 and 25.9 if it acts from the start (docs/experiments.md, "When prediction KD comes in").
FRESH_HEAD_WARMUP = 0.5  # of the run's steps


def choose_weight(method: Literal["ckd", "pkd"], student: Detector) -> float:
    """The weight of a term that depends on the student's family."""
    family: Literal["two-stage", "dense"] = "two-stage" if student.family == "two-stage" else "dense"
    return (CKD_WEIGHTS if method == "ckd" else PKD_WEIGHTS)[family]


def choose_region_count(student: Detector, device: str) -> int:
    """Maximum of regions per image for the terms: as many as the student's head trains on, fewer on a CPU."""
    own = student.sampled_proposals or MOST_REGIONS
    return min(own, MOST_REGIONS_ON_CPU) if device == "cpu" else own


def choose_prediction_warmup(steps: int, *, trained_head: bool) -> int:
    """Steps over which prediction KD comes in; ``trained_head``: the student's head is transferred or trained."""
    return 0 if trained_head else int(FRESH_HEAD_WARMUP * steps)
