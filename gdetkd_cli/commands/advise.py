"""``gdetkd advise``: short runs of plain training and of some methods, and what to expect of the whole ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gdetkd_cli.commands.compare import run_compare
from gdetkd_cli.compare.table import Comparison
from gdetkd_cli.compare.verdict import Verdict, judge
from gdetkd_cli.engine.events import Observer, silent
from gdetkd_cli.files import write_text
from gdetkd_cli.recipe.checks import require_distillation
from gdetkd_cli.recipe.load import dump_recipe
from gdetkd_cli.recipe.methods import NONE, WHOLE, select_method
from gdetkd_cli.recipe.scaling import scale_to_batch, shorten
from gdetkd_cli.recipe.schema import Recipe

# The methods with the highest AP in most tables of docs/benchmarks.
METHODS = (WHOLE, "roi_imitation")


@dataclass(frozen=True)
class Advice:
    """The result of ``gdetkd advise``.

    Attributes:
        steps: of each short run.
        full_steps: of the recipe.
        recommended: a recipe with the best method and all steps; None if no method finished.
    """

    recipe: str
    steps: int
    full_steps: int
    verdict: Verdict
    comparison: Comparison
    recommended: Path | None


def run_advise(
    recipe: Recipe,
    *,
    share: float = 0.1,
    methods: Sequence[str] = METHODS,
    seeds: int = 1,
    jobs: int = 1,
    output: Path | None = None,
    observer: Observer = silent,
) -> Advice:
    """Trains plain and with some methods for a share of the recipe's steps, and judges the result.

    Learning rate and warm-ups follow the short schedule. A call with the same folder continues the runs.

    Args:
        recipe: the pair, the data and the budget.
        share: of the recipe's steps that each run takes, above 0 and at most 1.
        methods: to try beside plain training, as in ``select_method``.
        seeds, jobs: as in ``run_compare``.
        output: folder of the runs; default: ``runs/advise-NAME-STEPS``, with the steps of the short runs.

    Raises:
        As ``run_compare``.
    """
    whole = scale_to_batch(require_distillation(recipe), processes=1)
    short = shorten(whole, 1 / share)
    folder = output or Path("runs") / f"advise-{recipe.name}-{short.train.steps}"
    comparison = run_compare(short, methods=(NONE, *methods), seeds=seeds, jobs=jobs, output=folder, observer=observer)
    rows = [row for row in comparison.rows if row.steps == short.train.steps]
    verdict = judge(rows, comparison.teacher_ap, whole.train.steps / short.train.steps)
    recommended = None
    if verdict.method is not None:
        recommended = folder / "recommended.yaml"
        chosen = select_method(whole, verdict.method, steps=whole.train.steps, seed=whole.seed)
        write_text(recommended, dump_recipe(chosen))
    return Advice(recipe.name, short.train.steps, whole.train.steps, verdict, comparison, recommended)
