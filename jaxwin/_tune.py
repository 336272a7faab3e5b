# SPDX-License-Identifier: Apache-2.0
"""`jaxwin.tune` and `jaxwin.best_layout`, without what only they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxwin.tuner.layout import Choice
    from jaxwin.tuner.tune import Result


def tune(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Result:
    """Finds the fastest plans for the convolutions of `fn(*args, **kwargs)` on this machine.

    The function is traced, not run. The plans go to the tuning database; what is compiled from now
    on takes them, programs that are compiled already stay as they are. No bit of a result changes.

    These arguments are for the tuner and not for `fn`. effort: "quick" (the default), "normal" or
    "full". budget: seconds for everything. threads: how many the program uses, by default as many
    as XLA's pool has here. again: whether to measure also what is in the database. database: its
    file, by default the first of JAXWIN_TUNING_DB, else the user's.

    Raises:
        ValueError: an option is wrong.
        jaxwin.tuner.database.DatabaseError: the database cannot be used.
    """
    from jaxwin.tuner import tune as tuner  # takes its time

    return tuner.tune(fn, *args, **kwargs)


def best_layout(
    fn: Callable[..., Any], *args: Any, source: str = "NHWC", rounds: int = 7
) -> Choice:
    """Says which layout the convolutions of `fn(*args)` should stay in, on this machine.

    The function is traced, not run. Each of its convolutions is timed alone in every layout, in
    turn; so are the conversions at both ends. Where the function computes gradients (a training
    step), those of every convolution and the conversion of the last cotangent count too. The sum of
    all decides. What lies between the convolutions is not counted, nor are transposed
    convolutions, which `jaxwin.conv` does not have.

    Args:
      fn: a function of arrays and pytrees of them, in "NHWC", "NCHW" or "CHWN".
      args: its arguments, or `jax.ShapeDtypeStruct`s of them.
      source: the layout at both ends: "NHWC", "NCHW" or "CHWN".
      rounds: samples of each.

    Returns:
      `best`, the name for `jaxwin.to_layout`, `jaxwin.conv` and `jaxwin.from_layout`; `ties`, those
      that are as good within the noise; `total_ns` and more. `str()` gives one line.

    Raises:
      ValueError: there is no convolution, or no such source.
    """
    from jaxwin.tuner import layout  # takes its time

    return layout.best_layout(fn, *args, source=source, rounds=rounds)
