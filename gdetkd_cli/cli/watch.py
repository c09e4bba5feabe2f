"""``gdetkd watch``."""

from __future__ import annotations

from pathlib import Path
from time import sleep
from typing import Annotated

import typer

from gdetkd_cli.text import show_hidden

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 60  # points of a curve
_NO_LOSS = {"step", "lr", "gradient_norm", "images_per_second"}


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that trains, or has trained.")],
    once: Annotated[bool, typer.Option("--once", help="Print the state once and exit.")] = False,
    every: Annotated[float, typer.Option("--every", metavar="SECONDS", min=0.2, help="Seconds between looks.")] = 5.0,
) -> None:
    """Show the AP curve and the latest losses of a run until it ends or stops.

    Example: gdetkd watch runs/student
    """
    from rich.live import Live

    from gdetkd_cli.cli.terminal import build_console

    text, running = describe_run(run)
    if once or not running:
        typer.echo(text)
        return
    with Live(text, console=build_console(), auto_refresh=False) as live:
        while running:
            sleep(every)
            text, running = describe_run(run)
            live.update(text, refresh=True)


def describe_run(run: Path) -> tuple[str, bool]:
    """Describes the state of a run in a few lines; also returns whether it is running.

    Raises:
        RunFolderError: the folder is not a run folder.
    """
    from gdetkd_cli.engine.run_folder import open_existing  # imports torch, which is slow

    folder = open_existing(run)
    lines = list(folder.read_log())
    steps = [line for line in lines if "loss" in line]
    aps = [line["evaluation"]["AP"] for line in lines if "evaluation" in line]
    aps = [ap for ap in aps if ap is not None]
    running = folder.is_held()
    state = "running" if running else "finished" if folder.metrics.exists() else "stopped"
    text = [f"{run}: {state}, {steps[-1]['step'] if steps else 0} steps"]
    text.append(f"AP   {draw_curve(aps)}  {aps[-1]:.1f} (best {max(aps):.1f})" if aps else "AP   no evaluation yet")
    if steps:
        text.append(f"loss {draw_curve([line['loss'] for line in steps])}  {steps[-1]['loss']:.3g}")
        parts = {k: v for k, v in steps[-1].items() if k not in _NO_LOSS | {"loss"} and not k.startswith("weight/")}
        text.append("     " + "  ".join(f"{name} {value:.3g}" for name, value in parts.items()))
        text.append(f"     {steps[-1]['images_per_second']:.1f} images/s  lr {steps[-1]['lr']:.2g}")
    if state == "stopped":
        text.append("no process writes into it; gdetkd train or distill --resume RUN continues it")
    return show_hidden("\n".join(text), keep="\n"), running


def draw_curve(values: list[float]) -> str:
    """Draws values as a row of blocks from the lowest to the highest; longer rows are thinned, the last stays."""
    if len(values) > _WIDTH:
        values = [values[place * (len(values) - 1) // (_WIDTH - 1)] for place in range(_WIDTH)]
    low, high = min(values), max(values)
    if low == high:
        return _BLOCKS[3] * len(values)
    return "".join(_BLOCKS[round((value - low) / (high - low) * (len(_BLOCKS) - 1))] for value in values)
