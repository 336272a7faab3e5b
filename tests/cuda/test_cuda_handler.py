# SPDX-License-Identifier: Apache-2.0
"""The CUDA handler itself: call frames as XLA makes them, with a driver made for it.

The calls are made in a process of their own, in which the fake driver is the one that is found.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import problems
import pytest

from jaxwin import _cuda, _ffi, _lowering
from jaxwin._problem import Problem

HERE = Path(__file__).parent
# Numbers of the FFI's C interface.
DTYPES = {"uint8": 6, "float16": 10, "float32": 11, "int32": 4, "bfloat16": 16}
INVALID, EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 3, 8, 12, 13, 14
STREAM = 64
ADDRESSES = {"x": 1 << 20, "w": 2 << 20, "bias": 3 << 20, "residual": 4 << 20, "y": 5 << 20}
WORKSPACE = 6 << 20

_PROBLEM = problems.make(2, 8, 16, (9, 10), (3, 3))
assert _PROBLEM is not None
PROBLEM = _PROBLEM


# --- in the other process --------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
    )


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("kind", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


class _Caller:
    """The three libraries."""

    def __init__(self, folder: str) -> None:
        self.cuda = ctypes.CDLL(f"{folder}/libcuda.so.1")
        self.xla = ctypes.CDLL(f"{folder}/libfake_xla.so")
        self.cuda.fake_pointer.restype = ctypes.c_void_p
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        self.handler = ctypes.c_void_p(get(_ffi.cuda_handler(), None))
        _ffi.cuda_configure([f"{folder}/libfake_nvrtc.so"], "")

    def call(
        self, operands: list[Any], results: list[Any], attributes: dict[str, Any], stream: int
    ) -> dict[str, Any]:
        """The status, and what the driver was told last; tensors are dtype, address, shape."""
        kept: list[Any] = []

        def tensors(given: list[Any]) -> Any:
            made = []
            for dtype, address, shape in given:
                sizes = (ctypes.c_int64 * len(shape))(*shape)
                kept.append(sizes)
                made.append(_Tensor(DTYPES[dtype], address, len(shape), sizes))
            return (_Tensor * len(made))(*made)

        listed = []
        for name, value in sorted(attributes.items()):
            if isinstance(value, str):
                data: Any = ctypes.create_string_buffer(value.encode())
                kind, count = 2, len(value)
            else:
                array = np.asarray(value, np.int64)
                data = (ctypes.c_int64 * array.size)(*array.ravel())
                kind, count = min(array.ndim, 1), array.size
            kept.append(data)
            listed.append(_Attribute(name.encode(), kind, ctypes.addressof(data), count))
        text = ctypes.create_string_buffer(1000)
        before = self.cuda.fake_launches()
        code = self.xla.fake_call(
            self.handler,
            ctypes.c_void_p(stream),
            len(operands),
            tensors(operands),
            len(results),
            tensors(results),
            len(listed),
            (_Attribute * len(listed))(*listed),
            text,
            ctypes.c_int64(len(text)),
        )
        return {
            "code": code,
            "text": text.value.decode(),
            "launches": self.cuda.fake_launches() - before,
            "blocks": self.cuda.fake_last(0),
            "pointers": [self.cuda.fake_pointer(i) for i in range(6)],
        }


def _serve(folder: str) -> None:
    caller = _Caller(folder)
    print(json.dumps({"traits": caller.xla.fake_traits(caller.handler)}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        failing = request.pop("fail", "")
        for library in (caller.cuda, ctypes.CDLL(f"{folder}/libfake_nvrtc.so")):
            library.fake_reset(failing.encode(), 2, 90)
        print(json.dumps(caller.call(**request)), flush=True)


# --- in this one -----------------------------------------------------------------------------


class Handler:
    """The other process."""

    def __init__(self, folder: Path) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("no C++ compiler")
        flags = ["-std=c++17", "-O0", "-shared", "-fPIC", "-w", f"-I{jax.ffi.include_dir()}"]
        for source, library, more in (
            ("fake_cuda.cc", "libcuda.so.1", ["-DFAKE_CUDA"]),
            ("fake_cuda.cc", "libfake_nvrtc.so", ["-DFAKE_NVRTC"]),
            ("fake_xla.cc", "libfake_xla.so", []),
        ):
            command = [compiler, *flags, *more, "-o", str(folder / library), str(HERE / source)]
            subprocess.run(command, check=True)
        paths = [str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "LD_LIBRARY_PATH": str(folder),
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "JAX_PLATFORMS": "cpu",
            },
        )
        self.traits = self._answer()["traits"]
        self.first = self.ask(_request() | {"fail": "cuInit"})  # it is called once

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"exit status {self._process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What became of a call."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Handler(tmp_path_factory.mktemp("handler"))
    yield made
    made.stop()


def _request(
    problem: Problem = PROBLEM, algorithm: str = "im2win", dtype: str = "float32", **said: Any
) -> dict[str, Any]:
    """A call as `_lowering` makes it."""
    answer = _ffi.cuda_make_plan(problem.native(), algorithm, dtype)
    plan = _cuda.plan_from(answer["plan"])
    attributes = _lowering.attributes(problem, plan) | said
    features = problem.out_shape[problem.out_spec[1]]
    operands = [
        [dtype, ADDRESSES["x"], problem.lhs_shape],
        [dtype, ADDRESSES["w"], problem.rhs_shape],
    ]
    if attributes["has_bias"]:
        operands.append([dtype, ADDRESSES["bias"], [features]])
    if attributes["has_residual"]:
        operands.append([dtype, ADDRESSES["residual"], problem.out_shape])
    results = [[dtype, ADDRESSES["y"], problem.out_shape]]
    if plan.workspace_bytes:
        results.append(["uint8", WORKSPACE, [plan.workspace_bytes]])
    plain = {n: v if isinstance(v, str) else np.asarray(v).tolist() for n, v in attributes.items()}
    return {"operands": operands, "results": results, "attributes": plain, "stream": STREAM}


def test_may_be_recorded_into_a_command_buffer(handler: Handler) -> None:
    assert handler.traits == 1


@pytest.mark.parametrize(("bias", "residual"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_kernels_get_the_buffers_of_the_call(handler: Handler, bias: int, residual: int) -> None:
    told = handler.ask(_request(has_bias=bias, has_residual=residual, activation=1))
    assert (told["code"], told["text"], told["launches"]) == (0, "", 1)
    expected = [
        ADDRESSES["x"],
        ADDRESSES["w"],
        ADDRESSES["bias"] if bias else None,
        ADDRESSES["residual"] if residual else None,
        ADDRESSES["y"],
        STREAM,
    ]
    assert told["pointers"] == expected
    (launch,) = _ffi.cuda_launches(PROBLEM.native(), "im2win", "float32", False, [], ADDRESSES)
    assert told["blocks"] == launch["blocks"]


def test_sixteen_bits_with_either_result(handler: Handler) -> None:
    request = _request(algorithm="tensor", dtype="bfloat16")
    assert handler.ask(request)["code"] == 0
    request["results"][0][0] = "float32"
    assert handler.ask(request)["code"] == 0


def test_the_workspace_is_xla_s(handler: Handler) -> None:
    request = _request(algorithm="im2win_full")
    told = handler.ask(request)
    size = request["results"][1][2][0]
    assert (told["code"], told["launches"]) == (0, 3)
    for pointer in told["pointers"][:2]:  # the last kernel reads windows and packed filters
        assert WORKSPACE <= pointer < WORKSPACE + size


def _changed(what: str) -> dict[str, Any]:
    """A call that is wrong somewhere."""
    request = _request(has_bias=1, has_residual=1)
    operands, results, said = (request[n] for n in ("operands", "results", "attributes"))
    if what == "an operand is missing":
        operands.pop()
    elif what == "three results":
        results += [["uint8", WORKSPACE, [8]], ["uint8", WORKSPACE, [8]]]
    elif what == "integers":
        operands[0][0] = "int32"
    elif what == "mixed operands":
        operands[1][0] = "bfloat16"
    elif what == "a narrow result":
        results[0][0] = "float16"
    elif what == "the bias":
        operands[2][2] = [15]
    elif what == "the residual":
        operands[3][2] = [2, 7, 8, 15]
    elif what == "the result's shape":
        results[0][2] = [2, 8, 8, 16]
    elif what == "the filter's rank":
        operands[1][2] = [3, 3, 128]
    elif what == "the algorithm":
        said["algorithm"] = "planar"
    elif what == "the parameters":
        said["params"][0] = 77
    elif what == "too many parameters":
        said["params"] = [1] * 40
    elif what == "an attribute is missing":
        del said["padding"]
    elif what == "an attribute's type":
        said["threads"] = [1, 2]
    elif what == "the padding":
        said["padding"] = [0, 0, 0]
    elif what == "the activation":
        said["activation"] = 99
    elif what == "packed filters":
        said |= {"rhs_panel": 16, "rhs_shape": [3, 3, 8, 16]}
    return request


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("an operand is missing", "expected 4 operands"),
        ("three results", "one or two results"),
        ("integers", "must all be float32"),
        ("mixed operands", "must all be float32"),
        ("a narrow result", "operands' type or be float32"),
        ("the bias", "one value per output feature"),
        ("the residual", "shape of the result"),
        ("the result's shape", ""),
        ("the filter's rank", ""),
        ("the algorithm", "unknown 'planar'"),
        ("the parameters", "powers of two"),
        ("too many parameters", "takes 8 values, got 40"),
        ("an attribute is missing", "padding"),
        ("an attribute's type", "threads"),
        ("the padding", "pairs of low and high"),
        ("the activation", "activation: unknown"),
        ("packed filters", "packed filters are for the CPU"),
    ],
)
def test_nonsense_is_an_invalid_argument(handler: Handler, what: str, words: str) -> None:
    told = handler.ask(_changed(what))
    assert told["code"] == INVALID, told
    assert told["text"].startswith("jaxwin: ") and words in told["text"]
    assert "\n" not in told["text"] and told["launches"] == 0


def test_workspaces_that_will_not_do(handler: Handler) -> None:
    request = _request(algorithm="im2win_full")
    good = request["results"][1]
    for bad, words in (
        (["uint8", WORKSPACE, [good[2][0] - 1]], "are needed"),
        (["uint8", WORKSPACE + 8, good[2]], "boundary of 16 bytes"),
        (None, "a workspace is needed"),
    ):
        request["results"][1:] = [] if bad is None else [bad]
        told = handler.ask(request)
        assert (told["code"], told["launches"]) == (INVALID, 0)
        assert words in told["text"]


@pytest.mark.parametrize(
    ("function", "code"),
    [
        ("cuStreamGetCtx", EXHAUSTED),  # the fake's error is "out of memory"
        ("cuLaunchKernel", EXHAUSTED),
        ("nvrtcCompileProgram", INTERNAL),
    ],
)
def test_what_the_driver_says_becomes_a_status(handler: Handler, function: str, code: int) -> None:
    request = _request()
    request["attributes"]["params"][7] = len(function)  # unroll: a kernel not compiled yet
    told = handler.ask(request | {"fail": function})
    assert told["code"] == code and told["text"].startswith("jaxwin: "), told
    assert told["launches"] == 0
    assert handler.ask(request)["code"] == 0, "the failure stuck"


def test_a_driver_that_does_not_start_is_unavailable(handler: Handler) -> None:
    assert handler.first["code"] == UNAVAILABLE and "cuInit" in handler.first["text"]


def test_without_a_stream_xla_s_error_is_passed_on(handler: Handler) -> None:
    told = handler.ask(_request() | {"stream": 0})
    assert told["code"] in (UNIMPLEMENTED, INVALID) and told["launches"] == 0


if __name__ == "__main__":
    _serve(sys.argv[1])
