# SPDX-License-Identifier: Apache-2.0
"""Programs for CUDA, made on a machine without a GPU; what dispatch decides there, and says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwin
from jaxwin import _cuda, _dispatch, _explain, _ffi, _machine, _record, _registry, _tuning
from jaxwin._problem import from_parameters

NUMBERS = ("NHWC", "HWIO", "NHWC")


def _shapes(*shapes: tuple[int, ...], dtype: Any = jnp.float32) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


X, W = (2, 12, 12, 16), (3, 3, 16, 8)
DEPTHWISE = (3, 3, 1, 16)
LARGE = (16, 28, 28, 64), (4, 4, 64, 64)


def _depthwise(x: Any, w: Any, precision: Any = "highest") -> Any:
    return jaxwin.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=NUMBERS, feature_group_count=16, precision=precision
    )


def _lowered(fn: Any, args: Any, *platforms: str) -> str:
    text: str = jax.jit(fn).trace(*args).lower(lowering_platforms=platforms).as_text()
    return text


def _algorithms(text: str) -> list[str]:
    """Those of the custom calls; "xla" for each convolution that is left."""
    found = []
    for line in text.splitlines():
        if "custom_call @jaxwin_conv" in line:
            found.append(line.split('algorithm = "')[1].split('"')[0])
        elif "stablehlo.convolution" in line:
            found.append("xla")
    return found


def test_a_program_for_cuda_without_a_gpu() -> None:
    text = _lowered(_depthwise, _shapes(X, DEPTHWISE), "cuda")
    assert _algorithms(text) == ["depthwise"]
    assert 'isa = "cuda"' in text


def test_one_program_for_both_platforms() -> None:
    text = _lowered(_depthwise, _shapes(X, DEPTHWISE), "cpu", "cuda")
    assert sorted(_algorithms(text)) == ["depthwise", "depthwise"]
    assert text.count('isa = "cuda"') == 1


def test_the_cpu_does_not_notice() -> None:
    args = _shapes(X, DEPTHWISE)
    text = _lowered(_depthwise, args, "cpu")
    assert 'isa = "cuda"' not in text and _algorithms(text) == ["depthwise"]


def test_export_for_cuda() -> None:
    exported = jax.export.export(
        jax.jit(_depthwise), platforms=["cuda"], disabled_checks=jaxwin.export_safety_checks()
    )(*_shapes(X, DEPTHWISE))
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cuda",)
    assert "jaxwin_conv" in again.mlir_module()


def test_gradients_of_depthwise_convolutions_are_ours() -> None:
    def loss(x: Any, w: Any) -> Any:
        return (_depthwise(x, w) ** 2).sum()

    text = _lowered(jax.grad(loss, (0, 1)), _shapes(X, DEPTHWISE), "cuda")
    assert len(_algorithms(text)) == 3 and "xla" not in _algorithms(text)


def test_transposed_convolutions_are_segregated() -> None:
    def up(x: Any, w: Any) -> Any:
        return jaxwin.conv_transpose(x, w, (2, 2), "SAME", precision="highest")

    assert _algorithms(_lowered(up, _shapes(*LARGE), "cuda")) == ["segregated"]


@pytest.mark.parametrize("precision", [None, "default", "highest"])
def test_cudnn_stays_where_nothing_was_measured(precision: Any) -> None:
    def dense(x: Any, w: Any) -> Any:
        return jaxwin.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=NUMBERS, precision=precision
        )

    assert _algorithms(_lowered(dense, _shapes(X, W), "cuda")) == ["xla"]
    if precision != "highest":
        text = _lowered(lambda x, w: _depthwise(x, w, precision), _shapes(X, DEPTHWISE), "cuda")
        assert _algorithms(text) == ["xla"]


def test_jaxwin_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(x: Any, w: Any) -> Any:
        return jaxwin.conv(x, w, activation="relu")

    for mode, expected in (("all", "im2win"), ("off", "xla"), ("auto", "xla")):
        monkeypatch.setenv("JAXWIN_GPU", mode)
        jax.clear_caches()
        assert _algorithms(_lowered(dense, _shapes(*LARGE), "cuda")) == [expected]
    monkeypatch.setenv("JAXWIN_GPU", "maybe")
    jax.clear_caches()
    with pytest.raises(ValueError, match="JAXWIN_GPU: 'maybe' is not one of auto, all, off"):
        _lowered(dense, _shapes(X, W), "cuda")


def test_a_gpu_that_cannot_run_them_gets_lax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too old, or without NVRTC: what nobody asked for by name must not fail there."""
    why = "the GPU has compute capability 7.5, at least 8.0 is needed"
    monkeypatch.setattr(_cuda, "unusable", lambda: why)
    monkeypatch.setattr(_explain, "default_platform", lambda: "cuda")
    monkeypatch.setenv("JAXWIN_GPU", "all")
    _cuda.decide.cache_clear()
    jax.clear_caches()
    try:
        assert _algorithms(_lowered(_depthwise, _shapes(X, DEPTHWISE), "cuda")) == ["xla"]
        (row,) = jaxwin.explain(_depthwise, *_shapes(X, DEPTHWISE))
        assert (row.algorithm, row.reason) == ("xla", why)
        text = _lowered(lambda x, w: jaxwin.conv(x, w, algorithm="im2win"), _shapes(X, W), "cuda")
        assert _algorithms(text) == ["im2win"]
    finally:
        _cuda.decide.cache_clear()


def test_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXWIN_DISABLE", "1")
    jax.clear_caches()
    assert _algorithms(_lowered(_depthwise, _shapes(X, DEPTHWISE), "cuda")) == ["xla"]


@pytest.mark.parametrize("algorithm", ["im2win", "im2win_full", "direct", "grouped", "tensor"])
def test_algorithms_by_name(algorithm: str) -> None:
    bias = jnp.zeros(8)

    def fn(x: Any, w: Any) -> Any:
        return jaxwin.conv(x, w, bias=bias, activation="gelu", algorithm=algorithm)

    text = _lowered(fn, _shapes(X, W), "cuda")
    assert _algorithms(text) == [algorithm]
    assert "activation = 3" in text and "has_bias = 1" in text


def test_sixteen_bits_are_read_as_they_are_where_there_are_kernels_for_them() -> None:
    dense, apart = _shapes(X, W, dtype=jnp.bfloat16), _shapes(X, DEPTHWISE, dtype=jnp.bfloat16)
    for algorithm, args, conversions in (
        ("tensor", dense, 0),
        ("direct", dense, 0),
        ("im2win", dense, 3),
        ("depthwise", apart, 0),
        ("grouped", apart, 0),
        ("im2win", apart, 3),
    ):

        def fn(x: Any, w: Any, algorithm: str = algorithm) -> Any:
            return jaxwin.conv(x, w, groups=16 // w.shape[2], algorithm=algorithm)

        text = _lowered(fn, args, "cuda")
        assert _algorithms(text) == [algorithm]
        assert text.count("stablehlo.convert") == conversions


def test_names_are_checked_by_platform() -> None:
    def fn(algorithm: str) -> Any:
        return lambda x, w: jaxwin.conv(x, w, algorithm=algorithm)

    with pytest.raises(ValueError, match="'planar' is on CUDA not one of auto, im2win"):
        _lowered(fn("planar"), _shapes(X, W), "cuda")
    with pytest.raises(ValueError, match="'tensor' is not one of"):
        _lowered(fn("tensor"), _shapes(X, W), "cpu")
    with pytest.raises(ValueError, match="'depthwise' cannot compute"):
        _lowered(fn("depthwise"), _shapes(X, W), "cuda")


def test_tensor_cores_are_below_highest() -> None:
    with jax.default_matmul_precision("highest"):
        with pytest.raises(ValueError, match="'tensor' is below the precision"):
            _lowered(lambda x, w: jaxwin.conv(x, w, algorithm="tensor"), _shapes(X, W), "cuda")


def test_installed_reaches_cuda() -> None:
    def plain(x: Any, w: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=NUMBERS,
            feature_group_count=16,
            precision="highest",
        )

    with jaxwin.installed():
        assert _algorithms(_lowered(plain, _shapes(X, DEPTHWISE), "cuda")) == ["depthwise"]
    assert _algorithms(_lowered(plain, _shapes(X, DEPTHWISE), "cuda")) == ["xla"]


def test_explain_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_explain, "default_platform", lambda: "cuda")
    (row,) = jaxwin.explain(_depthwise, *_shapes(X, DEPTHWISE))
    assert (row.algorithm, row.tier, row.isa) == ("depthwise", "heuristic", "cuda")
    assert row.parameters.keys() == {"strip", "vector", "threads"}
    assert row.rejected["segregated"] == "segregated: no lhs_dilation"
    assert row.rejected["tensor"] == "another numerical family: only where asked for"
    (row,) = jaxwin.explain(lambda x, w: _depthwise(x, w, None), *_shapes(X, DEPTHWISE))
    assert (row.algorithm, row.reason) == (
        "xla",
        "precision below HIGHEST: tensor cores are allowed",
    )
    (row,) = jaxwin.explain(lambda x, w: jaxwin.conv(x, w, algorithm="im2win"), *_shapes(X, W))
    assert (row.algorithm, row.tier) == ("im2win", "requested")


# --- the machine and its measurements --------------------------------------------------------

GPU = ("Fake GPU", 7, "9.0")


def test_measurements_of_a_gpu_are_a_matter_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    here = _machine.this_machine()
    measured = _machine.Machine(
        arch="other", gpu_name=GPU[0], gpu_sm_count=GPU[1], gpu_compute_capability=GPU[2]
    )
    monkeypatch.setattr(_machine, "_gpu", lambda: (None, None, None))
    assert here.likeness(measured) == "other"
    assert _machine.this_gpu() is None
    monkeypatch.setattr(_machine, "_gpu", lambda: GPU)
    assert here.likeness(measured) == "same"
    gpu = _machine.this_gpu()
    assert gpu is not None and gpu.gpu_sm_count == 7
    monkeypatch.setattr(_machine, "_gpu", lambda: (GPU[0], 8, GPU[2]))
    assert here.likeness(measured) == "other"


def test_a_measurement_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from jaxwin.tuner.database import Database, Measurement

    monkeypatch.setattr(_machine, "_gpu", lambda: GPU)
    gpu = _machine.this_gpu()
    assert gpu is not None

    def dense(x: Any, w: Any) -> Any:
        return jaxwin.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=NUMBERS, precision="highest"
        )

    (problem,) = _explain.problems(dense, *_shapes(X, W))
    default = _ffi.cuda_make_plan(problem.native(), "im2win")["plan"]
    names = _registry.parameter_names("im2win", "cuda")
    assert names is not None
    path = tmp_path / "gpu.db"
    with Database(path) as database:
        database.add(
            [
                Measurement(
                    problem=problem,
                    machine=gpu,
                    algorithm="im2win",
                    parameters=dict(zip(names, default["params"], strict=True)),
                    isa="cuda",
                    threads=1,
                    abi=_registry.abi("im2win", "cuda"),
                    status="ok",
                    ns_min=900.0,
                    ns_median=1000.0,
                    ns_mad=1.0,
                    repeats=10,
                    confirmed=True,
                )
            ]
        )
    monkeypatch.setenv("JAXWIN_MODE", "require")
    monkeypatch.setenv("JAXWIN_TUNING_DB", str(path))
    _tuning.reload()
    try:
        decision = _dispatch.decide(problem, platform="cuda", exact=True)
        assert decision.tier == "tuned" and decision.plan is not None
        assert decision.plan.algorithm == "im2win"
        below = _dispatch.decide(problem, platform="cuda", exact=False, enforce=False)
        assert below.plan is None and below.untried and not decision.untried
        assert not _record.misses()
    finally:
        _tuning.reload()


def _dense(x: Any, w: Any, precision: Any = None) -> Any:
    return jaxwin.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=NUMBERS, precision=precision
    )


@pytest.fixture
def untuned(own_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """There is no tuning database, and nothing was missed yet."""
    monkeypatch.delenv("JAXWIN_TUNING_DB")
    _record._missed.clear()
    yield
    _record._missed.clear()


@pytest.mark.parametrize(
    ("fn", "isa"),
    [
        (lambda x, w: _depthwise(x, w), "cuda"),  # the heuristic's kernel
        (lambda x, w: _depthwise(x, w, None), "cuda-tensor"),  # cuDNN's, until it is tuned
        (lambda x, w: jaxwin.conv(x, w, groups=16, bias=jnp.ones(16)), "cuda-tensor"),
    ],
    ids=["ours", "cuDNN", "fused"],
)
def test_what_was_not_tuned_for_cuda(
    fn: Any, isa: str, untuned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = _shapes(X, DEPTHWISE)
    _lowered(lambda *a: fn(*a), args, "cuda")
    (missed,) = _record.misses()
    assert missed[1:] == (1, isa)
    monkeypatch.setenv("JAXWIN_MODE", "require")
    asked = f"no tuned row for {re.escape(str(missed[0]))} with {isa} in "
    with pytest.raises(RuntimeError, match=f"JAXWIN_MODE=require: {asked}"):
        _lowered(lambda *a: fn(*a), args, "cuda")
    monkeypatch.setattr(_explain, "default_platform", lambda: "cuda")
    (row,) = jaxwin.explain(fn, *args)
    assert "JAXWIN_MODE=require: compiling this raises an error" in row.unused
    monkeypatch.setenv("JAXWIN_MODE", "off")
    _lowered(lambda *a: fn(*a), args, "cuda")
    assert _record.misses() == {missed: 2}


def test_what_nobody_can_tune_for_cuda(untuned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXWIN_MODE", "require")
    args = _shapes(X, W)
    _lowered(lambda x, w: jaxwin.conv(x, w, algorithm="im2win"), args, "cuda")
    _lowered(lambda x, w: jaxwin.conv(x, w, algorithm="xla"), args, "cuda")
    _lowered(lambda x, w: _dense(x, w), _shapes(X, W, dtype=jnp.int32), "cuda")
    monkeypatch.setenv("JAXWIN_GPU", "off")
    _lowered(lambda x, w: _dense(x, w), args, "cuda")
    monkeypatch.setenv("JAXWIN_GPU", "auto")
    _lowered(lambda x, w: jaxwin.conv(x, w, algorithm="xla"), args, "cpu", "cuda")
    assert not _record.misses()
    monkeypatch.setenv("JAXWIN_GPU", "all")
    with pytest.raises(RuntimeError, match="with cuda in "):  # exact kernels for any precision
        _lowered(lambda x, w: _dense(x, w), args, "cuda")


def test_no_problem_makes_dispatch_fail() -> None:
    """Narrow, wide and odd dtypes, ranks without kernels: always an answer."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.float64, jnp.complex64):
        for rank in range(5):
            x = jax.ShapeDtypeStruct((2, *(4,) * rank, 4), np.dtype(dtype))
            w = jax.ShapeDtypeStruct((*(2,) * rank, 2, 4), np.dtype(dtype))
            out = jax.ShapeDtypeStruct((2, *(3,) * rank, 4), np.dtype(dtype))
            order = tuple(range(1, rank + 1))
            numbers = jax.lax.ConvDimensionNumbers(
                (0, rank + 1, *order), (rank + 1, rank, *range(rank)), (0, rank + 1, *order)
            )
            problem = from_parameters(
                x,
                w,
                out,
                {
                    "dimension_numbers": numbers,
                    "window_strides": (1,) * rank,
                    "padding": ((0, 0),) * rank,
                    "lhs_dilation": (1,) * rank,
                    "rhs_dilation": (1,) * rank,
                    "feature_group_count": 2,
                    "batch_group_count": 1,
                },
            )
            decision = _dispatch.decide(problem, platform="cuda", exact=True)
            assert (decision.plan is None) == bool(decision.reason)
            if dtype is jnp.float32 and 1 <= rank <= 3:
                assert decision.plan is not None


def test_import_opens_no_driver() -> None:
    code = (
        "import jaxwin\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libcuda' not in maps and 'nvrtc' not in maps\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nvrtc_is_looked_for_in_the_wheels(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert _cuda.nvrtc_libraries()[0] == str(library)


def test_the_kernel_cache_s_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXWIN_KERNEL_CACHE", "off")
    assert _cuda.cache_folder() == ""
    monkeypatch.setenv("JAXWIN_KERNEL_CACHE", "/some/where")
    assert _cuda.cache_folder() == "/some/where"
    monkeypatch.delenv("JAXWIN_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert _cuda.cache_folder() == "/cache/jaxwin/kernels"
