"""Times steps of torchdistill and gdetkd in turn, on the same pair and the same batches.

    pip install torchdistill==1.1.5
    python benchmarks/torchdistill_step.py --recipe shapes/frcnn-frcnn --steps 20

torchdistill imitates features: it adds the mean squared error between the student's and the teacher's levels, hooked by
module path as in its Faster R-CNN examples, to the student's own losses. Its factor-transfer example runs the whole
teacher in evaluation mode; its GHND example runs only the backbone and pyramid (``HeadRCNN``), the fairer comparison.
gdetkd runs the same imitation (``fitnet``) and the unchanged recipe. Loading batches is not timed.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torchdistill.core.distillation import DistillationBox
from torchdistill.losses.registry import register_func2extract_model_output

from gdetkd_cli.commands.plan import prepare_steps, repeat_batches
from gdetkd_cli.engine.stepper import measure_seconds
from gdetkd_cli.recipe.checks import require_distillation
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.methods import select_method
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.structures import Batch

WARMUP = 2


@register_func2extract_model_output
def pass_losses(outputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> dict[str, torch.Tensor]:
    return outputs


def build_torchdistill_step(recipe: Recipe, student: Any, teacher: Any, *, whole: bool) -> Callable[[Batch], None]:
    """Builds torchdistill's step on a batch.

    Args:
        recipe: of the optimizer.
        student, teacher: torchvision's Faster R-CNNs; their levels must have equal channels.
        whole: whether to run the whole teacher or only its backbone and pyramid.
    """
    blocks = [f"backbone.fpn.layer_blocks.{i}" for i in range(len(student.backbone.fpn.layer_blocks))]
    prefix = "" if whole else "seq."
    terms = {
        f"level{i}": {
            "criterion": {"key": "MSELoss", "kwargs": {"reduction": "mean"}},
            "criterion_wrapper": {
                "key": "SimpleLossWrapper",
                "kwargs": {
                    "input": {"is_from_teacher": False, "module_path": path, "io": "output"},
                    "target": {"is_from_teacher": True, "module_path": prefix + path, "io": "output"},
                },
            },
            "weight": 1.0,
        }
        for i, path in enumerate(blocks)
    }
    teacher_config: dict[str, Any] = {
        "forward_proc": "forward_batch_only",
        "requires_grad": False,
        "forward_hook": {"input": [], "output": [prefix + path for path in blocks]},
    }
    if not whole:
        kwargs = {"head_rcnn": {"sequential": ["backbone"]}}
        teacher_config["auxiliary_model_wrapper"] = {"key": "HeadRCNN", "kwargs": kwargs}
    optimizer = recipe.train.optimizer
    config = {
        "num_epochs": 1,
        "teacher": teacher_config,
        "student": {"forward_proc": "forward_batch_target", "forward_hook": {"input": [], "output": blocks}},
        "optimizer": {
            "key": "AdamW",
            "kwargs": {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay},
            "max_grad_norm": recipe.train.clip_norm,
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "func2extract_model_loss": "pass_losses",
            "kwargs": {"model_term": {"weight": 1.0}, "sub_terms": terms},
        },
    }
    device = next(student.parameters()).device
    box = DistillationBox(teacher.eval(), student, {}, config, device, None, False, 1)
    box.pre_epoch_process(epoch=0)

    def step(batch: Batch) -> None:
        targets = [{"boxes": t.boxes, "labels": t.labels} for t in batch.targets]
        loss = box.forward_process(batch.images, targets, {})
        box.post_forward_process(loss=loss)
        loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="shapes/frcnn-frcnn")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", nargs="*", default=["runtime.threads=1"], metavar="FIELD=VALUE")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    recipe = require_distillation(load_recipe(options.recipe, tuple(options.set)))

    steps: dict[str, Callable[[Batch], object]] = {}
    for name in ("fitnet", "gdetkd"):
        setup, stepper = prepare_steps(select_method(recipe, name, steps=recipe.train.steps, seed=recipe.seed))
        steps[f"gdetkd, {'feature imitation' if name == 'fitnet' else 'unchanged recipe'}"] = stepper.distil
    for whole in (True, False):
        assert setup.distiller.teacher is not None
        pair = (copy.deepcopy(setup.student.detector.module), copy.deepcopy(setup.distiller.teacher.module))
        name = "torchdistill, feature imitation, " + ("full teacher forward" if whole else "backbone and pyramid")
        steps[name] = build_torchdistill_step(recipe, *pair, whole=whole)

    source = repeat_batches(setup)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARMUP + options.steps):
        batch = next(source).to(stepper.device)
        for name, step in steps.items():
            spent = measure_seconds(lambda: step(batch), stepper.device)  # noqa: B023  # called at once
            if number >= WARMUP:
                seconds[name].append(spent)
    base = "gdetkd, feature imitation"
    settings = setup.compute.settings
    print(f"{recipe.name}, {recipe.train.batch_size} images a step, {settings.device}, {settings.threads} CPU threads")
    for name, spent in seconds.items():
        ratio = median(a / b for a, b in zip(spent, seconds[base], strict=True))
        print(f"{1000 * median(spent):8.1f} ms  x {ratio:.2f}  {name}")


if __name__ == "__main__":
    main()
