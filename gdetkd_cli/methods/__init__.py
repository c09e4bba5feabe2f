"""Distillation methods, one file each: equation, term, and requirements on the pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from gdetkd_cli.methods import ckd, prediction, sgfi
from gdetkd_cli.methods.baselines import cwd, fgd, fitnet, gt_mask, logit, pkd, roi_imitation

# By the name of its block in the recipe, the function that builds a term from the pair and the block's settings.
BUILDERS: Mapping[str, Callable[..., nn.Module]] = {
    "sgfi": sgfi.build,
    "ckd": ckd.build,
    "class_kd": prediction.build_class_term,
    "box_kd": prediction.build_box_term,
    "fitnet": fitnet.build,
    "gt_mask": gt_mask.build,
    "roi_imitation": roi_imitation.build,
    "pkd": pkd.build,
    "cwd": cwd.build,
    "fgd": fgd.build,
    "logit": logit.build,
}
