# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' source, run on the CPU: bits of the scalar chain, bounds of tensor cores.

What this cannot show: that a GPU's own arithmetic and memory model do the same (tests/gpu does).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import cuda_shim
import numpy as np
import problems
import pytest
import reference

from jaxwin import _ffi, _registry

REGISTRY = {row["name"]: row for row in _registry.registry()["cuda"]["algorithms"]}
CANONICAL = [name for name, row in REGISTRY.items() if row["family"] == "canonical"]
# Small tiles: many blocks of few threads, and few of them full.
TILE = {"bm": 32, "bn": 32, "bk": 8, "tm": 4, "tn": 4, "stages": 3, "pack": 0, "unroll": 1}
TILE |= {"chunks": 0, "strip": 2, "vector": 1, "threads": 64, "pieces": 1, "bx": 8, "by": 4}
TILE |= {"taps_y": 3, "taps_x": 3}
KINDS = {
    "depthwise": "depthwise",
    "grouped": "grouped",
    "segregated": "segregated",
    "weight_grad": "weight_grad",
    "lanes_grad": "weight_grad",
}


@pytest.fixture(scope="module", autouse=True)
def _compiled_kernels() -> Iterator[None]:
    yield
    cuda_shim.cleanup()


def _params(algorithm: str, **changed: int) -> tuple[int, ...]:
    values = TILE | changed
    if algorithm == "im2win_full":
        values["pack"] = 1
    return tuple(values[spec["name"]] for spec in REGISTRY[algorithm]["params"])


def _equal(problem, algorithm: str, params: tuple[int, ...], rng: np.random.Generator) -> None:
    x, w = problems.operands(problem, rng)
    result = cuda_shim.run(problem, x, w, algorithm, params=params)
    expected = reference.chain(problem, x, w)
    np.testing.assert_array_equal(result, expected, f"{problem} {algorithm} {params}")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("algorithm", CANONICAL)
def test_drawn_problems(algorithm: str, seed: int) -> None:
    rng = np.random.default_rng([seed, CANONICAL.index(algorithm)])
    while True:
        problem = problems.draw(rng, KINDS.get(algorithm))
        if "rejected" in _ffi.cuda_candidates(problem.native())[algorithm]:
            continue
        if problem.flops < 4e5:
            break
    params = _params(algorithm, pack=seed % 2)
    if "plan" not in _ffi.cuda_make_plan(problem.native(), algorithm, params=params):
        params = ()  # pixels are neighbours: no strips
    _equal(problem, algorithm, params, rng)


def _make(*args, **kwargs):
    problem = problems.make(*args, **kwargs)
    assert problem is not None
    return problem


_PAD = ((1, 1), (1, 1))
NAMED = {
    # channels are neighbours: 16 bytes along the reduction, rows and features with tails
    "nhwc": ("im2win", _make(2, 8, 12, (9, 10), (3, 3), padding=_PAD, stride=(1, 2)), {}),
    "big tile": (
        "im2win",
        _make(1, 4, 20, (5, 9), (3, 3), padding=_PAD),
        {"bm": 64, "bn": 64, "tm": 8, "tn": 8, "bk": 16, "stages": 2, "unroll": 8},
    ),
    "first layer": ("im2win", _make(2, 3, 13, (11, 9), (5, 3), stride=(2, 2)), {"pack": 1}),
    "more stages than work": ("im2win", _make(1, 4, 4, (5, 5), (1, 1)), {"stages": 4}),
    "planes": (
        "im2win",
        _make(2, 5, 6, (7, 8), (3, 3), rhs_dilation=(2, 1), layout=("NCHW", "OIHW")),
        {},
    ),
    "images are neighbours": (
        "im2win",
        _make(8, 3, 9, (6, 7), (2, 3), padding=_PAD, layout=("CHWN", "IHWO")),
        {},
    ),
    "volume": ("im2win", _make(1, 4, 8, (4, 5, 6), (3, 2, 3), padding=((1, 1),) * 3), {}),
    "line": ("im2win", _make(2, 4, 8, (40,), (9,), rhs_dilation=(3,)), {}),
    "planes, results behind planes": (
        "im2win",
        _make(3, 5, 45, (7, 8), (3, 3), layout=("NCHW", "HWIO")),
        {"bn": 64, "tn": 8, "bm": 64},
    ),
    "residues of lines": (
        "segregated",
        _make(2, 3, 5, (9,), (4,), lhs_dilation=(2,), layout=("NCW", "OIW")),
        {},
    ),
    "rgb": (
        "few_channels",
        _make(2, 3, 13, (11, 20), (5, 3), stride=(2, 2), padding=_PAD, layout=("NHWC", "OHWI")),
        {},
    ),
    "rgb, aligned": (
        "few_channels",
        _make(2, 3, 40, (9, 17), (3, 3), padding=_PAD),
        {"bx": 16, "by": 8, "tm": 8, "tn": 8, "bn": 64, "bk": 16},
    ),
    "rgb planes": (
        "few_channels",
        _make(1, 3, 8, (9, 10), (3, 3), rhs_dilation=(2, 1), layout=("NCHW", "OIHW")),
        {"bk": 32},
    ),
    "grey volume": ("few_channels", _make(1, 1, 8, (4, 5, 6), (3, 2, 3)), {"by": 8, "bx": 4}),
    "mono": ("few_channels", _make(2, 2, 6, (50,), (7,), stride=(3,)), {"bx": 32, "by": 1}),
    "depthwise line": (
        "depthwise",
        _make(2, 8, 8, (40,), (4,), groups=8, padding=((2, 2),)),
        {"vector": 4, "strip": 8},
    ),
    "depthwise line, dilated planes": (
        "depthwise",
        _make(2, 6, 6, (40,), (5,), groups=6, rhs_dilation=(4,), layout=("NCW", "OIW")),
        {"strip": 1},
    ),
    "reversed": ("im2win", _make(1, 4, 8, (8, 7), (3, 2), reversal=(True, True)), {}),
    "groups of 4": (
        "grouped",
        _make(1, 16, 8, (6, 7), (3, 3), groups=4, padding=_PAD),
        {"vector": 4},
    ),
    "depthwise 4": (
        "depthwise",
        _make(2, 8, 8, (6, 9), (3, 3), groups=8, padding=_PAD, stride=(2, 2)),
        {"vector": 4, "strip": 4},
    ),
    "depthwise planes": (
        "depthwise",
        _make(2, 6, 6, (6, 9), (3, 3), groups=6, padding=_PAD, layout=("NCHW", "OIHW")),
        {"strip": 1},
    ),
    "depthwise, a large window": (
        "depthwise",
        _make(1, 3, 3, (9, 9), (9, 9), groups=3, padding=((4, 4),) * 2),
        {},
    ),
    "depthwise, transposed": (
        "depthwise",
        _make(1, 4, 4, (5, 6), (3, 3), groups=4, padding=_PAD, lhs_dilation=(2, 2)),
        {},
    ),
    "window below the dilation": (
        "segregated",
        _make(1, 4, 8, (5, 4), (2, 1), lhs_dilation=(3, 2), padding=((2, 1), (0, 1))),
        {},
    ),
    "ten parts, two launches": (
        "segregated",
        _make(1, 2, 4, (4, 3), (4, 3), lhs_dilation=(5, 2), padding=((3, 3), (1, 1))),
        {},
    ),
    "gradient": (
        "weight_grad",
        _make(8, 3, 12, (9, 10), (9, 9), padding=_PAD, layout=("CHWN", "IHWO")),
        {},
    ),
    # batch_groups: the channels of the forward convolution; the images are the channels here
    "gradient of depthwise": (
        "lanes_grad",
        _make(8, 3, 8, (9, 10), (8, 9), batch_groups=8, padding=_PAD, layout=("CHWN", "IHWO")),
        {"vector": 4, "taps_y": 2},
    ),
    "gradient of depthwise, stride 2": (
        "lanes_grad",
        _make(6, 2, 6, (9, 11), (5, 6), batch_groups=6, rhs_dilation=(2, 2), padding=_PAD),
        {},
    ),
    "gradient of a dilated line": (
        "lanes_grad",
        _make(4, 2, 4, (40,), (36,), batch_groups=4, stride=(2,), padding=((1, 2),)),
        {"taps_x": 2, "taps_y": 1},
    ),
    "gradient of groups": (
        "lanes_grad",
        _make(12, 3, 24, (6, 40), (6, 38), batch_groups=4, padding=((1, 1), (0, 0))),
        {"vector": 2},
    ),
    "gradient, in rounds": (
        "weight_grad",
        _make(3, 8, 5, (20, 60), (20, 60), padding=((1, 1), (1, 1)), layout=("CHWN", "IHWO")),
        {"chunks": 3, "bk": 32, "stages": 2},
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_problems(name: str) -> None:
    algorithm, problem, changed = NAMED[name]
    params = _params(algorithm, **changed)
    _equal(problem, algorithm, params, np.random.default_rng(7))


def test_several_chunks_and_rounds_were_met() -> None:
    algorithm, problem, changed = NAMED["gradient, in rounds"]
    launches = _ffi.cuda_launches(
        problem.native(), algorithm, "float32", False, _params(algorithm, **changed), {}
    )
    assert [launch["kernel"] for launch in launches[:4]] == ["jaxwin_gemm", "jaxwin_sum"] * 2


PIECES = {
    "a small image": (_make(1, 20, 9, (6, 7), (3, 3), padding=_PAD), {"pieces": 4}),
    "rows of 16 bytes": (_make(1, 8, 12, (5, 5), (3, 3)), {"pieces": 8, "pack": 1}),
    "images are neighbours": (
        _make(4, 10, 6, (4, 5), (3, 3), padding=_PAD, layout=("CHWN", "IHWO")),
        {"pieces": 2},
    ),
    "pointwise planes": (_make(1, 70, 5, (5, 4), (1, 1), layout=("NCHW", "OIHW")), {"pieces": 2}),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_of_the_chain_are_added_in_order(name: str) -> None:
    problem, changed = PIECES[name]
    x, w = problems.operands(problem, np.random.default_rng(7))
    result = cuda_shim.run(problem, x, w, "two_stage", params=_params("two_stage", **changed))
    length = problem.rhs_shape[problem.rhs_spec[1]] * int(
        np.prod([problem.rhs_shape[d] for d in problem.rhs_spec[2:]])
    )
    piece = -(-length // changed["pieces"] // 8) * 8
    np.testing.assert_array_equal(result, reference.chain(problem, x, w, piece))


def test_direct_computes_gradients_of_groups() -> None:
    problem = _make(4, 6, 6, (5, 7), (4, 7), batch_groups=1, groups=6, padding=_PAD)
    assert problem.chunk_rows > 0
    _equal(problem, "direct", (), np.random.default_rng(3))


ACTIVATIONS = _registry.registry()["activations"]


@pytest.mark.parametrize("case", ["im2win", "weight_grad", "depthwise"])
def test_the_epilogue_has_the_bits_of_the_cpu(case: str) -> None:
    problem = {
        "im2win": _make(1, 4, 9, (5, 6), (3, 3), padding=_PAD),
        "weight_grad": NAMED["gradient, in rounds"][1],
        "depthwise": _make(1, 6, 6, (5, 6), (3, 3), groups=6, padding=_PAD),
    }[case]
    rng = np.random.default_rng(1)
    x, w = problems.operands(problem, rng)
    if case == "weight_grad":
        x *= 0.02
    bias = rng.standard_normal(problem.out_shape[problem.out_spec[1]], np.float32)
    residual = rng.standard_normal(problem.out_shape, np.float32)
    chosen = {"weight_grad": ["gelu"], "im2win": ["silu", "none"], "depthwise": ["relu6"]}[case]
    for activation in chosen:
        extra = {"bias": bias, "residual": residual}
        result = cuda_shim.run(
            problem,
            x,
            w,
            case,
            params=_params(case, chunks=4),
            activation=ACTIVATIONS.index(activation),
            **extra,
        )
        expected = problems.run(problem, x, w, "auto", activation=activation, **extra)
        np.testing.assert_array_equal(result, expected, activation)


def test_activations_at_the_ends() -> None:
    """A 1x1 convolution by one: the activation of every value, NaN and infinities too."""
    values = [0.0, -0.0, 1e-38, -1e-39, 0.624, 0.626, 5.99, 6.0, 88.0, -88.0, 104.0, -200.0, 1e30]
    x = np.array([*values, np.inf, -np.inf, np.nan], np.float32).reshape(1, 4, 4, 1)
    problem = _make(1, 1, 1, (4, 4), (1, 1))
    one = np.ones((1, 1, 1, 1), np.float32)
    for activation in ACTIVATIONS:
        result = cuda_shim.run(problem, x, one, "direct", activation=ACTIVATIONS.index(activation))
        expected = problems.run(problem, x, one, "direct", activation=activation)
        np.testing.assert_array_equal(result.view(np.uint32), expected.view(np.uint32), activation)


def test_weights_that_are_not_finite_spread_over_padding() -> None:
    problem = _make(1, 4, 8, (5, 6), (3, 3), padding=_PAD)
    x, w = problems.operands(problem, np.random.default_rng(5))
    w[0, 0, 1, 3], w[2, 1, 0, 5] = np.inf, np.nan
    result = cuda_shim.run(problem, x, w, "im2win", params=_params("im2win"))
    np.testing.assert_array_equal(result, problems.run(problem, x, w, "im2win"))


TENSOR = {
    "nhwc": (_make(2, 8, 16, (9, 10), (3, 3), padding=_PAD), {}),
    "tails": (_make(2, 3, 13, (9, 10), (3, 3), padding=_PAD, stride=(2, 1)), {"pack": 1}),
    "gradient": (
        _make(8, 3, 16, (9, 10), (9, 9), padding=_PAD, layout=("CHWN", "IHWO")),
        {"bm": 64, "tm": 32, "stages": 2},
    ),
    "planes, in pieces": (
        _make(1, 8, 16, (9, 10), (3, 3), layout=("NCHW", "OIHW")),
        {"pieces": 2},
    ),
    "planes": (_make(2, 5, 9, (6, 7), (3, 3), layout=("NCHW", "OIHW")), {}),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *itertools.product(("nhwc", "tails", "gradient"), REGISTRY["tensor"]["dtypes"]),
        ("planes, in pieces", "float32"),
        ("planes", "bfloat16"),
    ],
)
def test_tensor_cores(name: str, dtype: str) -> None:
    problem, changed = TENSOR[name]
    x, w = problems.operands(problem, np.random.default_rng(11))
    (x, x_worth), (w, w_worth) = reference.rounded(x, dtype), reference.rounded(w, dtype)
    params = _params("tensor", **({"bk": 16, "tm": 16, "tn": 16} | changed))
    result = reference.widened(
        cuda_shim.run(problem, x, w, "tensor", params=params, dtype=dtype), dtype
    )
    exact, size = reference.float64(problem, x_worth, w_worth)
    bound = {"float32": 2**-20, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    assert (np.abs(result - exact) <= bound * size + 1e-6).all()


NARROW = [n for n in CANONICAL if len(REGISTRY[n]["dtypes"]) > 1]
# The vector kernels, strips, windows in registers or not, partial sums, and pixels as lanes.
SIXTEEN = {
    "depthwise 4": "float16",
    "depthwise planes": "bfloat16",
    "depthwise, a large window": "float16",
    "depthwise line": "bfloat16",
    "depthwise, transposed": "bfloat16",
    "groups of 4": "bfloat16",
    "gradient of depthwise": "bfloat16",
    "gradient of groups": "float16",
    "gradient of a dilated line": "bfloat16",
}


@pytest.mark.parametrize("name", SIXTEEN)
def test_sixteen_bits_are_widened_and_rounded_once(name: str) -> None:
    algorithm, problem, changed = NAMED[name]
    dtype = SIXTEEN[name]
    x, w = problems.operands(problem, np.random.default_rng(13))
    (x, x_worth), (w, w_worth) = reference.rounded(x, dtype), reference.rounded(w, dtype)
    params = _params(algorithm, **changed)
    result = cuda_shim.run(problem, x, w, algorithm, params=params, dtype=dtype)
    expected = reference.chain(problem, x_worth, w_worth)
    np.testing.assert_array_equal(result, reference.rounded(expected, dtype)[0])


@pytest.mark.parametrize("algorithm", NARROW)
def test_sixteen_bits_of_drawn_problems_with_either_result(algorithm: str) -> None:
    rng = np.random.default_rng([5, CANONICAL.index(algorithm)])
    while True:
        problem = problems.draw(rng, KINDS.get(algorithm))
        row = _ffi.cuda_candidates(problem.native(), "bfloat16", True)[algorithm]
        if problem.flops < 4e5 and "rejected" not in row:
            break
    x, w = problems.operands(problem, rng)
    (x, x_worth), (w, w_worth) = reference.rounded(x, "bfloat16"), reference.rounded(w, "bfloat16")
    expected = reference.chain(problem, x_worth, w_worth)
    wide = cuda_shim.run(problem, x, w, algorithm, dtype="bfloat16", wide_result=True)
    np.testing.assert_array_equal(wide, expected, str(problem))
    result = cuda_shim.run(problem, x, w, algorithm, dtype="bfloat16")
    np.testing.assert_array_equal(result, reference.rounded(expected, "bfloat16")[0], str(problem))


def test_the_epilogue_of_sixteen_bits_is_rounded_once() -> None:
    algorithm, problem, changed = NAMED["depthwise 4"]
    rng = np.random.default_rng(17)
    drawn = [*problems.operands(problem, rng), rng.standard_normal(8, np.float32)]
    drawn.append(rng.standard_normal(problem.out_shape, np.float32))
    given, worth = zip(*(reference.rounded(a, "bfloat16") for a in drawn), strict=True)
    result = cuda_shim.run(
        problem,
        *given[:2],
        algorithm,
        params=_params(algorithm, **changed),
        dtype="bfloat16",
        bias=given[2],
        residual=given[3],
        activation=ACTIVATIONS.index("silu"),
    )
    epilogue = {"bias": worth[2], "residual": worth[3], "activation": "silu"}
    expected = problems.run(problem, *worth[:2], "auto", **epilogue)
    np.testing.assert_array_equal(result, reference.rounded(expected, "bfloat16")[0])


def test_nonsense_parameters_are_refused() -> None:
    """Whatever a plan says, launches are only made of what `check` accepts."""
    rng = np.random.default_rng(0)
    strange = [-(2**62), -7, -1, 0, 1, 3, 5, 12, 48, 1000, 2**31, 2**62]
    refused = 0
    for _ in range(400):
        problem = problems.draw(rng)
        algorithm = str(rng.choice(list(REGISTRY)))
        specs = REGISTRY[algorithm]["params"]
        usual = rng.random() < 0.5
        params = [
            int(rng.choice(spec["values"] if usual and rng.random() < 0.8 else strange))
            for spec in specs
        ]
        answer = _ffi.cuda_make_plan(problem.native(), algorithm, params=params)
        if "plan" not in answer:
            refused += 1
            assert answer["error"]
            continue
        for launch in _ffi.cuda_launches(problem.native(), algorithm, "float32", False, params, {}):
            assert 0 < launch["blocks"] < 2**31
            assert 32 <= launch["threads"] <= 1024
            assert 0 <= launch["shared_bytes"] <= 99 * 1024
    assert 50 < refused < 400


def _rejections(problem) -> list[str]:
    rows = _ffi.cuda_candidates(problem.native())
    return [row.get("rejected", "") for row in rows.values()]


def test_offsets_that_do_not_fit_32_bits_are_refused() -> None:
    """Threads behind the end count theirs, too: so a little below 2^31 elements it ends."""
    last = 2**19 - 2**4  # pixels of 64 images with 64 channels
    for pixels, good in ((last - 1, True), (last, False), (2**19 - 1, False)):
        rejected = _rejections(_make(64, 64, 64, (pixels,), (1,)))
        assert ("" in rejected) == good
        assert good or "direct: an operand has nearly 2^31 elements, or more" in rejected
    sizes = (60, 1, 1, (2**13, 2**12), (1, 1))
    for rows, good in ((30000, True), (35000, False)):
        rejected = _rejections(_make(*sizes, stride=(64, 64), padding=((rows, 0), (0, 0))))
        assert ("" in rejected) == good == ("direct: padding reaches too far" not in rejected)


def test_a_packed_filter_that_does_not_fit_is_refused() -> None:
    groups = 2**16
    for channels, fits in ((2**11, True), (2**13, False)):
        sizes = (1, channels * groups, 2 * groups, (1,), (1,))
        problem = _make(*sizes, groups=groups, layout=("NCW", "OIW"))
        for algorithm, dtype in (("im2win", "float32"), ("tensor", "bfloat16")):
            plan = _ffi.cuda_make_plan(problem.native(), algorithm, dtype)["plan"]
            names = [spec["name"] for spec in REGISTRY[algorithm]["params"]]
            params = dict(zip(names, plan["params"], strict=True))
            assert params["pack"] == int(fits)
            packed = [*(params | {"pack": 1}).values()]
            answer = _ffi.cuda_make_plan(problem.native(), algorithm, dtype, params=packed)
            assert fits or "packed filter is too large" in answer["error"]


@pytest.mark.parametrize("algorithm", REGISTRY)
def test_defaults_are_valid_and_every_problem_has_a_kernel(algorithm: str) -> None:
    rng = np.random.default_rng(2)
    seen = 0
    for _ in range(150):
        problem = problems.draw(rng, algorithm if algorithm == "depthwise" else None)
        row = _ffi.cuda_candidates(problem.native())[algorithm]
        if "rejected" in row:
            assert "params" not in row["rejected"], f"{problem}: {row['rejected']}"
            continue
        seen += 1
        again = _ffi.cuda_make_plan(problem.native(), algorithm, params=row["params"])
        assert again["plan"]["workspace_bytes"] == row["workspace_bytes"]
    assert seen > 10
    assert algorithm != "direct" or seen == 150
