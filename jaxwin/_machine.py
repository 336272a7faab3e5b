# SPDX-License-Identifier: Apache-2.0
"""What this machine is, as far as measurements depend on it. Never who or where it is."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os

from jaxwin import _ffi, _registry

# Vector and matrix extensions of x86-64 and ARM. The other flags change with every microcode.
_FLAG_PREFIXES = ("avx", "amx", "fma", "f16c", "bmi2", "asimd", "sve", "bf16", "i8mm")


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of machine; sizes in bytes, 0 or "" where the system does not tell.

    `usable_cores` counts the CPUs that this process may use (affinity and cgroup quota). On ARM
    vendor, family, model and stepping are the implementer, architecture, part and revision.
    """

    arch: str
    vendor: str = ""
    family: int = 0
    model: int = 0
    stepping: int = 0
    brand: str = ""
    isa_flags: str = ""
    l1d_bytes: int = 0
    l2_bytes: int = 0
    l3_bytes: int = 0
    usable_cores: int = 1
    gpu_name: str | None = None
    gpu_sm_count: int | None = None
    gpu_compute_capability: str | None = None

    @functools.cached_property
    def id(self) -> str:
        """A name for this row of columns; the same wherever the same row is made."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        name = self.brand or f"{self.vendor} {self.family}/{self.model}"
        return f"{name}, {self.usable_cores} core{'s' * (self.usable_cores != 1)}"

    def likeness(self, other: Machine) -> str:
        """How far measurements of `other` hold here: "same", "related" or "other".

        "same": one CPU model with the same caches; its stepping and how many of its cores are
        usable do not matter (the number of threads is a matter of each measurement). "related":
        one CPU model, other caches, as between virtual machines. What was measured on a GPU is a
        matter of the GPU alone.
        """
        if other.gpu_name is not None:
            gpu = (self.gpu_name, self.gpu_sm_count, self.gpu_compute_capability)
            if gpu[0] is None:
                gpu = _gpu()
            theirs = (other.gpu_name, other.gpu_sm_count, other.gpu_compute_capability)
            return "same" if gpu == theirs else "other"
        if not self.vendor:  # an unknown CPU is like no other
            return "other"

        def model(m: Machine) -> tuple[str, str, int, int]:
            return m.arch, m.vendor, m.family, m.model

        def caches(m: Machine) -> tuple[int, int, int]:
            return m.l1d_bytes, m.l2_bytes, m.l3_bytes

        if model(self) != model(other):
            return "other"
        return "same" if caches(self) == caches(other) else "related"


def this_gpu() -> Machine | None:
    """The machine with the columns of its first GPU; None where there is none that CUDA can use."""
    name, processors, capability = _gpu()
    if name is None:
        return None
    return dataclasses.replace(
        this_machine(),
        gpu_name=name,
        gpu_sm_count=processors,
        gpu_compute_capability=capability,
    )


@functools.cache
def _gpu() -> tuple[str | None, int | None, str | None]:
    # Opens the CUDA driver: asked only where measurements of a GPU are at hand.
    device = _ffi.cuda_device(0)
    if "error" in device:
        return None, None, None
    return device["name"], device["processors"], device["capability"]


def this_machine() -> Machine:
    """The machine as this process sees it now."""
    return dataclasses.replace(_cpu(), usable_cores=_usable_cores())


@functools.cache
def _cpu() -> Machine:
    fields = _first_processor()

    def number(*names: str) -> int:
        for name in names:
            try:
                return int(fields[name], 0)
            except (KeyError, ValueError):
                continue
        return 0

    words = fields.get("flags", fields.get("Features", "")).split()
    caches = _registry.registry()["caches"]
    return Machine(
        arch=os.uname().machine,
        vendor=fields.get("vendor_id", fields.get("CPU implementer", "")),
        family=number("cpu family", "CPU architecture"),
        model=number("model", "CPU part"),
        stepping=number("stepping", "CPU revision"),
        brand=" ".join(fields.get("model name", "").split()),
        isa_flags=" ".join(sorted(w for w in words if w.startswith(_FLAG_PREFIXES))),
        l1d_bytes=caches["l1"],
        l2_bytes=caches["l2"],
        l3_bytes=caches["l3"],
    )


def _first_processor() -> dict[str, str]:
    """The first block of /proc/cpuinfo; on machines with many CPUs the whole is slow to read."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    break
                name, _, value = line.partition(":")
                fields[name.strip()] = value.strip()
    except OSError:
        return {}  # no /proc: the CPU stays unknown
    return fields


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        if quota != "max":
            cores = min(cores, -(-int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return cores  # no cgroup of version 2: no quota that we know of
    return max(cores, 1)
