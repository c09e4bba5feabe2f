"""The summary that ``gpu.py`` prints: what is known so far, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

TARGETS = {"step ratio": 1.10, "memory ratio": 1.35}
METHODS = ("none", "fgd", "roi_imitation", "gt_mask", "gdetkd")
PRECISIONS = ("bf16", "fp32")


def met(name: str, value: float) -> str:
    """``1.08 (target 1.10: met)``."""
    return f"{value:.2f} (target {TARGETS[name]:.2f}: {'met' if value <= TARGETS[name] else 'missed'})"


def summary(results: Mapping[str, Mapping[str, Any]], trials: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    """What is known so far, as Markdown; what is not, as a dash."""
    lines = ["| precision | step, ms | floor, ms | step ratio | memory, MiB | plain, MiB | memory ratio |"]
    lines += ["|---|---|---|---|---|---|---|", *(_cost_row(results, precision) for precision in PRECISIONS)]
    lines += ["", "| what | bf16 AP | fp32 AP |", "|---|---|---|"]
    trained = {precision: results.get(f"shapes-{precision}", {}).get("AP") for precision in PRECISIONS}
    for title, found in (
        ("shipped teacher, scenes at (1060, 600) of 1216 x 736", results.get("pasted", {})),
        ("shapes/frcnn-frcnn, trained", trained),
    ):
        lines.append(_row(title, _number(found.get("bf16")), _number(found.get("fp32"))))
    pair = results.get("two-processes")
    told = "not measured"
    if pair:
        equal = f"losses finite: {pair['finite']}, weights equal: {pair['equal']}"
        told = f"{pair['steps']} steps over {pair['backend']}, {equal}"
    lines += ["", f"Two processes on one device: {told}.", ""]
    teacher = results.get("bccd-teacher", {})
    lines += [f"BCCD at 640 x 480, R18 from R50 (teacher {_number(teacher.get('AP'))} AP):", ""]
    lines += ["| method | AP by seed | mean | deviation | s/step | MiB |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(_method_row(trials, method) for method in METHODS)])


def _cost_row(results: Mapping[str, Mapping[str, Any]], precision: str) -> str:
    step = results.get(f"cost-{precision}-step")
    plain, distilled = (results.get(f"cost-{precision}-memory-{kind}") for kind in ("plain", "distilled"))
    times, ratio = ["-", "-"], "-"
    if step:  # the step that the ratio is of, without its data
        times = [f"{1e3 * seconds:.0f}" for seconds in (step["floor"] * step["ratio"], step["floor"])]
        ratio = met("step ratio", step["ratio"])
    sizes = [f"{one['peak_memory_mb']:.0f}" if one else "-" for one in (distilled, plain)]
    memory = "-"
    if plain and distilled:
        memory = met("memory ratio", distilled["peak_memory_mb"] / plain["peak_memory_mb"])
    return _row(precision, *times, ratio, *sizes, memory)


def _method_row(trials: Mapping[tuple[str, int], Mapping[str, Any]], method: str) -> str:
    own = [facts for (name, _), facts in sorted(trials.items()) if name == method]
    if not own:
        return _row(method, *"-----")
    ap = [facts["AP"] for facts in own]
    spread = f"{stdev(ap):.1f}" if len(ap) > 1 else "-"
    seconds, memory = (mean(facts[name] for facts in own) for name in ("seconds_per_step", "peak_memory_mb"))
    return _row(method, ", ".join(map(_number, ap)), _number(mean(ap)), spread, f"{seconds:.3f}", f"{memory:.0f}")


def _row(*columns: str) -> str:
    return "| " + " | ".join(columns) + " |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
