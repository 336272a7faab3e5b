# SPDX-License-Identifier: Apache-2.0
"""The process in which candidates run: it may crash or hang without harm to the tuner.

Requests come as JSON lines on standard input, answers go as JSON lines to what was standard output;
whatever else is printed goes to standard error. `jaxwin.tuner.laboratory` is the other side.

A candidate is first run by the native core alone, into a result and a workspace full of NaN with
guards around them: what it leaves unwritten, reads unwritten or writes elsewhere shows. Then it is
timed as part of a compiled program: the same call, thread pool and workspace as in a user's
program. Timing it by the native core alone would start threads anew for each call, and hide what a
large workspace costs. The result goes into a donated buffer: a fresh one costs every candidate the
same. Candidates of a GPU are a matter of `jaxwin.tuner.gpu`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxwin import _ffi, _fused, _lowering, _registry
from jaxwin._plan import Plan
from jaxwin._problem import Problem
from jaxwin.tuner import gpu, machine, measure

# For tests: candidates that shall go wrong, as "KIND ALGORITHM PARAMETERS" with ";" between them,
# such as "crash direct 4,3,0,0,0,1,0". "late-crash" crashes when timed, the others when checked.
FAULTS = "JAXWIN_TUNER_FAULTS"

_GUARD = 256  # bytes on both sides of a result or workspace
_FILLING = 0xA5
_XLA_ERROR = 1000  # roundings of the largest value that other orders of summation may make
_EXACT = 0.0


class _Guarded:
    """So many bytes, aligned as XLA aligns, between two guards."""

    def __init__(self, size: int) -> None:
        raw = np.empty(size + 2 * _GUARD + 64, np.uint8)
        shift = -raw.ctypes.data % 64
        self._whole = raw[shift : shift + size + 2 * _GUARD]
        self.inside = self._whole[_GUARD : _GUARD + size]

    def poison(self) -> None:
        self._whole.fill(_FILLING)
        self.inside.fill(0xFF)  # NaN, in every floating-point type

    def intact(self) -> bool:
        guards = (self._whole[:_GUARD], self._whole[-_GUARD:])
        return all(bool((guard == _FILLING).all()) for guard in guards)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """The array as unsigned integers: the native core is not told of numpy's dtypes."""
    return array.view(np.dtype(f"uint{8 * array.itemsize}"))


class _Problem:
    """A problem with data: what is the same for all candidates."""

    def __init__(self, key: str, seed: int) -> None:
        self.problem = problem = Problem.from_key(key)
        rng = np.random.default_rng(seed)

        # Of the operands and results that kernels see.
        native = problem.native()
        self.dtype, self.out_dtype = np.dtype(native["lhs_dtype"]), np.dtype(native["out_dtype"])
        if self.dtype == np.float64:
            jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]

        def draw(*shape: int) -> NDArray[Any]:
            if self.dtype.kind in "iu":
                limits = np.iinfo(self.dtype)
                return rng.integers(limits.min, limits.max, shape, self.dtype, endpoint=True)
            return rng.standard_normal(shape, np.float32).astype(self.dtype)

        self.x, self.w = draw(*problem.lhs_shape), draw(*problem.rhs_shape)
        features = problem.out_shape[problem.out_spec[1]]
        self.bias = draw(features) if problem.bias else None
        self.residual = draw(*problem.out_shape) if problem.residual else None
        self.reference: NDArray[Any] | None = None
        given = (self.x, self.w, self.bias, self.residual)
        self.operands = [jax.device_put(array) for array in given if array is not None]
        self.held: Any = None  # the buffer that all compiled programs pass on

    def check(self, plan: Plan) -> tuple[str, str]:
        """Runs a plan by the native core; its status, and why. The first gives the reference.

        XLA's has no native part: its first result is checked when it is compiled.
        """
        problem = self.problem
        if plan.algorithm == _registry.XLA:
            return "ok", ""
        y = _Guarded(math.prod(problem.out_shape) * self.out_dtype.itemsize)
        workspace = _Guarded(plan.workspace_bytes)
        y.poison()
        workspace.poison()
        result = y.inside.view(self.out_dtype).reshape(problem.out_shape)
        activations = _registry.registry()["activations"]
        refused = _ffi.run(
            problem.native(),
            plan.algorithm,
            plan.isa,
            plan.threads,
            plan.params,
            _bits(self.x),
            _bits(self.w),
            _bits(result),
            workspace.inside,
            None if self.bias is None else _bits(self.bias),
            None if self.residual is None else _bits(self.residual),
            activations.index(problem.activation or "none"),
        )
        if refused:
            return "refused", refused
        _inject("wrong", plan, result)
        if not y.intact() or not workspace.intact():
            return "wrong", "writes outside of its result or workspace"
        if self.reference is None:
            if self.out_dtype.kind not in "iu" and not np.isfinite(result).all():
                return "wrong", "leaves a part of its result unwritten"
            self.reference = result
            return "ok", ""
        return self._compare(result, self._error(plan))

    def _error(self, plan: Plan) -> float:
        """How far results may be from the reference, as a share of its largest value."""
        if plan.algorithm == _registry.XLA:
            return self._error_of_xla()
        if _registry.family(plan.algorithm) == _registry.CANONICAL or self.out_dtype.kind in "iu":
            return _EXACT
        made = _ffi.make_plan(
            self.problem.native(),
            algorithm=plan.algorithm,
            isa=plan.isa,
            threads=plan.threads,
            params=plan.params,
        )
        rounding = float(jax.numpy.finfo(self.out_dtype).eps)  # type: ignore[no-untyped-call]
        return float(made["plan"]["error_bound"]) + rounding

    def _error_of_xla(self) -> float:
        """It sums in float32 or float64, and rounds the result; integers are exact."""
        if self.out_dtype.kind in "iu":
            return _EXACT
        word = np.float64 if self.out_dtype == np.float64 else np.float32
        own = float(jax.numpy.finfo(self.out_dtype).eps)  # type: ignore[no-untyped-call]
        return max(_XLA_ERROR * float(np.finfo(word).eps), 2 * own)

    def _compare(self, result: NDArray[Any], error_bound: float) -> tuple[str, str]:
        assert self.reference is not None
        if error_bound != _EXACT:
            # Standard normal operands: their sums are smaller than what an algorithm's bound is a
            # multiple of, as n to sqrt(n), and so are the errors.
            difference = result.astype(np.float64) - self.reference.astype(np.float64)
            error = float(np.abs(difference).max(initial=0.0))
            limit = error_bound * max(1.0, float(np.abs(self.reference).max(initial=0.0)))
            near = error <= limit and result.shape == self.reference.shape
            return (
                ("ok", "") if near else ("wrong", f"differs by {error:g} from the default plan's")
            )
        if np.array_equal(result, self.reference):
            return "ok", ""
        differing = int((result != self.reference).sum())
        return "wrong", f"{differing} of {result.size} values differ from the default plan's"

    def compile(self, plan: Plan) -> tuple[Callable[[], Any], str, str]:
        """A call of the compiled program, and the status of its first result."""
        problem = self.problem
        struct: Any = jax.ShapeDtypeStruct
        out = struct(problem.out_shape, self.out_dtype)
        results = [out]
        if plan.workspace_bytes > 0:
            results.append(struct((plan.workspace_bytes,), np.uint8))
        native = plan.algorithm != _registry.XLA
        if native:
            call = jax.ffi.ffi_call(_lowering.TARGET, results)
            attributes = _lowering.attributes(problem, plan)

        def program(operands: list[jax.Array], previous: jax.Array) -> jax.Array:
            result: jax.Array
            if native:
                result = call(*operands, **attributes)[0]
            else:
                result = _fused.of_problem(problem, *operands, algorithm=_registry.XLA)
            return result

        jitted = jax.jit(program, donate_argnums=1, keep_unused=True)
        compiled = jitted.lower(self.operands, out).compile()

        def run() -> Any:
            held, self.held = self.held, None
            if held is None:
                held = jax.numpy.zeros(out.shape, out.dtype)
            self.held = compiled(self.operands, held).block_until_ready()
            return self.held

        status, error = self._compare(np.asarray(run()), self._error(plan))
        return run, status, error


def _measure(
    subject: _Problem | gpu.Subject, request: dict[str, Any], tell: Callable[[Any], None]
) -> Any:
    """Checks and times candidates; one answer per candidate, in order."""
    answers: list[dict[str, Any]] = []
    timed: dict[str, measure.Timed] = {}

    @contextlib.contextmanager
    def announced(number: int) -> Iterator[None]:
        tell({"running": number})
        try:
            yield
        except Exception as wrong:  # seen here, since the stopwatch goes on with the others
            _leave_if_sick(subject, measure.first_line(wrong))
            raise

    for number, fields in enumerate(request["plans"]):
        plan = Plan(**fields | {"params": tuple(fields["params"])})
        with announced(number):
            status, error = "error", ""
            try:
                _inject("crash", plan)
                _inject("hang", plan)
                status, error = subject.check(plan)
                if status == "ok":
                    run, status, error = subject.compile(plan)
            except Exception as wrong:  # MemoryError, XLA's errors: this candidate's, not ours
                status, error = "error", measure.first_line(wrong)
                _leave_if_sick(subject, error)
            answers.append({"status": status, "error": error, "ns": [], "inner": 0})
            if status == "ok":
                if _afflicted("late-crash", plan):
                    run = _crash
                around = _bind(announced, number)
                calls = subject.calls if isinstance(subject, gpu.Subject) else 1
                timed[str(number)] = measure.Timed(run, around, calls)
    samples = measure.interleave(
        timed,
        threads=request["threads"],
        rounds=request["rounds"],
        min_seconds=request["min_seconds"],
        budget_seconds=request["budget_seconds"],
        slower_than=request["slower_than"],
        keep=("0",),  # what the others are compared with
        rng=random.Random(request["seed"]),
    )
    for name, taken in samples.items():
        answer = answers[int(name)]
        answer |= {"ns": taken.ns, "inner": taken.inner}
        if taken.error:
            answer |= {"status": "error", "error": taken.error}
    return {"answers": answers}


def _leave_if_sick(subject: _Problem | gpu.Subject, error: str) -> None:
    """Ends this process where a fault has cost it its GPU: so the one that ran is to blame."""
    if isinstance(subject, gpu.Subject) and gpu.is_sick():
        print(error, file=sys.stderr, flush=True)
        os.abort()


def _bind(
    announced: Callable[[int], contextlib.AbstractContextManager[None]], number: int
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    return lambda: announced(number)


# --- faults ----------------------------------------------------------------------------------


def _afflicted(kind: str, plan: Plan) -> bool:
    params = ",".join(map(str, plan.params))
    return f"{kind} {plan.algorithm} {params}".strip() in os.environ.get(FAULTS, "").split(";")


def _spoiled(plan: Plan) -> bool:
    return _afflicted("wrong", plan)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _inject(kind: str, plan: Plan, result: NDArray[np.float32] | None = None) -> None:
    if not _afflicted(kind, plan):
        return
    if kind == "crash":
        _crash()
    elif kind == "hang":
        time.sleep(1e6)
    elif result is not None:
        result.reshape(-1).view(np.uint32)[-1] ^= 1


# --- the process -----------------------------------------------------------------------------


def _requests(stream: IO[str]) -> Iterator[Any]:
    """The requests; ends the process with its parent, also where a candidate hangs."""
    arrived = threading.Semaphore(0)
    lines: list[str] = []

    def read() -> None:
        for line in stream:
            lines.append(line)
            arrived.release()
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        arrived.acquire()
        yield json.loads(lines.pop(0))


def main() -> None:
    """Serves requests until standard input ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    on_gpu = _registry.side(sys.argv[1]) != ""
    if not on_gpu:
        machine.pin(int(sys.argv[1]))
    jax.devices()
    tell({"ready": True})
    subject: _Problem | gpu.Subject | None = None
    for request in _requests(sys.stdin):
        if "problem" in request:
            del subject  # its memory first
            facts = request["problem"], request["seed"]
            subject = gpu.Subject(*facts, request["isa"], _spoiled) if on_gpu else _Problem(*facts)
        else:
            assert subject is not None
            tell(_measure(subject, request, tell))


if __name__ == "__main__":
    main()
