# SPDX-License-Identifier: Apache-2.0
"""The plans that there are for a problem: from the native registry, checked by the native core."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

from jaxwin import _cuda, _dispatch, _ffi, _registry
from jaxwin._plan import Plan
from jaxwin._problem import Problem

_RANKED_CHANGES = 2  # how many parameters `ranked` changes at a time


@dataclasses.dataclass(frozen=True, order=True)
class Candidate:
    """An algorithm with values for its parameters, in the order of the registry.

    side: "cuda" for those of the GPU, see `_registry.side`.
    """

    algorithm: str
    params: tuple[int, ...]
    side: str = ""

    @property
    def parameters(self) -> dict[str, int]:
        """The parameters by name."""
        names = _registry.parameter_names(self.algorithm, self.side) or ()
        return dict(zip(names, self.params, strict=True))

    def __str__(self) -> str:
        return " ".join((self.algorithm, *(f"{k}={v}" for k, v in self.parameters.items())))


class Space:
    """The valid candidates for one problem, instruction set and number of threads.

    On the CPU and for "cuda" these are of the canonical family; for "cuda-tensor" of all of them.
    An algorithm's parameters take the values of its ParamSpecs and those of its default plan; what
    only a whole program can tell stays as in the default plan.
    max_workspace: bytes, as in `make_plan`. canonical: whether the algorithms of the canonical
    numerical family are meant, or those of all others.
    """

    def __init__(
        self,
        problem: Problem,
        isa: str,
        threads: int,
        max_workspace: int,
        *,
        canonical: bool = True,
    ) -> None:
        self.problem, self.isa, self.threads = problem, isa, threads
        self.side = _registry.side(isa)
        self._native = problem.native()
        self._max_workspace = max_workspace
        self._plans: dict[Candidate, tuple[Plan, float] | None] = {}
        self._limits = _limits(problem)
        self.defaults: dict[str, Candidate] = {}
        self.values: dict[str, tuple[tuple[int, ...], ...]] = {}
        if (_cuda if self.side else _dispatch).unsupported(problem):
            return
        views = self._views()
        for row in _registry.rows(isa):
            if not self.side and canonical != (row["family"] == _registry.CANONICAL):
                continue
            view = views.get(row["name"], {"rejected": "another family"})
            if "rejected" in view:
                continue
            default = self.candidate(row["name"], view["params"])
            if self.plan(default) is None:  # its workspace
                continue
            self.defaults[row["name"]] = default
            self.values[row["name"]] = tuple(
                tuple(sorted({*spec["values"], value})) if spec["tuned"] else (value,)
                for spec, value in zip(row["params"], default.params, strict=True)
            )

    def _views(self) -> dict[str, Any]:
        if not self.side:
            return _ffi.candidates(self._native, isa=self.isa, threads=self.threads)
        found = {}
        for row in _registry.rows(self.isa):
            if row["family"] in _cuda.families(self.isa):
                answer = _cuda.ask(self.problem, row["name"])
                found[row["name"]] = answer.get("plan", {"rejected": answer.get("error")})
        return found

    def candidate(self, algorithm: str, params: Iterable[int]) -> Candidate:
        """A candidate of this space, valid or not."""
        return Candidate(algorithm, tuple(params), self.side)

    def incumbent(self) -> Candidate | None:
        """What dispatch takes where nothing is tuned; None where the native core has nothing.

        On a GPU, where that may be XLA, the best of the kernels by the cost model.
        """
        if not self.defaults:
            return None
        if self.side:
            return min(self.defaults.values(), key=lambda c: (self.cost(c), c))
        answer = _ffi.make_plan(
            self._native, isa=self.isa, threads=self.threads, max_workspace=self._max_workspace
        )
        if "plan" not in answer:
            return None
        return self.candidate(answer["plan"]["algorithm"], answer["plan"]["params"])

    def plan(self, candidate: Candidate) -> Plan | None:
        """A candidate's plan; None where the native core refuses it."""
        found = self._look_up(candidate)
        return found and found[0]

    def cost(self, candidate: Candidate) -> float:
        """Cycles by the native core's model; infinite for what it refuses."""
        found = self._look_up(candidate)
        return found[1] if found else math.inf

    def _look_up(self, candidate: Candidate) -> tuple[Plan, float] | None:
        if candidate not in self._plans:
            self._plans[candidate] = self._ask(candidate)
        return self._plans[candidate]

    def _ask(self, candidate: Candidate) -> tuple[Plan, float] | None:
        # No parameters at all would ask for the defaults: those of an algorithm without any.
        answer: dict[str, Any]
        if self.side:
            if _cuda.family(candidate.algorithm) not in _cuda.families(self.isa):
                return None
            answer = _cuda.ask(
                self.problem, candidate.algorithm, candidate.params, self._max_workspace
            )
        else:
            answer = _ffi.make_plan(
                self._native,
                algorithm=candidate.algorithm,
                isa=self.isa,
                threads=self.threads,
                max_workspace=self._max_workspace,
                params=candidate.params,
            )
        if "plan" not in answer:
            return None
        plan = answer["plan"]
        if tuple(plan["params"]) != candidate.params:
            return None
        if self.side:
            return _cuda.plan_from(plan), float(plan["cost"])
        fields = {name: plan[name] for name in Plan._fields}
        return Plan(**fields | {"params": candidate.params}), float(plan["cost"])

    def normal(self, candidate: Candidate) -> Candidate:
        """The same for candidates that do the same: a block as large as the whole is the whole.

        Of block sizes 0 means the whole. Not every such pair is recognised.
        """
        if self.side:
            return candidate
        names = _registry.parameter_names(candidate.algorithm) or ()
        params = tuple(
            0 if value >= self._limits.get(name, math.inf) else value
            for name, value in zip(names, candidate.params, strict=True)
        )
        return Candidate(candidate.algorithm, params)

    def everything(self, limit: int) -> list[Candidate] | None:
        """All valid candidates that differ, or None where there are more than `limit`."""
        # Of some spaces most points are invalid: look at more, as far as that takes no time.
        if sum(math.prod(map(len, v)) for v in self.values.values()) > 20 * limit:
            return None
        points = (
            self.candidate(algorithm, params)
            for algorithm, values in self.values.items()
            for params in itertools.product(*values)
        )
        valid: dict[Candidate, Candidate] = {}
        for point in self._valid(points):
            valid.setdefault(self.normal(point), point)
            if len(valid) > limit:
                return None
        return list(valid.values())

    def ranked(self) -> list[Candidate]:
        """Candidates a few changes away from their algorithm's defaults, the best modelled first.

        The model does not see every parameter: of candidates that it takes for equal only the one
        with the fewest changes is in the list.
        """
        best: dict[tuple[str, float], tuple[int, Candidate]] = {}
        for default in self.defaults.values():
            for changes, candidate in self._around(default, _RANKED_CHANGES):
                alike = (candidate.algorithm, self.cost(candidate))
                if alike not in best or (changes, candidate) < best[alike]:
                    best[alike] = (changes, candidate)
        order = sorted((cost, changes, c) for (_, cost), (changes, c) in best.items())
        return [candidate for _, _, candidate in order]

    def _around(self, centre: Candidate, most: int) -> Iterator[tuple[int, Candidate]]:
        values = self.values[centre.algorithm]
        for count in range(most + 1):
            for places in itertools.combinations(range(len(values)), count):
                others = ([v for v in values[p] if v != centre.params[p]] for p in places)
                for chosen in itertools.product(*others):
                    params = list(centre.params)
                    for place, value in zip(places, chosen, strict=True):
                        params[place] = value
                    candidate = self.candidate(centre.algorithm, params)
                    if self.plan(candidate) is not None:
                        yield count, candidate

    def neighbours(self, centre: Candidate) -> list[Candidate]:
        """Valid candidates one step away in one parameter, the best modelled first.

        Where the next value is not valid, the step goes on to one that is.
        """
        found: list[Candidate] = []
        for place, values in enumerate(self.values.get(centre.algorithm, ())):
            below = [v for v in reversed(values) if v < centre.params[place]]
            above = [v for v in values if v > centre.params[place]]
            for side in (below, above):
                points = (
                    self.candidate(
                        centre.algorithm,
                        (*centre.params[:place], value, *centre.params[place + 1 :]),
                    )
                    for value in side
                )
                found += itertools.islice(self._valid(points), 1)
        return sorted(found, key=lambda c: (self.cost(c), c))

    def _valid(self, points: Iterable[Candidate]) -> Iterator[Candidate]:
        return (point for point in points if self.plan(point) is not None)


def _limits(problem: Problem) -> dict[str, int]:
    """By parameter: from which value on a block is the whole, at the latest."""
    window = [problem.rhs_shape[d] for d in problem.rhs_spec[2:]]
    out = [problem.out_shape[d] for d in problem.out_spec[2:]]
    images = problem.out_shape[problem.out_spec[0]]
    pointwise = all(size == 1 for size in window)  # then rows may be joined to longer ones
    # Transposed convolutions count the columns between which the window's phases lie.
    width = (out[-1] if out else 1) + max(problem.lhs_dilation, default=1) - 1
    return {
        "kc": problem.rhs_shape[problem.rhs_spec[1]] * math.prod(window),
        "rows": images * math.prod(out[:-1]),
        "cols": images * math.prod(out) if pointwise else width,
    }
