# SPDX-License-Identifier: Apache-2.0
"""`jaxwin.tune`, without what only it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
