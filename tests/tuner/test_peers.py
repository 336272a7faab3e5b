# SPDX-License-Identifier: Apache-2.0
"""Each peer computes the convolution that it is asked for, as far as it is installed."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from typing import Any

import jax
import numpy as np
import pytest

from jaxwin import _lowering, _pack, _registry
from jaxwin.tuner import bench, peers, problems
from jaxwin.tuner.measure import Timed

SHAPES = (
    "n2 9x10 c6 k8 w3x2 s2 p1",
    "n2 9x10 c6 k8 w3 s2 psame reversed",
    "n2 12 c6 k8 w3 rd2",
    "n2 5x6x7 c4 k6 w3 p1",
    "n2 9x10 c6 k12 w3 p1 g3",
    "n2 9x10 c6 k12 w3 s2 p1 g6",
    "n2 5x6 c4 k6 w4 s2 p1 transposed",
    "n2 5x6 c4 k6 w3 s2 p1 g2 transposed",
    "n2 7 c4 k6 w2 s2 p0 transposed reversed",
    "n4 9x10 c6 k12 w3 p1 bg2",
    "n2 9x10 c6 k8 w3 p1:2x-1:2",
)
PACKED = ["jaxwin-packed", "jaxwin-packed-loop"]
# Of so many features that kernels read them in panels.
WIDE = (
    "n2 9x10 c6 k40 w3x2 s2 p1",
    "n2 12 c6 k40 w3 rd2",
    "n2 5x6x7 c8 k40 w3 p1",
    "n2 9x10 c6 k99 w3 p1 g3",
    "n2 9x10 c6 k40 w3 p1:2x-1:2",
)
JAX = [
    name
    for name in peers.names()
    if name.startswith("xla") or (peers.is_ours(name) and name not in PACKED)
]
OTHERS = [name for name in peers.names() if name not in (*JAX, *PACKED)]
FORWARD_ONLY = ("onednn-packed", "ort", "xnnpack")
# What a peer has no forward convolution for, by shape.
NOT_THERE = {
    SHAPES[1]: ("onednn-packed",),
    SHAPES[2]: (),
    SHAPES[3]: ("xnnpack",),
    SHAPES[7]: ("xnnpack",),
    SHAPES[9]: tuple(OTHERS),
    SHAPES[10]: ("onednn-packed", "ort", "xnnpack"),
}


def _task(text: str, direction: str, layout: str = "nhwc") -> peers.Task:
    conv = problems.parse(text)
    rng = np.random.default_rng(0)
    x, w, y = (bench.draw(rng, conv.shape(name), conv.dtype_of(name)) for name in "xwy")
    return peers.Task(conv, direction, layout, 1, x, w, y)


@functools.cache
def _expected(text: str, direction: str) -> np.ndarray:
    with jax.enable_x64(True):
        return bench.reference(_task(text, direction))


def _check(name: str, text: str, direction: str, layout: str = "nhwc") -> peers.Prepared:
    task, expected = _task(text, direction, layout), _expected(text, direction)
    with jax.enable_x64(True):
        prepared = peers.make(name).prepare(task)
        for _ in range(2):  # the second call may reuse what the first one left
            got = prepared.result()
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        with prepared.timed.around():
            prepared.timed.call()
    return prepared


@pytest.mark.parametrize("direction", problems.DIRECTIONS)
@pytest.mark.parametrize("text", [SHAPES[0], SHAPES[7]])
@pytest.mark.parametrize("name", JAX)
def test_jax_peers(name: str, text: str, direction: str) -> None:
    prepared = _check(name, text, direction)
    assert prepared.facts["workspace_bytes"] >= 0
    assert ("plan" in prepared.facts) == peers.is_ours(name)


@pytest.mark.parametrize("layout", problems.LAYOUTS[1:])
def test_layouts(layout: str) -> None:
    for direction in problems.DIRECTIONS:
        _check("jaxwin", SHAPES[0], direction, layout)


@pytest.mark.parametrize("name", PACKED)
def test_packed_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packings = []
    pack = _pack.pack_array
    monkeypatch.setattr(_pack, "pack_array", lambda *args: packings.append(args) or pack(*args))
    for text, layout in [*((text, "nhwc") for text in WIDE), (WIDE[0], "nchw")]:
        before = len(packings)
        prepared = _check(name, text, "fwd", layout)
        assert len(packings) == before + 1  # before the clock starts
        assert prepared.facts["plan"]["algorithm"] in _registry.algorithm_names()
    absent = {
        SHAPES[1]: "jaxwin.conv",
        SHAPES[5]: "reads packed weights",
        SHAPES[6]: "jaxwin.conv",
        SHAPES[9]: "jaxwin.conv",
    }
    for text, reason in absent.items():
        with pytest.raises(peers.Unsupported, match=reason):
            peers.make(name).prepare(_task(text, "fwd"))
    for direction in problems.DIRECTIONS[1:]:
        with pytest.raises(peers.Unsupported, match="forward only"):
            peers.make(name).prepare(_task(SHAPES[0], direction))
    monkeypatch.setattr(_pack, "_panel", lambda *_: 7)  # as from another machine
    with pytest.raises(peers.Unsupported, match="unpack"):
        peers.make(name).prepare(_task(WIDE[0], "fwd"))


@pytest.mark.parametrize("dtype", problems.INTEGERS)
def test_integers_are_exact(dtype: str) -> None:
    """By a sum in Python's integers, which wraps as int32 does."""
    text = f"n1 4x5 c6 k3 w3x2 s2x1 p1 {dtype}"
    task = _task(text, "fwd")
    x = np.pad(task.x.astype(object), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros(task.conv.y_shape, object)
    for i, row in enumerate(range(0, 4, 2)):
        for j in range(6):
            piece = x[0, row : row + 3, j : j + 2, :, None]
            expected[0, i, j] = (piece * task.w.astype(object)).sum((0, 1, 2))
    expected = (expected + 2**31) % 2**32 - 2**31
    np.testing.assert_array_equal(_expected(text, "fwd"), expected.astype(np.float64))
    for name in peers.names():
        if peers.make(name).missing():
            continue
        if name in (*JAX, "ort") and (name, dtype) != ("ort", "int16"):
            got = peers.make(name).prepare(task).result()
            assert got.dtype == np.int32, name
            np.testing.assert_array_equal(got, expected.astype(np.int32), name)
        else:
            with pytest.raises(peers.Unsupported):
                peers.make(name).prepare(task)


@pytest.mark.parametrize("name", OTHERS)
def test_other_peers(name: str) -> None:
    if reason := peers.make(name).missing():
        pytest.skip(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs are not our concern
        for text in SHAPES:
            for direction in problems.DIRECTIONS:
                absent = name in NOT_THERE.get(text, ()) or (
                    direction != "fwd" and name in FORWARD_ONLY
                )
                if absent or (direction == "dx" and text == SHAPES[10]):
                    with pytest.raises(peers.Unsupported):
                        peers.make(name).prepare(_task(text, direction))
                else:
                    _check(name, text, direction)


@pytest.mark.parametrize("direction", problems.DIRECTIONS)
def test_an_algorithm_asked_for_is_the_one_that_runs(direction: str) -> None:
    plans = {}
    for name in _registry.algorithm_names():
        try:
            plans[name] = _check(f"jaxwin:{name}", "n2 8x9 c4 k6 w3", direction).facts["plan"]
        except ValueError as error:
            assert name in str(error)
    assert len(plans) >= (1 if direction == "dw" else 3)
    for name, plan in plans.items():
        assert (plan["algorithm"], plan["tier"]) == (name, "requested")


def test_a_donated_buffer_is_where_the_result_lies() -> None:
    task = _task("n1 20x20 c8 k8 w3", "fwd")
    call = peers.make("jaxwin-donated").prepare(task).timed.call
    first = call().unsafe_buffer_pointer()
    assert call().unsafe_buffer_pointer() == first


def test_a_loop_computes_the_convolution_each_time() -> None:
    programs = []

    class Loop(peers.JaxwinLoop):
        def program(self, *args: Any) -> tuple[Any, Timed]:
            compiled, timed = super().program(*args)
            programs.append(compiled.as_text())
            return compiled, timed

    timed = Loop().prepare(_task("n1 32x32 c16 k16 w3", "fwd")).timed
    assert timed.calls > 1
    # XLA would compute it once if it moved it out of the loop, to where the program begins.
    (text,) = programs
    body, entry = text.split("\nENTRY ")
    assert "while(" in entry
    assert _lowering.TARGET in body
    assert _lowering.TARGET not in entry


def test_a_peer_that_is_not_installed_says_why() -> None:
    class Absent(peers.Peer):
        name = "absent"
        modules = ("no_such_module_at_all",)

    assert "no_such_module_at_all" in Absent().missing()
    assert peers.make("xla").missing() == ""


def test_nothing_is_imported_before_a_peer_is_asked_for() -> None:
    code = (
        "import sys, jaxwin.tuner.cli; "
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'ai_edge_litert') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names() -> None:
    assert set(peers.summaries()) == set(peers.names())
    assert all(peers.summaries().values())
    assert [name for name in peers.names() if peers.is_ours(name)] == [
        "jaxwin",
        "jaxwin-donated",
        "jaxwin-loop",
        *PACKED,
    ]
    ahead = [name for name in peers.names() if peers.make(name).packs_ahead]
    assert ahead == ["onednn-packed", "ort", "xnnpack", *PACKED]
    assert ahead == [name for name, text in peers.summaries().items() if "packed before" in text]
    assert peers.make(PACKED[1]).reuses_output and not peers.make(PACKED[0]).reuses_output
    with pytest.raises(KeyError):
        peers.make("nonsense")
