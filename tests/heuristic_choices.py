# SPDX-License-Identifier: Apache-2.0
"""What the heuristic should have chosen: `python tests/heuristic_choices.py resnet50/8/dx grouped`.

Each convolution of the presets (preset/batch/direction/dtype, the last three optional) is run by
the plan that the heuristic chooses and by the default plan of every other canonical algorithm, in
turns, by one thread, outside of XLA. Those are printed where another one is faster by more than
`--ratio`: run it for every instruction set after a change of a `cost` or a `defaults`. What a call
site keeps between calls is made anew in each: convolutions of a few microseconds mean little here.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import problems

from jaxwin import _ffi, _registry
from jaxwin._problem import Problem
from jaxwin.tuner import measure
from jaxwin.tuner.problems import preset


def _plans(problem: Problem, isa: str) -> Iterator[dict[str, Any]]:
    """The chosen plan, then those of the other algorithms that take the problem."""
    native = problem.native()
    chosen = _ffi.make_plan(native, isa=isa).get("plan")
    if chosen is None:
        return
    yield chosen
    for name in _registry.algorithm_names():
        if name == chosen["algorithm"] or _registry.family(name) != _registry.CANONICAL:
            continue
        if plan := _ffi.make_plan(native, algorithm=name, isa=isa).get("plan"):
            yield plan


def _calls(problem: Problem, isa: str) -> dict[str, Callable[[], None]]:
    """A call of each plan by its algorithm's name, on the same data; the chosen one first."""
    native = problem.native()

    def bits(array: np.ndarray) -> np.ndarray:
        return array.view(f"uint{8 * array.itemsize}")

    x, w = (bits(array) for array in problems.operands(problem, np.random.default_rng(0)))
    y = bits(np.zeros(problem.out_shape, problem.out_dtype))

    def call(plan: dict[str, Any]) -> Callable[[], None]:
        room = np.zeros(plan["workspace_bytes"] + 64, np.uint8)
        begin = -room.ctypes.data % 64
        workspace = room[begin : begin + plan["workspace_bytes"]]

        def run() -> None:
            refused = _ffi.run(
                native, plan["algorithm"], isa, 1, plan["params"], x, w, y, workspace
            )
            if refused:
                raise RuntimeError(refused)

        return run

    return {plan["algorithm"]: call(plan) for plan in _plans(problem, isa)}


def _asked(text: str) -> Iterator[tuple[str, Problem]]:
    """The problems that preset/batch/direction/dtype stands for, with their descriptions."""
    name, batch, direction, dtype = (*text.split("/"), "", "", "")[:4]
    for conv in preset(name, batch=int(batch or 1), dtype=dtype or "float32"):
        problem = conv.problem(direction or "fwd")
        yield f"{conv} {direction or 'fwd'}", problem


def main() -> None:
    """Prints a line for each convolution that another algorithm computes faster."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", nargs="+", help="PRESET[/BATCH[/DIRECTION[/DTYPE]]]")
    isas = [row["name"] for row in _registry.registry()["isas"] if row["runnable"]]
    parser.add_argument("--isa", default=_registry.isa(), choices=isas)
    parser.add_argument("--ratio", type=float, default=1.05, help="the least that is printed")
    options = parser.parse_args()
    try:
        asked = [pair for text in options.preset for pair in _asked(text)]
    except (KeyError, ValueError) as error:
        parser.error(f"preset: {error}")
    ratios = []
    for name, problem in asked:
        calls = _calls(problem, options.isa)
        if len(calls) < 2:
            continue
        samples = measure.interleave(
            {algorithm: measure.Timed(call) for algorithm, call in calls.items()},
            threads=1,
            rounds=7,
            min_seconds=0.004,
            budget_seconds=2.0,
            rng=random.Random(0),
            slower_than=1.5,
        )
        chosen = next(iter(calls))
        best = min(samples, key=lambda a: samples[a].median_ns if samples[a].ns else math.inf)
        ratio = samples[chosen].median_ns / samples[best].median_ns
        ratios.append(ratio)
        if ratio > options.ratio:
            rate = problem.flops / samples[chosen].median_ns
            print(f"{ratio:5.2f}  {name:<55} {chosen} at {rate:.1f} GFLOP/s, {best}", flush=True)
    if ratios:
        worst, mean = max(ratios), measure.geomean(ratios)
        print(f"{len(ratios)} convolutions, in the mean {mean:.3f}, at most {worst:.2f}")


if __name__ == "__main__":
    main()
