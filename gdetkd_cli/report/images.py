"""Draws images with boxes: detections beside the truth, or a sheet of annotated images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from gdetkd_cli.data.bad_images import BadImageError
from gdetkd_cli.data.split import Split
from gdetkd_cli.evaluation.predict import Predictor
from gdetkd_cli.report.figures import save_figure
from gdetkd_cli.structures import Detections
from gdetkd_cli.text import show_hidden

_MIN_SCORE = 0.5
_SHEET_COLUMNS = 4
_SHEET_PIXELS = 500  # longest side of an image on a sheet, at least


def draw_predictions(
    *, split: Split, predictors: Mapping[str, Predictor], folder: Path, count: int, device: str
) -> None:
    """Draws the truth and each predictor's boxes (score at least 0.5) side by side, one file per image.

    Args:
        split: the first ``count`` images are drawn; images that are left out (``Split.bad``) are passed over.
        predictors: by title, left to right after the truth.
        folder: made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(min(count, len(split))):
        path = folder / f"{index:02d}.png"
        try:
            draw_grid(split=split, predictors=predictors, path=path, indices=[index], device=device)
        except BadImageError:
            if split.bad is None:
                raise


def draw_grid(
    *, split: Split, predictors: Mapping[str, Predictor], path: Path, indices: list[int], device: str
) -> None:
    """Draws one image per row, with columns for the truth and for each predictor's boxes."""
    columns = 1 + len(predictors)
    figure = Figure(figsize=(3.2 * columns, 3.2 * len(indices)), layout="constrained")
    axes = figure.subplots(len(indices), columns, squeeze=False)
    for row, index in zip(axes, indices, strict=True):
        record, pixels = split.records[index], split.read(index)
        _draw(row[0], pixels, record.boxes, record.labels, None, split.class_names)
        image = (pixels.float() / 255).to(device)
        for axis, predictor in zip(row[1:], predictors.values(), strict=True):
            found: Detections = predictor.predict([image])[0]
            sure = (found.scores >= _MIN_SCORE).cpu()
            boxes, labels, scores = (part.cpu()[sure] for part in (found.boxes, found.labels, found.scores))
            _draw(axis, pixels, boxes, labels, scores, split.class_names)
    for axis, title in zip(axes[0], ["truth", *predictors], strict=True):
        axis.set_title(title)
    save_figure(figure, path)


def draw_sheet(split: Split, path: Path, *, count: int = 12) -> list[int]:
    """Draws images with their boxes in a grid, evenly chosen from those with objects, or from all if none has any.

    Args:
        split: images that cannot be decoded are passed over.
        path: the file to write, unless there is no image to draw.

    Returns:
        Indices of the images that are drawn.
    """
    full = [index for index, record in enumerate(split.records) if len(record.labels)] or list(range(len(split)))
    chosen = full[:: max(1, len(full) // count)][:count]
    rows = max(1, -(-len(chosen) // _SHEET_COLUMNS))
    figure = Figure(figsize=(3.2 * _SHEET_COLUMNS, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, _SHEET_COLUMNS, squeeze=False).ravel()
    drawn: list[int] = []
    for axis in axes:
        axis.set_axis_off()
    for index in chosen:
        try:
            pixels = split.read(index)
        except BadImageError:
            continue
        record = split.records[index]
        every = max(1, max(record.size) // _SHEET_PIXELS)
        axis = axes[len(drawn)]
        _draw(axis, pixels[:, ::every, ::every], record.boxes / every, record.labels, None, split.class_names)
        drawn.append(index)
    if drawn:
        save_figure(figure, path)
    return drawn


def _draw(
    axis: Axes, pixels: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor | None, class_names: tuple[str, ...]
) -> None:
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]  # a ListedColormap
    axis.imshow(pixels.permute(1, 2, 0).numpy())
    axis.set_axis_off()
    for i, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        x0, y0, x1, y1 = box
        colour = colours[(label - 1) % len(colours)]
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.5))
        text = class_names[label - 1] + (f" {scores[i]:.2f}" if scores is not None else "")
        text, background = show_hidden(text), (*colour, 0.7)
        # parse_math: a class may be named "$"
        axis.text(
            x0, y0 - 1, text, fontsize=5.5, color="black", backgroundcolor=background, va="bottom", parse_math=False
        )
