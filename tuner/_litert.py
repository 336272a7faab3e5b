# SPDX-License-Identifier: Apache-2.0
"""A LiteRT (TensorFlow Lite) model of one convolution, written without TensorFlow."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]


def model(
    x_shape: Shape,
    w: NDArray[Any],
    y_shape: Shape,
    *,
    groups: int,
    transposed: bool,
    stride: Shape,
    dilation: Shape,
    pads: Pads,
) -> bytes:
    """The model's file: one input, one output, float32, both channels last.

    w: (KH, KW, C / groups, K). stride, pads: of a transposed convolution those of the convolution
    that it is the transpose of. Padding that LiteRT's SAME does not mean becomes an operator.

    Raises:
        ValueError: LiteRT has no such convolution; one line.
    """
    from ai_edge_litert import schema_py_generated as schema

    builder = _Builder(schema)
    x = builder.tensor("x", x_shape)
    y = builder.tensor("y", y_shape)
    channels = x_shape[-1]
    if transposed:
        if groups > 1 or max(dilation) > 1:
            raise ValueError("no transposed convolutions with groups or dilation")
        options = schema.TransposeConvOptionsT()
        options.padding = _transposed_padding(schema, x_shape, y_shape, w.shape, stride, pads)
        options.strideH, options.strideW = stride
        flipped = np.ascontiguousarray(np.transpose(w[::-1, ::-1], (3, 0, 1, 2)))
        operands = [
            builder.constant("output_shape", np.asarray(y_shape, np.int32)),
            builder.constant("w", flipped),
            x,
        ]
        builder.operator("TRANSPOSE_CONV", "TransposeConvOptions", options, operands, y, version=1)
        return builder.finish(x, y)

    if pads == _same(x_shape, w.shape, stride, dilation):
        padding = schema.Padding.SAME
    else:
        padding = schema.Padding.VALID
        if any(pair != (0, 0) for pair in pads):
            if min(value for pair in pads for value in pair) < 0:
                raise ValueError("negative padding")
            everywhere = ((0, 0), *pads, (0, 0))
            sizes = tuple(
                size + low + high for size, (low, high) in zip(x_shape, everywhere, strict=True)
            )
            padded = builder.tensor("padded", sizes)
            amounts = builder.constant("pads", np.asarray(everywhere, np.int32))
            builder.operator("PAD", "PadOptions", schema.PadOptionsT(), [x, amounts], padded, 1)
            source = padded
        else:
            source = x
    if padding == schema.Padding.SAME:
        source = x
    depthwise = groups == channels and w.shape[2] == 1
    options = schema.DepthwiseConv2DOptionsT() if depthwise else schema.Conv2DOptionsT()
    options.padding = padding
    options.strideH, options.strideW = stride
    options.dilationHFactor, options.dilationWFactor = dilation
    bias = builder.constant("bias", np.zeros(w.shape[-1], np.float32))
    if depthwise:
        options.depthMultiplier = w.shape[-1] // channels
        filters = builder.constant("w", np.transpose(w, (2, 0, 1, 3)))
        builder.operator(
            "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions", options, [source, filters, bias], y, 2
        )
    else:
        filters = builder.constant("w", np.transpose(w, (3, 0, 1, 2)))
        builder.operator("CONV_2D", "Conv2DOptions", options, [source, filters, bias], y, 2)
    return builder.finish(x, y)


def _same(x_shape: Shape, w_shape: Shape, stride: Shape, dilation: Shape) -> Pads:
    """What SAME means: the larger half of the padding at the end."""
    result = []
    for size, k, s, d in zip(x_shape[1:3], w_shape[:2], stride, dilation, strict=True):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        result.append((total // 2, total - total // 2))
    return tuple(result)


def _transposed_padding(
    schema: Any, x_shape: Shape, y_shape: Shape, w_shape: Shape, stride: Shape, pads: Pads
) -> Any:
    """SAME or VALID, whichever crops the full result as `pads` do."""
    full = [(n - 1) * s + k for n, s, k in zip(x_shape[1:3], stride, w_shape[:2], strict=True)]
    lows = [low for low, _ in pads]
    if all(low == 0 for low in lows) and tuple(y_shape[1:3]) == tuple(full):
        return schema.Padding.VALID
    sizes = [-(-n // s) for n, s in zip(y_shape[1:3], stride, strict=True)]
    same = [max(f - n, 0) // 2 for f, n in zip(full, y_shape[1:3], strict=True)]
    if sizes == list(x_shape[1:3]) and same == lows:
        return schema.Padding.SAME
    raise ValueError("a transposed convolution with padding that is neither SAME nor VALID")


class _Builder:
    """Tensors, buffers and operators of a model with one graph."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._graph = schema.SubGraphT()
        self._graph.tensors, self._graph.operators = [], []
        self._model = schema.ModelT()
        self._model.version = 3
        self._model.operatorCodes = []
        self._model.subgraphs = [self._graph]
        self._model.buffers = [schema.BufferT()]  # the first one is that of tensors without data

    def tensor(self, name: str, shape: Shape, kind: str = "FLOAT32", buffer: int = 0) -> int:
        tensor = self._schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name, list(shape), buffer
        tensor.type = getattr(self._schema.TensorType, kind)
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def constant(self, name: str, value: NDArray[Any]) -> int:
        buffer = self._schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
        self._model.buffers.append(buffer)
        kind = {"float32": "FLOAT32", "int32": "INT32"}[value.dtype.name]
        return self.tensor(name, value.shape, kind, len(self._model.buffers) - 1)

    def operator(
        self, name: str, kind: str, options: Any, inputs: list[int], output: int, version: int
    ) -> None:
        code = self._schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(self._schema.BuiltinOperator, name)
        code.version = version
        self._model.operatorCodes.append(code)
        operator = self._schema.OperatorT()
        operator.opcodeIndex = len(self._model.operatorCodes) - 1
        operator.inputs, operator.outputs = inputs, [output]
        operator.builtinOptionsType = getattr(self._schema.BuiltinOptions, kind)
        operator.builtinOptions = options
        self._graph.operators.append(operator)

    def finish(self, x: int, y: int) -> bytes:
        import flatbuffers

        self._graph.inputs, self._graph.outputs = [x], [y]
        builder = flatbuffers.Builder(1024)
        builder.Finish(self._model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())
