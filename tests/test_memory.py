# SPDX-License-Identifier: Apache-2.0
"""Workspace, as XLA's memory analysis of the compiled program sees it."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import problems
import pytest

import jaxwin
from jaxwin import _ffi, _registry

# The twelve benchmark layers of the im2win papers: C, H = W, K, window, stride.
LAYERS = {
    "conv1": (3, 227, 96, 11, 4),
    "conv2": (3, 231, 96, 11, 4),
    "conv3": (3, 227, 64, 7, 2),
    "conv4": (64, 224, 64, 7, 2),
    "conv5": (96, 24, 256, 5, 1),
    "conv6": (256, 12, 512, 3, 1),
    "conv7": (3, 224, 64, 3, 1),
    "conv8": (64, 112, 128, 3, 1),
    "conv9": (64, 56, 64, 3, 1),
    "conv10": (128, 28, 128, 3, 1),
    "conv11": (256, 14, 256, 3, 1),
    "conv12": (512, 7, 512, 3, 1),
}
LAST = {1: ("NWC", "WIO"), 2: ("NHWC", "HWIO"), 3: ("NDHWC", "DHWIO")}
MIB = 1 << 20
LINE = 64  # parts of a workspace begin on cache lines


def _temporary_bytes(
    layer: str, batch: int, algorithm: str, layout: str = "NHWC"
) -> tuple[int, int]:
    c, size, k, window, stride = LAYERS[layer]
    shape = (batch, size, size, c) if layout == "NHWC" else (batch, c, size, size)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    w = jax.ShapeDtypeStruct((window, window, c, k), jnp.float32)
    f = jax.jit(
        lambda x, w: jaxwin.conv(
            x, w, stride=stride, padding="VALID", algorithm=algorithm, layout=layout
        )
    )
    temporary = f.lower(x, w).compile().memory_analysis().temp_size_in_bytes
    return temporary, _packed_bytes(window * window * c, k)


def _packed_bytes(rows: int, k: int) -> int:
    """The packed copy of a filter: features padded to whole panels, four vectors at most."""
    lanes = 4 * max(row["width"] for row in _registry.registry()["isas"])
    return 4 * rows * (-(-k // lanes) * lanes)


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("layer", LAYERS)
def test_blocked_im2win_needs_a_strip_per_thread(
    layer: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPROC", str(threads))
    small, packed = _temporary_bytes(layer, 1, "im2win")
    large, _ = _temporary_bytes(layer, 128, "im2win")
    assert small <= threads * MIB + packed
    assert large <= threads * MIB + packed


def test_blocked_im2win_does_not_grow_with_the_images() -> None:
    """Nor with their number, nor with rows of any width: those are cut into pieces."""
    sizes = ((1000, 1000), (8, 10**6), (10**6, 8), (20000, 20000), (10**7,), (400, 300, 500))
    for size, (n, c, k, window, stride), threads, order in itertools.product(
        sizes, ((1, 64, 64, 3, 1), (128, 3, 64, 7, 2)), (1, 3, 16), ("last", "NC{}", "C{}N")
    ):
        rank = len(size)
        space, kernel = "DHW"[3 - rank :], LAST[rank][1]
        layout = LAST[rank] if order == "last" else (order.format(space), kernel)
        problem = problems.make(
            n, c, k, size, (window,) * rank, stride=(stride,) * rank, layout=layout
        )
        plan = _ffi.make_plan(problem.native(), algorithm="im2win", threads=threads)["plan"]
        packed = _packed_bytes(window**rank * c, k)
        assert plan["workspace_bytes"] <= threads * (MIB + LINE) + packed, f"{problem} {layout}"


@pytest.mark.parametrize("layer", LAYERS)
def test_dispatch_needs_no_more(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "4")
    temporary, packed = _temporary_bytes(layer, 8, "auto")
    assert temporary <= 4 * MIB + packed


@pytest.mark.parametrize("layer", LAYERS)
def test_kn2_adds_up_in_place(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = 3
    monkeypatch.setenv("NPROC", str(threads))
    c, size, k, window, stride = LAYERS[layer]
    width = (size - window) // stride + 1
    assert _temporary_bytes(layer, 2, "kn2col_aa")[0] == 0
    # NCHW with a stride: some channels of a row, no more than a few output rows.
    rows, _ = _temporary_bytes(layer, 2, "kn2row_aa", "NCHW")
    assert rows <= (0 if stride == 1 else threads * 4 * 4 * k * width)
    # OIHW: and as much of the filters of one window position.
    problem = problems.make(
        2, c, k, (size,) * 2, (window,) * 2, stride=(stride,) * 2, layout=("NCHW", "OIHW")
    )
    plan = _ffi.make_plan(problem.native(), algorithm="kn2row_aa", threads=threads)["plan"]
    assert plan["workspace_bytes"] <= threads * 2 * (4 * 4 * k * width + LINE)
    # One image of one phase of the input.
    phase = -(-size // stride)
    products = 4 * k * phase * phase
    assert _temporary_bytes(layer, 2, "kn2col_as")[0] <= products + LINE
    assert _temporary_bytes(layer, 2, "kn2row_as", "NCHW")[0] <= (
        products + LINE + (0 if stride == 1 else threads * (4 * 4 * k * phase + LINE))
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_lowered_tensors(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes as the papers say them, and of the forms that this library runs."""
    threads = 2
    monkeypatch.setenv("NPROC", str(threads))
    c, size, k, window, stride = LAYERS[layer]
    out = (size - window) // stride + 1
    read = (out - 1) * stride + window  # input rows and columns
    batch = 3
    problem = problems.make(batch, c, k, (size,) * 2, (window,) * 2, stride=(stride,) * 2)

    def workspace(algorithm: str, **chosen: int) -> int:
        """In bytes, with one thread and the filters where they lie."""
        answer = _ffi.make_plan(problem.native(), algorithm=algorithm)
        specs = {row["name"]: row["params"] for row in _registry.registry()["algorithms"]}
        names = [spec["name"] for spec in specs[algorithm]]
        params = dict(zip(names, answer["plan"]["params"], strict=True)) | chosen
        answer = _ffi.make_plan(problem.native(), algorithm=algorithm, params=list(params.values()))
        return answer["plan"]["workspace_bytes"]

    lowered = 4 * batch * out * window * read * c
    assert 0 <= workspace("mec", full=1, pack=0) - lowered <= LINE
    full = 4 * batch * read * out * window * c
    assert 0 <= workspace("im2win", full=1, pack=0) - full <= LINE
    # For one output row, of a column of its windows: all channels, the rows of each residue
    # together. And its sums.
    rows = min(window, stride) * (1 + (window - 1) // stride)
    assert 0 <= workspace("smm", rows=1) - 4 * out * (c * rows + k) <= 2 * LINE

    # What XLA sees of the blocked form, and of the indirection buffer, which all images share.
    temporary, packed = _temporary_bytes(layer, batch, "mec")
    assert temporary <= threads * MIB + packed
    temporary, packed = _temporary_bytes(layer, batch, "indirect")
    table = 8 * out * out * window * window
    assert table <= temporary <= table + 4 * c + 3 * LINE + packed
    temporary, _ = _temporary_bytes(layer, batch, "smm", "NCHW")
    assert temporary <= threads * MIB


def test_max_workspace_is_kept() -> None:
    x = jnp.ones((1, 28, 28, 64))
    w = jnp.ones((3, 3, 64, 64))
    limit = 150_000
    f = jax.jit(lambda x, w: jaxwin.conv(x, w, max_workspace=limit))
    assert f.lower(x, w).compile().memory_analysis().temp_size_in_bytes <= limit
    with pytest.raises(ValueError, match="max_workspace"):
        jax.jit(lambda x, w: jaxwin.conv(x, w, algorithm="im2win", max_workspace=100)).lower(x, w)


def test_calls_of_a_program_share_their_workspace() -> None:
    x = jnp.ones((1, 56, 56, 64))
    w = jnp.ones((3, 3, 64, 64))

    def chain(depth: int) -> int:
        def f(x):
            for _ in range(depth):
                x = jaxwin.conv(x, w)
            return x

        return jax.jit(f).lower(x).compile().memory_analysis().temp_size_in_bytes

    activations = 2 * x.nbytes
    assert chain(6) <= chain(1) + activations


def _advised(address: int) -> bool:
    """Whether the system was asked for huge pages at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("not mapped")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no huge pages"
)
def test_large_results_ask_for_huge_pages() -> None:
    f = jax.jit(lambda x, w: jaxwin.conv(x, w))
    w = jnp.ones((1, 1, 1, 64))
    large = f(jnp.ones((1, 384, 384, 1)), w)  # 36 MiB: more than the C library ever keeps
    address = large.unsafe_buffer_pointer()
    assert _advised(address)
    assert _advised(address + large.nbytes - 1)


FAULTS = """
import resource
import sys

import jax
import jax.numpy as jnp

import jaxwin

kept = sys.argv[1] == "keep" and jaxwin.keep_memory()
add = jax.jit(lambda x: x + 1)
x = jnp.zeros(1 << 24)
for _ in range(30):  # blocks find their places in the first few
    add(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
add(x).block_until_ready()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "asan" in os.environ.get("LD_PRELOAD", ""),
    reason="another malloc than glibc's",
)
def test_kept_memory_is_not_mapped_again() -> None:
    """A result of 64 MiB, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    faults = {}
    for how in ("keep", "return"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            timeout=120,
        )
        kept, count = done.stdout.split()
        assert kept == str(how == "keep")
        faults[how] = int(count)
    # The system's own pages are 4 KiB, or 2 MiB where it gives those without being asked.
    assert faults["keep"] < 10 < 32 <= faults["return"]


def test_another_c_library_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert jaxwin.keep_memory() is False
