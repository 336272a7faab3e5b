# SPDX-License-Identifier: Apache-2.0
"""Other numerical families: the algorithms behind them, their bounds, and that nobody gets them
unasked. tests/test_conformance.py holds them to their bounds on drawn problems.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import bilinear
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import reference
import tuning

import jaxwin
from jaxwin import _dispatch, _ffi, _lowering, _registry, _tuning
from jaxwin._plan import Plan
from jaxwin.tuner import worker
from jaxwin.tuner.database import Database
from jaxwin.tuner.space import Space

ISAS = [row["name"] for row in _registry.registry()["isas"] if row["runnable"]]
OTHERS = [n for n in _registry.algorithm_names() if _registry.family(n) != "canonical"]
SCHEMES = {
    ("winograd", 2): lambda: bilinear.winograd(2),
    ("winograd", 4): lambda: bilinear.winograd(4),
    ("sfc", 6): bilinear.sfc,
}
# So large that the model takes a tiled algorithm for the fastest.
LARGE = problems.make(1, 64, 64, (56, 56), (3, 3), padding=((1, 1), (1, 1)))


def _params(algorithm: str, tile: int, **others: int) -> tuple[int, ...]:
    names = _registry.parameter_names(algorithm)
    values = {"tile": tile, "tiles": 5, "nv": 2, "once": 0} | others
    return tuple(values[name] for name in names)


# --- the algorithms --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "products", "results"),
    [
        (lambda: bilinear.winograd(2), 16, 4),
        (lambda: bilinear.winograd(4), 36, 16),
        (bilinear.sfc, 88, 36),
    ],
)
def test_how_many_products_a_tile_takes(
    make: Callable[[], bilinear.Bilinear], products: int, results: int
) -> None:
    """The algorithm exists with so many products, and is exact up to float64's roundings."""
    found = make()
    assert found.A.shape == (results, products) and found.products == products
    rng = np.random.default_rng(0)
    size = round(results**0.5) + 2
    x, w = rng.standard_normal((size, size)), rng.standard_normal((3, 3))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3))
    exact = np.einsum("ijuv,uv->ij", windows, w).reshape(-1)
    result = found.A @ ((found.G @ w.reshape(-1)) * (found.B @ x.reshape(-1)))
    np.testing.assert_allclose(result, exact, rtol=0, atol=1e-10)


def test_sfc_transforms_by_additions_alone() -> None:
    found = bilinear.sfc()
    for matrix in (found.B, found.G):
        assert set(np.unique(np.round(matrix, 9))) <= {-1.0, 0.0, 1.0}
    assert np.abs(36 * found.A - np.round(36 * found.A)).max() < 1e-9


@pytest.mark.parametrize(("algorithm", "tile"), SCHEMES)
def test_the_stated_bound_is_the_algorithms(algorithm: str, tile: int) -> None:
    problem = problems.make(1, 1000, 8, (12, 12), (3, 3))
    params = _params(algorithm, tile)
    plan = _ffi.make_plan(problem.native(), algorithm=algorithm, params=params)["plan"]
    chain = 1000 * SCHEMES[algorithm, tile]().growth * 2.0**-24
    assert chain < plan["error_bound"] < 1.2 * chain
    direct = _ffi.make_plan(problem.native(), algorithm="direct")["plan"]
    assert direct["error_bound"] == 9000 * 2.0**-24


@pytest.mark.parametrize(
    ("sizes", "layout", "groups", "padding"),
    [
        ((1, 1, 1, (8, 8)), ("NHWC", "HWIO"), 1, ((0, 0), (0, 0))),
        ((2, 5, 19, (13, 17)), ("NHWC", "HWIO"), 1, ((1, 1), (1, 1))),
        ((2, 6, 18, (9, 11)), ("NCHW", "OIHW"), 3, ((2, 0), (-1, 3))),
        ((1, 33, 70, (7, 7)), ("NHWC", "OHWI"), 1, ((1, 1), (1, 1))),
    ],
)
@pytest.mark.parametrize(("algorithm", "tile"), SCHEMES)
def test_exact_where_nothing_is_rounded(algorithm, tile, sizes, layout, groups, padding) -> None:
    """Small integers, with weights that the filters' denominators divide: not one bit off."""
    rng = np.random.default_rng(3)
    problem = problems.make(*sizes, (3, 3), layout=layout, groups=groups, padding=padding)
    x = rng.integers(-3, 4, problem.lhs_shape).astype(np.float32)
    w = 576 * rng.integers(-3, 4, problem.rhs_shape).astype(np.float32)
    exact, _ = reference.float64(problem, x, w)
    for isa in ISAS:
        for once in (0, 1):
            params = _params(algorithm, tile, once=once)
            result = problems.run(problem, x, w, algorithm, isa=isa, threads=3, params=params)
            np.testing.assert_array_equal(result, exact, f"{isa} once={once}")


@pytest.mark.parametrize(("dtype", "most", "extreme"), [("int8", 404, -128), ("uint8", 101, 255)])
def test_integers_at_their_limits(dtype: str, most: int, extreme: int) -> None:
    """Exact with as many channels and as large values as there can be; one more is refused."""
    problem = problems.make(1, most, 3, (8, 8), (3, 3), dtype=dtype, out_dtype="int32")
    x = np.full(problem.lhs_shape, extreme, dtype)
    w = np.full(problem.rhs_shape, extreme, dtype)
    result = problems.run(problem, x, w, "sfc")
    np.testing.assert_array_equal(result, np.full(problem.out_shape, 9 * most * extreme**2))
    more = problems.make(1, most + 1, 3, (8, 8), (3, 3), dtype=dtype, out_dtype="int32")
    assert "too many channels" in _ffi.candidates(more.native())["sfc"]["rejected"]


@pytest.mark.parametrize(("algorithm", "tile"), SCHEMES)
def test_the_workspace_of_a_thread_does_not_grow_with_the_images(algorithm, tile) -> None:
    """Nor with the filters, which go through it piece by piece, unless transformed once for all."""

    def workspace(n: int, size: int, k: int, threads: int, once: int = 0) -> int:
        problem = problems.make(n, 64, k, (size, size), (3, 3))
        params = _params(algorithm, tile, tiles=16, once=once)
        answer = _ffi.make_plan(problem.native(), algorithm, threads=threads, params=params)
        return answer["plan"]["workspace_bytes"]

    one = workspace(1, 56, 64, 1)
    assert one == workspace(8, 224, 512, 1)
    assert workspace(8, 224, 512, 4) == 4 * one
    products = SCHEMES[algorithm, tile]().products
    shared = workspace(8, 224, 512, 1, once=1) - workspace(8, 224, 64, 1, once=1)
    assert 4 * products * 64 * 448 <= shared < 1.1 * 4 * products * 64 * 448


def test_not_a_number_stays_in_its_tile() -> None:
    """What is not finite spreads over a tile, not beyond it."""
    problem = problems.make(1, 2, 3, (14, 14), (3, 3))
    rng = np.random.default_rng(0)
    x, w = problems.operands(problem, rng)
    x[0, 0, 0, 0] = np.nan
    for algorithm, tile in SCHEMES:
        result = problems.run(problem, x, w, algorithm, params=_params(algorithm, tile))
        assert np.isnan(result[0, 0, 0]).all()
        assert np.isfinite(result[0, tile:]).all() and np.isfinite(result[0, :, tile:]).all()


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_epilogue_is_that_of_all_algorithms(dtype: str, activation: str | None) -> None:
    """act(conv + bias + residual) beside the direct sum's, whole tiles and parts of tiles."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 15, 14, 8)), dtype)
    w = jnp.asarray(rng.standard_normal((3, 3, 8, 20)), dtype)
    bias = jnp.asarray(rng.standard_normal(20), dtype)
    residual = jnp.asarray(rng.standard_normal((2, 15, 14, 20)), dtype)

    def run(algorithm: str) -> np.ndarray:
        y = jaxwin.conv(
            x, w, bias=bias, residual=residual, activation=activation, algorithm=algorithm
        )
        return np.asarray(y.astype(jnp.float32))

    expected = run("rows")
    for algorithm in ("winograd", "sfc"):
        tolerance = 1e-4 if dtype == "float32" else 0.1
        np.testing.assert_allclose(run(algorithm), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("features", [72, 50])
@pytest.mark.parametrize("groups", [1, 2])
def test_packed_filters_give_the_same_bits(groups: int, features: int) -> None:
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((1, 15, 15, 24), np.float32))
    w = jnp.asarray(rng.standard_normal((3, 3, 24 // groups, features), np.float32))
    packed = jaxwin.pack(w, x, groups=groups)
    assert packed.panel, "this kind of filter is packed"
    for algorithm in ("winograd", "sfc"):

        def call(w, algorithm=algorithm):
            return jaxwin.conv(x, w, groups=groups, algorithm=algorithm)

        np.testing.assert_array_equal(jax.jit(call)(packed), jax.jit(call)(w), algorithm)


# --- who gets them ---------------------------------------------------------------------------


@pytest.fixture
def path(own_database: Path) -> Path:
    with Database(own_database):
        pass
    _tuning.reload()
    return own_database


def _row(algorithm: str, tile: int, problem=LARGE, **changes):
    names = _registry.parameter_names(algorithm)
    parameters = dict(zip(names, _params(algorithm, tile), strict=True))
    return tuning.measurement(
        problem, algorithm=algorithm, parameters=parameters, family=algorithm, **changes
    )


@pytest.mark.filterwarnings("ignore:jaxwin. tuning database:RuntimeWarning")
def test_only_who_asks_gets_another_family(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def family(**options) -> str:
        return _registry.family(_dispatch.decide(LARGE, enforce=False, **options).plan.algorithm)

    assert family() == "canonical"
    assert family(algorithm="any") != "canonical", "the model finds one faster"
    assert family(algorithm="winograd") == "winograd"
    monkeypatch.setenv("JAXWIN_FAMILY", "any")
    assert family() != "canonical"


@pytest.mark.filterwarnings("ignore:jaxwin. tuning database:RuntimeWarning")
def test_measurements_of_another_family(path: Path) -> None:
    """They decide where any family will do, and nowhere else; a confirmed one must have won."""

    def decide(**options):
        return _dispatch.decide(LARGE, enforce=False, **options)

    with Database(path) as db:
        db.add([_row("winograd", 2, confirmed=True, ns_median=900.0)])
    _tuning.reload()
    assert _registry.family(decide().plan.algorithm) == "canonical"
    found = decide(algorithm="any")
    assert (found.tier, found.plan.algorithm, found.plan.params[0]) == ("tuned", "winograd", 2)
    named = decide(algorithm="winograd")
    assert (named.tier, named.plan.params[0], named.row is None) == ("requested", 2, False)
    later = "2999-01-01T00:00:00+00:00"
    with Database(path) as db:
        db.add([_row("winograd", 2, created=later, confirmed=False), tuning.measurement(LARGE)])
    _tuning.reload()
    assert decide().tier == "tuned"
    assert decide(algorithm="any") == decide(), "the last comparison counts, and it lost that"


@pytest.mark.filterwarnings("ignore:jaxwin. tuning database:RuntimeWarning")
def test_a_row_that_lies_about_its_family(path: Path) -> None:
    """A measurement of winograd filed as canonical, and one of another family's name."""
    with Database(path) as db:
        row = _row("winograd", 2, confirmed=True, ns_median=1.0)
        db.add([dataclasses.replace(row, family="canonical", uid="a")])
        db.add([dataclasses.replace(row, family="sfc", uid="b")])
    _tuning.reload()
    decision = _dispatch.decide(LARGE, enforce=False)
    assert _registry.family(decision.plan.algorithm) == "canonical"
    assert decision.tier == "heuristic"
    assert _dispatch.decide(LARGE, algorithm="any", enforce=False).tier == "heuristic"


def test_the_tuner_searches_one_family_at_a_time() -> None:
    isa = _registry.isa()
    ours = Space(LARGE, isa, 1, 2**30)
    theirs = Space(LARGE, isa, 1, 2**30, canonical=False)
    assert not set(ours.defaults) & set(OTHERS)
    assert set(theirs.defaults) <= set(OTHERS) and {"winograd", "sfc"} <= set(theirs.defaults)
    assert ours.incumbent().algorithm not in OTHERS


def test_the_tuners_gate_takes_what_keeps_to_its_bound() -> None:
    """Other bits are right within the bound, and wrong beyond it."""
    subject = worker._Problem(LARGE.key, seed=0)

    def plan(algorithm: str) -> Plan:
        made = _ffi.make_plan(LARGE.native(), algorithm=algorithm)["plan"]
        return Plan(**{n: made[n] for n in Plan._fields} | {"params": tuple(made["params"])})

    assert subject.check(plan("auto")) == ("ok", "")
    for algorithm in ("winograd", "sfc"):
        assert subject.check(plan(algorithm)) == ("ok", ""), algorithm
        assert subject.compile(plan(algorithm))[1:] == ("ok", "")
    wrong = subject.reference.copy()
    wrong[0, 3, 3, 3] += 0.5
    assert subject._compare(wrong, subject._error(plan("sfc")))[0] == "wrong"


def test_explain_names_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = jaxwin.explain(LARGE)
    assert row.family == "canonical"
    assert row.rejected["sfc"] == "another numerical family (sfc): not asked for"
    x, w = jnp.zeros((1, 56, 56, 64)), jnp.zeros((3, 3, 64, 64))
    told = jaxwin.explain(lambda x, w: jaxwin.conv(x, w, precision="fastest"), x, w)
    assert told.rows[0].family == told.rows[0].algorithm != "canonical"
    assert f"numbers of the family {told.rows[0].family}" in str(told)
    assert "not asked for" not in told.rows[0].rejected.values()
    (row,) = jaxwin.explain(lambda x, w: jaxwin.conv(x, w, algorithm="xla"), x, w)
    assert row.family == "any"


def test_gradients_of_the_fastest_are_canonical(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = jnp.ones((1, 24, 24, 32)), jnp.ones((3, 3, 32, 32))

    def loss(x, w, **options):
        return jaxwin.conv(x, w, **options).sum()

    options = {"precision": "fastest"}
    rows = jaxwin.explain(jax.grad(lambda x, w: loss(x, w, **options), (0, 1)), x, w)
    assert [row.family == "canonical" for row in rows] == [False, True, True]
    monkeypatch.setenv("JAXWIN_FAMILY", "any")
    rows = jaxwin.explain(jax.grad(loss, (0, 1)), x, w)
    families = {bool(row.problem.rhs_reversal): row.family for row in rows}
    assert families[True] != "canonical", "the input gradient is a forward convolution"
    monkeypatch.delenv("JAXWIN_FAMILY")
    rng = np.random.default_rng(0)
    x, w = (
        jnp.asarray(rng.standard_normal(x.shape, "f4")),
        jnp.asarray(rng.standard_normal(w.shape, "f4")),
    )
    expected = jax.grad(loss, (0, 1))(x, w)
    for algorithm in ("winograd", "sfc"):
        found = jax.grad(lambda x, w: loss(x, w, algorithm=algorithm), (0, 1))(x, w)  # noqa: B023
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_precision_is_checked() -> None:
    x, w = jnp.zeros((1, 8, 8, 2)), jnp.zeros((3, 3, 2, 2))
    with pytest.raises(ValueError, match="unknown precision 'fast'; choose one of 'default'"):
        jaxwin.conv(x, w, precision="fast")
    assert jaxwin.conv(x, w, precision="highest").shape == (1, 8, 8, 2)


def test_a_plan_keeps_its_bits_where_its_instruction_set_is_missing() -> None:
    """A program from another machine: the tile, on which the bits depend, stays what it was."""
    rng = np.random.default_rng(0)
    problem = problems.make(1, 8, 8, (12, 12), (3, 3))
    x, w = problems.operands(problem, rng)
    for tile in (2, 4):
        expected = problems.run(problem, x, w, "winograd", params=_params("winograd", tile))
        plan = Plan("winograd", "of-tomorrow", 1, _params("winograd", tile), 0)
        out = jax.ShapeDtypeStruct(problem.out_shape, np.float32)
        call = functools.partial(
            jax.ffi.ffi_call(_lowering.TARGET, out), **_lowering.attributes(problem, plan)
        )
        np.testing.assert_array_equal(jax.jit(call)(x, w), expected)
