# SPDX-License-Identifier: Apache-2.0
"""Loading, caching and every way to fail, with a CUDA driver and an NVRTC made for it."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import problems
import pytest

from jaxwin import _ffi

_PROBLEM = problems.make(2, 8, 16, (9, 10), (3, 3))
assert _PROBLEM is not None
PROBLEM = _PROBLEM.native()
STREAM = 64
BUFFERS = {"x": 256, "w": 512, "y": 1024, "workspace": 2048}


class Fakes:
    """The two libraries, and what they were called."""

    def __init__(self, folder: Path) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("no C++ compiler")
        source = Path(__file__).with_name("fake_cuda.cc")
        self.paths = {}
        for name in ("CUDA", "NVRTC"):
            path = folder / f"libfake_{name.lower()}.so"
            flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-w", f"-DFAKE_{name}"]
            subprocess.run([compiler, *flags, "-o", str(path), str(source)], check=True)
            self.paths[name] = str(path)
        self.cuda, self.nvrtc = (ctypes.CDLL(path) for path in self.paths.values())
        for library in (self.cuda, self.nvrtc):
            library.fake_calls.restype = ctypes.c_char_p
        self.cuda.fake_image.restype = ctypes.c_char_p

    def set(self, function: str = "", code: int = 999, capability: int = 90) -> None:
        """From now on `function` fails with `code`; forgets the calls until now."""
        for library in (self.cuda, self.nvrtc):
            library.fake_reset(function.encode(), code, capability)
        self.compiler()

    def compiler(self, word: bytes = b"image", milliseconds: int = 0) -> None:
        """From now on images begin with a word ("stale": the driver refuses them)."""
        self._word = word
        self.nvrtc.fake_compiler(self._word, milliseconds)

    def calls(self, function: str) -> int:
        """How often a function was called since."""
        text = (self.cuda if function.startswith("cu") else self.nvrtc).fake_calls().decode()
        return text.split().count(function)

    def runtime(self, cache: Path | str = "", **changed: Any) -> Any:
        """A runtime of its own, with these libraries."""
        arguments: dict[str, Any] = {
            "cuda": [self.paths["CUDA"]],
            "nvrtc": [self.paths["NVRTC"]],
            "cache": str(cache),
        }
        return _ffi.CudaRuntime(**(arguments | changed))


@pytest.fixture(scope="module")
def _libraries(tmp_path_factory: pytest.TempPathFactory) -> Fakes:
    return Fakes(tmp_path_factory.mktemp("fakes"))


@pytest.fixture
def fakes(_libraries: Fakes) -> Iterator[Fakes]:
    _libraries.set()
    yield _libraries
    assert _libraries.cuda.fake_depth() == 0, "a context was left pushed"
    assert _libraries.cuda.fake_capture_mode() == 0, "the capture mode was not restored"


def _run(runtime: Any, algorithm: str = "im2win", **options: Any) -> tuple[str, str]:
    result: tuple[str, str] = runtime.run(
        PROBLEM, algorithm, buffers=BUFFERS, stream=STREAM, **options
    )
    return result


def test_launches_and_keeps_the_function(fakes: Fakes) -> None:
    runtime = fakes.runtime()
    for _ in range(3):
        assert _run(runtime) == ("", "")
    assert fakes.calls("cuLaunchKernel") == 3
    assert fakes.calls("cuModuleLoadData") == 1
    assert fakes.calls("nvrtcCompileProgram") == 1
    assert runtime.counters() == {"compiled": 1, "from_disk": 0, "loaded": 1}
    launch = _ffi.cuda_launches(PROBLEM, "im2win", "float32", False, [], BUFFERS)[0]
    seen = [fakes.cuda.fake_last(i) for i in range(3)]
    assert seen == [launch["blocks"], launch["threads"], launch["shared_bytes"]]


def test_every_device_has_functions_of_its_own(fakes: Fakes) -> None:
    """Streams of two contexts; the fake driver refuses a function of the other one."""
    runtime = fakes.runtime()
    for stream in (64, 128, 64, 136):
        assert runtime.run(PROBLEM, "im2win", buffers=BUFFERS, stream=stream) == ("", "")
    assert fakes.calls("cuModuleLoadData") == 2 == runtime.counters()["loaded"]


def test_what_is_compiled(fakes: Fakes) -> None:
    assert _run(fakes.runtime()) == ("", "")
    words = fakes.cuda.fake_image().decode().split()
    launch = _ffi.cuda_launches(PROBLEM, "im2win", "float32", False, [], BUFFERS)[0]
    assert {"--gpu-architecture=sm_90", "--ftz=true", "--fmad=false", *launch["options"]} <= {
        *words
    }


def test_large_tiles_ask_for_their_shared_memory(fakes: Fakes) -> None:
    assert _run(fakes.runtime(), params=[128, 128, 16, 8, 8, 4, 0, 1]) == ("", "")
    assert fakes.calls("cuFuncSetAttribute") == 1


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        ("cuInit", "unavailable"),
        ("cuStreamGetCtx", "internal"),
        ("cuCtxPushCurrent", "internal"),
        ("cuCtxGetDevice", "internal"),
        ("cuDeviceGetAttribute", "internal"),
        ("nvrtcVersion", "unavailable"),
        ("nvrtcCreateProgram", "internal"),
        ("nvrtcCompileProgram", "internal"),
        ("nvrtcGetCUBINSize", "internal"),
        ("nvrtcGetCUBIN", "internal"),
        ("cuModuleLoadData", "internal"),
        ("cuModuleGetFunction", "internal"),
        ("cuFuncSetAttribute", "internal"),
        ("cuFuncGetAttribute", "internal"),
        ("cuLaunchKernel", "internal"),
    ],
)
def test_every_failure_is_one_line_and_passes(fakes: Fakes, function: str, kind: str) -> None:
    runtime = fakes.runtime()
    fakes.set(function)
    big = [128, 128, 16, 8, 8, 4, 0, 1]
    failure, text = _run(runtime, params=big)
    assert failure == kind
    assert text and "\n" not in text
    assert fakes.calls("cuModuleLoadData") - fakes.calls("cuModuleUnload") in (
        (1,) if function == "cuLaunchKernel" else (0, 1) if function == "cuModuleLoadData" else (0,)
    )
    fakes.set()
    assert _run(runtime, params=big) == ("", ""), "the failure stuck"


@pytest.mark.parametrize("function", ["cuModuleLoadData", "cuLaunchKernel"])
def test_out_of_memory_is_named(fakes: Fakes, function: str) -> None:
    fakes.set(function, code=2)
    failure, text = _run(fakes.runtime())
    assert failure == "out of memory"
    assert "CUDA_ERROR_OUT_OF_MEMORY" in text


def test_a_compile_error_tells_the_compiler_s_line(fakes: Fakes) -> None:
    fakes.set("nvrtcCompileProgram", code=6)
    _, text = _run(fakes.runtime())
    assert "error: no such thing" in text and "jaxwin_gemm for sm_90" in text


def test_nothing_is_launched_where_a_later_kernel_is_missing(fakes: Fakes) -> None:
    runtime = fakes.runtime()
    fakes.set("cuModuleGetFunction")
    assert _run(runtime, "im2win_full")[0] == "internal"
    assert fakes.calls("cuLaunchKernel") == 0


def test_no_driver() -> None:
    runtime = _ffi.CudaRuntime(["/nowhere/libcuda.so.1"], ["/nowhere/libnvrtc.so.13"])
    failure, text = _run(runtime)
    assert failure == "unavailable" and "CUDA driver" in text and "/nowhere" in text
    assert "CUDA driver" in runtime.device()["error"]


def test_a_driver_without_our_functions(fakes: Fakes) -> None:
    failure, text = _run(fakes.runtime(cuda=[fakes.paths["NVRTC"]]))
    assert failure == "unavailable" and "cuInit" in text


def test_no_nvrtc(fakes: Fakes) -> None:
    failure, text = _run(fakes.runtime(nvrtc=["/nowhere/libnvrtc.so.13"]))
    assert failure == "unavailable" and "pip install nvidia-cuda-nvrtc" in text


def test_the_first_nvrtc_that_opens_is_taken(fakes: Fakes) -> None:
    assert _run(fakes.runtime(nvrtc=["/nowhere/one", fakes.paths["NVRTC"]])) == ("", "")


def test_no_context(fakes: Fakes) -> None:
    failure, text = fakes.runtime().run(PROBLEM, "im2win", buffers=BUFFERS, stream=0)
    assert failure == "internal" and "context" in text


def test_an_old_gpu_is_refused(fakes: Fakes) -> None:
    fakes.set(capability=75)
    failure, text = _run(fakes.runtime())
    assert failure == "unavailable" and "7.5" in text and "8.0" in text


def test_a_gpu_newer_than_nvrtc_gets_ptx(fakes: Fakes) -> None:
    fakes.set(capability=120)
    assert _run(fakes.runtime()) == ("", "")
    assert "--gpu-architecture=compute_90" in fakes.cuda.fake_image().decode()
    assert fakes.calls("nvrtcGetPTX") == 1


def test_device(fakes: Fakes) -> None:
    assert fakes.runtime().device() == {"name": "Fake GPU", "processors": 7, "capability": "9.0"}
    assert "error" in fakes.runtime().device(3)


def test_what_makes_a_gpu_unusable(fakes: Fakes) -> None:
    assert fakes.runtime().unusable() == ""
    assert "nvidia-cuda-nvrtc" in fakes.runtime(nvrtc=["/nowhere/libnvrtc.so.13"]).unusable()
    fakes.set(capability=75)
    assert "7.5" in fakes.runtime().unusable()
    # no GPU, no driver: nothing is known of where the program will run
    assert fakes.runtime().unusable(3) == ""
    assert fakes.runtime(cuda=["/nowhere/libcuda.so.1"]).unusable() == ""


def test_many_threads_at_once(fakes: Fakes) -> None:
    runtime = fakes.runtime()
    results: list[tuple[str, str]] = []

    def work() -> None:
        results.extend(_run(runtime) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [("", "")] * 200
    assert runtime.counters()["loaded"] == 1


def test_a_kernel_is_compiled_once_for_all_who_wait(fakes: Fakes) -> None:
    """Without a cache on disk: as where several devices begin at the same moment."""
    runtime = fakes.runtime()
    fakes.compiler(milliseconds=300)
    results: list[tuple[str, str]] = []
    begin = threading.Barrier(4)

    def work() -> None:
        begin.wait()
        results.append(_run(runtime))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [("", "")] * 4
    assert fakes.calls("nvrtcCompileProgram") == runtime.counters()["compiled"] == 1


def test_a_failure_is_told_to_all_who_wait(fakes: Fakes) -> None:
    runtime = fakes.runtime()
    fakes.set("nvrtcCompileProgram", code=6)
    fakes.compiler(milliseconds=300)
    results: list[tuple[str, str]] = []
    begin = threading.Barrier(3)

    def work() -> None:
        begin.wait()
        results.append(_run(runtime))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [failure for failure, _ in results] == ["internal"] * 3
    fakes.set()
    assert _run(runtime) == ("", ""), "the failure stuck"


# --- the cache -------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_another_process_finds_the_image(fakes: Fakes, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    assert _run(fakes.runtime(cache)) == ("", "")
    first = fakes.cuda.fake_image()
    assert len(_files(cache)) == 1
    fakes.set()
    other = fakes.runtime(cache)
    assert _run(other) == ("", "")
    assert fakes.calls("nvrtcCompileProgram") == 0
    assert other.counters()["from_disk"] == 1
    assert fakes.cuda.fake_image() == first
    fakes.set(capability=80)  # another architecture is another image
    assert _run(fakes.runtime(cache)) == ("", "")
    assert fakes.calls("nvrtcCompileProgram") == 1
    assert len(_files(cache)) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "one bit", "text", "longer", "a folder"])
def test_a_damaged_file_is_compiled_again(fakes: Fakes, tmp_path: Path, damage: str) -> None:
    assert _run(fakes.runtime(tmp_path)) == ("", "")
    (path,) = _files(tmp_path)
    good = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        flipped = bytearray(good)
        flipped[-2] ^= 4
        path.write_bytes(
            {
                "empty": b"",
                "cut": good[: len(good) // 2],
                "one bit": bytes(flipped),
                "text": b"hello\n" * 100,
                "longer": good + b"x",
            }[damage]
        )
    fakes.set()
    assert _run(fakes.runtime(tmp_path)) == ("", "")
    assert fakes.calls("nvrtcCompileProgram") == 1
    if damage != "a folder":
        assert path.read_bytes() == good
    assert not [f for f in _files(tmp_path) if f.suffix != ".cubin"], "a temporary file was left"


def test_an_image_that_the_driver_refuses_is_compiled_again(fakes: Fakes, tmp_path: Path) -> None:
    fakes.compiler(b"stale")
    failure, text = _run(fakes.runtime(tmp_path))
    assert failure == "internal" and "cuModuleLoadData" in text
    assert fakes.calls("nvrtcCompileProgram") == 1, "what was just compiled is not compiled again"
    fakes.set()
    runtime = fakes.runtime(tmp_path)
    assert _run(runtime) == ("", "")
    assert fakes.calls("nvrtcCompileProgram") == runtime.counters()["compiled"] == 1
    fakes.set()
    assert _run(fakes.runtime(tmp_path)) == ("", "")
    assert fakes.calls("nvrtcCompileProgram") == 0, "the new image was not kept"


def test_a_folder_that_cannot_be_written_is_no_error(fakes: Fakes, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    for cache in (file, file / "below", Path("/proc/nothing")):
        assert _run(fakes.runtime(cache)) == ("", "")


def test_the_cache_is_bounded(fakes: Fakes, tmp_path: Path) -> None:
    assert _run(fakes.runtime(tmp_path)) == ("", "")
    size = _files(tmp_path)[0].stat().st_size
    runtime = fakes.runtime(tmp_path, cache_bytes=int(3.5 * size))
    for stages in (2, 3, 4):
        for unroll in (1, 2, 8):
            params = [64, 64, 8, 8, 4, stages, 0, unroll]
            assert _run(runtime, params=params) == ("", "")
            assert sum(f.stat().st_size for f in _files(tmp_path)) <= 3.6 * size
    (tmp_path / "mine.txt").write_text("stays")
    left = tmp_path / "0123456789abcdef.cubin.AbCdEf"  # by a process that died
    left.write_bytes(b"x" * 4 * size)
    os.utime(left, (1, 1))
    assert _run(runtime, params=[32, 32, 8, 4, 4, 2, 0, 1]) == ("", "")
    assert (tmp_path / "mine.txt").exists() and not left.exists()


def test_plans_on_the_device_without_xla(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What tests/gpu/measure.py checks bits with: a kernel that does nothing leaves NaN."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "gpu"))
    on_device: Any = importlib.import_module("on_device")
    monkeypatch.setattr(on_device, "LIBRARY", fakes.paths["CUDA"])
    monkeypatch.setattr(on_device, "_FILLER_BYTES", 1 << 10)
    monkeypatch.setattr(on_device._cuda, "nvrtc_libraries", lambda: [fakes.paths["NVRTC"]])
    monkeypatch.setenv("JAXWIN_KERNEL_CACHE", "off")
    x, w = problems.operands(_PROBLEM, np.random.default_rng(0))
    try:
        result = on_device.run(_PROBLEM, x, w, "im2win")
        assert result.shape == _PROBLEM.out_shape and np.isnan(result).all()
        assert fakes.calls("cuMemAlloc") == fakes.calls("cuMemFree") == 4
        fakes.set()
        measure: Any = importlib.import_module("measure")
        case = dataclasses.asdict(measure.Work("paper", 11, "float32", "highest"))
        request = {"work": case, "algorithm": "im2win_full", "params": []}
        took = measure.launch_times(request, lambda text: None)
        kernels = ["jaxwin_pack", "jaxwin_window", "jaxwin_gemm"]
        expected = [{"kernel": k, "median_us": 250.0, "min_us": 250.0} for k in kernels]
        assert took == expected
        assert fakes.calls("cuMemAlloc") == fakes.calls("cuMemFree") == 5
        assert fakes.calls("cuEventCreate") == fakes.calls("cuEventDestroy") == 2
        assert fakes.calls("cuLaunchKernel") == 6 * 3
        fakes.set("cuCtxSynchronize", 999)
        with pytest.raises(on_device.DriverError, match="CUDA_ERROR_UNKNOWN"):
            on_device.run(_PROBLEM, x, w, "im2win")
        fakes.set("cuLaunchKernel", 2)
        with pytest.raises(RuntimeError, match=r"out of memory: .*CUDA_ERROR_OUT_OF_MEMORY"):
            on_device.run(_PROBLEM, x, w, "im2win")
    finally:
        fakes.cuda.cuCtxSetCurrent(None)
