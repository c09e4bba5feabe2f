"""A detector from the user's own code that trains like torchvision's; probing finds its pyramid.

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
from gdetkd_cli.errors import PairError, get_first_line
from gdetkd_cli.probing.formats.runner import ModuleRunner, list_calls
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.pyramid import probe_image
from gdetkd_cli.probing.record import Output, list_tensors
from gdetkd_cli.structures import Batch, Pyramid

_JITTERED = 4  # candidates near each true box
_ANYWHERE = 32  # candidates anywhere in each image
_CALL_ERRORS = (TypeError, ValueError, LookupError, AttributeError, AssertionError)  # of code that expects another call


@dataclass(frozen=True)
class _Call:
    """One call of a module: its result, the input of its first convolution, and its levels."""

    returned: Any
    network_input: Tensor
    maps: list[Tensor]


class TrainableDetector(ProbedDetector):
    """An nn.Module that is called like torchvision's detectors.

    In training, ``module(images, targets)`` returns losses by name. In evaluation, ``module(images)`` returns
    ``boxes``, ``scores`` and ``labels`` for each image. A module that takes a tensor, (N, 3, H, W) or (3, H, W), has
    no losses of its own and learns only from a teacher. Every level must be the output of a submodule. Its predictions
    in training are unknown, so its candidates are boxes near the true ones and random boxes.
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
            class_names: K names of the labels 1..K.
            size: (height, width) pixels of an image that it accepts.
            last: it takes its images as (H, W, 3).
            levels: names of the pyramid's levels, if the user named them.

        Raises:
            ModelError, NoPyramidError: the module cannot be run, or has no pyramid.
        """
        training = module.training
        module.eval()
        runner = ModuleRunner(module, calls=list_calls(last=last))
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
        """Whether its losses and detections are unknown."""
        return self.probed.call.takes != "any"

    @property
    def skips_parameters(self) -> bool:
        """Unknown code may skip parts of a model, as transformers' detectors do for images without objects."""
        return True

    def forward_train(self, batch: Batch, *, candidates: bool = True) -> Observation:
        # The user's code may compute boxes anywhere, and half precision would round them.
        with torch.autocast(batch.images[0].device.type, enabled=False):
            return self._run_training(batch, candidates)

    def _run_training(self, batch: Batch, candidates: bool) -> Observation:
        if self._input.fit is not None:
            raise PairError(
                f"{self._source} accepts only one image size, so it can teach but cannot be trained; remove input.fit"
            )
        outputs = [self._require_output(level.name, level.output) for level in self.probed.levels]
        prepared = [self._input.prepare(image) for image in batch.images]
        if self.features_only:
            groups = [self._call(outputs, self.probed.call.argument(g)) for g in self.probed.call.groups(prepared)]
            losses: Any = {}
        else:
            argument = self.probed.call.argument(prepared)
            groups = [self._call(outputs, argument, common.convert_targets(batch))]
            losses = groups[0].returned
            if not isinstance(losses, dict) or not losses or not all(map(_is_loss, losses.values())):
                raise PairError(
                    f"{self._source} cannot be trained: in training mode, (images, targets) returned "
                    f"{_describe_result(losses)}; expected a dictionary of losses, each one number with a gradient; "
                    "state them in a gdetkd_cli.adapter.TrainableModule"
                )
        maps = tuple(stack([group.maps[level] for group in groups]) for level in range(len(self.levels)))
        height, width = (max(group.network_input.shape[axis] for group in groups) for axis in (-2, -1))
        pyramid = Pyramid(maps=maps, levels=self.levels, frame=self._frame_of(batch, (height, width)))
        boxes = self._draw_candidates(batch) if candidates else None
        return Observation(losses=losses, pyramid=pyramid, candidates=boxes)

    def _call(self, outputs: Sequence[Output], *arguments: object) -> _Call:
        """Calls the module and reads its levels, with their gradients."""
        network: list[Tensor] = []
        first = self.module.get_submodule(self._find_first())
        handle = first.register_forward_pre_hook(lambda _, inputs: network.append(inputs[0]))
        try:
            with Tap(self.module, list({output.module for output in outputs})) as tap:
                returned = self.module(*arguments)
        except _CALL_ERRORS as error:
            called = "(images, targets)" if len(arguments) > 1 else "images"
            raise PairError(
                f"{self._source} cannot be trained: called with {called}, it raised {type(error).__name__}: "
                f"{get_first_line(error)}; if it has losses of another form, state them in a "
                "gdetkd_cli.adapter.TrainableModule"
            ) from error
        finally:
            handle.remove()
        values = [list_tensors(tap.outputs(output.module)[output.call])[output.leaf] for output in outputs]
        size = network[0].shape[-2:]
        maps = [level.as_map(value, size) for value, level in zip(values, self.probed.levels, strict=True)]
        return _Call(returned, network[0], maps)

    def _find_first(self) -> str:
        """Name of the module whose input is the network's: the first convolution."""
        name = self.probed.first.partition(".parametrizations.")[0]
        if not name:
            raise PairError(
                f"the first convolution of {self._source} is not a module, so its input cannot be read in training; "
                "make it an nn.Conv2d"
            )
        return name

    def _require_output(self, level: str, output: Output | None) -> Output:
        if output is None:
            raise PairError(
                f"the level {level!r} of {self._source} is not what one of its submodules returns, so it cannot be "
                "read in training; return it from a submodule, such as an nn.Identity"
            )
        return output

    def _draw_candidates(self, batch: Batch) -> Candidates:
        # The images seed the draw, so a resumed run repeats it and training's own random numbers do not change.
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


def _is_loss(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad


def _describe_result(losses: object) -> str:
    """Describes what a module returned in place of losses."""
    if not isinstance(losses, dict) or not losses:
        return type(losses).__name__ if losses != {} else "an empty dictionary"
    name, value = next((name, value) for name, value in losses.items() if not _is_loss(value))
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} for {name!r}"
    return f"a tensor of shape {tuple(value.shape)}{'' if value.requires_grad else ' without a gradient'} for {name!r}"
