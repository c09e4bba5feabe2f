"""A detector as an ONNX file.

torchvision's detectors need torch.onnx's TorchScript exporter. The newer exporter uses torch.export, which fails on
their data-dependent sizes (as of torch 2.14).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import ExportError, get_first_line
from gdetkd_cli.evaluation.exported import INPUT, OUTPUTS, describe
from gdetkd_cli.export.single_image import SingleImage, build_example_image

OPSET = 17  # RoiAlign equals torchvision's since 16; onnxruntime reads 17 since 1.12


def export_onnx(detector: Detector, path: Path, *, architecture: dict[str, Any], opset: int = OPSET) -> str:
    """Writes the detector as ONNX: ``image`` (3, H, W) in 0..1 -> ``boxes`` (D, 4), ``scores`` (D,), ``labels`` (D,).

    Args:
        detector: a torchvision detector.
        path: the file to write.
        architecture: the description that rebuilds the detector, stored in the file with the class names.
        opset: version of ONNX's operators, 16 to 20.

    Returns:
        The name of the exporter.

    Raises:
        ExportError: the exporter failed, or its file is not valid ONNX.
    """
    image = SingleImage(detector)
    heads: Any = getattr(image.detector, "roi_heads", None)
    if heads is not None:
        heads.box_coder = _SingleImageCoder(heads.box_coder.weights, heads.box_coder.bbox_xform_clip)
    try:
        # The tracer warns of every possible constant; the parity check finds the real ones.
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(
                image,
                (build_example_image(),),
                path,
                dynamo=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_axes={INPUT: {1: "height", 2: "width"}, **{name: {0: "detections"} for name in OUTPUTS}},
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
    onnx.helper.set_model_props(model, describe(detector, architecture))
    onnx.save(model, path)
    return f"torch.onnx TorchScript, opset {opset}"


class _SingleImageCoder(BoxCoder):
    """The RoI head's box coder, for one image.

    torchvision's own reshapes to (proposals, -1), which ONNX cannot do without proposals.
    """

    def decode(self, rel_codes: Tensor, boxes: list[Tensor]) -> Tensor:
        decoded: Tensor = self.decode_single(rel_codes, boxes[0])
        return decoded.reshape(-1, rel_codes.shape[1] // 4, 4)
