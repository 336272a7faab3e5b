# SPDX-License-Identifier: Apache-2.0
"""The candidates for a problem: all of the registry's, and only what the native core takes."""

from __future__ import annotations

import dataclasses
import math

import problems
import pytest

from jaxwin import _ffi, _registry
from jaxwin.tuner.space import Candidate, Space

ISA = _registry.isa()
PROBLEMS = {
    "dense": problems.make(2, 8, 16, (12, 13), (3, 3)),
    "depthwise": problems.make(1, 8, 8, (9, 9), (3, 3), groups=8),
    "transposed": problems.make(1, 4, 8, (5, 5), (4, 4), lhs_dilation=(2, 2)),
    "1-D": problems.make(1, 8, 8, (40,), (3,)),
}


def _space(name: str = "dense", max_workspace: int = 2**30) -> Space:
    return Space(PROBLEMS[name], ISA, 1, max_workspace)


@pytest.mark.parametrize("name", PROBLEMS)
def test_algorithms_are_those_that_the_core_has_for_the_problem(name: str) -> None:
    space = _space(name)
    views = _ffi.candidates(PROBLEMS[name].native(), isa=ISA, threads=1)
    assert set(space.defaults) == {
        name
        for name, view in views.items()
        if "rejected" not in view and view["family"] == "canonical"
    }
    for algorithm, default in space.defaults.items():
        specs = {row["name"]: row["params"] for row in _registry.registry()["algorithms"]}
        assert default.params == tuple(views[algorithm]["params"])
        for spec, value, values in zip(
            specs[algorithm], default.params, space.values[algorithm], strict=True
        ):
            searched = {*spec["values"], value} if spec["tuned"] else {value}
            assert values == tuple(sorted(searched))


@pytest.mark.parametrize("name", PROBLEMS)
def test_ranked_and_neighbours_are_valid_and_in_order(name: str) -> None:
    space = _space(name)
    ranked = space.ranked()
    costs = [space.cost(candidate) for candidate in ranked]
    assert costs == sorted(costs) and math.isfinite(costs[-1])
    assert len({(c.algorithm, space.cost(c)) for c in ranked}) == len(ranked)
    for centre in ranked[:5]:
        for neighbour in space.neighbours(centre):
            assert space.plan(neighbour) is not None
            changed = [a != b for a, b in zip(neighbour.params, centre.params, strict=True)]
            assert sum(changed) == 1


def test_the_incumbent_is_what_dispatch_takes() -> None:
    plan = _ffi.make_plan(PROBLEMS["dense"].native(), isa=ISA)["plan"]
    incumbent = _space().incumbent()
    assert incumbent == Candidate(plan["algorithm"], tuple(plan["params"]))
    assert _space().cost(incumbent) == plan["cost"]
    assert str(incumbent).startswith(f"{plan['algorithm']} ")


def test_what_is_invalid() -> None:
    space = _space()
    incumbent = space.incumbent()
    assert space.plan(Candidate(incumbent.algorithm, incumbent.params[:-1])) is None
    assert space.plan(Candidate(incumbent.algorithm, ())) is None
    assert space.cost(Candidate("abacus", (1,))) == math.inf
    wide = Space(PROBLEMS["dense"], ISA, 1, 2**30)
    narrow = Space(PROBLEMS["dense"], ISA, 1, 0)
    assert all(plan.workspace_bytes == 0 for c in narrow.ranked() if (plan := narrow.plan(c)))
    assert set(narrow.defaults) < set(wide.defaults)
    nothing = Space(dataclasses.replace(PROBLEMS["dense"], lhs_dtype="float64"), ISA, 1, 2**30)
    assert nothing.incumbent() is None and nothing.ranked() == []


def test_everything_or_nothing() -> None:
    dw = problems.make(2, 3, 8, (9, 9), (8, 8))  # a window larger than its output
    space = Space(dw, ISA, 1, 0)
    everything = space.everything(10_000_000)
    assert everything and len(set(everything)) == len(everything)
    assert space.everything(len(everything)) in (everything, None)
    assert space.everything(len(everything) - 1) is None
    assert set(space.defaults.values()) <= set(everything)


def test_blocks_as_large_as_the_whole_are_the_whole() -> None:
    problem = problems.make(1, 8, 16, (6, 7), (3, 3))  # 4x5 outputs, reductions of 72
    space = Space(problem, ISA, 1, 2**30)
    names = list(_registry.parameter_names("im2win"))
    default = space.defaults["im2win"]

    def changed(**values: int) -> Candidate:
        params = dict(zip(names, default.params, strict=True)) | values
        return Candidate("im2win", tuple(params.values()))

    whole = space.normal(changed(kc=0, rows=0, cols=0))
    assert space.normal(changed(kc=512, rows=16, cols=448)) == whole
    assert space.normal(changed(kc=0, rows=2, cols=0)) != whole
    assert space.normal(changed(mr=1, kc=0, rows=0, cols=0)) != whole
    everything = space.everything(10**6)
    if everything is not None:
        normal = [space.normal(candidate) for candidate in everything]
        assert len(set(normal)) == len(normal)
    # What counts as the same does the same: the native core needs the same memory for it.
    for candidate in space.ranked():
        plan, same = space.plan(candidate), space.plan(space.normal(candidate))
        assert same is None or plan.workspace_bytes == same.workspace_bytes, candidate
