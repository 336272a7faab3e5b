# SPDX-License-Identifier: Apache-2.0
"""A plan: which algorithm computes a problem, with which parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxwin._tuning import Row


class Plan(NamedTuple):
    """Everything that the native core needs besides the problem; travels as call attributes.

    `params` are the values of the algorithm's parameters in the order of the registry.
    `threads` is how many threads the workspace is laid out for; results do not depend on it.
    """

    algorithm: str
    isa: str
    threads: int
    params: tuple[int, ...]
    workspace_bytes: int


class Decision(NamedTuple):
    """What dispatch chose for a problem.

    tier: "tuned" (a measurement of this problem), "transferred" (the nearest measurement),
        "heuristic" (the native core's cost model), "requested" (by `algorithm=`), or "xla".
    plan: None where lax computes it.
    reason: why lax computes it, else empty.
    row: the measurement behind it: of "tuned" and "transferred" always, of "requested" where that
        algorithm was measured for the problem.
    incumbent: lax computes it for want of a measurement; there are kernels, too.
    """

    tier: str
    plan: Plan | None
    reason: str = ""
    row: Row | None = None
    incumbent: bool = False

    @property
    def untried(self) -> bool:
        """Whether tuning the problem could change it: there are kernels, but no tuned row."""
        return self.incumbent or self.tier in ("transferred", "heuristic")
