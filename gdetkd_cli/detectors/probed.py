"""Any model that probing understands, as a teacher: its pyramid is read, and nothing else of it is known.

Shapes: N images, R regions; boxes xyxy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gdetkd_cli.detectors.pooling import DENSE_CELLS, TWO_STAGE_CELLS, assign_levels, channels_of, pool_assigned
from gdetkd_cli.detectors.protocol import Detector, Family, Finding, Observation, RegionView, View
from gdetkd_cli.detectors.torchvision.common import device_of, evaluating
from gdetkd_cli.errors import ModelError, PairError
from gdetkd_cli.probing.formats.runner import RUN_ERRORS, Runner, reason_of
from gdetkd_cli.probing.geometry import Geometry
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.outputs import OutputForm
from gdetkd_cli.probing.pyramid import Probed, measure_image_frame, probe
from gdetkd_cli.structures import Batch, Detections, Frame, LevelSpec, Pyramid, Regions


class ProbedDetector(Detector):
    """A model of unknown code, from a TorchScript file for example. It can teach by its features, but not be trained.

    Its region embedding is the mean of a region's pooled feature. Its detections are read where their form is known.
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
            source: for messages.
            kind: of its file.
            model_input: what it wants its images to be.
            size: (height, width) pixels of an image that it can be run on.
            class_names: K names of what it detects; by default those that its file tells.
            levels: names of the pyramid's levels, where someone knows better.

        Raises:
            ModelError, NoPyramidError: probing does not understand it.
        """
        self.module: nn.Module = runner.module
        self._runner = runner
        self._source = source
        self.kind = kind
        self.class_names = class_names or runner.class_names
        self._input = model_input
        self._frames: dict[tuple[int, int], Geometry] = {}
        self.probed: Probed = probe(runner, size, model_input, levels, len(self.class_names) or None)
        self._levels = tuple(
            LevelSpec(level.name, level.channels, level.cells.stride, level.cells.offset, level.shape)
            for level in self.probed.levels
        )

    @property
    def levels(self) -> tuple[LevelSpec, ...]:
        return self._levels

    @property
    def parameter_count(self) -> int:
        return self._runner.parameters

    @property
    def finding(self) -> Finding:
        found = self.probed
        form = found.detections
        return Finding(self.kind, found.call.name, form.name if form else None, found.reason, found.confidence)

    @property
    def embedding_channels(self) -> int:
        return max(level.channels for level in self.levels)

    @property
    def embedding_source(self) -> str:
        return "mean of the pooled region"

    def forward_train(self, batch: Batch, *, candidates: bool = True) -> Observation:
        raise PairError(f"{self._source} can teach, but not be trained: its losses are not known")

    def _detection_form(self) -> OutputForm:
        """The form of its detections.

        Raises:
            PairError: they cannot be read, or their classes are not known.
        """
        form = self.probed.detections
        if form is None:
            known = f"{len(self.class_names)} classes" if self.class_names else "classes that are not known"
            raise PairError(
                f"{self._source}, a detector of {known}, can teach by its features, but its detections cannot be read; "
                "expected boxes, scores and labels, or YOLO's one tensor, whose classes the recipe must name if the "
                "file does not (teacher.classes)"
            )
        if not self.class_names:
            raise PairError(
                f"the classes that {self._source} detects are not known; name them in a recipe, with teacher.classes"
            )
        return form

    def check_detects(self) -> None:
        self._detection_form()

    @torch.no_grad()
    def predict(self, images: list[Tensor]) -> list[Detections]:
        form = self._detection_form()
        prepared = [self._input.prepare(image) for image in images]
        # Unknown code decodes boxes in whatever dtype autocast gives it, so it runs as it was made.
        with evaluating(self.module), torch.autocast(device_of(self.module).type, enabled=False):
            groups = [form.read(self._run(group), len(group)) for group in self.probed.call.groups(prepared)]
        found = list(chain(*groups))
        unknown = [label for one in found for label in one.labels.tolist() if label > len(self.class_names)]
        if unknown:
            raise PairError(
                f"{self._source} detects a class number {unknown[0]}, counted from 1, but {len(self.class_names)} "
                "classes are named; correct teacher.classes"
            )
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        return [
            Detections(boxes=self._input.to_image(one.boxes, size), scores=one.scores, labels=one.labels)
            for one, size in zip(found, sizes, strict=True)
        ]

    @torch.no_grad()
    def extract_features(self, batch: Batch) -> Observation:
        prepared = [self._input.prepare(image) for image in batch.images]
        with evaluating(self.module):
            groups = [self._read(images) for images in self.probed.call.groups(prepared)]
        maps = tuple(stack([group[1][level] for group in groups]) for level in range(len(self.levels)))
        height, width = (max(group[0].shape[axis] for group in groups) for axis in (-2, -1))
        frame = self._frame_of(batch, (height, width))
        return Observation(losses={}, pyramid=Pyramid(maps=maps, levels=self.levels, frame=frame), candidates=None)

    def _frame_of(self, batch: Batch, size: tuple[int, int]) -> Frame:
        """Where the network's input, (height, width) pixels, lies in the batch's images."""
        frames = [self._frame(image) for image in batch.images]
        stride, offset = (torch.tensor(xs).flip(1) for xs in ([f.stride for f in frames], [f.offset for f in frames]))
        return Frame.of(1 / stride, 0.5 - offset / stride, size, batch.images[0].device)

    def region_outputs(self, seen: Observation, regions: Regions, needs: frozenset[View]) -> RegionView:
        assignment = assign_levels(seen.pyramid, regions, cells_per_side=self.cells_per_side)
        pooled = pool_assigned(seen.pyramid, regions, assignment, size=7, sampling_ratio=2)
        return RegionView(
            pooled=pooled,
            pooled_channels=channels_of(self.levels, assignment),
            embedding=pooled.mean(dim=(2, 3)) if "embedding" in needs else None,
            level=assignment,
        )

    @property
    def cells_per_side(self) -> float:
        """Of a region on its level: as the model itself does it, where that was seen."""
        if self.probed.least_side is not None:
            return self.probed.least_side * 2**0.5
        return TWO_STAGE_CELLS if self.probed.family == "two-stage" else DENSE_CELLS

    def _run(self, images: list[Tensor]) -> object:
        """What the model returns for prepared images that one call takes."""
        try:
            return self._runner.run(self.probed.call, images)
        except RUN_ERRORS as error:
            height, width = images[0].shape[-2:]
            raise ModelError(
                f"{self._source} cannot be run on an image of {height} x {width} pixels "
                f"({reason_of(error)}); if it was made for one size, say so with input.size and "
                "input.fit: true"
            ) from error

    def _read(self, images: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The network's input and the levels, (N, C, H, W), of prepared images that one call takes."""
        addresses = [level.address for level in self.probed.levels]
        network_input, values = self._runner.read(self.probed.call, images, addresses)
        size = network_input.shape[-2:]
        return network_input, [
            level.as_map(value, size) for value, level in zip(values, self.probed.levels, strict=True)
        ]

    def _frame(self, image: Tensor) -> Geometry:
        """Where the network's input lies in images of this size; measured once for each size."""
        size = (image.shape[-2], image.shape[-1])
        if size not in self._frames:
            with evaluating(self.module), torch.autocast(image.device.type, enabled=False):
                self._frames[size] = measure_image_frame(self._runner, self.probed.call, image, self._input)
        return self._frames[size]


def stack(maps: Sequence[Tensor]) -> Tensor:
    """Maps of several calls as one batch, padded at the far sides to the largest."""
    height, width = (max(m.shape[axis] for m in maps) for axis in (-2, -1))
    return torch.cat([pad(m, (0, width - m.shape[-1], 0, height - m.shape[-2])) for m in maps])
