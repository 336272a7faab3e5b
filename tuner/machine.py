# SPDX-License-Identifier: Apache-2.0
"""What a measurement says about the machine that it was taken on.

`Machine` is a row of columns. Two rows with the same values are the same kind of machine; nothing
in it (a host name, a serial number) tells one machine of a kind from another.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import re
import time
from collections.abc import Iterable
from pathlib import Path

from jaxwin import _registry

_CPUS = Path("/sys/devices/system/cpu")
# Flags that decide which kernels a CPU can run, ours or another library's.
_ISA_FLAG = re.compile(r"sse|ssse3|avx|fma|f16c|amx|bmi|adx|asimd|sve|sme|neon|bf16|i8mm")


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of machine, and how much of it a process used.

    isa: the CPU's flags that matter for kernels, in order, with spaces between them.
    l1, l2, l3: bytes of data cache that one core sees; 0 where there is none or it is unknown.
    cores: CPUs that the process may run on. threads: how many of them it used.
    """

    vendor: str
    family: int
    model: int
    stepping: int
    brand: str
    isa: str
    l1: int
    l2: int
    l3: int
    cores: int
    threads: int


def describe(threads: int | None = None, cores: int | None = None) -> Machine:
    """This machine.

    threads: as used by the kernels; None for what XLA's pool has in this process.
    cores: usable ones; None for those of the affinity mask as it is now.
    """
    fields = _cpuinfo()

    def number(key: str) -> int:
        text = fields.get(key, "")
        return int(text) if text.isdecimal() else 0

    flags = fields.get("flags", fields.get("Features", "")).split()
    caches = _registry.registry()["caches"]
    return Machine(
        vendor=fields.get("vendor_id", fields.get("CPU implementer", "")),
        family=number("cpu family"),
        model=number("model"),
        stepping=number("stepping"),
        brand=fields.get("model name", platform.machine()),
        isa=" ".join(sorted(flag for flag in flags if _ISA_FLAG.match(flag))),
        l1=int(caches["l1"]),
        l2=int(caches["l2"]),
        l3=int(caches["l3"]),
        cores=len(usable_cpus()) if cores is None else cores,
        threads=_registry.threads() if threads is None else threads,
    )


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first CPU's entries of /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


# --- CPUs ------------------------------------------------------------------------------------


def usable_cpus() -> tuple[int, ...]:
    """Numbers of the CPUs that this process may run on."""
    return tuple(sorted(os.sched_getaffinity(0)))


def pin(threads: int) -> tuple[int, ...]:
    """Confines this process, and what XLA's pool will be, to some of its CPUs; returns them.

    To be called before JAX has a CPU client and before other libraries start threads: all of them
    count the CPUs then. Takes one CPU per physical core first, and those with high numbers: the
    first CPU serves most interrupts.

    Raises:
        ValueError: there are fewer CPUs.
    """
    usable = usable_cpus()
    if threads > len(usable):
        raise ValueError(f"threads: {threads} asked for, but this process may use {len(usable)}")
    chosen = tuple(sorted(_by_core(usable)[:threads]))
    os.sched_setaffinity(0, chosen)
    os.environ["NPROC"] = str(threads)
    return chosen


def _by_core(cpus: Iterable[int]) -> list[int]:
    """CPUs with high numbers first, second threads of a core after all first ones."""
    firsts: list[int] = []
    seconds: list[int] = []
    seen: set[str] = set()
    for cpu in sorted(cpus, reverse=True):
        path = _CPUS / f"cpu{cpu}/topology/thread_siblings_list"
        core = path.read_text() if path.exists() else str(cpu)
        (seconds if core in seen else firsts).append(cpu)
        seen.add(core)
    return firsts + seconds


def pool_threads() -> int:
    """How many threads XLA's pool has in this process now; 0 where that cannot be seen."""
    names = (path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return sum(name == "tf_XLAEigen" for name in names)


# --- load ------------------------------------------------------------------------------------

_TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Load:
    """A moment, for `disturbance`: seconds of work so far on some CPUs, and of this process."""

    cpus: tuple[int, ...]
    wall: float
    busy: float
    stolen: float
    own: float

    @staticmethod
    def now(cpus: tuple[int, ...]) -> Load:
        """The counters of these CPUs now."""
        busy = stolen = 0.0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *values = line.split()
            if name in {f"cpu{cpu}" for cpu in cpus}:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, values[:8])
                busy += (user + nice + system + irq + softirq) * _TICK
                stolen += steal * _TICK
        return Load(cpus, time.monotonic(), busy, stolen, time.process_time())


def disturbance(before: Load, after: Load) -> tuple[float, float]:
    """(share of the CPUs' time that other processes used, share that the hypervisor took)."""
    available = max((after.wall - before.wall) * len(before.cpus), _TICK)
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others / available), max(0.0, (after.stolen - before.stolen) / available)
