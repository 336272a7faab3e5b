# SPDX-License-Identifier: Apache-2.0
"""What the environment variables say, as they are now."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

# Every variable that is read, and what it does; the README and `jaxwin-tune doctor` tell them.
VARIABLES = {
    "JAXWIN_DISABLE": "every convolution is computed by `jax.lax`",
    "JAXWIN_MODE": "which use is made of tuning databases",
    "JAXWIN_FAMILY": "which numbers are good enough",
    "JAXWIN_MAX_ISA": "use no newer instructions than these",
    "JAXWIN_VERBOSE": "print one line on standard error for each convolution that is compiled",
    "JAXWIN_RECORD": "a file to which every problem that is compiled is added",
    "JAXWIN_MISSES": "whether problems without a tuned row are remembered",
    "JAXWIN_TUNING_DB": "tuning databases to read before all others",
    "JAXWIN_GPU": "for which convolutions our kernels are taken on NVIDIA GPUs",
    "JAXWIN_KERNEL_CACHE": "where compiled GPU kernels are kept",
    "NPROC": "how many threads XLA's pool has",
}
MODES = ("off", "cached", "require")
FAMILIES = ("canonical", "any")
_FALSE = ("", "0", "false", "off", "no")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The variables, parsed. `mode` and `family` are not checked: `mode()` and `family()` do."""

    disable: bool
    mode: str
    family: str
    max_isa: str
    verbose: bool
    record: str
    misses: bool
    tuning_db: str
    gpu: str
    kernel_cache: str
    threads: int | None


def _parse(values: tuple[bytes | None, ...]) -> Settings:
    texts = [os.fsdecode(value or b"") for value in values]
    disable, mode, family, max_isa, verbose, record, misses, tuning_db, gpu, cache, threads = texts
    return Settings(
        disable=disable.lower() not in _FALSE,
        mode=mode or "cached",
        family=family or "canonical",
        max_isa=max_isa,
        verbose=verbose.lower() not in _FALSE,
        record=record,
        misses=(misses or "1").lower() not in _FALSE,
        tuning_db=tuning_db,
        gpu=gpu or "auto",
        kernel_cache=cache,
        threads=int(threads) if threads.isdecimal() and int(threads) > 0 else None,
    )


# The dictionary behind os.environ: looking at a variable that is not set takes a twentieth of the
# time. It is private, so do without where it is not what it was.
_RAW: Any = getattr(os.environ, "_data", None)
_KEYS = tuple(os.fsencode(name) for name in VARIABLES)
_GET = _RAW.get if type(_RAW) is dict and {*map(type, _RAW)} == {bytes} else os.environb.get


_last: tuple[tuple[bytes | None, ...], Settings] = ((), _parse((None,) * len(_KEYS)))


def settings() -> Settings:
    """The settings as they are now; a look takes half a microsecond."""
    global _last
    values = tuple(map(_GET, _KEYS))
    known, parsed = _last
    if values != known:
        parsed = _parse(values)
        _last = values, parsed
    return parsed


def _one_of(variable: str, text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise ValueError(f"{variable}: {text!r} is not one of {', '.join(choices)}")
    return text


def mode() -> str:
    """What `JAXWIN_MODE` says: "off", "cached" (the default) or "require".

    Raises:
        ValueError: it says something else.
    """
    return _one_of("JAXWIN_MODE", settings().mode, MODES)


def family() -> str:
    """What `JAXWIN_FAMILY` says: "canonical" (the default) or "any".

    Raises:
        ValueError: it says something else.
    """
    return _one_of("JAXWIN_FAMILY", settings().family, FAMILIES)
