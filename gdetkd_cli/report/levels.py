"""Draws where each level of a pyramid is active."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from gdetkd_cli.report.figures import save_figure
from gdetkd_cli.report.pyramid import LevelReport


def draw_levels(image: Tensor, levels: Sequence[LevelReport], maps: Sequence[Tensor], path: Path) -> None:
    """Draws each level's activation energy over the image.

    Args:
        image: (3, H, W) in 0..1.
        levels: the geometry of each map's cells.
        maps: (1, C, H_l, W_l) each.
        path: the file to write; its suffix selects a format of matplotlib.
    """
    height, width = image.shape[-2:]
    figure = Figure(figsize=(3.2 * (1 + len(levels)), 3.2 * height / width + 0.5), layout="constrained")
    axes = figure.subplots(1, 1 + len(levels), squeeze=False)[0]
    for axis in axes:
        axis.imshow(image.permute(1, 2, 0).cpu().clamp(0, 1).numpy(), extent=(0, width, height, 0))
        axis.set_axis_off()
    axes[0].set_title(f"{height} x {width}")
    for axis, level, features in zip(axes[1:], levels, maps, strict=True):
        energy = features[0].float().square().mean(dim=0).sqrt().cpu().numpy()
        (stride_y, stride_x), (offset_y, offset_x) = level.stride, level.offset
        left, top = offset_x - stride_x / 2, offset_y - stride_y / 2
        extent = (left, left + stride_x * energy.shape[1], top + stride_y * energy.shape[0], top)
        axis.imshow(energy, extent=extent, cmap="inferno", alpha=0.7, interpolation="nearest")
        axis.set_xlim(0, width)
        axis.set_ylim(height, 0)
        axis.set_title(f"{level.channels} channels, stride {stride_y:.3g}")
    save_figure(figure, path)
