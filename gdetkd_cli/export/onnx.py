"""A detector as an ONNX file.

torchvision's detectors need torch.onnx's TorchScript exporter. The newer exporter uses torch.export, which fails on
their data-dependent sizes (as of torch 2.14).
"""

from __future__ import annotations

import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.detectors.transformers.model import QueryModel
from gdetkd_cli.errors import ExportError, get_first_line
from gdetkd_cli.evaluation.exported import BATCH_INPUT, BATCH_OUTPUTS, INPUT, OUTPUTS, describe
from gdetkd_cli.export.batch import ImageBatch, QueryBatch
from gdetkd_cli.export.single_image import SingleImage, build_example_image

ANY = 0  # a batch of any number of images
OPSET = 17  # RoiAlign equals torchvision's since 16; onnxruntime reads 17 since 1.12


def export_onnx(
    detector: Detector, path: Path, *, architecture: dict[str, Any], opset: int = OPSET, batch: int | None = None
) -> str:
    """Writes the detector as ONNX: ``image`` (3, H, W) in 0..1 -> ``boxes`` (D, 4), ``scores`` (D,), ``labels`` (D,).

    With a batch: ``images`` (N, 3, H, W) -> ``boxes`` (N, D, 4), ``scores`` (N, D), ``labels`` (N, D) and ``counts``
    (N,), the detections of each image. What is behind them is 0.

    Args:
        architecture: the description that rebuilds the detector, stored in the file with the class names.
        opset: version of ONNX's operators, 16 to 20.
        batch: N, or ``ANY`` for a detector of the family ``query``; None: one image without the dimension N. What
            follows the network of other families, such as NMS, is traced image by image, so their N is fixed.

    Returns:
        The name of the exporter.

    Raises:
        ExportError: the exporter failed, or its file is not valid ONNX.
    """
    module, axes = _build_module(detector, batch), {1: "height", 2: "width"}
    example, names, outputs = build_example_image(), [INPUT], list(OUTPUTS)
    output_axes = {name: {0: "detections"} for name in outputs}
    if batch is not None:
        free = {0: "batch"} if batch == ANY else {}
        axes = free | {2: "height", 3: "width"}
        # Two images, because the tracer makes a constant of a single one.
        example = torch.stack([example.roll(place, dims=2) for place in range(batch or 2)])
        names, outputs = [BATCH_INPUT], list(BATCH_OUTPUTS)
        output_axes = {name: free | {1: "detections"} for name in OUTPUTS} | {"counts": free}
    heads: Any = getattr(getattr(module, "detector", None), "roi_heads", None)
    if heads is not None:
        heads.box_coder = _TraceableCoder(heads.box_coder.weights, heads.box_coder.bbox_xform_clip)
    try:
        # The tracer warns of every possible constant; the parity check finds the real ones. If the exporter fails, it
        # prints the whole graph.
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
            torch.onnx.export(
                module,
                (example,),
                path,
                dynamo=False,
                opset_version=opset,
                input_names=names,
                output_names=outputs,
                dynamic_axes={names[0]: axes, **output_axes},
            )
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
    except (
        torch.onnx.OnnxExporterError,
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = get_first_line(error)
        raise ExportError(f"torch {torch.__version__} cannot write this detector as ONNX: {reason}") from error
    onnx.helper.set_model_props(model, describe(detector, architecture, batch=batch))
    onnx.save(model, path)
    images = "" if batch is None else f", batches of {batch or 'any number of'} images"
    return f"torch.onnx TorchScript, opset {opset}{images}"


def _build_module(detector: Detector, batch: int | None) -> nn.Module:
    if batch is None:
        return SingleImage(detector)
    if isinstance(detector.module, QueryModel):
        return QueryBatch(detector)
    return ImageBatch(detector, batch)


class _TraceableCoder(BoxCoder):
    """The RoI head's box coder.

    torchvision's own reshapes to (proposals, -1), which ONNX cannot do without proposals.
    """

    def decode(self, rel_codes: Tensor, boxes: list[Tensor]) -> Tensor:
        decoded: Tensor = self.decode_single(rel_codes, boxes[0] if len(boxes) == 1 else torch.cat(boxes))
        return decoded.reshape(-1, rel_codes.shape[1] // 4, 4)
