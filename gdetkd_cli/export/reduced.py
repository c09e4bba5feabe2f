"""Smaller forms of an ONNX file: half precision, and whole numbers of 8 bits.

Only convolutions and matrix products with weights of their own change. Everything that computes a coordinate stays in
float32: float16 resolves no half pixel above 1,024, and 8 bits resolve far less.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor

from gdetkd_cli.errors import ExportError, get_first_line
from gdetkd_cli.evaluation.exported import BATCH_INPUT, INPUT
from gdetkd_cli.structures import group_by_size

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def write_half(source: Path, path: Path) -> None:
    """Writes an ONNX file whose weighted layers compute in float16; its inputs and outputs stay float32."""
    model = onnx.load(source)
    graph = model.graph
    weights = {one.name: one for one in graph.initializer if one.data_type == TensorProto.FLOAT}
    # The exporter writes one of several equal weights and makes the others its copies.
    weights |= {
        node.output[0]: weights[node.input[0]]
        for node in graph.node
        if node.op_type == "Identity" and node.input[0] in weights
    }
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type in _WEIGHTED and all(name in weights for name in node.input[1:]):
            nodes += _halve_layer(node, weights, graph)
        else:
            nodes.append(node)
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [one for one in graph.initializer if one.name in read]
    kept = [TensorProto.FromString(one.SerializeToString()) for one in kept]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    _save(model, path)


def _halve_layer(node: NodeProto, weights: dict[str, TensorProto], graph: GraphProto) -> Iterator[NodeProto]:
    """Yields the layer in float16, between a cast of its input and a cast of its output."""
    known = {one.name for one in graph.initializer}
    name, output = node.output[0], f"{node.output[0]} half"
    own = [weights[each] for each in node.input[1:]]
    inputs = [f"{name} input half", *(f"{weight.name} half" for weight in own)]
    for weight in own:
        if f"{weight.name} half" not in known:
            array = numpy_helper.to_array(weight).astype(np.float16)
            graph.initializer.append(numpy_helper.from_array(array, f"{weight.name} half"))
            known.add(f"{weight.name} half")
    layer = NodeProto()
    layer.CopyFrom(node)
    del layer.input[:], layer.output[:]
    layer.input.extend(inputs)
    layer.output.append(output)
    yield onnx.helper.make_node("Cast", [node.input[0]], [inputs[0]], to=TensorProto.FLOAT16)
    yield layer
    yield onnx.helper.make_node("Cast", [output], [name], to=TensorProto.FLOAT)


@dataclass(frozen=True)
class CalibrationImages:
    """Images that are read when their turn comes, because a hundred large ones may not fit into the memory.

    Attributes:
        sizes: (height, width) pixels of each.
        read: reads one as (3, H, W) in 0..1; None if it is left out.
    """

    sizes: Sequence[tuple[int, int]]
    read: Callable[[int], Tensor | None]


def write_int8(
    source: Path, path: Path, images: CalibrationImages, progress: Callable[[int], None] | None = None
) -> None:
    """Writes an ONNX file whose weighted layers compute with 8 bits, by onnxruntime's static quantisation.

    Args:
        images: the ranges of all values are measured on these.
        progress: gets the number of images done.

    Raises:
        ExportError: onnxruntime cannot quantise the file.
    """
    from onnxruntime.quantization import (  # slow to import
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds = _list_feeds(source, images, progress)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises a preparation that fails on sizes which depend on the image
    try:
        quantize_static(
            onnx.load(source),  # from a path, it writes and deletes NAME-inferred.onnx beside the file
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_WEIGHTED),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    except OSError:  # such as a full disk
        raise
    except Exception as error:  # onnxruntime's errors have no common base
        raise ExportError(f"onnxruntime cannot quantise {source} ({get_first_line(error)})") from error
    finally:
        logger.setLevel(level)
    model = onnx.load(path)
    # With the shapes that it noted, onnxruntime simplifies a reshape so that it fails on an image without detections.
    del model.graph.value_info[:]
    _save(model, path)


def _list_feeds(
    source: Path, images: CalibrationImages, progress: Callable[[int], None] | None
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the inputs of a file for images; a batch that is not full has some of its images twice."""
    given = onnx.load(source).graph.input[0]
    batched = given.name == BATCH_INPUT
    batch = (batched and given.type.tensor_type.shape.dim[0].dim_value) or 1  # 1, if the file takes any number
    done = 0
    for places in group_by_size(images.sizes, batch):
        found = [image for place in places if (image := images.read(place)) is not None]
        if found:
            filled = torch.stack(list(islice(cycle(found), batch)))
            yield {BATCH_INPUT: filled.numpy()} if batched else {INPUT: filled[0].numpy()}
        done += len(places)
        if progress is not None:
            progress(done)


def _save(model: ModelProto, path: Path) -> None:
    onnx.checker.check_model(model)
    onnx.save(model, path)
