# SPDX-License-Identifier: Apache-2.0
"""Every registry entry against the scalar chain (bit for bit) and float64, on drawn problems.

Algorithms of other numerical families are held to the error bound that their row states, and to one
result for every instruction set and number of threads.

Plans run outside XLA into poisoned, guarded result and workspace buffers. A new algorithm, tile or
instruction set is tested by existing: all names come from the registry.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import problems
import pytest
import reference

from jaxwin import _ffi, _registry
from jaxwin._problem import Problem
from jaxwin.tuner import problems as tuner_problems

REGISTRY = _registry.registry()
ALGORITHMS = {row["name"]: row for row in REGISTRY["algorithms"]}
DTYPES = REGISTRY["dtypes"]
KERNELS = [(name, dtype) for name, row in ALGORITHMS.items() for dtype in row["dtypes"]]
CANONICAL = [name for name, row in ALGORITHMS.items() if row["family"] == "canonical"]
ISAS = [row["name"] for row in REGISTRY["isas"] if row["runnable"]]
DRAWS = 25


def _drawn(algorithm: str, seed: int, dtype: str = "float32"):
    """A problem that the algorithm computes, with operands and the generator that made them."""
    rng = np.random.default_rng([seed, list(ALGORITHMS).index(algorithm)])
    kind = {"im2win": None, "im2col": None}.get(algorithm, algorithm)
    while True:
        out_dtype = str(rng.choice(DTYPES[dtype]["results"]))
        problem = problems.draw(rng, kind, dtype, out_dtype)
        taken = "rejected" not in _ffi.candidates(problem.native())[algorithm]
        if taken and not problem.widened:
            return problem, *problems.operands(problem, rng), rng


def _parameters(algorithm: str, problem, isa: str, threads: int, rng: np.random.Generator):
    """Random valid parameters, or the defaults where some tries find none."""
    specs = ALGORITHMS[algorithm]["params"]
    for _ in range(10):
        params = [int(rng.choice(spec["values"])) for spec in specs]
        answer = _ffi.make_plan(
            problem.native(), algorithm=algorithm, isa=isa, threads=threads, params=params
        )
        if "plan" in answer:
            return tuple(params)
    return ()


def _params(problem: Problem, algorithm: str, isa: str, **changes: int) -> tuple[int, ...]:
    """Of the usual plan, some of them changed; whether they make a plan is another question."""
    plan = _ffi.make_plan(problem.native(), algorithm=algorithm, isa=isa)["plan"]
    names = _registry.parameter_names(algorithm)
    chosen = dict(zip(names, plan["params"], strict=True))
    assert changes.keys() <= chosen.keys()
    return tuple((chosen | changes).values())


def _accepted(problem: Problem, algorithm: str, isa: str, params: tuple[int, ...]) -> bool:
    return "plan" in _ffi.make_plan(
        problem.native(), algorithm=algorithm, isa=isa, params=list(params)
    )


@pytest.mark.parametrize("seed", range(DRAWS))
@pytest.mark.parametrize(("algorithm", "dtype"), [k for k in KERNELS if k[0] in CANONICAL])
def test_equals_the_scalar_chain(algorithm: str, dtype: str, seed: int) -> None:
    problem, x, w, rng = _drawn(algorithm, seed, dtype)
    expected = reference.chain(problem, x, w)
    for isa in ISAS:
        for threads in (1, 3):
            for params in ((), _parameters(algorithm, problem, isa, threads, rng)):
                result = problems.run(
                    problem, x, w, algorithm, isa=isa, threads=threads, params=params
                )
                np.testing.assert_array_equal(result, expected, f"{problem} {isa} {params}")


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("algorithm", "dtype"), [k for k in KERNELS if k[0] not in CANONICAL])
def test_other_families_keep_to_their_bound(algorithm: str, dtype: str, seed: int) -> None:
    """Within the bound, whatever the plan; and the same bits on every set and thread."""
    problem, x, w, rng = _drawn(algorithm, seed, dtype)
    exact, _ = reference.float64(problem, x, w)
    scale = reference.scale(problem, x, w)
    drawn = _parameters(algorithm, problem, ISAS[0], 1, rng)
    for params in dict.fromkeys([(), drawn]):
        plan = _ffi.make_plan(problem.native(), algorithm=algorithm, isa=ISAS[0], params=params)
        params = tuple(plan["plan"]["params"])
        first = None
        for isa in ISAS:
            for threads in (1, 3):
                result = problems.run(
                    problem, x, w, algorithm, isa=isa, threads=threads, params=params
                )
                first = result if first is None else first
                np.testing.assert_array_equal(result, first, f"{problem} {isa} {params}")
        if np.dtype(problem.out_dtype).kind in "iu":
            expected = reference.chain(problem, x, w)
            np.testing.assert_array_equal(first, expected, f"{problem} {params}")
            continue
        half = float(jnp.finfo(problem.out_dtype).eps) / 2
        bound = plan["plan"]["error_bound"] * scale + half * np.abs(exact) + 1e-30
        wrong = np.abs(first.astype(np.float64) - exact) - (1 + half) * bound
        assert (wrong <= 0).all(), f"{problem} {params}"


@pytest.mark.parametrize("seed", range(DRAWS))
@pytest.mark.parametrize("algorithm", CANONICAL)
def test_close_to_float64(algorithm: str, seed: int) -> None:
    problem, x, w, _ = _drawn(algorithm, 1000 + seed)
    exact, magnitude = reference.float64(problem, x, w)
    result = problems.run(problem, x, w, algorithm)
    # n roundings of a chain: |error| <= n u sum |x| |w|, n u < 1
    terms = x.size + w.size
    bound = min(terms, 10_000) * 2.0**-24 * magnitude + 1e-30
    assert (np.abs(result - exact) <= bound).all(), str(problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_tile(isa: str, dtype: str) -> None:
    """All (mr, nv) of the registry's tiles, every tail of rows and columns."""
    row = next(r for r in REGISTRY["isas"] if r["name"] == isa)
    width = row["width"] * 4 // DTYPES[dtype]["word"]
    rng = np.random.default_rng(7)
    for max_mr, nv in row["tiles"]:
        for k in {nv * width, max(1, nv * width - 3), 2 * nv * width + 1}:
            problem = problems.make(
                1, 3, k, (5, max_mr + 3), (2, 3), padding=((1, 0), (1, 1)), dtype=dtype
            )
            x, w = problems.operands(problem, rng)
            expected = reference.chain(problem, x, w)
            names = [spec["name"] for spec in ALGORITHMS["im2win"]["params"]]
            plan = _ffi.make_plan(problem.native(), algorithm="im2win", isa=isa)["plan"]
            usual = dict(zip(names, plan["params"], strict=True))
            for mr in range(1, max_mr + 1):
                tile = usual | {"mr": mr, "nv": nv, "kc": 0, "rows": 2, "cols": 0, "pack": 1}
                params = tuple(tile.values())
                if "int" in dtype and mr == max_mr:  # one row less may be all that fits
                    answer = _ffi.make_plan(
                        problem.native(), algorithm="im2win", isa=isa, params=params
                    )
                    if "no such tile" in answer.get("error", ""):
                        continue
                result = problems.run(problem, x, w, "im2win", isa=isa, params=params)
                np.testing.assert_array_equal(result, expected, f"mr {mr} nv {nv} k {k}")


def test_the_readme_names_every_algorithm() -> None:
    readme = Path(__file__).resolve().parent.parent / "README.md"
    if not readme.exists():
        pytest.skip("the tests are not in a checkout")
    table = readme.read_text().split("## Algorithms")[1].split("\n## ")[0]
    lines = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    names = [(re.findall(r"`(\w+)`", cells[1]), cells[2]) for cells in lines]
    assert sorted(name for row, _ in names for name in row) == sorted(ALGORITHMS)
    others = {name for row, what in names for name in row if "*other bits*" in what}
    assert others == set(ALGORITHMS) - set(CANONICAL)


@pytest.mark.parametrize(
    ("images", "layout"), [(1, ("NWC", "WIO")), (3, ("NWC", "WIO")), (2, ("NCW", "OIW"))]
)
def test_wide_weight_gradients_in_pieces(images: int, layout: tuple[str, str]) -> None:
    """A row that is a chunk for itself, some window positions at a time: what wide layers have."""
    rng = np.random.default_rng(5)
    # Channels are the gradient's images, and images its channels.
    lhs, rhs = ("CWN", "IWO") if layout[0] == "NWC" else ("CNW", "IOW")
    problem = problems.make(
        5, images, 3, (721,), (703,), stride=(3,), padding=((2, 1),), layout=(lhs, rhs)
    )
    assert problem.chunk_rows == 1
    x, w = problems.operands(problem, rng)
    expected = reference.chain(problem, x, w)
    names = [spec["name"] for spec in ALGORITHMS["weight_grad"]["params"]]
    pieces = 0
    for isa in ISAS:
        plan = _ffi.make_plan(problem.native(), algorithm="weight_grad", isa=isa)["plan"]
        usual = dict(zip(names, plan["params"], strict=True))
        for pack, tile, swap, cols in itertools.product((0, 1), (0, 1), (0, 1), (0, 100, 256)):
            chosen = usual | {"pack": pack, "tile": tile, "swap": swap, "cols": cols}
            params = tuple(chosen.values())
            answer = _ffi.make_plan(
                problem.native(), algorithm="weight_grad", isa=isa, params=params
            )
            if "plan" not in answer:
                continue
            pieces += cols > 0
            for threads in (1, 3):
                result = problems.run(
                    problem, x, w, "weight_grad", isa=isa, threads=threads, params=params
                )
                np.testing.assert_array_equal(result, expected, f"{isa} {chosen}")
    assert pieces >= 4


# Of layers of few channels: images, input and output channels, size, and options of the layer.
FEW_CHANNELS = {
    "first layer": (2, 3, 20, (23, 21), (3, 3), {"padding": ((1, 1), (1, 1))}),
    "first layer, stride": (
        1,
        1,
        9,
        (30, 41),
        (5, 5),
        {"stride": (2, 2), "padding": ((2, 1),) * 2},
    ),
    "last layer": (3, 18, 2, (17, 24), (3, 4), {"padding": ((1, 1), (2, 0))}),
    "transposed": (2, 3, 1, (20, 19), (5, 5), {"lhs_dilation": (2, 2), "padding": ((3, 2),) * 2}),
    "transposed, cropped": (
        1,
        9,
        3,
        (15, 26),
        (4, 4),
        {"lhs_dilation": (2, 3), "padding": ((-1, 2), (0, -2))},
    ),
    "dilated": (1, 2, 1, (9, 40), (3, 3), {"rhs_dilation": (2, 1), "padding": ((3, 2), (1, 1))}),
    "sound": (2, 1, 1, (2100,), (7,), {"padding": ((3, 3),)}),
    "three dimensions": (1, 2, 5, (4, 12, 30), (3, 3, 3), {"padding": ((1, 1),) * 3}),
}


def _weight_gradient(images, c, k, size, window, options) -> Problem:
    """The convolution that lax's rule makes of the weight gradient of a layer, channels last."""
    rank = len(size)
    ones = (1,) * rank
    stride = options.get("stride", ones)
    lhs_dilation = options.get("lhs_dilation", ones)
    rhs_dilation = options.get("rhs_dilation", ones)
    padding = options["padding"]
    real = [
        (s - 1) * d + 1 + sum(pad) for s, d, pad in zip(size, lhs_dilation, padding, strict=True)
    ]
    taps = [(w - 1) * d + 1 for w, d in zip(window, rhs_dilation, strict=True)]
    out = [(r - t) // s + 1 for r, t, s in zip(real, taps, stride, strict=True)]
    rows = [(o - 1) * s + 1 for o, s in zip(out, stride, strict=True)]
    # Input that no output reads is cropped.
    cropped = tuple(
        (low, high + t - 1 + row - r)
        for (low, high), r, t, row in zip(padding, real, taps, rows, strict=True)
    )
    spatial = "DHW"[3 - rank :]
    return problems.make(
        c,
        images,
        k,
        size,
        tuple(out),
        stride=rhs_dilation,
        padding=cropped,
        lhs_dilation=lhs_dilation,
        rhs_dilation=stride,
        layout=(f"C{spatial}N", f"I{spatial}O"),
        out_layout=f"{spatial}NC",
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", FEW_CHANNELS)
def test_weight_gradients_of_few_channels(isa: str, layer: str) -> None:
    """Output columns share a tile, along padding with margins of zeros; with operands exchanged."""
    problem = _weight_gradient(*FEW_CHANNELS[layer])
    assert problem.chunk_rows > 0
    x, w = problems.operands(problem, np.random.default_rng(11))
    expected = reference.chain(problem, x, w)
    merged = set()
    plain = {"pack": 0, "tile": 0, "nv": 1}
    for swap, margins, mr in itertools.product((0, 1), (0, 1), (2, 5)):
        params = _params(problem, "weight_grad", isa, **plain, swap=swap, margins=margins, mr=mr)
        if not _accepted(problem, "weight_grad", isa, params):
            continue
        merged.add((swap, margins))
        result = problems.run(problem, x, w, "weight_grad", isa=isa, threads=2, params=params)
        np.testing.assert_array_equal(result, expected, f"{swap=} {margins=} {mr=}")
    assert {(0, 0), (1, 0)} <= merged
    assert merged & {(0, 1), (1, 1)}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("operand", ["lhs", "rhs"])
@pytest.mark.parametrize("layer", ["first layer", "last layer", "transposed"])
def test_zeros_of_margins_spoil_no_sum(isa: str, operand: str, layer: str) -> None:
    """Where the convolution has no product, no infinity is multiplied by a margin's zero."""
    problem = _weight_gradient(*FEW_CHANNELS[layer])
    operands = problems.operands(problem, np.random.default_rng(12))
    array = operands[("lhs", "rhs").index(operand)]
    for column in (0, array.shape[2] // 2, array.shape[2] - 1):
        x, w = (each.copy() for each in operands)
        (x if operand == "lhs" else w)[0, 3, column, 0] = np.inf
        results = {}
        plain = {"pack": 0, "tile": 0}
        for swap, margins in itertools.product((0, 1), (0, 1)):
            params = _params(problem, "weight_grad", isa, **plain, swap=swap, margins=margins)
            if _accepted(problem, "weight_grad", isa, params):
                results[swap, margins] = problems.run(
                    problem, x, w, "weight_grad", isa=isa, params=params
                )
        assert any(margins == 1 for _, margins in results)
        assert np.isfinite(results[0, 0]).any()
        for result in results.values():
            np.testing.assert_array_equal(result, results[0, 0])


@pytest.mark.parametrize("isa", ISAS)
def test_weight_gradients_of_cropped_inputs(isa: str) -> None:
    """Negative padding: the input rows that a chunk packs begin behind the first."""
    problem = problems.make(
        6,
        9,
        8,
        (4, 6),
        (4, 5),
        padding=((-1, 2), (-1, 1)),
        layout=("CHWN", "IHWO"),
        out_layout="NHWC",
    )
    x, w = problems.operands(problem, np.random.default_rng(3))
    expected = reference.chain(problem, x, w)
    params = _params(problem, "weight_grad", isa, tile=1)
    result = problems.run(problem, x, w, "weight_grad", isa=isa, params=params)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("size", "window", "dilation", "padding"),
    [
        ((6, 7), (6, 7), (1, 1), ((0, 0), (0, 0))),
        ((7, 9), (4, 5), (2, 2), ((0, 0), (0, 0))),  # stride 2: every other row and column is read
        ((8, 9), (4, 3), (2, 3), ((0, -1), (-1, -1))),
        ((9, 9), (4, 5), (3, 2), ((1, 0), (1, -1))),  # the first is padding
    ],
)
def test_weight_gradients_of_pointwise_layers(isa: str, size, window, dilation, padding) -> None:
    """Products of two matrices, in chunks of several images; either may be the tiles' rows."""
    images = 1 + 2048 // (window[0] * window[1])
    problem = problems.make(
        19,
        images,
        7,
        size,
        window,
        rhs_dilation=dilation,
        padding=padding,
        layout=("CHWN", "IHWO"),
        out_layout="HWNC",
    )
    assert problem.out_shape[:2] == (1, 1)
    x, w = problems.operands(problem, np.random.default_rng(9))
    expected = reference.chain(problem, x, w)
    names = [spec["name"] for spec in ALGORITHMS["weight_grad"]["params"]]
    plan = _ffi.make_plan(problem.native(), algorithm="weight_grad", isa=isa)["plan"]
    usual = dict(zip(names, plan["params"], strict=True))
    taken = set()
    for pack, tile, swap in itertools.product((0, 1), repeat=3):
        params = tuple((usual | {"pack": pack, "tile": tile, "swap": swap}).values())
        answer = _ffi.make_plan(problem.native(), algorithm="weight_grad", isa=isa, params=params)
        if "plan" not in answer:
            continue
        taken.add((pack, tile, swap))
        for threads in (1, 3):
            result = problems.run(
                problem, x, w, "weight_grad", isa=isa, threads=threads, params=params
            )
            np.testing.assert_array_equal(result, expected, f"{pack=} {tile=} {swap=}")
    product = padding[0][0] <= 0 and padding[1][0] <= 0
    assert ((1, 1, 1) in taken) == product
    assert {(0, 0, 0), (1, 1, 0), (0, 0, 1)} <= taken


@pytest.mark.parametrize("layout", [("CHWN", "IHWO"), ("NCHW", "OIHW")])
@pytest.mark.parametrize(
    ("groups", "images", "features", "batch", "case"),
    [
        (40, 1, 1, 3, {"size": (9, 8), "padding": ((1, 1), (1, 1))}),
        (40, 1, 1, 2, {"size": (70, 12), "padding": ((1, 1), (1, 1))}),
        (40, 1, 1, 1, {"size": (5, 200), "padding": ((2, 2), (2, 2))}),
        (21, 1, 2, 2, {"size": (30, 9), "padding": ((1, 0), (0, 1)), "rhs_dilation": (2, 2)}),
        (21, 1, 1, 2, {"size": (23, 9), "padding": ((2, 2), (2, 2)), "stride": (2, 2)}),
        (17, 1, 1, 2, {"size": (20, 9), "padding": ((7, 6), (6, 7))}),  # rows of padding alone
        (17, 1, 1, 2, {"size": (20, 9), "padding": ((-2, 4), (-1, 2))}),
        (9, 3, 2, 2, {"size": (11, 10), "padding": ((1, 1), (1, 1))}),
        (5, 8, 8, 1, {"size": (10, 30), "padding": ((1, 1), (1, 1))}),
        # Groups that take turns as lanes, the last vector with fewer of them than the others.
        (11, 2, 2, 2, {"size": (9, 31), "padding": ((1, 1), (1, 1)), "stride": (2, 2)}),
        (7, 4, 4, 2, {"size": (33, 37), "padding": ((2, 2), (2, 2)), "rhs_dilation": (2, 2)}),
        (5, 2, 4, 2, {"size": (10, 12), "padding": ((1, 0), (0, 1)), "rhs_dilation": (1, 2)}),
        (9, 4, 2, 1, {"size": (12, 11), "padding": ((-1, 3), (2, -1)), "outputs": (3, 4)}),
        (3, 8, 8, 3, {"size": (24, 39), "padding": ((2, 2), (2, 2)), "outputs": (5, 5)}),
        (3, 3, 8, 1, {"size": (10, 12), "padding": ((1, 1), (1, 1)), "outputs": (2, 2)}),
        (2, 16, 16, 2, {"size": (10, 30), "padding": ((1, 1), (1, 1))}),
        (2, 11, 32, 1, {"size": (9, 14), "padding": ((0, 0), (1, 1)), "outputs": (1, 7)}),
        (3, 8, 8, 1, {"size": (8, 8), "padding": ((7, 6), (6, 7))}),
        (2, 8, 8, 1, {"size": (3000,), "padding": ((1, 1),), "outputs": (3,)}),
        (3, 4, 4, 1, {"size": (4, 20, 30), "padding": ((1, 1),) * 3, "outputs": (3, 3, 3)}),
        # Operands that no second-level cache holds: channels of several vectors side by side.
        (80, 1, 1, 1, {"size": (90, 90), "padding": ((1, 1), (1, 1))}),
    ],
)
def test_weight_gradients_with_channels_as_lanes(
    layout: tuple[str, str],
    groups: int,
    images: int,
    features: int,
    batch: int,
    case: dict[str, Any],
) -> None:
    case = dict(case)
    size, outputs = case["size"], case.pop("outputs", (3, 3))
    stride, dilation = (case.get(o, (1,) * len(size)) for o in ("stride", "rhs_dilation"))
    spatial = "DHW"[3 - len(size) :]
    lhs, rhs = (text.replace("HW", spatial) for text in layout)
    window = tuple(
        (s + sum(p) - 1 - (o - 1) * t) // d + 1
        for s, p, o, t, d in zip(size, case["padding"], outputs, stride, dilation, strict=True)
    )
    problem = problems.make(
        *(groups * images, batch, groups * features), window=window, batch_groups=groups,
        layout=(lhs, rhs), out_layout=spatial + "NC" if lhs[0] == "C" else lhs, **case
    )  # fmt: skip
    assert problem is not None
    assert problem.chunk_rows > 0
    x, w = problems.operands(problem, np.random.default_rng(groups))
    expected = reference.chain(problem, x, w)
    name = "depthwise" if images == 1 else "grouped"
    for isa, threads in itertools.product(ISAS, (1, 3)):
        result = problems.run(problem, x, w, name, isa=isa, threads=threads)
        np.testing.assert_array_equal(result, expected, f"{isa} {threads}")


@pytest.mark.parametrize("isa", ISAS)
def test_filters_that_vectors_do_not_fill_are_packed(isa: str) -> None:
    (width,) = (row["width"] for row in REGISTRY["isas"] if row["name"] == isa)
    names = [spec["name"] for spec in ALGORITHMS["direct"]["params"]]

    def pack(features: int) -> int:
        problem = problems.make(1, 96, features, (56, 56), (1, 1))
        plan = _ffi.make_plan(problem.native(), algorithm="direct", isa=isa, threads=1)["plan"]
        return dict(zip(names, plan["params"], strict=True))["pack"]

    assert pack(2 * width) == 0
    assert pack(width + width // 2) == 1


def test_the_fewer_channels_of_a_pointwise_layer_are_rows() -> None:
    def swap(c: int, k: int, stride: int = 1) -> int:
        problem = problems.make(
            c,
            8,
            k,
            (28 * stride,) * 2,
            (28, 28),
            rhs_dilation=(stride,) * 2,
            padding=((0, 1 - stride),) * 2,
            layout=("CHWN", "IHWO"),
            out_layout="HWNC",
        )
        plan = _ffi.make_plan(problem.native(), algorithm="weight_grad", isa=ISAS[-1], threads=1)
        names = [spec["name"] for spec in ALGORITHMS["weight_grad"]["params"]]
        return dict(zip(names, plan["plan"]["params"], strict=True))["swap"]

    assert swap(512, 128) == swap(512, 128, 2) == 1
    assert swap(128, 512) == swap(128, 512, 2) == 0


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2), (4, 4), (1, 4)])
def test_segregated_transposed_convolutions(stride: tuple[int, int]) -> None:
    """All windows from below the stride to above it, odd sizes, and results cut off anywhere."""
    rng = np.random.default_rng(sum(stride))
    for window, low, high in itertools.product(range(1, 6), (0, 1, 3), (0, 2)):
        problem = problems.make(
            2,
            3,
            5,
            (4, 3),
            (window, max(1, 6 - window)),
            padding=((low, high), (high, low)),
            lhs_dilation=stride,
        )
        if problem is None or "rejected" in _ffi.candidates(problem.native())["segregated"]:
            assert stride == (1, 1) or problem is None
            continue
        x, w = problems.operands(problem, rng)
        expected = reference.chain(problem, x, w)
        for isa in ISAS:
            result = problems.run(problem, x, w, "segregated", isa=isa, threads=2)
            np.testing.assert_array_equal(result, expected, f"{problem} {isa}")


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("epilogue", ["none", "bias", "residual"])
def test_few_features_of_all_residues_are_written_together(stride: int, epilogue: str) -> None:
    """Odd widths, windows from below the stride to above it, padding, cut in blocks and not."""
    rng = np.random.default_rng(stride)
    tested = 0
    for window, (low, high), width in itertools.product(
        (1, 3, 4), ((0, 0), (2, -1), (1, 3)), (1, 9, 35)
    ):
        features = int(rng.integers(1, 7))
        problem = problems.make(
            2,
            int(rng.integers(1, 6)),
            features,
            (5, width),
            (min(window, 2), window),
            padding=((0, 1), (low, high)),
            lhs_dilation=(min(stride, 2), stride),
        )
        if problem is None or "rejected" in _ffi.candidates(problem.native())["planar"]:
            continue
        tested += 1
        x, w = problems.operands(problem, rng)
        expected = reference.chain(problem, x, w)
        arguments = {}
        if epilogue != "none":
            arguments |= {
                "bias": problems.values(rng, (features,), "float32"),
                "activation": "relu",
            }
            expected = expected + arguments["bias"]
        if epilogue == "residual":
            arguments["residual"] = problems.values(rng, problem.out_shape, "float32")
            expected = expected + arguments["residual"]
        if epilogue != "none":
            expected = np.maximum(expected, 0)
        for isa, cols, flat in itertools.product(ISAS, (0, 16), (0, 1)):
            params = _params(problem, "planar", isa, cols=cols, flat=flat)
            answer = _ffi.make_plan(problem.native(), algorithm="planar", isa=isa, params=params)
            if "plan" not in answer:
                continue
            result = problems.run(problem, x, w, "planar", isa=isa, params=params, **arguments)
            np.testing.assert_array_equal(result, expected, f"{problem} {isa} {params}")
    assert tested > 15


@pytest.mark.parametrize("k", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("isa", ISAS)
def test_output_rows_of_few_features_share_loads(isa: str, k: int) -> None:
    """planar's tiles of several output rows, in blocks of any rows, in place and not."""
    rng = np.random.default_rng(k)
    tiles = next(row["tiles"] for row in REGISTRY["isas"] if row["name"] == isa)
    highest = max(mr for mr, _ in tiles)
    tested = 0
    for size, window, padding, layout in (
        ((9, 35), (3, 3), ((1, 1), (1, 1)), ("NHWC", "HWIO")),
        ((3, 20), (5, 2), ((3, 4), (0, 3)), ("NHWC", "OHWI")),
        ((12, 18), (2, 3), ((-1, 0), (0, 0)), ("NCHW", "OIHW")),
    ):
        problem = problems.make(
            2, 17, k, size, window, padding=padding, layout=layout, out_layout="NHWC"
        )
        x, w = problems.operands(problem, rng)
        bias = problems.values(rng, (k,), "float32")
        expected = np.maximum(reference.chain(problem, x, w) + bias, 0)
        for mr, rows, cols, strip in itertools.product((k, highest), (0, 3), (0, 16), (0, 1)):
            chosen = {"mr": mr, "nv": 1, "rows": rows, "cols": cols, "strip": strip, "flat": 0}
            params = tuple(chosen[name] for name in _registry.parameter_names("planar"))
            answer = _ffi.make_plan(problem.native(), algorithm="planar", isa=isa, params=params)
            if "plan" not in answer:
                continue
            tested += 1
            result = problems.run(
                problem, x, w, "planar", isa=isa, params=params, bias=bias, activation="relu"
            )
            np.testing.assert_array_equal(result, expected, f"{problem} {chosen}")
    assert tested >= 24


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("isa", ISAS)
def test_each_input_pixel_reaches_its_outputs(isa: str, k: int, dtype: str) -> None:
    """scatter's walkers, bands of rows and images, that leave the input at either end."""
    rng = np.random.default_rng(k)
    tested = 0
    for size, window, padding, dilation, out_layout in (
        ((13, 9), (3, 3), ((1, 1), (1, 1)), (1, 1), "NHWC"),
        ((7, 6), (4, 5), ((2, 1), (2, 3)), (2, 3), "NHWC"),  # inserted zeros
        ((8, 11), (2, 3), ((-2, 0), (4, -3)), (1, 2), "NCHW"),  # outputs that nothing reaches
        ((1, 20), (1, 4), ((0, 0), (3, 3)), (1, 1), "NHWC"),
        ((3, 4), (1, 1), ((0, 0), (0, 1)), (3, 3), "NHWC"),  # windows with gaps between
    ):
        problem = problems.make(
            *(3, 17, k, size, window),
            padding=padding,
            lhs_dilation=dilation,
            out_layout=out_layout,
            dtype=dtype,
            out_dtype="int32" if dtype == "int8" else "",
        )
        x, w = problems.operands(problem, rng)
        expected = reference.chain(problem, x, w)
        epilogue = {}
        if dtype == "float32":
            bias = problems.values(rng, (k,), "float32")
            features = bias if out_layout == "NHWC" else bias[:, None, None]
            expected = np.maximum(expected + features, 0)
            epilogue = {"bias": bias, "activation": "relu"}
        for mr, nv, cols, images in itertools.product((1, 2, 5), (1, 2), (0, 4), (0, 1)):
            chosen = {"mr": mr, "nv": nv, "cols": cols, "images": images}
            params = tuple(chosen[name] for name in _registry.parameter_names("scatter"))
            answer = _ffi.make_plan(problem.native(), algorithm="scatter", isa=isa, params=params)
            if "no such tile" in answer.get("error", ""):
                continue
            tested += 1
            result = problems.run(problem, x, w, "scatter", isa=isa, params=params, **epilogue)
            np.testing.assert_array_equal(result, expected, f"{problem} {chosen}")
    assert tested >= 60


@pytest.mark.parametrize("isa", ISAS)
def test_few_columns_become_words_at_a_time(isa: str) -> None:
    """A large image of elements that are not words, in scatter's strip."""
    for batch, images in ((1, 0), (3, 1)):
        problem = problems.make(
            batch, 1600, 2, (21, 9), (2, 2), padding=((1, 0), (0, 1)), dtype="bfloat16"
        )
        x, w = problems.operands(problem, np.random.default_rng(batch))
        expected = reference.chain(problem, x, w)
        for mr, cols in ((2, 0), (3, 4)):
            chosen = {"mr": mr, "nv": 1, "cols": cols, "images": images}
            params = tuple(chosen[name] for name in _registry.parameter_names("scatter"))
            result = problems.run(problem, x, w, "scatter", isa=isa, params=params)
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("size", "window", "padding", "c", "k"),
    [
        ((301,), (5,), ((2, 2),), 3, 9),  # rows in place, but for blocks on padding
        ((2, 90), (1, 4), ((0, 0), (5, 1)), 20, 40),
        ((90,), (2,), ((1, -3),), 64, 32),
        ((4, 4), (3, 3), ((1, 1), (1, 1)), 96, 256),  # filters in the order of memory
        ((4, 4), (1, 3), ((0, 0), (1, 1)), 300, 640),
        ((5, 5), (3, 3), ((2, 2), (2, 2)), 96, 256),  # each column of the window its part of them
        ((10, 11), (3, 4), ((2, 2), (3, 1)), 40, 600),
        ((44, 64), (3, 3), ((1, 1), (1, 1)), 64, 3),  # the next rows during products
    ],
)
def test_what_comes_next_is_read_ahead(isa: str, size, window, padding, c: int, k: int) -> None:
    problem = problems.make(1, c, k, size, window, padding=padding)
    x, w = problems.operands(problem, np.random.default_rng(k))
    expected = reference.chain(problem, x, w)
    for algorithm, cols in itertools.product(("im2win", "rows", "direct", "planar"), (0, 32)):
        params = _params(problem, algorithm, isa, **({"cols": cols} if cols > 0 else {}))
        for threads in (1, 2):
            result = problems.run(problem, x, w, algorithm, isa=isa, params=params, threads=threads)
            np.testing.assert_array_equal(result, expected, f"{algorithm} {params}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("size", "padding"), [((4, 4), (1, 1)), ((5, 3), (2, 2))])
def test_transposed_filters_are_read_ahead(isa: str, size, padding) -> None:
    """Channels innermost, as input gradients have them: a window position is one piece."""
    problem = problems.make(
        1, 256, 650, size, (3, 3), padding=(padding, padding), layout=("NHWC", "HWOI")
    )
    x, w = problems.operands(problem, np.random.default_rng(3))
    expected = reference.chain(problem, x, w)
    for kc, threads in itertools.product((256, 128, 0), (1, 2)):
        params = _params(problem, "direct", isa, pack=2, kc=kc)
        result = problems.run(problem, x, w, "direct", isa=isa, params=params, threads=threads)
        np.testing.assert_array_equal(result, expected, f"{params}")


# Large enough for several threads: few rows, one row, groups of other numbers than the threads'.
SHARED_OUT = {
    "1x1": {"c": 128, "k": 40, "size": (30, 30), "window": (1, 1)},
    "panels": {"c": 64, "k": 144, "size": (9, 9), "window": (3, 3)},
    "groups": {"c": 96, "k": 96, "size": (16, 16), "window": (3, 3), "groups": 3},
    "row": {"c": 15, "k": 15, "size": (4000,), "window": (21,), "rhs_dilation": (4,)},
    "depthwise row": {"c": 80, "k": 80, "size": (3000,), "window": (15,), "groups": 80},
    "grouped": {"c": 64, "k": 64, "size": (20, 20), "window": (3, 3), "groups": 4},
    "residues": {"c": 24, "k": 30, "size": (20, 18), "window": (8, 8), "lhs_dilation": (4, 4)},
    "uneven residues": {
        "c": 48,
        "k": 48,
        "size": (14, 14),
        "window": (3, 3),
        "lhs_dilation": (2, 2),
    },
    "no window": {"c": 128, "k": 128, "size": (16, 16), "window": (1, 1), "lhs_dilation": (2, 2)},
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", SHARED_OUT)
def test_however_many_threads_share_the_work(isa: str, case: str) -> None:
    shape = SHARED_OUT[case]
    padding = tuple((size // 2, size // 2) for size in shape["window"])
    problem = problems.make(1, **shape, padding=padding)
    assert problem.flops > 6e6, "fewer threads are worth waking"
    x, w = problems.operands(problem, np.random.default_rng(11))
    expected = reference.chain(problem, x, w)
    for threads in (1, 2, 3, 16):
        result = problems.run(problem, x, w, "auto", isa=isa, threads=threads)
        np.testing.assert_array_equal(result, expected, f"{threads} threads")


def test_inserted_zeros_are_not_multiplied() -> None:
    """Products and memory of a stride of 4 by 2: an eighth, and no upsampled input."""
    for size, k in (((32, 32), 4), ((33, 31), 4)):
        dense = problems.make(1, 16, 8, tuple(4 * n + 3 for n in size), (k, k))
        problem = problems.make(
            1, 16, 8, size, (k, k), padding=((3, 3), (3, 3)), lhs_dilation=(4, 2)
        )
        products = 2 * problem.out_shape[1] * problem.out_shape[2] * 8 * 16 * k * k
        assert problem.flops == pytest.approx(products / 8, rel=0.05)
        assert dense.flops > problem.flops
        plan = _ffi.make_plan(problem.native(), algorithm="segregated", threads=1)["plan"]
        upsampled = 4 * 16 * (4 * size[0]) * (2 * size[1])
        assert plan["workspace_bytes"] < upsampled / 4


def test_output_rows_that_are_lanes_together() -> None:
    """planar's `flat`, for tasks of a few rows and of all of them."""
    tested = 0
    for seed, isa, rows in itertools.product(range(60), ISAS, (0, 3)):
        problem, x, w, _ = _drawn("planar", seed)
        params = _params(problem, "planar", isa, rows=rows, flat=1)
        answer = _ffi.make_plan(problem.native(), algorithm="planar", isa=isa, params=params)
        if "plan" not in answer:
            assert "rows are not an input row apart" in answer["error"]
            continue
        tested += 1
        result = problems.run(problem, x, w, "planar", isa=isa, params=params)
        expected = reference.chain(problem, x, w)
        np.testing.assert_array_equal(result, expected, f"{problem} {isa} {params}")
    assert tested > 60


@pytest.mark.parametrize(
    ("size", "window", "padding", "rhs_dilation", "stride"),
    [
        ((14, 15), (3, 3), ((6, 6), (6, 6)), (6, 6), (1, 1)),
        ((5, 20), (2, 9), ((0, 1), (8, 8)), (1, 1), (1, 1)),
        ((3, 11), (3, 5), ((1, 1), (30, 3)), (1, 2), (1, 2)),
        ((4, 9), (1, 4), ((0, 0), (-2, 25)), (1, 3), (1, 1)),
        ((2, 3, 12), (2, 3, 3), ((1, 1), (1, 1), (9, 9)), (1, 1, 9), (1, 1, 1)),
        ((6, 7), (3, 3), ((1, 1), (2, 2)), (1, 1), (1, 1)),
        ((5, 4), (4, 3), ((3, 0), (0, 2)), (1, 1), (2, 1)),
    ],
)
@pytest.mark.parametrize("channels", [5, 40])
@pytest.mark.parametrize("algorithm", ["rows", "im2win", "direct"])
def test_tiles_on_padding(
    algorithm: str, channels: int, size, window, padding, rhs_dilation, stride
) -> None:
    """Padding along x is left out, of whole tiles, of their edges, or column by column."""
    rng = np.random.default_rng(11)
    layouts = (None, {3: ("NCHW", "OIHW"), 4: None}[len(size) + 1])
    dtypes = ("float32",) if algorithm == "direct" else ("float32", "bfloat16")
    for layout, dtype in itertools.product(dict.fromkeys(layouts), dtypes):
        problem = problems.make(
            2,
            channels,
            19,
            size,
            window,
            padding=padding,
            rhs_dilation=rhs_dilation,
            stride=stride,
            layout=layout,
            dtype=dtype,
        )
        x, w = problems.operands(problem, rng)
        expected = reference.chain(problem, x, w)
        for isa, (mr, kc, cols) in itertools.product(
            ISAS, ((2, 0, 0), (4, 0, 5), (2, 8, 0), (4, 20, 0), (4, 20, 3))
        ):
            params = _params(problem, algorithm, isa, mr=mr, kc=kc, cols=cols)
            result = problems.run(problem, x, w, algorithm, isa=isa, params=params)
            np.testing.assert_array_equal(result, expected, f"{problem} {isa} {params}")


def _sweeps(problem: Problem, heights: Iterable[int]) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(isa, parameters, threads) of the sweeps of `grouped` that are so many rows high."""
    for isa, rows, threads in itertools.product(ISAS, heights, (1, 3)):
        params = _params(problem, "grouped", isa, strip=0, sweep=rows, rows=4)
        answer = _ffi.make_plan(problem.native(), algorithm="grouped", isa=isa, params=params)
        if "plan" in answer:
            yield isa, params, threads
        else:
            assert "no such tile" in answer["error"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    ("c", "k", "groups", "padding", "stride", "rhs_dilation", "out_layout"),
    [
        (3, 16, 1, ((1, 1), (1, 1)), (1, 1), (1, 1), "NHWC"),
        (20, 24, 1, ((1, 0), (3, 2)), (1, 1), (1, 1), "NHWC"),  # the last is not full
        (7, 32, 1, ((2, 2), (0, 4)), (2, 1), (2, 2), "NCHW"),  # by way of a buffer
        (5, 16, 3, ((0, 2), (1, 1)), (1, 2), (1, 1), "NHWC"),
        (4, 32, 2, ((1, 1), (-1, 1)), (2, 2), (3, 1), "NHWC"),
    ],
)
def test_sweeps_of_few_features(
    dtype: str, c: int, k: int, groups: int, padding, stride, rhs_dilation, out_layout
) -> None:
    """`grouped` with a vector of features that all read the same channels."""
    problem = problems.make(
        2,
        c * groups,
        k * groups,
        (9, 11),
        (3, 3),
        padding=padding,
        stride=stride,
        rhs_dilation=rhs_dilation,
        groups=groups,
        dtype=dtype,
        layout=("NHWC", "HWIO"),
        out_layout=out_layout,
    )
    if dtype == "bfloat16" and groups == 1:  # the dense kernels widen it
        assert "lie apart" in _ffi.make_plan(problem.native(), algorithm="grouped")["error"]
        return
    x, w = problems.operands(problem, np.random.default_rng(c))
    expected = reference.chain(problem, x, w)
    tested = 0
    for isa, params, threads in _sweeps(problem, range(1, 8)):
        tested += 1
        result = problems.run(
            problem, x, w, "grouped", isa=isa, params=params, threads=threads, activation="relu"
        )
        np.testing.assert_array_equal(result, np.maximum(expected, 0), f"{isa} {params}")
    assert tested >= 2 * (7 + 4 if dtype != "float64" else 4)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        *(("float32", "float32"), ("float64", "float64"), ("bfloat16", "bfloat16")),
        *(("float16", "float16"), ("bfloat16", "float32"), ("int8", "int32"), ("uint8", "uint8")),
    ],
)
@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 1), (1, 2)])
def test_sweeps_of_narrow_windows(window: tuple[int, int], dtype: str, out_dtype: str) -> None:
    """Words, of whatever type results are: elements have no tiles for such windows."""
    tested = 0
    for c, k, out_layout in ((8, 8, "NHWC"), (2, 4, "NHWC"), (3, 4, "NCHW")):
        problem = problems.make(
            *(2, c * 5, k * 5, (9, 11), window),
            padding=((1, 0), (0, 1)),
            groups=5,
            dtype=dtype,
            out_dtype=out_dtype,
            layout=("NHWC", "HWIO"),
            out_layout=out_layout,
        )
        assert problem is not None
        x, w = problems.operands(problem, np.random.default_rng(c))
        expected = reference.chain(problem, x, w)
        for isa, params, threads in _sweeps(problem, (1, 4, 7)):
            tested += 1
            result = problems.run(problem, x, w, "grouped", isa=isa, params=params, threads=threads)
            np.testing.assert_array_equal(
                *map(problems.comparable, (result, expected)), f"{isa} {params}"
            )
    assert tested >= 12


# The algorithms that take at least half again as long there, some of them six times.
SLOW = {
    "n16 1x1 c100 k1024 w4 p3": ("fwd", {"scatter", "direct", "rows", "im2win"}),
    "n8 14x14 c256 k256 w3 p1": ("fwd", {"scatter", "weight_grad"}),
    "n8 14x14 c512 k512 w3 s2 p1": ("fwd", {"scatter", "weight_grad"}),
    "n8 14x14 c1024 k512 w1 s2": ("dx", {"weight_grad"}),
    "16000 c1 k512 w10 s5": ("fwd", {"depthwise"}),
    "56x56 c128 k128 w3 p1 g32": ("dw", {"weight_grad"}),
    "28x28 c256 k256 w1 g64": ("fwd", {"direct", "planar"}),
    "28x28 c256 k256 w2 g64": ("fwd", {"direct", "planar"}),
}


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "baseline"])
@pytest.mark.parametrize("shape", SLOW)
def test_the_heuristic_leaves_what_is_slow(shape: str, isa: str) -> None:
    direction, slow = SLOW[shape]
    problem = tuner_problems.parse(shape).problem(direction)
    plan = _ffi.make_plan(problem.native(), isa=isa)["plan"]
    assert plan["algorithm"] not in slow


def test_every_algorithm_can_be_chosen() -> None:
    """The heuristic uses the whole registry but the baselines, some where there is no workspace."""
    chosen = set()
    for seed in range(300):
        rng = np.random.default_rng(seed)
        problem = problems.draw(rng, list(ALGORITHMS)[seed % len(ALGORITHMS)])
        for limit in (-1, 0):
            answer = _ffi.make_plan(problem.native(), max_workspace=limit)
            if "plan" in answer:
                chosen.add(answer["plan"]["algorithm"])
    assert chosen == set(CANONICAL) - {"im2col", "mec", "indirect"}


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
)
@pytest.mark.parametrize("layout", [("NHWC", "HWIO"), ("NCHW", "OIHW")])
@pytest.mark.parametrize("groups", [1, 80])
def test_an_epilogue_follows_each_piece_of_a_row(
    dtype: str, out_dtype: str, layout: tuple[str, str], groups: int
) -> None:
    """Rows of several pieces, panels that end within one, and marks of filters on padding."""
    rng = np.random.default_rng(groups)
    make = functools.partial(problems.make, 1, 80, 80, (5, 150), (3, 3), groups=groups)
    problem = make(padding=((1, 1), (1, 1)), dtype=dtype, out_dtype=out_dtype, layout=layout)
    assert problem is not None
    x, w = problems.operands(problem, rng)
    w[(0,) * w.ndim] = -np.inf  # what relu would hide
    bias = problems.values(rng, (80,), dtype)
    residual = problems.values(rng, problem.out_shape, dtype)
    shape = [1, 1, 1, 1]
    shape[problem.out_spec[1]] = 80
    sums = dataclasses.replace(problem, out_dtype="float32")
    tested = 0
    for name, row in _ffi.candidates(problem.native()).items():
        if "rejected" in row or name not in CANONICAL:
            continue
        plain = problems.run(sums, x, w, name)
        assert np.isnan(plain).any() and np.isinf(plain).any()
        biased = plain + bias.reshape(shape).astype(np.float32)
        with np.errstate(invalid="ignore"):
            expected = np.maximum(biased + residual.astype(np.float32), 0).astype(out_dtype)
        for isa, changes in itertools.product(ISAS, ({}, {"kc": 64}, {"window": 2})):
            if not changes.keys() <= set(_registry.parameter_names(name)):
                continue
            params = _params(problem, name, isa, **changes)
            answer = _ffi.make_plan(problem.native(), algorithm=name, isa=isa, params=params)
            if "plan" not in answer:
                continue
            tested += 1
            got = problems.run(
                *(problem, x, w, name),
                isa=isa,
                params=params,
                bias=bias,
                residual=residual,
                activation="relu",
            )
            np.testing.assert_array_equal(
                *map(problems.comparable, (got, expected)), f"{name} {isa} {params}"
            )
    assert tested > 5


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [(d, a) for d, r in DTYPES.items() for a in r["activations"]],
)
def test_epilogue_is_the_same_everywhere(activation: str, dtype: str) -> None:
    """act((chain + bias) + residual): the same bits in every algorithm, layout and set."""
    rng = np.random.default_rng(3)
    for case in (
        {"groups": 1, "layout": ("NHWC", "HWIO")},
        {"groups": 1, "layout": ("NCHW", "OIHW")},
        {"groups": 6, "layout": ("NHWC", "HWIO")},
        {"groups": 6, "layout": ("CHWN", "IHWO")},
        {"groups": 1, "layout": ("NHWC", "HWIO"), "lhs_dilation": (2, 2)},
    ):
        problem = problems.make(
            2, 6, 18, (6, 7), (3, 3), padding=((1, 1), (1, 1)), dtype=dtype, **case
        )
        x, w = problems.operands(problem, rng)
        bias = problems.values(rng, (18,), dtype)
        residual = problems.values(rng, problem.out_shape, dtype)
        shape = [1, 1, 1, 1]
        shape[problem.out_spec[1]] = 18
        wide = dataclasses.replace(
            problem, out_dtype="float64" if dtype == "float64" else "float32"
        )
        total = reference.chain(wide, x, w) + bias.reshape(shape).astype(wide.out_dtype)
        total = total + residual.astype(wide.out_dtype)
        exact = {
            "none": lambda z: z,
            "relu": lambda z: np.maximum(z, 0),
            "relu6": lambda z: np.clip(z, 0, 6),
            "leaky_relu": lambda z: np.where(z >= 0, z, 0.01 * z),
            "tanh": np.tanh,
            "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
            "silu": lambda z: z / (1 + np.exp(-z)),
            "gelu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
        }[activation](total.astype(np.float64))
        first = None
        for name, row in _ffi.candidates(problem.native()).items():
            if "rejected" in row or name not in CANONICAL:
                continue
            for isa in ISAS:
                for arguments in ({"bias": bias, "residual": residual, "activation": activation},):
                    result = problems.run(problem, x, w, name, isa=isa, **arguments)
                    first = result if first is None else first
                    np.testing.assert_array_equal(result, first, f"{name} {isa}")
        assert first is not None
        assert first.dtype == dtype
        tolerance = 8 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(first.astype(np.float64), exact, rtol=tolerance, atol=tolerance)
