# SPDX-License-Identifier: Apache-2.0
"""The kernels work on XLA's pool: as many threads as the process has CPUs, never stuck, same bits.

XLA makes its pool once, so each case is a process of its own. `NPROC` gives it a pool of several
threads on a machine with one CPU, too. No test looks at the clock.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwin

PRELUDE = """
import os, sys, threading
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import jaxwin
from jax import lax

def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape, np.float32) / 8)

def pool():
    names = (path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return sum(name == "tf_XLAEigen" for name in names)

def busy():
    '''Nanoseconds on a CPU of each thread of the pool.'''
    found = {}
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "tf_XLAEigen":
            found[task.name] = int((task / "schedstat").read_text().split()[0])
    return found

def shared_out(f, operands, calls):
    '''Whether two of the pool's threads have had work, a millisecond each, after so many calls.'''
    f(*operands).block_until_ready()
    before = busy()
    for _ in range(calls):
        f(*operands).block_until_ready()
        worked = {name for name, ns in busy().items() if ns - before[name] > 1_000_000}
        if len(worked) >= 2:
            return True
    return False
"""


def _python(code: str, cpus: set[int] | None = None, **environment: str) -> list[str]:
    """Lines that the code prints, in a process of its own on some of the CPUs."""
    unset = ("NPROC", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"JAX_PLATFORMS": "cpu", "JAXWIN_MODE": "off", **environment}
    # Not by preexec_fn: a process with JAX's threads had better not fork.
    confine = "" if cpus is None else f"import os\nos.sched_setaffinity(0, {sorted(cpus)})\n"
    done = subprocess.run(
        [sys.executable, "-c", confine + PRELUDE + code],
        capture_output=True,
        text=True,
        timeout=240,  # a deadlock
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_one_cpu_is_one_thread() -> None:
    """As under taskset: nothing but the calling thread works."""
    lines = _python(
        """
x, w = draw(8, 40, 40, 32), draw(3, 3, 32, 64)
f = jax.jit(jaxwin.conv)
f(x, w).block_until_ready()
before = busy()
for _ in range(5):
    f(x, w).block_until_ready()
(row,) = jaxwin.explain(jaxwin.conv, x, w)
print(row.threads, len(os.sched_getaffinity(0)), pool() <= 1)
# A program of one thunk runs on one thread, the pool's own or the caller.
print(sum(after > before.get(name, 0) for name, after in busy().items()) <= 1)
""",
        cpus={min(os.sched_getaffinity(0))},
    )
    assert lines == ["1 1 True", "True"]


def test_large_problems_use_the_pool_and_small_ones_do_not() -> None:
    """Which threads had work, by the kernel's own account."""
    lines = _python(
        """
large = draw(8, 56, 56, 64), draw(3, 3, 64, 64)
small = draw(1, 8, 8, 16), draw(3, 3, 16, 16)
for x, w in (large, small):
    (row,) = jaxwin.explain(jaxwin.conv, x, w)
    print(row.threads)
print(pool(), shared_out(jax.jit(jaxwin.conv), large, 100))
""",
        NPROC="4",
    )
    assert lines == ["4", "1", "4 True"]


# Convolutions of a single row, and one in parts that could wait for each other.
FEW_ROWS = {
    "1x1": "jaxwin.conv, draw(1, 56, 56, 256), draw(1, 1, 256, 64)",
    "1-D": "partial(jaxwin.conv, dilation=8), draw(1, 8000, 15), draw(51, 15, 15)",
    "depthwise": "partial(jaxwin.conv, groups=256), draw(1, 4000, 256), draw(31, 1, 256)",
    "transposed": "lambda x, w: jaxwin.conv_transpose(x, w, (4, 4), 'SAME'), "
    "draw(1, 32, 32, 21), draw(8, 8, 21, 21)",
}


@pytest.mark.parametrize("kind", FEW_ROWS)
def test_few_rows_are_shared_out_too(kind: str) -> None:
    lines = _python(
        f"""
from functools import partial
function, *operands = {FEW_ROWS[kind]}
print(shared_out(jax.jit(function), operands, 200))
""",
        NPROC="4",
    )
    assert lines == ["True"]


def test_explain_says_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "8")
    w = jnp.zeros((3, 3, 16, 16))
    for size, least, most in ((4, 1, 1), (16, 1, 2), (64, 8, 8)):
        x = jax.ShapeDtypeStruct((1, size, size, 16), jnp.float32)
        explanation = jaxwin.explain(jaxwin.conv, x, w)
        (row,) = explanation
        assert least <= row.threads <= most
        line = str(explanation).splitlines()[1]
        assert f" {row.threads} " in line
    assert "threads" in str(explanation).splitlines()[0]


# Programs in which convolutions meet each other on the pool; each gives arrays.
NESTED = {
    "independent": """
xs = [draw(2, 30, 30, 16 + 4 * i) for i in range(6)]
ws = [draw(3, 3, 16 + 4 * i, 32) for i in range(6)]
f = jax.jit(lambda xs, ws: [jaxwin.conv(x, w, activation="relu") for x, w in zip(xs, ws)])
result = f(xs, ws)
""",
    "scan": """
x, ws = draw(2, 24, 24, 32), draw(5, 3, 3, 32, 32)
def layer(x, w):
    side = [jaxwin.conv(x, w * s) for s in (1, 2, 3)]
    return side[0] + side[1] - side[2], side[1][:, :2]
result = jax.jit(lambda x, ws: lax.scan(layer, x, ws))(x, ws)
""",
    "vmap": """
x, ws = draw(4, 20, 20, 16), draw(6, 3, 3, 16, 32)
result = jax.jit(jax.vmap(jaxwin.conv, (None, 0)))(x, ws)
""",
    "gradient": """
x, w1, w2 = draw(4, 28, 28, 16), draw(3, 3, 16, 32), draw(3, 3, 1, 32)
def loss(w1, w2, x):
    y = jaxwin.conv(x, w1, stride=2, activation="relu")
    return (jaxwin.conv(y, w2, groups=32) ** 2).sum((1, 2, 3)).mean()
result = jax.jit(jax.grad(loss, (0, 1, 2)))(w1, w2, x)
""",
    "cond and loop": """
x, w = draw(2, 24, 24, 32), draw(3, 3, 32, 32)
def step(i, x):
    return lax.cond(i % 2, lambda x: jaxwin.conv(x, w), lambda x: jaxwin.conv(x, -w), x) * 0.5
result = jax.jit(lambda x: lax.fori_loop(0, 8, step, x))(x)
""",
    "Python's threads": """
x, ws = draw(2, 24, 24, 32), [draw(3, 3, 32, 32) * i for i in range(8)]
f = jax.jit(jaxwin.conv)
result = [None] * len(ws)
def work(i):
    for _ in range(10):
        result[i] = f(x, ws[i])
        jax.block_until_ready(result[i])
threads = [threading.Thread(target=work, args=(i,)) for i in range(len(ws))]
for thread in threads: thread.start()
for thread in threads: thread.join(timeout=120)
assert not any(thread.is_alive() for thread in threads)
""",
}

SAVE = """
leaves = jax.tree.leaves(result)
jax.block_until_ready(leaves)
np.savez(sys.argv[1], *[np.asarray(leaf) for leaf in leaves])
"""


def test_nested_and_concurrent_use(tmp_path: Path) -> None:
    """All of it, several times, in pools of 1, 3 and 8 threads: it ends, with the same bits."""
    program = "".join(
        f"for _ in range(3):\n{_indented(code)}\n{_indented(SAVE)}\n".replace(
            "sys.argv[1]", f"sys.argv[1] + {f'/{number}'!r}"
        )
        for number, code in enumerate(NESTED.values())
    )
    folders = []
    for threads in (1, 3, 8):
        folder = tmp_path / str(threads)
        folder.mkdir()
        folders.append(folder)
        assert _python(
            f"sys.argv.append({str(folder)!r})\n{program}\nprint('done')", NPROC=str(threads)
        ) == ["done"]
    first, *others = folders
    for number in range(len(NESTED)):
        contents = (first / f"{number}.npz").read_bytes()
        assert len(contents) > 1000
        for other in others:
            assert _same(first / f"{number}.npz", other / f"{number}.npz"), number


def _indented(code: str) -> str:
    return "\n".join("    " + line for line in code.strip().splitlines())


def _same(a: Path, b: Path) -> bool:
    with np.load(a) as x, np.load(b) as y:
        return x.files == y.files and all(np.array_equal(x[name], y[name]) for name in x.files)
