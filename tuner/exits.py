# SPDX-License-Identifier: Apache-2.0
"""The exit codes of `jaxwin-tune`: the one list of them."""

from __future__ import annotations

OK = 0
FOUND = 1
USAGE = 2
UNSUPPORTED = 3
DATABASE = 4
BUSY = 5
INTERRUPTED = 130

MEANINGS = {
    OK: "done, all is well",
    FOUND: "done, and something is wrong: the output says what",
    USAGE: "wrong usage",
    UNSUPPORTED: "none of the convolutions has a native kernel",
    DATABASE: "a tuning database cannot be used",
    BUSY: "done, but the machine was too busy to tell which plan is the fastest; try again",
    INTERRUPTED: "stopped by Ctrl-C; what was measured is kept",
}


def table() -> str:
    """For help texts: lines of a code and what it means."""
    return "\n".join(f"  {code:<4} {meaning}" for code, meaning in MEANINGS.items())
