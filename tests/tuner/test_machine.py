# SPDX-License-Identifier: Apache-2.0
"""Which CPUs are used, and who else used them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jaxwin.tuner import machine


def test_one_cpu_per_core_first(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, siblings in enumerate(("0,4", "1,5", "2,6", "3,7") * 2):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    assert machine._by_core(range(8)) == [7, 6, 5, 4, 3, 2, 1, 0]
    assert machine._by_core([0, 1, 4]) == [4, 1, 0]
    assert machine._by_core([9, 8]) == [9, 8]  # the system does not say


def test_disturbance() -> None:
    before = machine.Load(cpus=(0, 1), wall=10.0, busy=5.0, stolen=1.0, own=3.0)
    after = machine.Load(cpus=(0, 1), wall=20.0, busy=16.0, stolen=2.0, own=10.0)
    others, stolen = machine.disturbance(before, after)
    assert (others, stolen) == (pytest.approx(0.2), pytest.approx(0.05))
    assert machine.disturbance(after, after) == (0.0, 0.0)


def test_load_counts_this_process() -> None:
    cpus = machine.usable_cpus()
    before = machine.Load.now(cpus)
    while machine.Load.now(cpus).busy - before.busy < 0.02:
        pass
    after = machine.Load.now(cpus)
    assert after.own > before.own
    assert after.wall > before.wall


def test_pin_confines_the_pool_of_xla() -> None:
    code = (
        "import os; from jaxwin.tuner import machine; cpus = machine.pin(1); import jax; "
        "jax.devices(); print(len(cpus), len(os.sched_getaffinity(0)), machine.pool_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1", "1"]


def test_pin_to_more_than_there_are() -> None:
    usable = machine.usable_cpus()
    with pytest.raises(ValueError, match="threads"):
        machine.pin(len(usable) + 1)
    assert machine.usable_cpus() == usable
