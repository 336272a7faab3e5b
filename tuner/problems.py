# SPDX-License-Identifier: Apache-2.0
"""The convolutions that commands work on: presets, and shapes written on the command line."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import lax

import jaxwin
from jaxwin import Problem, _explain

DIRECTIONS = ("fwd", "dx", "dw")
PADDINGS = ("valid", "same")
INTEGERS = ("int8", "uint8", "int16")  # of operands; their sums are int32
DTYPES = ("float32", "float64", "bfloat16", "float16", *INTEGERS)
LAYOUTS = ("nhwc", "nchw", "chwn")

# The order of lhs and rhs in memory, per layout and number of spatial dimensions.
_SPECS = {
    "nhwc": {1: ("NWC", "WIO"), 2: ("NHWC", "HWIO"), 3: ("NDHWC", "DHWIO")},
    "nchw": {1: ("NCW", "OIW"), 2: ("NCHW", "OIHW"), 3: ("NCDHW", "OIDHW")},
    "chwn": {1: ("CWN", "IWO"), 2: ("CHWN", "IHWO"), 3: ("CDHWN", "IDHWO")},
}

GRAMMAR = """\
A shape is a list of words with spaces or commas between them, such as
"n8 56x56 c64 k128 w3 s2 p1". It is what jaxwin prints for a convolution.

\b
  56x56       input size, 1 to 3 dimensions
  c64 k128    input and output channels
  w3, w3x5    filter size
  n8          batch                           (else --batch)
  s2, s2x1    stride                          (else 1)
  p1, p1x2    padding on both sides           (else --padding)
  p0:1x0:1    padding before and after
  psame       padding as JAX computes it; also pvalid
  rd2         dilation of the filter          (else 1)
  ld2         dilation of the input           (else 1)
  g32, bg2    feature groups, batch groups    (else 1)
  transposed  the transpose of a convolution with this stride and padding
  reversed    the filter is read backwards, as in input gradients
  bfloat16    dtype of operands and result    (else --dtype); also float32,
              float64, float16, and int8, uint8, int16 with int32 results
  *3          how often a network has it      (else 1)
"""


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution by the parameters of `lax.conv_general_dilated`, whatever the layout.

    `size`, `window`, `stride`, `padding`, `lhs_dilation` and `rhs_dilation` have one entry per
    spatial dimension; `channels` and `features` are those of the input and of the output.
    `reversed`: the filter is read backwards. `count` says how often a network has the layer.
    """

    name: str
    batch: int
    size: tuple[int, ...]
    channels: int
    features: int
    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int = 1
    batch_groups: int = 1
    reversed: bool = False
    dtype: str = "float32"
    count: int = 1

    @property
    def rank(self) -> int:
        """The number of spatial dimensions."""
        return len(self.size)

    @property
    def out_size(self) -> tuple[int, ...]:
        """Spatial size of the output."""
        spans = _spans(self.window, self.rhs_dilation)
        return tuple(
            ((size - 1) * dilation + 1 + low + high - span) // stride + 1
            for size, dilation, (low, high), span, stride in zip(
                self.size, self.lhs_dilation, self.padding, spans, self.stride, strict=True
            )
        )

    @property
    def x_shape(self) -> tuple[int, ...]:
        """(batch, spatial..., channels)"""
        return (self.batch, *self.size, self.channels)

    @property
    def w_shape(self) -> tuple[int, ...]:
        """(window..., channels / groups, features)"""
        return (*self.window, self.channels // self.groups, self.features)

    @property
    def y_shape(self) -> tuple[int, ...]:
        """(batch, spatial..., features)"""
        return (self.batch // self.batch_groups, *self.out_size, self.features)

    def dtype_of(self, operand: str) -> str:
        """Of "x", "w" or "y"."""
        return "int32" if operand == "y" and self.dtype in INTEGERS else self.dtype

    def shape(self, operand: str) -> tuple[int, ...]:
        """Of "x", "w" or "y", channels last."""
        return {"x": self.x_shape, "w": self.w_shape, "y": self.y_shape}[operand]

    @property
    def flops(self) -> float:
        """Two per multiplication, without inserted zeros; the same for every direction."""
        return self.problem().flops

    def problem(self, direction: str = "fwd", layout: str = "nhwc") -> Problem:
        """What jaxwin's dispatch sees of the convolution, or of one of its gradients.

        Raises:
            ValueError: it has no gradients.
        """
        fn, operands = computation(self, direction, layout, jaxwin.conv_general_dilated)
        with jax.enable_x64(True):  # else float64 would become float32
            (problem,) = _explain.problems(fn, *(abstract(self, name, layout) for name in operands))
        return problem

    def __str__(self) -> str:
        return str(self.problem())


def from_problem(problem: Problem, count: int = 1) -> Conv:
    """The convolution of a problem, its layout and its epilogue left out.

    A gradient becomes a convolution of its own, with the dilations that it has. Operands of
    integers have a result of int32.

    Raises:
        ValueError: its dtype is none of `DTYPES`.
    """
    if problem.lhs_dtype not in DTYPES or problem.rhs_dtype != problem.lhs_dtype:
        dtypes = " and ".join(dict.fromkeys((problem.lhs_dtype, problem.rhs_dtype)))
        raise ValueError(f"{problem}: operands of {dtypes} are not among {', '.join(DTYPES)}")
    lhs, rhs = problem.lhs_spec, problem.rhs_spec
    conv = Conv(
        name="",
        batch=problem.lhs_shape[lhs[0]],
        size=tuple(problem.lhs_shape[d] for d in lhs[2:]),
        channels=problem.lhs_shape[lhs[1]],
        features=problem.rhs_shape[rhs[0]],
        window=tuple(problem.rhs_shape[d] for d in rhs[2:]),
        stride=problem.window_strides,
        padding=problem.padding,
        lhs_dilation=problem.lhs_dilation,
        rhs_dilation=problem.rhs_dilation,
        groups=problem.feature_group_count,
        batch_groups=problem.batch_group_count,
        reversed=any(problem.rhs_reversal),
        dtype=problem.lhs_dtype,
        count=count,
    )
    return dataclasses.replace(conv, name=str(conv))


def computation(
    conv: Conv, direction: str, layout: str, convolve: Callable[..., jax.Array]
) -> tuple[Callable[..., jax.Array], tuple[str, str]]:
    """A function of two arrays, and which operands those are: "x", "w" or "y" (its cotangent).

    convolve: `lax.conv_general_dilated` or a function with its signature.

    Raises:
        ValueError: the gradient of a convolution of integers.
    """
    if direction != "fwd" and conv.dtype in INTEGERS:
        raise ValueError(f"{conv.name or conv.dtype}: integers have no gradients ({direction})")
    lhs, rhs = _SPECS[layout][conv.rank]

    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        if conv.reversed:
            w = lax.rev(w, [d for d, letter in enumerate(rhs) if letter not in "IO"])
        return convolve(
            x,
            w,
            conv.stride,
            conv.padding,
            lhs_dilation=conv.lhs_dilation,
            rhs_dilation=conv.rhs_dilation,
            dimension_numbers=(lhs, rhs, lhs),
            feature_group_count=conv.groups,
            batch_group_count=conv.batch_groups,
            preferred_element_type=jax.numpy.int32 if conv.dtype in INTEGERS else None,
        )

    def input_gradient(w: jax.Array, y: jax.Array) -> jax.Array:
        like = abstract(conv, "x", layout)
        dx: jax.Array
        (dx,) = jax.linear_transpose(lambda x: forward(x, w), like)(y)
        return dx

    def filter_gradient(x: jax.Array, y: jax.Array) -> jax.Array:
        like = abstract(conv, "w", layout)
        dw: jax.Array
        (dw,) = jax.linear_transpose(lambda w: forward(x, w), like)(y)
        return dw

    if direction == "fwd":
        return forward, ("x", "w")
    if direction == "dx":
        return input_gradient, ("w", "y")
    return filter_gradient, ("x", "y")


def friendly(conv: Conv, layout: str, algorithm: str = "auto") -> Callable[..., jax.Array]:
    """`jaxwin.conv` of x in one of its layouts and w, which cannot say all that a `Conv` can."""

    def convolve(x: jax.Array, w: jax.Array | jaxwin.PackedWeights) -> jax.Array:
        return jaxwin.conv(x, w, algorithm=algorithm, **_arguments(conv, layout))

    return convolve


def pack(conv: Conv, layout: str, x: jax.Array, w: jax.Array) -> jaxwin.PackedWeights:
    """The weights of `friendly`'s convolution, (window..., C / groups, K), packed for it."""
    return jaxwin.pack(w, x, **_arguments(conv, layout))


def _arguments(conv: Conv, layout: str) -> dict[str, Any]:
    return {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.rhs_dilation,
        "groups": conv.groups,
        "layout": layout,
    }


def result_operand(direction: str) -> str:
    """Which operand's shape the result of a direction has."""
    return {"fwd": "y", "dx": "x", "dw": "w"}[direction]


def abstract(conv: Conv, operand: str, layout: str) -> Any:
    """Shape and dtype of "x", "w" or "y" in a layout."""
    stored = _permutation(conv.rank, operand, layout)
    shape = conv.shape(operand)
    struct: Any = jax.ShapeDtypeStruct
    return struct(tuple(shape[d] for d in stored), jax.numpy.dtype(conv.dtype_of(operand)))


def to_layout(array: Any, operand: str, layout: str) -> Any:
    """An array that is channels last, in another layout."""
    return np.ascontiguousarray(np.transpose(array, _permutation(array.ndim - 2, operand, layout)))


def from_layout(array: Any, operand: str, layout: str) -> Any:
    """The inverse of `to_layout`."""
    return np.transpose(array, np.argsort(_permutation(array.ndim - 2, operand, layout)))


def _permutation(rank: int, operand: str, layout: str) -> tuple[int, ...]:
    which = 1 if operand == "w" else 0
    ours, theirs = _SPECS["nhwc"][rank][which], _SPECS[layout][rank][which]
    return tuple(ours.index(letter) for letter in theirs)


# --- the grammar -----------------------------------------------------------------------------

_NUMBERS = r"\d+(?:x\d+)*"
_WORDS: dict[str, str] = {
    "batch": r"n(\d+)",
    "size": rf"({_NUMBERS})",
    "channels": r"c(\d+)",
    "features": r"k(\d+)",
    "window": rf"w({_NUMBERS})",
    "stride": rf"s({_NUMBERS})",
    "padding": r"p(same|valid|-?\d+(?::-?\d+)?(?:x-?\d+(?::-?\d+)?)*)",
    "lhs_dilation": rf"ld({_NUMBERS})",
    "rhs_dilation": rf"rd({_NUMBERS})",
    "groups": r"g(\d+)",
    "batch_groups": r"bg(\d+)",
    "transposed": r"(transposed)",
    "reversed": r"(reversed)",
    "dtype": rf"({'|'.join(DTYPES)})",
    "count": r"\*(\d+)",
}
_PATTERNS = {field: re.compile(pattern, re.IGNORECASE) for field, pattern in _WORDS.items()}


def parse(
    text: str,
    *,
    name: str = "",
    batch: int = 1,
    padding: str = "valid",
    dtype: str = "float32",
) -> Conv:
    """The convolution that a shape in the grammar describes.

    batch, padding ("valid" or "same"), dtype: for what the text leaves open.

    Raises:
        ValueError: one line that names the word at fault, or what is missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    words: dict[str, str] = {}
    for word in re.split(r"[\s,]+", text.strip()):
        for field, pattern in _PATTERNS.items():
            if match := pattern.fullmatch(word):
                if field in words:
                    raise ValueError(f"shape {text!r}: {word!r} gives the {field} a second time")
                words[field] = match[1].lower()
                break
        else:
            raise ValueError(f"shape {text!r}: {word!r} is no word of the grammar; see --help")
    required = {"size": "56x56", "channels": "c64", "features": "k64", "window": "w3"}
    for field, example in required.items():
        if field not in words:
            raise ValueError(f"shape {text!r}: {field} not given, for example {example}")
    size = _numbers(words["size"])
    rank = len(size)
    if rank > 3:
        raise ValueError(f"shape {text!r}: {rank} spatial dimensions; 1 to 3 are possible")

    def per_dimension(field: str) -> tuple[int, ...]:
        values = _numbers(words.get(field, "1"))
        if len(values) not in (1, rank):
            raise ValueError(f"shape {text!r}: the {field} must have 1 or {rank} values")
        return values * rank if len(values) == 1 else values

    window, stride, lhs_dilation, rhs_dilation = map(
        per_dimension, ("window", "stride", "lhs_dilation", "rhs_dilation")
    )
    pads = words.get("padding", padding.lower())
    transposed = "transposed" in words
    if transposed:
        if "lhs_dilation" in words:
            raise ValueError(f"shape {text!r}: transposed says the dilation of the input by s")
        lhs_dilation, stride = stride, (1,) * rank
    spans = _spans(window, rhs_dilation)
    if not transposed:
        resolved = _padding(text, pads, rank, size, spans, stride)
    elif pads in PADDINGS:
        resolved = _transposed_padding(pads, spans, lhs_dilation)
    else:
        forward = _padding(text, pads, rank, size, spans, stride)
        resolved = tuple(
            (span - 1 - low, span - 1 - high)
            for span, (low, high) in zip(spans, forward, strict=True)
        )
    conv = Conv(
        name=name,
        batch=int(words.get("batch", batch)),
        size=size,
        channels=int(words["channels"]),
        features=int(words["features"]),
        window=window,
        stride=stride,
        padding=resolved,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        groups=int(words.get("groups", 1)),
        batch_groups=int(words.get("batch_groups", 1)),
        reversed="reversed" in words,
        dtype=words.get("dtype", dtype),
        count=int(words.get("count", 1)),
    )
    _check(text, conv)
    return dataclasses.replace(conv, name=name or str(conv))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))


def _spans(window: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))


def _padding(
    text: str,
    pads: str,
    rank: int,
    size: tuple[int, ...],
    spans: tuple[int, ...],
    stride: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    if pads in PADDINGS:
        return tuple(
            (int(low), int(high))
            for low, high in lax.padtype_to_pads(size, spans, stride, pads.upper())
        )
    pairs = [tuple(int(value) for value in part.split(":")) for part in pads.split("x")]
    if len(pairs) not in (1, rank):
        raise ValueError(f"shape {text!r}: the padding must have 1 or {rank} values")
    return tuple((pair[0], pair[-1]) for pair in (pairs * rank if len(pairs) == 1 else pairs))


def _transposed_padding(
    pads: str, spans: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """What "same" and "valid" mean for `lax.conv_transpose`."""
    result = []
    for span, step in zip(spans, dilation, strict=True):
        total = span + step - 2
        low = span - 1 if step > span - 1 else math.ceil(total / 2)
        if pads == "valid":
            total, low = total + max(span - step, 0), span - 1
        result.append((low, total - low))
    return tuple(result)


def _check(text: str, conv: Conv) -> None:
    def fail(what: str) -> None:
        raise ValueError(f"shape {text!r}: {what}")

    positive = (
        *conv.size,
        *conv.window,
        *conv.stride,
        *conv.lhs_dilation,
        *conv.rhs_dilation,
        *(conv.batch, conv.channels, conv.features, conv.groups, conv.batch_groups, conv.count),
    )
    if min(positive) < 1:
        fail("every size must be at least 1")
    if conv.groups > 1 and conv.batch_groups > 1:
        fail("feature groups and batch groups exclude each other")
    if conv.channels % conv.groups or conv.features % (conv.groups * conv.batch_groups):
        fail("the groups must divide the channels c and k")
    if conv.batch % conv.batch_groups:
        fail("the batch groups must divide the batch n")
    if min(conv.out_size) < 1:
        fail("the window is larger than the padded input")


# --- presets ---------------------------------------------------------------------------------

# Name -> (what it is, lines of a layer's name and its shape in the grammar). What a line leaves
# open (batch, and padding where the source has layers of both kinds) is for the user to say.
PRESETS: dict[str, tuple[str, str]] = {
    "paper": (
        "the twelve benchmark layers of the im2win papers",
        """
        cv1   227x227 c3 k96 w11 s4
        cv2   231x231 c3 k96 w11 s4
        cv3   227x227 c3 k64 w7 s2
        cv4   224x224 c64 k64 w7 s2
        cv5   24x24 c96 k256 w5
        cv6   12x12 c256 k512 w3
        cv7   224x224 c3 k64 w3
        cv8   112x112 c64 k128 w3
        cv9   56x56 c64 k64 w3
        cv10  28x28 c128 k128 w3
        cv11  14x14 c256 k256 w3
        cv12  7x7 c512 k512 w3
        """,
    ),
    "resnet50": (
        "ResNet-50 (v1.5) at 224x224",
        """
        stem        224x224 c3 k64 w7 s2 p3
        s1.reduce1  56x56 c64 k64 w1 p0
        s1.3x3      56x56 c64 k64 w3 p1 *3
        s1.expand   56x56 c64 k256 w1 p0 *4
        s1.reduce   56x56 c256 k64 w1 p0 *2
        s2.reduce1  56x56 c256 k128 w1 p0
        s2.3x3s2    56x56 c128 k128 w3 s2 p1
        s2.down     56x56 c256 k512 w1 s2 p0
        s2.expand   28x28 c128 k512 w1 p0 *4
        s2.reduce   28x28 c512 k128 w1 p0 *3
        s2.3x3      28x28 c128 k128 w3 p1 *3
        s3.reduce1  28x28 c512 k256 w1 p0
        s3.3x3s2    28x28 c256 k256 w3 s2 p1
        s3.down     28x28 c512 k1024 w1 s2 p0
        s3.expand   14x14 c256 k1024 w1 p0 *6
        s3.reduce   14x14 c1024 k256 w1 p0 *5
        s3.3x3      14x14 c256 k256 w3 p1 *5
        s4.reduce1  14x14 c1024 k512 w1 p0
        s4.3x3s2    14x14 c512 k512 w3 s2 p1
        s4.down     14x14 c1024 k2048 w1 s2 p0
        s4.expand   7x7 c512 k2048 w1 p0 *3
        s4.reduce   7x7 c2048 k512 w1 p0 *2
        s4.3x3      7x7 c512 k512 w3 p1 *2
        """,
    ),
    "mobilenetv2": (
        "MobileNetV2 (width 1) at 224x224",
        """
        stem      224x224 c3 k32 w3 s2 p1
        b1.dw     112x112 c32 k32 w3 p1 g32
        b1.out    112x112 c32 k16 w1 p0
        b2.in     112x112 c16 k96 w1 p0
        b2.dw     112x112 c96 k96 w3 s2 p1 g96
        b2.out    56x56 c96 k24 w1 p0
        b3.in     56x56 c24 k144 w1 p0 *2
        b3.dw     56x56 c144 k144 w3 p1 g144
        b3.out    56x56 c144 k24 w1 p0
        b4.dw     56x56 c144 k144 w3 s2 p1 g144
        b4.out    28x28 c144 k32 w1 p0
        b5.in     28x28 c32 k192 w1 p0 *3
        b5.dw     28x28 c192 k192 w3 p1 g192 *2
        b5.out    28x28 c192 k32 w1 p0 *2
        b7.dw     28x28 c192 k192 w3 s2 p1 g192
        b7.out    14x14 c192 k64 w1 p0
        b8.in     14x14 c64 k384 w1 p0 *4
        b8.dw     14x14 c384 k384 w3 p1 g384 *4
        b8.out    14x14 c384 k64 w1 p0 *3
        b11.out   14x14 c384 k96 w1 p0
        b12.in    14x14 c96 k576 w1 p0 *3
        b12.dw    14x14 c576 k576 w3 p1 g576 *2
        b12.out   14x14 c576 k96 w1 p0 *2
        b14.dw    14x14 c576 k576 w3 s2 p1 g576
        b14.out   7x7 c576 k160 w1 p0
        b15.in    7x7 c160 k960 w1 p0 *3
        b15.dw    7x7 c960 k960 w3 p1 g960 *3
        b15.out   7x7 c960 k160 w1 p0 *2
        b17.out   7x7 c960 k320 w1 p0
        head      7x7 c320 k1280 w1 p0
        """,
    ),
    "convnext": (
        "ConvNeXt-T at 224x224, its pointwise layers as 1x1 convolutions",
        """
        stem      224x224 c3 k96 w4 s4 p0
        s1.dw     56x56 c96 k96 w7 p3 g96 *3
        s1.up     56x56 c96 k384 w1 p0 *3
        s1.down   56x56 c384 k96 w1 p0 *3
        s2.half   56x56 c96 k192 w2 s2 p0
        s2.dw     28x28 c192 k192 w7 p3 g192 *3
        s2.up     28x28 c192 k768 w1 p0 *3
        s2.down   28x28 c768 k192 w1 p0 *3
        s3.half   28x28 c192 k384 w2 s2 p0
        s3.dw     14x14 c384 k384 w7 p3 g384 *9
        s3.up     14x14 c384 k1536 w1 p0 *9
        s3.down   14x14 c1536 k384 w1 p0 *9
        s4.half   14x14 c384 k768 w2 s2 p0
        s4.dw     7x7 c768 k768 w7 p3 g768 *3
        s4.up     7x7 c768 k3072 w1 p0 *3
        s4.down   7x7 c3072 k768 w1 p0 *3
        """,
    ),
    "unet": (
        "U-Net with 64 to 1024 channels at 128x128",
        """
        enc1.a  128x128 c3 k64 w3 p1
        enc1.b  128x128 c64 k64 w3 p1 *2
        enc2.a  64x64 c64 k128 w3 p1
        enc2.b  64x64 c128 k128 w3 p1 *2
        enc3.a  32x32 c128 k256 w3 p1
        enc3.b  32x32 c256 k256 w3 p1 *2
        enc4.a  16x16 c256 k512 w3 p1
        enc4.b  16x16 c512 k512 w3 p1 *2
        mid.a   8x8 c512 k1024 w3 p1
        mid.b   8x8 c1024 k1024 w3 p1
        up4     8x8 c1024 k512 w2 s2 p0 transposed
        dec4    16x16 c1024 k512 w3 p1
        up3     16x16 c512 k256 w2 s2 p0 transposed
        dec3    32x32 c512 k256 w3 p1
        up2     32x32 c256 k128 w2 s2 p0 transposed
        dec2    64x64 c256 k128 w3 p1
        up1     64x64 c128 k64 w2 s2 p0 transposed
        dec1    128x128 c128 k64 w3 p1
        head    128x128 c64 k2 w1 p0
        """,
    ),
    "dcgan": (
        "DCGAN, generator and discriminator at 64x64",
        """
        gen1  1x1 c100 k1024 w4 p0 transposed
        gen2  4x4 c1024 k512 w4 s2 p1 transposed
        gen3  8x8 c512 k256 w4 s2 p1 transposed
        gen4  16x16 c256 k128 w4 s2 p1 transposed
        gen5  32x32 c128 k3 w4 s2 p1 transposed
        dis1  64x64 c3 k128 w4 s2 p1
        dis2  32x32 c128 k256 w4 s2 p1
        dis3  16x16 c256 k512 w4 s2 p1
        dis4  8x8 c512 k1024 w4 s2 p1
        dis5  4x4 c1024 k1 w4 p0
        """,
    ),
    "audio1d": (
        "one-dimensional layers of audio and genomics",
        """
        wide       10000 c15 k15 w51 rd8
        k5         10000 c64 k64 w5
        k5d8       10000 c64 k64 w5 rd8
        k51d8      10000 c64 k64 w51 rd8
        wave1      16000 c1 k512 w10 s5 p0
        wave2      3199 c512 k512 w3 s2 p0
        gated      16000 c32 k64 w2 rd64
        dw31       1000 c256 k256 w31 p15 g256
        dw3        1024 c64 k64 w3 p1 g64
        upsample8  256 c256 k128 w16 s8 p4 transposed
        upsample2  16384 c64 k32 w4 s2 p1 transposed
        """,
    ),
    "conv3d": (
        "three-dimensional layers of video and medical imaging",
        """
        video16  16x56x56 c16 k32 w3
        video64  8x28x28 c64 k64 w3
        stem     16x112x112 c3 k64 w3x7x7 s1x2x2 p1x3x3
        space    8x56x56 c64 k144 w1x3x3 p0x1x1
        time     8x56x56 c144 k64 w3x1x1 p1x0x0
        point    8x14x14 c256 k64 w1 p0
        dw       8x28x28 c64 k64 w3 p1 g64
        up       8x14x14 c128 k64 w2 s2 p0 transposed
        """,
    ),
    "depthwise": (
        "depthwise layers",
        """
        dw3.112  112x112 c32 k32 w3 p1 g32
        dw3.s2   112x112 c96 k96 w3 s2 p1 g96
        dw3.56   56x56 c128 k128 w3 p1 g128
        dw3.v    56x56 c128 k128 w3 p0 g128
        dw3.28   28x28 c192 k192 w3 p1 g192
        dw3.14   14x14 c384 k384 w3 p1 g384
        dw3.7    7x7 c960 k960 w3 p1 g960
        dw5.28   28x28 c120 k120 w5 p2 g120
        dw5.14   14x14 c672 k672 w5 p2 g672
        dw7.56   56x56 c96 k96 w7 p3 g96
        dw7.14   14x14 c384 k384 w7 p3 g384
        mult2    56x56 c64 k128 w3 p1 g64
        """,
    ),
    "grouped": (
        "layers with 2 to 32 groups",
        """
        g32.56   56x56 c128 k128 w3 p1 g32
        g32.28   28x28 c256 k256 w3 p1 g32
        g32.14   14x14 c512 k512 w3 p1 g32
        g32.7    7x7 c1024 k1024 w3 p1 g32
        g32.v    56x56 c128 k128 w3 p0 g32
        g32.s2   56x56 c256 k256 w3 s2 p1 g32
        g8.28    28x28 c256 k256 w3 p1 g8
        g4.14    14x14 c512 k512 w3 p1 g4
        g2.27    27x27 c96 k256 w5 p2 g2
        g3.1x1   28x28 c240 k240 w1 p0 g3
        """,
    ),
    "transposed": (
        "transposed layers of generators, decoders and upsampling",
        """
        t4.4     4x4 c1024 k512 w4 s2 p1 transposed
        t4.8     8x8 c512 k256 w4 s2 p1 transposed
        t4.16    16x16 c256 k128 w4 s2 p1 transposed
        t4.32    32x32 c128 k3 w4 s2 p1 transposed
        t2.56    56x56 c128 k64 w2 s2 p0 transposed
        t3.28    28x28 c64 k64 w3 s2 p1 transposed
        t8.32    32x32 c21 k21 w8 s4 p2 transposed
        t5.224   224x224 c3 k1 w5 s2 p1 transposed
        t4.224   224x224 c3 k1 w4 s2 p1 transposed
        t3.224   224x224 c3 k1 w3 s2 p1 transposed
        t5.wide  224x224 c3 k64 w5 s2 p1 transposed
        """,
    ),
    "gan": (
        "transposed layers of the generators of DCGAN, ArtGAN, GP-GAN and EB-GAN",
        """
        dc1   4x4 c1024 k512 w4 s2 p1 transposed
        dc2   8x8 c512 k256 w4 s2 p1 transposed
        dc3   16x16 c256 k128 w4 s2 p1 transposed
        dc4   32x32 c128 k3 w4 s2 p1 transposed
        art1  4x4 c512 k256 w4 s2 p1 transposed
        art2  8x8 c256 k128 w4 s2 p1 transposed
        art3  16x16 c128 k128 w4 s2 p1 transposed
        art4  32x32 c128 k3 w4 s2 p1 transposed
        gp1   4x4 c512 k256 w4 s2 p1 transposed
        gp2   8x8 c256 k128 w4 s2 p1 transposed
        gp3   16x16 c128 k64 w4 s2 p1 transposed
        gp4   32x32 c64 k3 w4 s2 p1 transposed
        eb1   4x4 c2048 k1024 w4 s2 p1 transposed
        eb2   8x8 c1024 k512 w4 s2 p1 transposed
        eb3   16x16 c512 k256 w4 s2 p1 transposed
        eb4   32x32 c256 k128 w4 s2 p1 transposed
        eb5   64x64 c128 k64 w4 s2 p1 transposed
        eb6   128x128 c64 k64 w4 s2 p1 transposed
        """,
    ),
    "long1d": (
        "one-dimensional layers with long dilated filters, around that of arXiv 2104.08002",
        """
        s51d8    60400 c15 k15 w51 rd8
        s51d1    60400 c15 k15 w51
        s51d64   60400 c15 k15 w51 rd64
        s21d8    60400 c15 k15 w21 rd8
        s5d8     60400 c15 k15 w5 rd8
        short    2000 c15 k15 w51 rd8
        c32      60400 c32 k32 w21 rd8
        c64      60400 c64 k64 w5 rd8
        """,
    ),
    "pointwise": (
        "1x1 layers",
        """
        p56.64    56x56 c256 k64 w1 p0
        p56.256   56x56 c64 k256 w1 p0
        p56.s2    56x56 c256 k512 w1 s2 p0
        p28.512   28x28 c128 k512 w1 p0
        p28.128   28x28 c512 k128 w1 p0
        p14.256   14x14 c1024 k256 w1 p0
        p14.1024  14x14 c256 k1024 w1 p0
        p7.2048   7x7 c512 k2048 w1 p0
        p7.512    7x7 c2048 k512 w1 p0
        p112.16   112x112 c32 k16 w1 p0
        """,
    ),
    "dilated": (
        "layers with a dilated filter",
        """
        d2.56   56x56 c64 k64 w3 rd2 p2
        d2.28   28x28 c256 k256 w3 rd2 p2
        d4.28   28x28 c512 k512 w3 rd4 p4
        d6.33   33x33 c256 k256 w3 rd6 p6
        d12.33  33x33 c256 k256 w3 rd12 p12
        d2.v    56x56 c64 k64 w3 rd2 p0
        """,
    ),
    "tiny": (
        "convolutions so small that calling them costs most",
        """
        t4    4x4 c8 k8 w3
        t8    8x8 c16 k16 w3
        t8.s  8x8 c16 k16 w3 p1
        t1    1x1 c8 k8 w1
        t.dw  8x8 c16 k16 w3 p1 g16
        t.1d  32 c8 k8 w3
        """,
    ),
}


def preset(
    name: str, *, batch: int = 1, padding: str = "valid", dtype: str = "float32"
) -> tuple[Conv, ...]:
    """The convolutions of a preset.

    batch, padding ("valid" or "same"), dtype: for what its lines leave open.

    Raises:
        KeyError: there is no such preset.
    """
    return tuple(
        parse(shape, name=layer, batch=batch, padding=padding, dtype=dtype)
        for layer, shape in _lines(name)
    )


def _lines(name: str) -> Iterator[tuple[str, str]]:
    for line in PRESETS[name][1].strip().splitlines():
        layer, shape = line.split(maxsplit=1)
        yield layer, shape
