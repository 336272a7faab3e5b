# SPDX-License-Identifier: Apache-2.0
"""The CPUs that a measurement runs on, and who else used them; what they are, Machine says."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")

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


# --- conditions ------------------------------------------------------------------------------

# What a frequency governor and the kernel's memory settings are read from, where there are any.
_CONDITIONS = {
    "governor": _CPUS / "cpu0/cpufreq/scaling_governor",
    "boost": _CPUS / "cpufreq/boost",
    "intel no_turbo": _CPUS / "intel_pstate/no_turbo",
    "SMT": _CPUS / "smt/control",
    "transparent huge pages": Path("/sys/kernel/mm/transparent_hugepage/enabled"),
    "NUMA nodes": Path("/sys/devices/system/node/online"),
    "cgroup cpu.max": Path("/sys/fs/cgroup/cpu.max"),
}
_LOOK_SECONDS = 0.5


def conditions() -> dict[str, str]:
    """What moves times on this machine beside jaxwin: CPUs, clock, memory, and what else runs."""
    usable = usable_cpus()
    facts = {
        "CPUs": f"{os.cpu_count()} in the machine, usable: {_ranges(usable)}",
        "physical cores": str(_cores(usable)),
    }
    for name, path in _CONDITIONS.items():
        try:
            facts[name] = path.read_text().strip()
        except OSError:
            facts[name] = "the system does not say"
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    facts["memory"] = f"{pages:.1f} GiB, pages of {os.sysconf('SC_PAGE_SIZE') // 1024} KiB"
    facts["load average"] = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    before = Load.now(usable)
    time.sleep(_LOOK_SECONDS)
    others, stolen = disturbance(before, Load.now(usable))
    facts["just now"] = f"other processes use {others:.0%} of these CPUs, {stolen:.0%} are stolen"
    return facts


def _ranges(cpus: Iterable[int]) -> str:
    """Numbers as in "0-3,8"."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in parts)


def _cores(cpus: Iterable[int]) -> int:
    seen = set()
    for cpu in cpus:
        path = _CPUS / f"cpu{cpu}/topology/thread_siblings_list"
        seen.add(path.read_text() if path.exists() else str(cpu))
    return len(seen)
