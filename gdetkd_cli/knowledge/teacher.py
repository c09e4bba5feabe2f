"""A teacher that computes the features of each view of an image once, and reads them from a store afterwards.

Shapes: N images, L levels, C channels, H x W cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gdetkd_cli.detectors.protocol import Detector, Observation
from gdetkd_cli.errors import KnowledgeError, ModelError, PairError
from gdetkd_cli.knowledge.store import Store, Tensors
from gdetkd_cli.structures import Batch, Detections, Frame, ImageView, LevelSpec, Pyramid, name_view

_LEVEL, _SCALE, _GEOMETRY = "level.", ".scale", "geometry"
_MOST = 65504.0  # of float16


class RememberedTeacher:
    """A teacher with a store. Everything but its forward is the detector's own.

    A view that is not in the store is computed in float32 and alone, so that its features do not depend on the other
    images of a batch, not even by rounding, on the precision, or on the process that computes it.

    Args:
        detector: the teacher, in evaluation mode.
        live: whether the detector can run; else a view that is not in the store is an error.
        detections: store of the detections by view, for a detector that cannot run.
        source: of the store, for messages.
        int8: store 8 bits per value and one scale per channel instead of float16.
        parameters: of the teacher, if the detector holds only a part of it.
        views: whether the store has images as they are, and mirrored ones.
    """

    def __init__(
        self,
        detector: Detector,
        store: Store,
        *,
        live: bool = True,
        detections: Store | None = None,
        source: str = "",
        int8: bool = False,
        parameters: int | None = None,
        views: tuple[bool, bool] = (True, True),
    ) -> None:
        if not hasattr(detector, "recall"):
            raise PairError(
                f"{type(detector).__name__} cannot rebuild what it saw from stored features; derive it from "
                "gdetkd_cli.detectors.protocol.Detector, or set distill.teacher_cache to off"
            )
        self.detector = detector
        self.store, self.live, self.source, self.views = store, live, source, views
        self.parameter_count = detector.parameter_count if parameters is None else parameters
        self._detections, self._int8 = detections, int8

    def __getattr__(self, name: str) -> Any:
        return getattr(self.detector, name)

    @torch.no_grad()
    def extract_features(self, batch: Batch) -> Observation:
        """Rebuilds the detector's observation of a batch from the views of its images.

        Only training images come with views. Others are seen once or twice in a run, so a detector that can run does.

        Raises:
            KnowledgeError: a view is not in the store, and the detector cannot run.
        """
        if self.live and not batch.views:
            return self.detector.extract_features(batch)
        views = batch.views or tuple(ImageView(name_view(to_pixels(image))) for image in batch.images)
        device = batch.images[0].device
        stored = [self.store.read(view.name) for view in views]
        if missing := [place for place, found in enumerate(stored) if found is None]:
            seen = [
                batch.images[i] if (pixels := views[i].pixels) is None else pixels.to(device).float() / 255
                for i in missing
            ]
            for place, computed in zip(missing, self.compute(seen), strict=True):
                stored[place] = computed
                self.store.add(views[place].name, computed)
        groups = cast(list[Tensors], stored)
        expected = {_GEOMETRY, *(f"{_LEVEL}{number}" for number in range(len(self.levels)))}
        if not all(expected <= group.keys() for group in groups):
            raise KnowledgeError(
                f"the stored features have other parts than the teacher's {len(self.levels)} levels; remove their "
                "folder, and fill it again"
            )
        return self._rebuild(batch, groups)

    @torch.no_grad()
    def compute(self, images: Sequence[Tensor]) -> list[Tensors]:
        """Runs the detector; returns what is stored of each image (3, H, W) in 0..1."""
        if not self.live:
            raise KnowledgeError(
                f"{self.source} knows nothing of {len(images)} of the images in this batch; it was taught with other "
                "images, or without mirrored ones: run `gdetkd teach` with this recipe's data"
            )
        results: list[Tensors] = []
        for image in images:
            alone = Batch([image], [], torch.zeros(1, dtype=torch.int64))
            with torch.autocast(image.device.type, enabled=False):
                seen = self.detector.extract_features(alone)
            self._check_rebuilds(alone, seen)
            results += self._pack(alone, seen)
        return results

    def check_detects(self) -> None:
        """Raises a PairError if the detections cannot be read."""
        if self.live:
            self.detector.check_detects()
        elif self._detections is None:
            raise PairError(f"{self.source} has no detections, because those of its teacher could not be read")

    def predict(self, images: list[Tensor]) -> list[Detections]:
        """Detects objects as the detector does, or reads its stored detections.

        Raises:
            KnowledgeError: the detections of an image are not stored.
        """
        if self.live:
            return self.detector.predict(images)
        return [self._read_detections(image) for image in images]

    def _read_detections(self, image: Tensor) -> Detections:
        found = self._detections.read(name_view(to_pixels(image))) if self._detections is not None else None
        if found is None:
            raise KnowledgeError(
                f"{self.source} has no detections of an image of {image.shape[-1]} x {image.shape[-2]} pixels; run "
                "`gdetkd teach` with this recipe's data"
            )
        return Detections(**{name: value.to(image.device) for name, value in found.items()})

    def _check_rebuilds(self, batch: Batch, seen: Observation) -> None:
        """Raises a PairError if the detector's own kind of observation cannot be rebuilt."""
        kept = self.detector.keep(seen)
        if type(self.detector.recall(batch, seen.pyramid, kept)) is not type(seen):
            raise PairError(
                f"{type(self.detector).__name__} cannot rebuild its {type(seen).__name__} from stored features; "
                "override Detector.keep and Detector.recall, or set distill.teacher_cache to off"
            )

    def _pack(self, batch: Batch, seen: Observation) -> list[Tensors]:
        """Splits an observation into one group of tensors on the host per image."""
        frame = seen.pyramid.frame.on_host()
        levels = [self._shrink(spec, values) for spec, values in zip(self.levels, seen.pyramid.maps, strict=True)]
        kept = {name: value.float().cpu() for name, value in self.detector.keep(seen).items()}
        packed = []
        for i, image in enumerate(batch.images):
            sizes = torch.tensor([*frame.size, *image.shape[-2:]], dtype=torch.float32)
            group = {_GEOMETRY: torch.cat([frame.scale[i], frame.shift[i], sizes])}
            for number, parts in enumerate(levels):
                group |= {f"{_LEVEL}{number}{part}": value[i].clone() for part, value in parts.items()}
            packed.append(group | {name: value[i].clone() for name, value in kept.items()})
        return packed

    def _shrink(self, level: LevelSpec, values: Tensor) -> dict[str, Tensor]:
        """Rounds a level (N, C, H, W) for the store."""
        greatest = values.abs().amax(dim=(2, 3), keepdim=True).float()
        most = float(greatest.max())  # NaN, if any value is
        if not math.isfinite(most):
            raise ModelError(
                f"the teacher's level {level.name} has NaN or infinity in an image, which is not stored; use an "
                "earlier checkpoint of the teacher"
            )
        if self._int8:
            scale = (greatest / 127).clamp(min=1e-30)
            return {"": (values / scale).round().to(torch.int8).cpu(), _SCALE: scale.cpu()}
        if most > _MOST:
            raise ModelError(
                f"the teacher's level {level.name} has values up to {most:.3g}, but float16 ends at "
                f"{_MOST:.0f}; set distill.teacher_cache to off"
            )
        return {"": values.half().cpu()}

    def _rebuild(self, batch: Batch, stored: Sequence[Tensors]) -> Observation:
        """The detector's observation from each image's group; smaller maps are padded with zeros at the far sides."""
        device = batch.images[0].device
        geometry = torch.stack([group[_GEOMETRY] for group in stored])  # scale, shift, height, width, view's own
        scale, shift, height, width = geometry[:, :2], geometry[:, 2:4], geometry[:, 4], geometry[:, 5]
        sides = torch.tensor([[image.shape[-1], image.shape[-2]] for image in batch.images], dtype=torch.float32)
        # The loader may have resized the image after the teacher saw it.
        scale = scale * geometry[:, [7, 6]] / sides
        frame = Frame.of(scale, shift, (int(height.max()), int(width.max())), device)
        maps = tuple(_join(stored, f"{_LEVEL}{number}", device) for number in range(len(self.levels)))
        names = [name for name in stored[0] if not name.startswith((_LEVEL, _GEOMETRY))]
        kept = {name: torch.stack([group[name] for group in stored]).to(device) for name in names}
        return self.detector.recall(batch, Pyramid(maps, self.levels, frame), kept)


def remember(detector: Detector, store: Store, **options: Any) -> Detector:
    """Builds a ``RememberedTeacher``, which is a ``Detector`` like the one it keeps."""
    return cast(Detector, RememberedTeacher(detector, store, **options))


def to_pixels(image: Tensor) -> Tensor:
    """Converts an image in 0..1 to the uint8 pixels from which the loader made it, on the host."""
    return (image * 255).round().to(torch.uint8).cpu()


def _join(stored: Sequence[Mapping[str, Tensor]], name: str, device: torch.device) -> Tensor:
    """One level of all images (N, C, H, W) in float32, on the device."""
    maps = [group[name] for group in stored]
    height, width = (max(values.shape[axis] for values in maps) for axis in (-2, -1))
    joined = maps[0].new_zeros(len(maps), maps[0].shape[0], height, width)
    for place, values in zip(joined, maps, strict=True):
        place[:, : values.shape[-2], : values.shape[-1]] = values
    levels = joined.to(device, non_blocking=True).float()
    if name + _SCALE in stored[0]:
        levels *= torch.stack([group[name + _SCALE] for group in stored]).to(device, non_blocking=True)
    return levels
