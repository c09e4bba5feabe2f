"""A teacher from any model with a pyramid that probing finds; nothing else of the model is known.

Shapes: N images, R regions; boxes xyxy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gdetkd_cli.detectors.pooling import DENSE_CELLS, TWO_STAGE_CELLS, assign_levels, get_channels, pool_assigned
from gdetkd_cli.detectors.protocol import Detector, Family, Finding, Observation, RegionView, View
from gdetkd_cli.detectors.torchvision.common import get_device, use_eval_mode
from gdetkd_cli.errors import ModelError, PairError
from gdetkd_cli.probing.formats.runner import RUN_ERRORS, Runner, find_reason
from gdetkd_cli.probing.geometry import Geometry
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.outputs import OutputForm
from gdetkd_cli.probing.pyramid import Probed, measure_image_frame, probe, probe_image
from gdetkd_cli.structures import Batch, Detections, Frame, LevelSpec, Pyramid, Regions


class ProbedDetector(Detector):
    """A model of unknown code, such as a TorchScript file. It can teach with its features but cannot be trained.

    Its region embedding is the mean of a region's pooled feature. Its detections are read if their form is known.
    """

    family: Family = "unknown"

    def __init__(
        self,
        *,
        runner: Runner,
        source: str,
        kind: str,
        model_input: ModelInput,
        size: tuple[int, int],
        class_names: tuple[str, ...] = (),
        levels: tuple[str, ...] = (),
    ) -> None:
        """Probes the model.

        Args:
            runner: the model, in evaluation mode, on the CPU.
            model_input: how its images are prepared, as far as the user said.
            size: (height, width) pixels of an image that it accepts.
            class_names: K names of its classes; by default those in its file.
            levels: names of the pyramid's levels, if the user named them.

        Raises:
            ModelError, NoPyramidError: the model cannot be run, or has no pyramid.
        """
        self.module: nn.Module = runner.module
        self._runner = runner
        self._source = source
        self.kind = kind
        self.class_names = class_names or runner.class_names
        self._frames: dict[tuple[int, int], Geometry] = {}
        self.probed: Probed = probe(runner, size, model_input, levels, len(self.class_names) or None)
        self._input = self.probed.model_input
        self._levels = tuple(
            LevelSpec(level.name, level.channels, level.cells.stride, level.cells.offset, level.shape)
            for level in self.probed.levels
        )

    @torch.no_grad()
    def accept_any_size(self) -> str | None:
        """Pads images to multiples of the coarsest stride if the model takes no others; returns a note if it does.

        Many networks enlarge a coarse map and join it with a finer one, which fails where a side was rounded.
        """
        if self._input.fit is not None:
            return None
        image = probe_image((self.probed.size[0] + 21, self.probed.size[1] + 13))
        if self._accepts(image, self._input):
            return None
        stride = round(max(max(level.stride) for level in self.levels))
        for multiple in (stride, 2 * stride, 4 * stride):
            padded = replace(self._input, multiple=multiple)
            if self._accepts(image, padded):
                self._input = padded
                return (
                    f"takes only images whose sides are multiples of {multiple} pixels, so images are padded at the "
                    "right and the bottom"
                )
        return None

    def _accepts(self, image: Tensor, model_input: ModelInput) -> bool:
        prepared = [model_input.prepare(image)]
        try:
            with use_eval_mode(self.module):
                self._runner.run(self.probed.call, prepared)
                self._read(prepared)
        except (ModelError, *RUN_ERRORS):
            return False
        return True

    @property
    def levels(self) -> tuple[LevelSpec, ...]:
        return self._levels

    @property
    def parameter_count(self) -> int:
        return self._runner.parameters

    def list_bad_weights(self) -> list[str]:
        return self._runner.list_bad_weights()

    @property
    def finding(self) -> Finding | None:
        probed, form = self.probed, self.probed.detections
        return Finding(self.kind, probed.call.name, form.name if form else None, probed.reason, probed.confidence)

    @property
    def embedding_channels(self) -> int:
        return max(level.channels for level in self.levels)

    @property
    def embedding_source(self) -> str:
        return "mean of the pooled region"

    def forward_train(self, batch: Batch, *, candidates: bool = True) -> Observation:
        raise PairError(
            f"{self._source} can teach but cannot be trained, because its losses are unknown; choose another student"
        )

    def _require_form(self) -> OutputForm:
        """The form of its detections; raises a PairError if they cannot be read, or their classes are unknown."""
        form = self.probed.detections
        if form is None:
            known = f"{len(self.class_names)} classes" if self.class_names else "unknown classes"
            raise PairError(
                f"{self._source}, a detector of {known}, can teach with its features, but its detections cannot be "
                "read; expected boxes, scores and labels, or YOLO's single tensor; if the file does not name the "
                "classes, name them with --classes, or with teacher.classes in a recipe"
            )
        if not self.class_names:
            raise PairError(
                f"the classes of {self._source} are unknown; name them with --classes, or with teacher.classes in a "
                "recipe"
            )
        return form

    def check_detects(self) -> None:
        self._require_form()

    @torch.no_grad()
    def predict(self, images: list[Tensor]) -> list[Detections]:
        form = self._require_form()
        prepared = [self._input.prepare(image) for image in images]
        # Unknown code would decode boxes in autocast's dtype, so it runs without autocast.
        with use_eval_mode(self.module), torch.autocast(get_device(self.module).type, enabled=False):
            groups = [form.read(self._run(group), len(group)) for group in self.probed.call.groups(prepared)]
        detections = list(chain(*groups))
        unknown = [label for d in detections for label in d.labels.tolist() if label > len(self.class_names)]
        if unknown:
            raise PairError(
                f"{self._source} detected class {unknown[0]} (counted from 1), but only {len(self.class_names)} "
                "classes are named; correct teacher.classes"
            )
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return [
            Detections(boxes=self._input.to_image(d.boxes, size), scores=d.scores, labels=d.labels)
            for d, size in zip(detections, sizes, strict=True)
        ]

    @torch.no_grad()
    def extract_features(self, batch: Batch) -> Observation:
        prepared = [self._input.prepare(image) for image in batch.images]
        with use_eval_mode(self.module):
            groups = [self._read(images) for images in self.probed.call.groups(prepared)]
        maps = tuple(stack([group[1][level] for group in groups]) for level in range(len(self.levels)))
        height, width = (max(group[0].shape[axis] for group in groups) for axis in (-2, -1))
        frame = self._frame_of(batch, (height, width))
        return Observation(losses={}, pyramid=Pyramid(maps=maps, levels=self.levels, frame=frame), candidates=None)

    def _frame_of(self, batch: Batch, size: tuple[int, int]) -> Frame:
        """The frame of the network's input, ``size`` (height, width) pixels, in the batch's images."""
        frames = [self._measure_frame(image) for image in batch.images]
        stride, offset = (torch.tensor(xs).flip(1) for xs in ([f.stride for f in frames], [f.offset for f in frames]))
        return Frame.of(1 / stride, 0.5 - offset / stride, size, batch.images[0].device)

    def region_outputs(self, seen: Observation, regions: Regions, needs: frozenset[View]) -> RegionView:
        return read_regions(seen.pyramid, regions, needs, cells_per_side=self.cells_per_side)

    @property
    def cells_per_side(self) -> float:
        """Usual side of a region on its level: the model's own if probing observed it, else the family's."""
        if self.probed.least_side is not None:
            return self.probed.least_side * 2**0.5
        return TWO_STAGE_CELLS if self.probed.family == "two-stage" else DENSE_CELLS

    def _run(self, images: list[Tensor]) -> object:
        """Runs the model on prepared images that fit into one call."""
        try:
            return self._runner.run(self.probed.call, images)
        except RUN_ERRORS as error:
            raise self._describe_failure(images, error) from error

    def _read(self, images: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Reads the network's input and the levels, (N, C, H, W), of prepared images that fit into one call."""
        addresses = [level.address for level in self.probed.levels]
        try:
            network_input, values = self._runner.read(self.probed.call, images, addresses)
        except RUN_ERRORS as error:
            raise self._describe_failure(images, error) from error
        size = network_input.shape[-2:]
        return network_input, [
            level.as_map(value, size) for value, level in zip(values, self.probed.levels, strict=True)
        ]

    def _describe_failure(self, images: Sequence[Tensor], error: Exception) -> ModelError:
        height, width = images[0].shape[-2:]
        return ModelError(
            f"{self._source} fails on an image of {height} x {width} pixels ({find_reason(error)}); if it accepts only "
            "some sizes, set input.size and input.fit: true"
        )

    def _measure_frame(self, image: Tensor) -> Geometry:
        """The geometry of the network's input in images of this size, measured once per size."""
        size = (image.shape[-2], image.shape[-1])
        if size not in self._frames:
            with use_eval_mode(self.module), torch.autocast(image.device.type, enabled=False):
                self._frames[size] = measure_image_frame(self._runner, self.probed.call, image, self._input)
        return self._frames[size]


def read_regions(pyramid: Pyramid, regions: Regions, needs: frozenset[View], *, cells_per_side: float) -> RegionView:
    """Reads what a teacher without known heads says about regions: their levels, and features pooled from these.

    Args:
        regions: R of them.
        needs: features are pooled only for ``pooled`` and ``embedding``.
        cells_per_side: usual side of a region on its level.
    """
    assignment = assign_levels(pyramid, regions, cells_per_side=cells_per_side)
    if not needs & {"pooled", "embedding"}:
        return RegionView(level=assignment)
    pooled = pool_assigned(pyramid, regions, assignment)
    return RegionView(
        pooled=pooled,
        pooled_channels=get_channels(pyramid.levels, assignment),
        embedding=pooled.mean(dim=(2, 3)) if "embedding" in needs else None,
        level=assignment,
    )


def stack(maps: Sequence[Tensor]) -> Tensor:
    """Joins the maps of several calls to one batch, padded at the far sides to the largest."""
    height, width = (max(m.shape[axis] for m in maps) for axis in (-2, -1))
    return torch.cat([pad(m, (0, width - m.shape[-1], 0, height - m.shape[-2])) for m in maps])
