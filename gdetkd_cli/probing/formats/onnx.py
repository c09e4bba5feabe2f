"""An ONNX model run by onnxruntime. The graph lists the operators; values are read by adding them as outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto
from torch import Tensor, nn

from gdetkd_cli.errors import NO_CONVOLUTION, ModelError, NoPyramidError, get_first_line
from gdetkd_cli.probing.formats.declared import read_declared
from gdetkd_cli.probing.formats.metadata import read_class_names, read_size
from gdetkd_cli.probing.formats.runner import RecordedCall, complete_input
from gdetkd_cli.probing.formats.search import find_size
from gdetkd_cli.probing.inputs import Call, ModelInput
from gdetkd_cli.probing.record import Address, Value, Window, measure_sides
from gdetkd_cli.probing.second_inputs import KNOWN, SecondInput, describe_unknown

# aten's names, by which the rules for levels recognise operators.
_NAMES = {
    "Conv": "convolution",
    "MatMul": "mm",
    "Gemm": "addmm",
    "MaxPool": "max_pool2d",
    "AveragePool": "avg_pool2d",
    "Pad": "constant_pad_nd",
    "Resize": "upsample",
    "Upsample": "upsample",
    "GlobalAveragePool": "mean",
    "ReduceMean": "mean",
    "GlobalMaxPool": "adaptive_max_pool2d",
    "RoiAlign": "roi_align",
}
# Element types of maps; 8 bits in quantised models. Wider integers are sizes and indices.
_MAP_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT8, TensorProto.UINT8)
_IMAGE_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8,
}
_OTHER_TYPES = _IMAGE_TYPES | {"tensor(int64)": torch.int64, "tensor(int32)": torch.int32, "tensor(bool)": torch.bool}
_FATAL = 4  # log level; at lower ones onnxruntime also prints the errors that it raises


class OnnxRunner:
    """An ONNX file; every value named in its graph can be read.

    Raises:
        ModelError: the file is incomplete, or does not take images.
        NoPyramidError: the model has no convolution.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.module = nn.Module()
        try:
            self._model = onnx.load(path)
            inferred = onnx.shape_inference.infer_shapes(self._model)
        except Exception as error:  # protobuf's and onnx's errors have no common base class
            raise ModelError(f"{path} is not a whole ONNX file ({get_first_line(error)})") from error
        self._types = {info.name: info.type.tensor_type.elem_type for info in inferred.graph.value_info}
        self._types |= {info.name: info.type.tensor_type.elem_type for info in inferred.graph.output}
        graph = self._model.graph
        _move_constants(graph)
        self._weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self.parameters = sum(int(np.prod(shape)) for shape in self._weights.values())
        self._sessions: dict[tuple[str, ...], onnxruntime.InferenceSession] = {}  # by the names that they compute
        self._whole: onnxruntime.InferenceSession | None = None  # of the unchanged model, for its own outputs
        self._tensors: dict[Address, str] = {}
        self._network_input = ""
        self._paddings: dict[str, tuple[int, ...]] = {}  # of Pad operators, by the name of their second input
        self._sides: dict[str, tuple[float, float] | None] = {}  # of RoiAlign operators' boxes, by output
        inputs = self._open(self._model).get_inputs()
        if not any("Conv" in node.op_type for node in graph.node):
            raise NoPyramidError(NO_CONVOLUTION)
        images = [i for i in inputs if i.name not in KNOWN and len(i.shape) in (3, 4) and i.type in _IMAGE_TYPES]
        if len(images) != 1:
            raise ModelError(
                f"{path} has {len(images)} inputs that could be images, among "
                f"{', '.join(f'{i.name} {i.type} {i.shape}' for i in inputs) or 'none'}; expected exactly one, of "
                f"{', '.join(map(str, _IMAGE_TYPES))}"
            )
        self._image = images[0].name
        others = [i for i in inputs if i.name != self._image]
        unknown = [i.name for i in others if i.name not in KNOWN or i.type not in _OTHER_TYPES]
        if unknown:
            raise ModelError(describe_unknown(path, unknown))
        self.others = tuple(SecondInput.declare(i.name, _OTHER_TYPES[i.type], i.shape) for i in others)
        metadata = {entry.key: entry.value for entry in self._model.metadata_props}
        self.class_names = read_class_names(metadata)
        self._named_size = read_size(metadata.get("imgsz"))
        declared = read_declared(path, images[0].shape, _IMAGE_TYPES[images[0].type])
        self._call, self.size, self.grey = declared.call, declared.size, declared.grey
        self.bytes = self._call.dtype == torch.uint8

    def list_bad_weights(self) -> list[str]:
        return _list_bad_initializers(self._model)

    def adapt(self, model_input: ModelInput) -> ModelInput | None:
        # A size that the graph states is complete; a free one may be contradicted by constants.
        if self.size is None:
            self.size = find_size(self._accepts, [self._named_size] if self._named_size else [])
        return None if self.size is None else complete_input(model_input, self)

    def _accepts(self, size: tuple[int, int]) -> bool:
        try:
            self.run(self._call, [torch.full((1 if self.grey else 3, *size), 0.5)])
        except ModelError:
            return False
        return True

    def record(self, image: Tensor) -> RecordedCall:
        shapes, returned = self._measure(image)
        aliases = {name: name for name in self._weights}  # a converted or scaled weight counts as the weight
        index = {self._image: 0}
        values = [Value("input", 0, 0, shapes[self._image], (), name=self._image)]
        calls: Counter[str] = Counter()
        results = {output.name for output in self._model.graph.output}
        for node in self._model.graph.node:
            read = list(_list_inputs(node))
            parents = tuple(index[name] for name in read if name in index)
            weights = tuple(aliases[name] for name in read if name in aliases)
            op = _NAMES.get(node.op_type, node.op_type.lower())
            call = calls[op]
            calls[op] += 1
            if weights and not parents and all(name in aliases for name in read if name):
                aliases.update((name, weights[0]) for name in node.output)
                continue
            for output, name in enumerate(node.output):
                if name in shapes:
                    index[name] = len(values)
                    window = self._read_window(node, shapes)
                    value = Value(op, call, output, shapes[name], parents, weights, window, self._sides.get(name))
                    values.append(replace(value, name=name, result=name in results))
                    self._tensors[Address(op, call, output)] = name
                    if op == "convolution" and parents and not self._network_input:
                        self._network_input = node.input[0]
        return RecordedCall.of(self._call, values, returned)

    def read(self, call: Call, images: Sequence[Tensor], addresses: Sequence[Address]) -> tuple[Tensor, list[Tensor]]:
        if not self._network_input:
            raise NoPyramidError(NO_CONVOLUTION)
        names = (self._network_input, *(self._tensors[address] for address in addresses))
        feed = self._feed(call, images)
        computed = tuple(name for name in dict.fromkeys(names) if name not in feed)
        known = dict(feed)
        if computed:
            if computed not in self._sessions:
                self._sessions[computed] = self._open(self._cut_after(list(computed)))
            known |= zip(computed, self._run(self._sessions[computed], feed, list(computed)), strict=True)
        device = images[0].device
        # float(): a quantised map holds 8-bit integers.
        found = [torch.from_numpy(np.asarray(known[name])).to(device).float() for name in names]
        found = [value[: len(images)] if call.is_batch(value) else value for value in found]
        return found[0] if found[0].dim() == 4 else found[0][None], found[1:]

    def run(self, call: Call, images: Sequence[Tensor]) -> object:
        if self._whole is None:
            self._whole = self._open(self._model)
        names = [output.name for output in self._whole.get_outputs()]
        found = self._run(self._whole, self._feed(call, images), names)
        device = images[0].device
        rows = {name: value.to(device) for name, value in _select_arrays(names, found).items()}
        return call.keep(rows, len(images))

    def _measure(self, image: Tensor) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
        """Runs the model on an image. Returns each value's shape by name, and the model's own outputs.

        Also sets the paddings of Pad operators and the sides of RoiAlign's boxes. Added Shape operators keep the values
        themselves out of memory.
        """
        model = ModelProto()
        model.CopyFrom(self._model)
        graph = model.graph
        own = [output.name for output in graph.output]
        shaped = {f"gdetkd shape of {name}": name for name in self._list_maps()}
        paddings = {node.input[1] for node in graph.node if node.op_type == "Pad" and len(node.input) > 1}
        # Paddings are often computed by a chain of small operators.
        computed = {f"gdetkd value of {name}": name for name in sorted(paddings)}
        graph.node.extend(onnx.helper.make_node("Shape", [name], [output]) for output, name in shaped.items())
        regions = [node for node in graph.node if node.op_type == "RoiAlign"]
        boxes = {f"gdetkd boxes of {node.output[0]}": node.input[1] for node in regions}
        for output, name in [*computed.items(), *boxes.items()]:
            graph.node.append(onnx.helper.make_node("Identity", [name], [output]))
        whole = [onnx.helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in (*shaped, *computed)]
        graph.output.extend(whole)
        for output, name in boxes.items():
            kind = self._types.get(name, TensorProto.FLOAT)
            graph.output.append(onnx.helper.make_tensor_value_info(output, kind, None))
        outputs = [*shaped, *computed, *boxes, *own]
        feed = self._feed(self._call, [image])
        rows = self._run(self._open(model), feed, outputs)
        for node, row in zip(regions, rows[len(shaped) + len(computed) :], strict=False):
            scale = next((float(a.f) for a in node.attribute if a.name == "spatial_scale"), 1.0)
            self._sides[node.output[0]] = measure_sides(torch.from_numpy(row), scale)
        found = [tuple(int(n) for n in row) for row in rows[: len(shaped) + len(computed)]]
        self._paddings = dict(zip(computed.values(), found[len(shaped) :], strict=True))
        shapes = dict(zip(shaped.values(), found, strict=False))
        returned = _select_arrays(own, rows[len(rows) - len(own) :])
        return shapes | {self._image: tuple(feed[self._image].shape)}, returned

    def _list_maps(self) -> Iterable[str]:
        """Yields the names of values that may be maps, in the order of their computation."""
        for node in self._model.graph.node:
            yield from (name for name in node.output if name and self._types.get(name) in _MAP_TYPES)

    def _cut_after(self, names: list[str]) -> ModelProto:
        """Returns the part of the model that computes these values."""
        model = ModelProto()
        model.CopyFrom(self._model)
        graph = model.graph
        needed, kept = set(names), []
        for node in reversed(graph.node):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(_list_inputs(node))
        nodes = [NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.output[:]
        graph.output.extend(
            onnx.helper.make_tensor_value_info(name, self._types.get(name, TensorProto.FLOAT), None) for name in names
        )
        return model

    def _open(self, model: ModelProto) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base class
            raise ModelError(f"onnxruntime cannot open {self._path} ({get_first_line(error)})") from error

    def _run(
        self, session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray], names: list[str]
    ) -> list[np.ndarray]:
        given = {i.name for i in session.get_inputs()}
        try:
            found: list[np.ndarray] = session.run(names, {name: value for name, value in feed.items() if name in given})
        except Exception as error:  # onnxruntime's errors have no common base class
            raise ModelError(
                f"onnxruntime cannot run {self._path} on an image of shape {list(feed[self._image].shape)} "
                f"({get_first_line(error)}); if it accepts only some sizes, set input.size and input.fit: true"
            ) from error
        return found

    def _feed(self, call: Call, images: Sequence[Tensor]) -> dict[str, np.ndarray]:
        argument = call.argument(images)
        assert isinstance(argument, Tensor)
        count, size = call.batch or len(images), (images[0].shape[-2], images[0].shape[-1])
        tensors = {one.name: one.compute(count, size, argument.device) for one in self.others}
        return {name: value.detach().cpu().numpy() for name, value in ({self._image: argument} | tensors).items()}

    def _read_window(self, node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> Window | None:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Pad":
            pads = self._paddings[node.input[1]] if len(node.input) > 1 else attributes.get("pads")
            if pads is None or len(pads) != 8 or len(node.input) > 3:
                return None
            return Window((1, 1), (1, 1), (int(pads[2]), int(pads[3])), (1, 1))
        if node.op_type not in ("Conv", "MaxPool", "AveragePool"):
            return None
        kernel = attributes.get("kernel_shape") or list(self._weights.get(node.input[1], ()))[2:]
        if len(kernel) != 2:
            return None
        stride = attributes.get("strides") or [1, 1]
        dilation = attributes.get("dilations") or [1, 1]
        padding = (attributes.get("pads") or [0, 0, 0, 0])[:2]
        source = shapes.get(node.input[0])
        rule = attributes.get("auto_pad", b"NOTSET").decode()
        if rule in ("SAME_UPPER", "SAME_LOWER") and source is not None:
            padding = [
                _pad_same(source[2 + a], (kernel[a] - 1) * dilation[a] + 1, stride[a], lower=rule == "SAME_LOWER")
                for a in (0, 1)
            ]
        return Window(*((int(p[0]), int(p[1])) for p in (kernel, stride, padding, dilation)))


def _move_constants(graph: Any) -> None:
    """Makes initializers of the weights that a graph computes by Constant nodes, as Paddle's exporter writes them."""
    moved = []
    for node in graph.node:
        values = [a.t for a in node.attribute if a.name == "value"] if node.op_type == "Constant" else []
        if values and values[0].dims and values[0].data_type in _MAP_TYPES:
            weight = graph.initializer.add()
            weight.CopyFrom(values[0])
            weight.name = node.output[0]
            moved.append(node)
    for node in moved:
        graph.node.remove(node)


def read_bad_initializers(path: Path) -> list[str]:
    """Names of a whole file's weights with NaN or infinity."""
    model = onnx.load(path)
    _move_constants(model.graph)
    return _list_bad_initializers(model)


def _list_bad_initializers(model: ModelProto) -> list[str]:
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return [name for name, one in arrays.items() if one.dtype.kind == "f" and not np.isfinite(one).all()]


def _select_arrays(names: Sequence[str], rows: Sequence[Any]) -> dict[str, Tensor]:
    """Returns outputs by name, without those that are not arrays of numbers (text, sequences)."""
    pairs = zip(names, rows, strict=True)
    return {n: torch.from_numpy(r) for n, r in pairs if isinstance(r, np.ndarray) and r.dtype.kind in "fiub"}


def _pad_same(length: int, reach: int, stride: int, *, lower: bool) -> int:
    """Returns the cells of padding before an axis under ONNX's SAME_UPPER or SAME_LOWER."""
    total = max((ceil(length / stride) - 1) * stride + reach - length, 0)
    return (total + 1) // 2 if lower else total // 2


def _list_inputs(node: NodeProto) -> Iterable[str]:
    """Yields the names that a node reads, including those that its branches and loops read from outside."""
    yield from node.input
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
        for graph in graphs:
            own = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
            for inner in graph.node:
                yield from (name for name in _list_inputs(inner) if name not in own)
                own.update(inner.output)
            yield from (info.name for info in graph.output if info.name not in own)
