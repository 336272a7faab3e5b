# SPDX-License-Identifier: Apache-2.0
"""The libraries that jaxwin is compared with: one small adapter each, in one registry.

To add one, write a subclass of `Peer` with the decorator `register`. Nothing is imported before a
peer is asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

import jaxwin
from jaxwin import _ffi, _fused, _lowering, _primitive, _problem, _registry
from jaxwin._plan import Plan
from jaxwin._problem import Problem
from jaxwin.tuner.measure import Timed, calls_per_sample, first_line
from jaxwin.tuner.problems import (
    INTEGERS,
    Conv,
    abstract,
    computation,
    friendly,
    from_layout,
    pack,
    result_operand,
    to_layout,
)

Array = NDArray[Any]


class Unsupported(Exception):
    """A peer has no such convolution; the text says why."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One convolution, or one of its gradients, with its operands.

    x, w, y: channels last, of the convolution's dtype; y is the cotangent. layout: of what jax
    peers are given; the others have a layout of their own.
    """

    conv: Conv
    direction: str
    layout: str
    threads: int
    x: Array
    w: Array
    y: Array

    def operand(self, name: str) -> Array:
        """ "x", "w" or "y", channels last."""
        return {"x": self.x, "w": self.w, "y": self.y}[name]

    def forwards(self, w: Array) -> Array:
        """A filter, or its gradient, such as it is for a library that reads no filter backwards."""
        return np.flip(w, tuple(range(self.conv.rank))) if self.conv.reversed else w


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A peer ready to compute a task.

    result: computes once and returns the result, channels last. facts: what is known beforehand,
    such as `workspace_bytes`.
    """

    timed: Timed
    result: Callable[[], Array]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class Peer:
    """A library, or one way of using it.

    name: on the command line and in tables. summary: one line. modules: what must be importable.
    reuses_output: whether each call writes into the same memory; else each call's result is
    fresh memory, whose page faults are then part of the time. packs_ahead: whether the weights are
    known before the clock starts, in the library's own order where that helps; else each call is
    given them as an array.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    reuses_output: ClassVar[bool] = False
    packs_ahead: ClassVar[bool] = False

    def missing(self) -> str:
        """Why the peer cannot be used in this process; empty if it can."""
        for module in self.modules:
            try:
                importlib.import_module(module)
            except Exception as error:  # a broken installation fails in any way
                return first_line(error)
        return ""

    def prepare(self, task: Task) -> Prepared:
        """Everything that a user does once: compile, pack the weights, convert the layout.

        Raises:
            Unsupported: the library does not have this convolution.
        """
        raise NotImplementedError


_LOOP_SECONDS = 0.002  # of a program of many convolutions: what calling it costs is little of that

_REGISTRY: dict[str, type[Peer]] = {}


def register(peer: type[Peer]) -> type[Peer]:
    """Class decorator: puts a peer into the registry under its name."""
    _REGISTRY[peer.name] = peer
    return peer


_BASELINES: dict[str, type[Peer]] = {}


def baseline(peer: type[Peer]) -> type[Peer]:
    """Class decorator: no library, but something to compare with, that is measured if asked for."""
    _BASELINES[peer.name] = peer
    return peer


def names() -> tuple[str, ...]:
    """Names of all peers, in the order of tables."""
    return tuple(_REGISTRY)


def baselines() -> dict[str, str]:
    """One line about each baseline."""
    return {name: peer.summary for name, peer in _BASELINES.items()}


def summaries() -> dict[str, str]:
    """One line about each peer."""
    return {name: peer.summary for name, peer in _REGISTRY.items()}


def make(name: str) -> Peer:
    """The peer of this name, or the baseline.

    "jaxwin:NAME" is jaxwin with that algorithm, "jaxwin:NAME:full=1" with a parameter of it that is
    not the default, and "jaxwin:NAME@CHWN8" in that layout of `jaxwin.conv`.

    Raises:
        KeyError: there is none.
    """
    if not name.startswith("jaxwin:"):
        return (_REGISTRY | _BASELINES)[name]()
    algorithm, _, layout = name.removeprefix("jaxwin:").partition("@")
    algorithm, *changes = algorithm.split(":")
    if layout:
        return JaxwinIn(algorithm, layout)
    values = dict(change.split("=") for change in changes)
    return JaxwinWith(algorithm, {key: int(value) for key, value in values.items()})


def is_ours(name: str) -> bool:
    """Whether a peer's name is that of a form of jaxwin."""
    return name == "jaxwin" or name.startswith(("jaxwin-", "jaxwin:"))


# --- XLA and jaxwin --------------------------------------------------------------------------


class _Jax(Peer):
    """A convolution compiled by XLA, called through its compiled executable."""

    options: ClassVar[dict[str, Any]] = {}

    def function(self, task: Task) -> Callable[..., jax.Array]:
        fn, _ = computation(task.conv, task.direction, task.layout, lax.conv_general_dilated)
        return fn

    def prepare(self, task: Task) -> Prepared:
        fn, arrays = self.function(task), self.arrays(task)
        kind = result_operand(task.direction)
        like = abstract(task.conv, kind, task.layout)
        compiled, timed = self.program(fn, arrays, like)
        memory = compiled.memory_analysis()
        facts = {"workspace_bytes": int(memory.temp_size_in_bytes)} | self.facts(fn, arrays)

        def result() -> Array:
            made: Array = from_layout(np.asarray(timed.call()), kind, task.layout)
            return made

        return Prepared(timed, result, facts)

    def arrays(self, task: Task) -> list[Any]:
        """The arguments of `function`, arrays or trees of them."""
        _, operands = computation(task.conv, task.direction, task.layout, lax.conv_general_dilated)
        return [
            jax.device_put(to_layout(task.operand(name), name, task.layout)) for name in operands
        ]

    def facts(self, fn: Callable[..., jax.Array], arrays: list[Any]) -> dict[str, Any]:
        return {}

    def program(
        self, fn: Callable[..., jax.Array], arrays: list[Any], like: Any
    ) -> tuple[Any, Timed]:
        """What is compiled, and what is timed of it; calls return a result that is like `like`."""
        compiled = jax.jit(fn).lower(*arrays).compile(compiler_options=self.options)
        return compiled, Timed(lambda: compiled(*arrays).block_until_ready())


def _zeros(like: Any) -> jax.Array:
    """In memory of XLA's own, which it can take over."""
    held: jax.Array = jax.jit(lambda: jnp.zeros(like.shape, like.dtype))()
    return held


@register
class Xla(_Jax):
    """What a user of JAX gets."""

    name = "xla"
    summary = "jax.lax with default flags"


@register
class XlaEigen(_Jax):
    """XLA without YNNPACK, which is slower for some convolutions and faster for others."""

    name = "xla-eigen"
    summary = "jax.lax without YNNPACK (xla_cpu_experimental_ynn_fusion_type='')"
    options: ClassVar[dict[str, Any]] = {"xla_cpu_experimental_ynn_fusion_type": ""}


class _Torch(Peer):
    """PyTorch; 1-D convolutions with channels last are 2-D ones of height 1, as torch has no other.

    What is not symmetric in the padding is padded by an operation of its own, as a user must.
    """

    modules = ("torch",)
    channels_last: ClassVar[bool] = False

    def prepare(self, task: Task) -> Prepared:
        import torch

        torch.set_num_threads(task.threads)
        conv = task.conv
        if conv.batch_groups > 1:
            raise Unsupported("no batch groups")
        if conv.dtype in INTEGERS:
            raise Unsupported("no integers without quantisation")
        geometry = _Geometry.of(conv)
        flat = self.channels_last and conv.rank == 1
        if flat:
            geometry = geometry.with_height()
        formats = {1: torch.channels_last, 2: torch.channels_last, 3: torch.channels_last_3d}
        order = formats[conv.rank] if self.channels_last else torch.contiguous_format

        def data(array: Array) -> Any:
            tensor = _torch_tensor(np.expand_dims(array, 1) if flat else array).movedim(-1, 1)
            return tensor.contiguous(memory_format=order)

        filters = task.forwards(task.w)
        weights = geometry.torch_weights(
            np.expand_dims(filters, 0) if flat else filters, conv.groups
        )
        x, y = data(task.x), data(task.y)
        w = _torch_tensor(weights).contiguous(memory_format=order)
        call = self.operation(task, geometry, x, w, y)

        def result() -> Array:
            with self.around():
                tensor = call()
                if tensor.dtype == torch.bfloat16:
                    tensor = tensor.float()
                out: Array = tensor.numpy()
            if task.direction == "dw":
                out = geometry.lax_weights(out, conv.groups)
                return task.forwards(np.asarray(out[0]) if flat else out)
            out = np.moveaxis(out, 1, -1)
            return np.asarray(out[:, 0]) if flat else out

        return Prepared(Timed(call, self.around), result)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """The state of torch in which calls run."""
        import torch

        with torch.inference_mode():
            yield

    def operation(
        self, task: Task, geometry: _Geometry, x: Any, w: Any, y: Any
    ) -> Callable[[], Any]:
        import torch

        pads, crop = geometry.explicit_padding()
        if task.direction == "dx" and min(pads, default=0) < 0:
            raise Unsupported("negative padding")
        args = (
            geometry.stride,
            geometry.torch_padding(),
            geometry.dilation,
            geometry.transposed,
            geometry.output_padding(),
            task.conv.groups,
        )

        def padded(x: Any) -> Any:
            return torch.nn.functional.pad(x, pads) if pads else x

        if task.direction == "fwd":
            return lambda: torch.convolution(padded(x), w, None, *args)
        backward = torch.ops.aten.convolution_backward.default
        if task.direction == "dx":
            like = padded(x)
            return lambda: backward(y, like, w, None, *args, (True, False, False))[0][crop]
        return lambda: backward(y, padded(x), w, None, *args, (False, True, False))[1]


def _torch_tensor(array: Array) -> Any:
    import torch

    if array.dtype.name == "bfloat16":  # numpy's is not torch's
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """A convolution the way that other libraries say it: stride and padding, maybe transposed.

    Of a transposed one, `stride` and `pads` are those of the convolution that it is the transpose
    of, and `grow` is what the output has beyond the smallest size that fits.
    """

    transposed: bool
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    grow: tuple[int, ...]

    @staticmethod
    def of(conv: Conv) -> _Geometry:
        """Raises Unsupported where the input is dilated and the window strides."""
        zeros = (0,) * conv.rank
        if max(conv.lhs_dilation) == 1:
            return _Geometry(
                False, conv.window, conv.stride, conv.rhs_dilation, conv.padding, zeros
            )
        if max(conv.stride) > 1:
            raise Unsupported("stride and dilation of the input together")
        low = [
            (k - 1) * d - low
            for k, d, (low, _) in zip(conv.window, conv.rhs_dilation, conv.padding, strict=True)
        ]
        grow = tuple(high - low for low, high in conv.padding)
        if min(low) < 0:
            raise Unsupported("a transposed convolution with negative padding")
        if min(grow) < 0:
            # one pixel less at the end: cropped by padding more, which crops at both ends
            raise Unsupported("a transposed convolution cropped more at its end")
        return _Geometry(
            True,
            conv.window,
            conv.lhs_dilation,
            conv.rhs_dilation,
            tuple((p, p) for p in low),
            grow,
        )

    def with_height(self) -> _Geometry:
        """The same with a first spatial dimension of size 1."""
        return _Geometry(
            self.transposed,
            (1, *self.window),
            (1, *self.stride),
            (1, *self.dilation),
            ((0, 0), *self.pads),
            (0, *self.grow),
        )

    def _symmetric(self) -> bool:
        return all(low == high >= 0 for low, high in self.pads)

    def torch_padding(self) -> tuple[int, ...]:
        return tuple(low if self._symmetric() else 0 for low, _ in self.pads)

    def output_padding(self) -> tuple[int, ...]:
        return self.grow

    def explicit_padding(self) -> tuple[list[int], Any]:
        """For `torch.nn.functional.pad` where padding is not symmetric, and what undoes it."""
        if self._symmetric():
            return [], ...
        ends = [slice(low or None, -high or None) for low, high in self.pads]
        return [p for pair in reversed(self.pads) for p in pair], (slice(None), slice(None), *ends)

    def torch_weights(self, w: Array, groups: int) -> Array:
        """(window..., C / groups, K) to (K, C / groups, window...), or (C, K / groups, ...)."""
        rank = w.ndim - 2
        if not self.transposed:
            return np.moveaxis(w, (rank + 1, rank), (0, 1))
        w = np.flip(w, tuple(range(rank)))
        *window, c, k = w.shape
        w = w.reshape(*window, c, groups, k // groups)
        w = np.moveaxis(w, (rank + 1, rank, rank + 2), (0, 1, 2))
        return w.reshape(groups * c, k // groups, *window)

    def lax_weights(self, w: Array, groups: int) -> Array:
        """The inverse of `torch_weights`."""
        rank = w.ndim - 2
        if not self.transposed:
            return np.moveaxis(w, (0, 1), (rank + 1, rank))
        c, k, *window = w.shape
        w = w.reshape(groups, c // groups, k, *window)
        w = np.moveaxis(w, (0, 1, 2), (rank + 1, rank, rank + 2))
        w = w.reshape(*window, c // groups, groups * k)
        return np.flip(w, tuple(range(rank)))


@register
class OneDnn(_Torch):
    """oneDNN as PyTorch calls it, channels last."""

    name = "onednn"
    summary = "PyTorch with oneDNN, channels last"
    channels_last = True


@register
class OneDnnNchw(_Torch):
    """oneDNN as PyTorch calls it, channels first."""

    name = "onednn-nchw"
    summary = "PyTorch with oneDNN, channels first"


@register
class OneDnnPacked(_Torch):
    """oneDNN with weights that were brought into its own order before."""

    name = "onednn-packed"
    summary = "PyTorch with oneDNN, channels last, weights packed before; forward only"
    channels_last = True
    packs_ahead = True

    def operation(
        self, task: Task, geometry: _Geometry, x: Any, w: Any, y: Any
    ) -> Callable[[], Any]:
        import torch

        if task.direction != "fwd":
            raise Unsupported("forward only")
        if task.conv.dtype == "float64":
            raise Unsupported("no float64")
        pads, _ = geometry.explicit_padding()
        if pads:
            raise Unsupported("padding that is not symmetric")
        padding, stride = list(geometry.torch_padding()), list(geometry.stride)
        dilation, groups = list(geometry.dilation), task.conv.groups
        ops = torch.ops.mkldnn
        with torch.inference_mode():
            if not geometry.transposed:
                packed = ops._reorder_convolution_weight(
                    w, padding, stride, dilation, groups, list(x.shape)
                )
                return lambda: ops._convolution_pointwise(
                    x, packed, None, padding, stride, dilation, groups, "none", [], ""
                )
            grow = list(geometry.output_padding())
            packed = ops._reorder_convolution_transpose_weight(
                w, padding, grow, stride, dilation, groups, list(x.shape)
            )
        return lambda: ops._convolution_transpose_pointwise(
            x, packed, None, padding, grow, stride, dilation, groups, "none", [], ""
        )


@register
class TorchNative(_Torch):
    """PyTorch's own kernels."""

    name = "torch-native"
    summary = "PyTorch without oneDNN, channels first"

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the switch warns about TF32 on GPUs
            with super().around(), torch.backends.mkldnn.flags(enabled=False):
                yield


@register
class OnnxRuntime(Peer):
    """ONNX Runtime; input and output are bound to memory that is kept."""

    name = "ort"
    summary = (
        "ONNX Runtime, channels first, weights packed before, output kept; forward only; integers "
        "by ConvInteger"
    )
    modules = ("onnxruntime", "onnx")
    reuses_output = True
    packs_ahead = True

    def prepare(self, task: Task) -> Prepared:
        import onnx
        import onnxruntime
        from onnx import helper, numpy_helper

        conv = task.conv
        if task.direction != "fwd":
            raise Unsupported("forward only")
        if conv.batch_groups > 1:
            raise Unsupported("no batch groups")
        if conv.dtype in ("bfloat16", "float64", "int16"):
            raise Unsupported(f"no {conv.dtype}")
        integers = conv.dtype in INTEGERS
        geometry = _Geometry.of(conv)
        attributes: dict[str, Any] = {
            "kernel_shape": geometry.window,
            "strides": geometry.stride,
            "dilations": geometry.dilation,
            "group": conv.groups,
            "pads": [low for low, _ in geometry.pads] + [high for _, high in geometry.pads],
        }
        if min(attributes["pads"]) < 0:
            raise Unsupported("negative padding")
        if geometry.transposed:
            if integers:
                raise Unsupported("no transposed convolutions of integers")
            attributes["output_padding"] = geometry.grow
        x = np.ascontiguousarray(np.moveaxis(task.x, -1, 1))
        y = np.zeros((conv.batch, conv.features, *conv.out_size), conv.dtype_of("y"))
        kind = helper.np_dtype_to_tensor_dtype
        weights = np.ascontiguousarray(geometry.torch_weights(task.forwards(task.w), conv.groups))
        operator = "ConvTranspose" if geometry.transposed else "ConvInteger" if integers else "Conv"
        graph = helper.make_graph(
            [helper.make_node(operator, ["x", "w"], ["y"], **attributes)],
            "convolution",
            [helper.make_tensor_value_info("x", kind(x.dtype), x.shape)],
            [helper.make_tensor_value_info("y", kind(y.dtype), y.shape)],
            [numpy_helper.from_array(weights, "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = task.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        out = onnxruntime.OrtValue.ortvalue_from_numpy(y)
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
        binding.bind_ortvalue_output("y", out)
        call = functools.partial(session.run_with_iobinding, binding)

        def result() -> Array:
            call()
            return np.array(np.moveaxis(out.numpy(), 1, -1))  # whose memory goes with the session

        return Prepared(Timed(call), result)


@register
class Xnnpack(Peer):
    """XNNPACK as LiteRT (TensorFlow Lite) calls it, from a model of one convolution."""

    name = "xnnpack"
    summary = (
        "XNNPACK through LiteRT, channels last, weights packed before, output kept; forward only"
    )
    modules = ("ai_edge_litert.interpreter", "flatbuffers")
    reuses_output = True
    packs_ahead = True

    def prepare(self, task: Task) -> Prepared:
        from ai_edge_litert.interpreter import Interpreter

        from jaxwin.tuner import _litert

        if task.direction != "fwd":
            raise Unsupported("forward only")
        if task.conv.dtype != "float32":
            raise Unsupported("float32 only")
        conv = task.conv
        if conv.batch_groups > 1:
            raise Unsupported("no batch groups")
        if conv.rank == 3:
            raise Unsupported("no 3-D convolutions")
        geometry = _Geometry.of(conv)
        x, w, y = task.x, task.forwards(task.w), task.y
        if conv.rank == 1:
            geometry = geometry.with_height()
            x, w, y = np.expand_dims(x, 1), np.expand_dims(w, 0), np.expand_dims(y, 1)
        try:
            model = _litert.model(
                x.shape,
                w,
                y.shape,
                groups=conv.groups,
                transposed=geometry.transposed,
                stride=geometry.stride,
                dilation=geometry.dilation,
                pads=geometry.pads,
            )
        except ValueError as error:
            raise Unsupported(str(error)) from error
        interpreter = Interpreter(model_content=model, num_threads=task.threads)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
        interpreter.invoke()
        if not any(op["op_name"] == "DELEGATE" for op in interpreter._get_ops_details()):
            raise Unsupported("XNNPACK does not take it, only LiteRT's own kernel")
        index = interpreter.get_output_details()[0]["index"]

        def result() -> Array:
            interpreter.invoke()
            out: Array = interpreter.get_tensor(index)
            return out[:, 0] if conv.rank == 1 else out

        return Prepared(Timed(interpreter.invoke), result)


@register
class Jaxwin(_Jax):
    """jaxwin as a user gets it."""

    name = "jaxwin"
    summary = "jaxwin, the plan that dispatch chooses"

    def function(self, task: Task) -> Callable[..., jax.Array]:
        fn, _ = computation(task.conv, task.direction, task.layout, jaxwin.conv_general_dilated)
        return fn

    def facts(self, fn: Callable[..., jax.Array], arrays: list[Any]) -> dict[str, Any]:
        (row,) = jaxwin.explain(fn, *arrays)
        return {
            "plan": {
                "tier": row.tier,
                "algorithm": row.algorithm,
                "parameters": row.parameters,
                "isa": row.isa,
                "reason": row.reason,
            }
        }


@register
class JaxwinDonated(Jaxwin):
    """jaxwin where the program reuses its buffers, as the peers that keep their output do."""

    name = "jaxwin-donated"
    summary = "jaxwin with the result in a donated buffer"
    reuses_output = True

    def program(
        self, fn: Callable[..., jax.Array], arrays: list[Any], like: Any
    ) -> tuple[Any, Timed]:
        def into(first: jax.Array, second: jax.Array, out: jax.Array) -> jax.Array:
            return fn(first, second)

        program = jax.jit(into, donate_argnums=2, keep_unused=True)
        compiled = program.lower(*arrays, like).compile(compiler_options=self.options)
        held = _zeros(like)

        def call() -> Any:
            nonlocal held
            held = compiled(*arrays, held).block_until_ready()
            return held

        place = held.unsafe_buffer_pointer()
        if any(call().unsafe_buffer_pointer() != place for _ in range(2)):
            raise Unsupported("XLA did not put the result into the donated buffer")
        return compiled, Timed(call)


@register
class JaxwinLoop(Jaxwin):
    """jaxwin as a part of a larger program, which is called once for many convolutions."""

    name = "jaxwin-loop"
    summary = "jaxwin in a loop of one program, to compare with peers that keep their output"
    reuses_output = True

    def program(
        self, fn: Callable[..., jax.Array], arrays: list[Any], like: Any
    ) -> tuple[Any, Timed]:
        def repeated(count: jax.Array, out: jax.Array, *operands: jax.Array) -> jax.Array:
            def once(_: jax.Array, carry: Any) -> Any:
                # As if an operand depended on the result before it, or XLA would compute only one.
                operands, _ = lax.optimization_barrier(carry)  # type: ignore[no-untyped-call]
                return operands, fn(*operands)

            result: jax.Array = lax.fori_loop(0, count, once, (operands, out))[1]
            return result

        program = jax.jit(repeated, donate_argnums=1)
        compiled = program.lower(np.int32(1), like, *arrays).compile(compiler_options=self.options)
        held = _zeros(like)

        def times(count: int) -> Callable[[], Any]:
            number = jax.device_put(np.int32(count))

            def call() -> Any:
                nonlocal held
                held = compiled(number, held, *arrays).block_until_ready()
                return held

            return call

        calls = calls_per_sample(times(1), _LOOP_SECONDS)
        return compiled, Timed(times(calls), calls=calls)


@register
class JaxwinPacked(Jaxwin):
    """jaxwin with the filters from `jaxwin.pack`, an argument of each call."""

    name = "jaxwin-packed"
    summary = "jaxwin with weights packed before; forward only"
    packs_ahead = True

    def function(self, task: Task) -> Callable[..., jax.Array]:
        _check_friendly(task)
        return friendly(task.conv, task.layout.upper())

    def arrays(self, task: Task) -> list[Any]:
        x = jax.device_put(to_layout(task.x, "x", task.layout))
        w = pack(task.conv, task.layout.upper(), x, jax.device_put(task.w))
        if w.packing is None:
            raise Unsupported("no kernel that dispatch chooses here reads packed weights")
        (row,) = jaxwin.explain(self.function(task), x, w)
        if row.algorithm == _registry.XLA:
            raise Unsupported(f"the program would unpack the weights: {row.reason}")
        return [x, w]


@register
class JaxwinPackedLoop(JaxwinPacked, JaxwinLoop):
    """Both."""

    name = "jaxwin-packed-loop"
    summary = "jaxwin-loop with weights packed before; forward only"


@baseline
class Float32(JaxwinLoop):
    """The time that a convolution of another dtype would take in float32."""

    name = "float32"
    summary = "jaxwin-loop with the operands as float32"

    def prepare(self, task: Task) -> Prepared:
        if task.conv.dtype == "float32":
            raise Unsupported("the convolution is float32 already")
        wide = dataclasses.replace(
            task,
            conv=dataclasses.replace(task.conv, dtype="float32"),
            x=task.x.astype(np.float32),
            w=task.w.astype(np.float32),
            y=task.y.astype(np.float32),
        )
        prepared = super().prepare(wide)
        if task.conv.dtype not in INTEGERS:
            return prepared
        # Large sums of integers are not exact in float32; theirs are those that are compared.
        return dataclasses.replace(prepared, result=super().prepare(task).result)


def _check_friendly(task: Task) -> None:
    """Raises Unsupported where `jaxwin.conv` does not have the task's convolution."""
    conv = task.conv
    if task.direction != "fwd":
        raise Unsupported("forward only")
    if max(conv.lhs_dilation) > 1 or conv.reversed or conv.batch_groups > 1:
        raise Unsupported("jaxwin.conv has no such convolution")
    if conv.dtype in INTEGERS:
        raise Unsupported("jaxwin.conv gives the dtype of its operands")


class JaxwinWith(Jaxwin):
    """jaxwin with an algorithm asked for by name, for gradients too.

    changes: parameters of the algorithm that shall not have their default.
    """

    def __init__(self, algorithm: str, changes: Mapping[str, int] | None = None) -> None:
        self.algorithm, self.changes = algorithm, dict(changes or {})
        words = [algorithm, *(f"{key}={value}" for key, value in self.changes.items())]
        self.name = "jaxwin:" + ":".join(words)  # type: ignore[misc]

    def function(self, task: Task) -> Callable[..., jax.Array]:
        fn = super().function(task)

        def with_algorithm(*args: jax.Array) -> jax.Array:
            closed = jax.make_jaxpr(fn)(*args)
            return _evaluate(closed, self._convolution, args)

        return with_algorithm

    def _convolution(self, x: jax.Array, w: jax.Array, **params: Any) -> jax.Array:
        if not self.changes:
            return _fused.fused_conv(x, w, algorithm=self.algorithm, **params)
        out = jax.eval_shape(lambda x, w: _primitive.conv_p.bind(x, w, **params), x, w)
        problem = _problem.from_parameters(x, w, out, params)
        made = plan(problem, self.algorithm, self.changes)
        struct: Any = jax.ShapeDtypeStruct
        results = [struct(out.shape, out.dtype)]
        if made.workspace_bytes > 0:
            results.append(struct((made.workspace_bytes,), np.uint8))
        call = jax.ffi.ffi_call(_lowering.TARGET, results)
        result: jax.Array = call(x, w, **_lowering.attributes(problem, made))[0]
        return result

    def facts(self, fn: Callable[..., jax.Array], arrays: list[Any]) -> dict[str, Any]:
        if not self.changes:
            return super().facts(fn, arrays)
        return {"plan": {"tier": "requested", "algorithm": self.algorithm, "isa": _registry.isa(),
                         "parameters": self.changes, "reason": ""}}  # fmt: skip


def plan(problem: Problem, algorithm: str, changes: Mapping[str, int]) -> Plan:
    """An algorithm's default plan for a problem, with some parameters changed.

    Raises:
        Unsupported: the native core refuses it.
    """
    names = _registry.parameter_names(algorithm)
    if names is None or not changes.keys() <= set(names):
        raise Unsupported(f"{algorithm} has no parameters {', '.join(changes)}")

    def made(params: Sequence[int]) -> dict[str, Any]:
        answer = _ffi.make_plan(
            problem.native(), algorithm, _registry.isa(), _registry.threads(), params=params
        )
        if "plan" not in answer:
            raise Unsupported(answer["error"])
        return dict(answer["plan"])

    default = dict(zip(names, made(())["params"], strict=True))
    values = tuple((default | dict(changes)).values())
    return Plan(
        algorithm, _registry.isa(), _registry.threads(), values, made(values)["workspace_bytes"]
    )


def _evaluate(
    closed: Any, convolve: Callable[..., jax.Array], args: tuple[jax.Array, ...]
) -> jax.Array:
    """A flat jaxpr with another function in place of its convolutions."""
    values: dict[Any, Any] = dict(zip(closed.jaxpr.invars, args, strict=True))
    values.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    for equation in closed.jaxpr.eqns:
        inputs = [
            variable.val if hasattr(variable, "val") else values[variable]
            for variable in equation.invars
        ]
        if equation.primitive is _primitive.conv_p:
            outputs = [convolve(*inputs, **equation.params)]
        else:
            bound = equation.primitive.bind(*inputs, **equation.params)
            outputs = bound if equation.primitive.multiple_results else [bound]
        values.update(zip(equation.outvars, outputs, strict=True))
    result: jax.Array = values[closed.jaxpr.outvars[0]]
    return result


class JaxwinIn(Jaxwin):
    """jaxwin with operands and result in a layout of `jaxwin.conv`, converted before; forward."""

    def __init__(self, algorithm: str, layout: str) -> None:
        self.algorithm, self.layout = algorithm, layout
        self.name = f"jaxwin:{algorithm}@{layout}"  # type: ignore[misc]

    def prepare(self, task: Task) -> Prepared:
        _check_friendly(task)
        conv = task.conv
        fn = friendly(conv, self.layout, self.algorithm)
        arrays = [jaxwin.to_layout(task.x, self.layout), jax.device_put(task.w)]
        try:
            compiled = jax.jit(fn).lower(*arrays).compile()
        except ValueError as error:
            raise Unsupported(first_line(error)) from error

        def call() -> Any:
            return compiled(*arrays).block_until_ready()

        def result() -> Array:
            return np.asarray(jaxwin.from_layout(call(), self.layout, batch=conv.batch))

        analysis: Any = compiled.memory_analysis()
        memory = int(analysis.temp_size_in_bytes)
        return Prepared(Timed(call), result, {"workspace_bytes": memory} | self.facts(fn, arrays))


# --- baselines -------------------------------------------------------------------------------


class _ZeroInsertion(_Jax):
    """A transposed convolution the conventional way: its input written out with zeros between."""

    convolve: ClassVar[Callable[..., jax.Array]]

    def function(self, task: Task) -> Callable[..., jax.Array]:
        conv = task.conv
        if task.direction != "fwd" or max(conv.lhs_dilation) == 1 or task.layout != "nhwc":
            raise Unsupported("transposed convolutions, forward, channels last")
        dense = dataclasses.replace(
            conv,
            size=tuple((n - 1) * d + 1 for n, d in zip(conv.size, conv.lhs_dilation, strict=True)),
            lhs_dilation=(1,) * conv.rank,
        )
        fn, _ = computation(dense, "fwd", "nhwc", type(self).convolve)
        between = [(0, 0, 0), *((0, 0, d - 1) for d in conv.lhs_dilation), (0, 0, 0)]

        def upsampled(x: jax.Array, w: jax.Array) -> jax.Array:
            # The barrier keeps XLA from turning the zeros into a dilation.
            barrier: Any = lax.optimization_barrier
            return fn(barrier(lax.pad(x, np.zeros((), x.dtype), between)), w)

        return upsampled


@baseline
class Zeros(_ZeroInsertion):
    """Zero insertion and jaxwin's own convolution."""

    name = "zeros"
    summary = "zeros inserted into the input, then jaxwin's dense convolution"
    convolve = staticmethod(jaxwin.conv_general_dilated)


@baseline
class ZerosXla(_ZeroInsertion):
    """Zero insertion and XLA's convolution."""

    name = "zeros-xla"
    summary = "zeros inserted into the input, then jax.lax's dense convolution"
    convolve = staticmethod(lax.conv_general_dilated)


@baseline
class Loops(Peer):
    """A plain direct convolution, compiled here with `cc -O3 -march=native`; see loops.c."""

    name = "loops"
    summary = "seven loops in C, channels last, features innermost; one thread, forward, float32"
    reuses_output = True

    def missing(self) -> str:
        return "" if shutil.which("cc") else "there is no C compiler (cc)"

    def prepare(self, task: Task) -> Prepared:
        conv = task.conv
        plain = max(*conv.lhs_dilation, conv.groups, conv.batch_groups) == 1 and not conv.reversed
        if task.direction != "fwd" or conv.rank != 2 or conv.dtype != "float32" or not plain:
            raise Unsupported("two dimensions, forward, float32, dense")
        if task.threads > 1:
            raise Unsupported("one thread only")
        x, w = np.ascontiguousarray(task.x), np.ascontiguousarray(task.w)
        y = np.zeros(conv.y_shape, np.float32)
        sizes = (
            *(conv.batch, *conv.size, conv.channels, conv.features, *conv.window, *conv.out_size),
            *(*conv.stride, *conv.rhs_dilation, conv.padding[0][0], conv.padding[1][0]),
        )
        numbers = np.array(sizes, np.int64)
        arguments = [ctypes.c_void_p(array.ctypes.data) for array in (x, w, y, numbers)]
        function = _loops()

        def call() -> Any:
            function(*arguments)
            return x, w, y, numbers  # which the pointers point into

        def result() -> Array:
            call()
            return y

        return Prepared(Timed(call), result, {"workspace_bytes": 0})


@functools.cache
def _loops() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "loops.so")
        source = Path(__file__).with_name("loops.c")
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC"]
        command += ["-o", str(library), str(source)]
        subprocess.run(command, check=True, capture_output=True)
        function = ctypes.CDLL(str(library)).jaxwin_loops
    function.restype = None
    return function
