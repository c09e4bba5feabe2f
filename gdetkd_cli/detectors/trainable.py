"""A detector of the user's own code that trains as torchvision's do; its pyramid is what probing finds.

Shapes: N images; boxes xyxy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gdetkd_cli.detectors.measure import is_subsampled
from gdetkd_cli.detectors.probed import ProbedDetector, stack
from gdetkd_cli.detectors.protocol import Candidates, Observation
from gdetkd_cli.detectors.tap import Tap
from gdetkd_cli.detectors.torchvision import common
from gdetkd_cli.errors import PairError
from gdetkd_cli.probing.formats.runner import ModuleRunner, calls_for
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.pyramid import probe_image
from gdetkd_cli.probing.record import Output, tensors_in
from gdetkd_cli.structures import Batch, Pyramid

_JITTERED = 4  # boxes near each true one
_ANYWHERE = 32  # boxes of each image, wherever


@dataclass(frozen=True)
class _Tapped:
    """One call of a module: what it returned, what its first convolution was given, and its levels."""

    returned: Any
    network_input: Tensor
    maps: list[Tensor]


class TrainableDetector(ProbedDetector):
    """An nn.Module called as torchvision's detectors are.

    In training: ``module(images, targets)`` -> its losses by name. In evaluation: ``module(images)`` -> for each image
    ``boxes``, ``scores`` and ``labels``. A module that takes a tensor instead, (N, 3, H, W) or (3, H, W), offers
    features alone: it has no losses here, but a teacher can train it. Every level must be what one of its submodules
    returns. Its candidates are boxes near the true ones and boxes anywhere, since nothing is known of what it predicts
    in training.
    """

    def __init__(
        self,
        *,
        module: nn.Module,
        source: str,
        class_names: tuple[str, ...],
        model_input: ModelInput,
        size: tuple[int, int],
        last: bool = False,
        levels: tuple[str, ...] = (),
    ) -> None:
        """Probes the module.

        Args:
            module: on the CPU.
            source: for messages.
            class_names: K names of the labels 1..K.
            model_input: what it wants its images to be.
            size: (height, width) pixels of an image that it can be run on.
            last: it takes its images as (H, W, 3).
            levels: names of the pyramid's levels, where someone knows better.

        Raises:
            ModelError, NoPyramidError: probing does not understand it.
        """
        training = module.training
        module.eval()
        runner = ModuleRunner(module, calls=calls_for(last=last))
        super().__init__(
            runner=runner, source=source, kind="factory", model_input=model_input, size=size, levels=levels
        )
        with torch.no_grad():
            _, maps = self._read([model_input.prepare(probe_image(size))])
        self._levels = (
            self.levels[0],
            *(
                replace(spec, subsampled=is_subsampled(level, before))
                for spec, level, before in zip(self.levels[1:], maps[1:], maps, strict=False)
            ),
        )
        module.train(training)
        self.class_names = class_names

    @property
    def features_only(self) -> bool:
        """Whether it has neither losses nor detections that are known here."""
        return self.probed.call.takes != "any"

    def forward_train(self, batch: Batch, *, candidates: bool = True) -> Observation:
        # Own code mixes network and boxes in ways that are not known here, and half precision would round the boxes.
        with torch.autocast(batch.images[0].device.type, enabled=False):
            return self._observe(batch, candidates)

    def _observe(self, batch: Batch, candidates: bool) -> Observation:
        if self._input.fit is not None:
            raise PairError(
                f"{self._source} takes one size alone, so it can teach but not be trained; leave out input.fit"
            )
        outputs = [self._output(level.name, level.output) for level in self.probed.levels]
        prepared = [self._input.prepare(image) for image in batch.images]
        if self.features_only:
            groups = [self._tapped(outputs, self.probed.call.argument(g)) for g in self.probed.call.groups(prepared)]
            losses: Any = {}
        else:
            argument = self.probed.call.argument(prepared)
            groups = [self._tapped(outputs, argument, common.targets_for(batch))]
            losses = groups[0].returned
            if not isinstance(losses, dict) or not losses or not all(isinstance(v, Tensor) for v in losses.values()):
                raise PairError(
                    f"{self._source} cannot be trained: called with (images, targets) in training mode it returned "
                    f"{type(losses).__name__}; a dictionary of losses was expected, as torchvision's detectors give it"
                )
        maps = tuple(stack([group.maps[level] for group in groups]) for level in range(len(self.levels)))
        height, width = (max(group.network_input.shape[axis] for group in groups) for axis in (-2, -1))
        pyramid = Pyramid(maps=maps, levels=self.levels, frame=self._frame_of(batch, (height, width)))
        offered = self._candidates(batch) if candidates else None
        return Observation(losses=losses, pyramid=pyramid, candidates=offered)

    def _tapped(self, outputs: Sequence[Output], *arguments: object) -> _Tapped:
        """Calls the module and reads its levels, with their gradients."""
        network: list[Tensor] = []
        first = self.module.get_submodule(self.probed.first)
        handle = first.register_forward_pre_hook(lambda _, inputs: network.append(inputs[0]))
        try:
            with Tap(self.module, list({output.module for output in outputs})) as tap:
                returned = self.module(*arguments)
        except TypeError as error:
            called = "(images, targets)" if len(arguments) > 1 else "images"
            raise PairError(f"{self._source} cannot be trained: called with {called}, {error}") from error
        finally:
            handle.remove()
        values = [tensors_in(tap.outputs(output.module)[output.call])[output.leaf] for output in outputs]
        size = network[0].shape[-2:]
        maps = [level.as_map(value, size) for value, level in zip(values, self.probed.levels, strict=True)]
        return _Tapped(returned, network[0], maps)

    def _output(self, level: str, output: Output | None) -> Output:
        if output is None:
            raise PairError(
                f"the level {level!r} of {self._source} is not what one of its submodules returns, so it cannot be "
                "read in training; return it from a submodule (an nn.Identity will do)"
            )
        return output

    def _candidates(self, batch: Batch) -> Candidates:
        # Drawn by the images alone: a resumed run draws the same, and training's own random numbers stay as they are.
        generator = torch.Generator().manual_seed(int(batch.image_ids.sum()))
        boxes, image_index = [], []
        truth = torch.cat([target.boxes for target in batch.targets]).cpu()
        of_images = truth.split([len(target.boxes) for target in batch.targets])
        for i, (image, objects) in enumerate(zip(batch.images, of_images, strict=True)):
            size = torch.tensor([image.shape[-1], image.shape[-2]] * 2, dtype=torch.float32)
            near = objects.repeat(_JITTERED, 1)
            sides = (near[:, 2:] - near[:, :2]).repeat(1, 2)
            near = near + (torch.rand(near.shape, generator=generator) - 0.5) * 0.4 * sides
            corners = torch.rand(_ANYWHERE, 2, 2, generator=generator).sort(dim=1).values.flatten(1) * size
            found = torch.cat([near, corners]).clamp(min=0).minimum(size)
            found = found[((found[:, 2:] - found[:, :2]) >= 1).all(dim=1)]
            boxes.append(found)
            image_index.append(torch.full((len(found),), i))
        device = batch.images[0].device
        found_boxes, index = (torch.cat(x).to(device, non_blocking=True) for x in (boxes, image_index))
        return Candidates(found_boxes, index, sampled=False, counts=tuple(len(b) for b in boxes))
