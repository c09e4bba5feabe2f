"""Writes the results of ``gpu.py`` so far as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

TARGETS = {"step ratio": 1.10, "memory ratio": 1.35}
METHODS = ("none", "fgd", "roi_imitation", "gt_mask", "gdetkd")
PRECISIONS = ("bf16", "fp32")


def compare_with_target(name: str, value: float) -> str:
    """Returns, for example, ``1.08 (target 1.10: met)``."""
    return f"{value:.2f} (target {TARGETS[name]:.2f}: {'met' if value <= TARGETS[name] else 'missed'})"


def write_summary(results: Mapping[str, Mapping[str, Any]], trials: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    """Returns the results so far as Markdown, with a dash for each missing one."""
    lines = ["| precision | step, ms | floor, ms | step ratio | memory, MiB | plain, MiB | memory ratio |"]
    lines += ["|---|---|---|---|---|---|---|", *(_write_cost_row(results, precision) for precision in PRECISIONS)]
    lines += ["", "| detector | bf16 AP | fp32 AP |", "|---|---|---|"]
    trained = {precision: results.get(f"shapes-{precision}", {}).get("AP") for precision in PRECISIONS}
    for title, found in (
        ("shipped teacher, scenes at (1060, 600) of 1216 x 736", results.get("pasted", {})),
        ("shapes/frcnn-frcnn, trained", trained),
    ):
        lines.append(_write_row(title, _write_number(found.get("bf16")), _write_number(found.get("fp32"))))
    pair = results.get("two-processes")
    facts = "not measured"
    if pair:
        equal = f"losses finite: {pair['finite']}, weights equal: {pair['equal']}"
        facts = f"{pair['steps']} steps over {pair['backend']}, {equal}"
    lines += ["", f"Two processes on one device: {facts}.", ""]
    teacher = results.get("bccd-teacher", {})
    lines += [f"BCCD at 640 x 480, R18 from R50 (teacher {_write_number(teacher.get('AP'))} AP):", ""]
    lines += ["| method | AP by seed | mean | deviation | s/step | MiB |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(_write_method_row(trials, method) for method in METHODS)])


def _write_cost_row(results: Mapping[str, Mapping[str, Any]], precision: str) -> str:
    step = results.get(f"cost-{precision}-step")
    plain, distilled = (results.get(f"cost-{precision}-memory-{kind}") for kind in ("plain", "distilled"))
    times, ratio = ["-", "-"], "-"
    if step:  # the step of the ratio, without loading data
        times = [f"{1e3 * seconds:.0f}" for seconds in (step["floor"] * step["ratio"], step["floor"])]
        ratio = compare_with_target("step ratio", step["ratio"])
    sizes = [f"{facts['peak_memory_mb']:.0f}" if facts else "-" for facts in (distilled, plain)]
    memory = "-"
    if plain and distilled:
        memory = compare_with_target("memory ratio", distilled["peak_memory_mb"] / plain["peak_memory_mb"])
    return _write_row(precision, *times, ratio, *sizes, memory)


def _write_method_row(trials: Mapping[tuple[str, int], Mapping[str, Any]], method: str) -> str:
    own = [facts for (name, _), facts in sorted(trials.items()) if name == method]
    if not own:
        return _write_row(method, *"-----")
    ap = [facts["AP"] for facts in own]
    spread = f"{stdev(ap):.1f}" if len(ap) > 1 else "-"
    seconds, memory = (mean(facts[name] for facts in own) for name in ("seconds_per_step", "peak_memory_mb"))
    return _write_row(
        method, ", ".join(map(_write_number, ap)), _write_number(mean(ap)), spread, f"{seconds:.3f}", f"{memory:.0f}"
    )


def _write_row(*columns: str) -> str:
    return "| " + " | ".join(columns) + " |"


def _write_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
