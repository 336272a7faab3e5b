# SPDX-License-Identifier: Apache-2.0
"""The tuner's side of the process in which candidates run (`jaxwin.tuner.worker`)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import jaxwin
from jaxwin import _registry
from jaxwin._plan import Plan
from jaxwin._problem import Problem
from jaxwin.tuner import gpu, measure

_START_SECONDS = 120.0
_ERROR_LINES = 3  # of a dead process's last words
# The default plan has no measurement to derive a limit from: it may be as slow as this.
_SLOWEST_FLOPS_PER_SECOND = 2e7
_GPU_SLOWEST = 2e9
_GPU_SECONDS = 60.0  # to compile a program, cuDNN's own search and NVRTC included


class LaboratoryError(Exception):
    """Nothing can be measured; the text is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of one candidate in one comparison.

    status: as in the tuning database. ns: one sample per round, nanoseconds per call; fewer than
    there were rounds where the candidate was much slower than the fastest. calls: how many calls
    were timed.
    """

    status: str
    error: str = ""
    ns: tuple[float, ...] = ()
    calls: int = 0

    @property
    def median_ns(self) -> float:
        """Median of the samples."""
        return statistics.median(self.ns)

    @property
    def mad_ns(self) -> float:
        """Their median absolute deviation."""
        return measure.mad(self.ns)

    def joined(self, other: Finding) -> Finding:
        """The samples of two comparisons of one candidate; of one that went wrong, that one."""
        if self.status != "ok" or other.status != "ok":
            return other if self.status == "ok" else self
        return Finding("ok", "", self.ns + other.ns, self.calls + other.calls)

    def ratios(self, other: Finding) -> list[float]:
        """Time relative to another candidate's, round by round."""
        return [mine / theirs for mine, theirs in zip(self.ns, other.ns, strict=False)]


class Laboratory:
    """Checks and times plans in a process of their own, which is started when it is needed.

    threads: how many the plans use; the process is confined to as many CPUs. seconds: how long a
    candidate may be silent (a warm-up, a sample, a compilation) before it counts as hanging, on
    top of what is usual for the problem. isa: where not the CPU's, "cuda" or "cuda-tensor"; it may
    be set anew between problems. A context manager.
    """

    def __init__(self, threads: int, seconds: float = 10.0, seed: int = 0, isa: str = "") -> None:
        self.threads, self.seconds, self._seed, self.isa = threads, seconds, seed, isa
        self._process: subprocess.Popen[bytes] | None = None
        self._problem: tuple[Problem, str] | None = None
        self._known = False  # whether the process has the problem
        self._words: IO[bytes] | None = None  # what the process prints
        self._buffer = b""
        self._usual_seconds = 0.0
        self._comparisons = 0

    def __enter__(self) -> Laboratory:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the process; the next comparison starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # a request that nobody will read
                        pipe.close()
        if self._words is not None:
            self._words.close()
            self._words = None
        self._known = False

    def compare(
        self,
        problem: Problem,
        plans: Sequence[Plan],
        *,
        rounds: int,
        min_seconds: float,
        slower_than: float,
        budget_seconds: float = math.inf,
    ) -> list[Finding]:
        """Checks plans against the first one's bits and times those that are right, interleaved.

        A plan that kills or blocks the process is left out, and the others are compared again. One
        that has had `budget_seconds` gets no further samples, but at least one.

        Raises:
            LaboratoryError: the process does not start, or the first plan does not run in it.
        """
        if (problem, self.isa) != self._problem:
            self._problem, self._known, self._usual_seconds = (problem, self.isa), False, 0.0
        self._comparisons += 1
        findings: dict[int, Finding] = {}
        while True:
            numbers = [number for number in range(len(plans)) if number not in findings]
            request = {
                "plans": [plans[number]._asdict() for number in numbers],
                "threads": 0 if self._on_gpu else self.threads,
                "rounds": rounds,
                "min_seconds": min_seconds,
                "slower_than": slower_than,
                "budget_seconds": budget_seconds,
                "seed": self._seed + self._comparisons,
            }
            answers, culprit, finding = self._ask(request, problem)
            if answers is not None:
                break
            if numbers[culprit] == 0:
                raise LaboratoryError(f"the default plan {finding.status}: {finding.error}")
            findings[numbers[culprit]] = finding
        for number, answer in zip(numbers, answers, strict=True):
            ns = tuple(answer["ns"])
            calls = len(ns) * answer["inner"]
            findings[number] = Finding(answer["status"], answer["error"], ns, calls)
        first = findings[0]
        if first.status != "ok":
            raise LaboratoryError(f"the default plan: {first.status}: {first.error}")
        self._usual_seconds = first.median_ns / 1e9
        return [findings[number] for number in range(len(plans))]

    def _ask(
        self, request: dict[str, Any], problem: Problem
    ) -> tuple[list[dict[str, Any]] | None, int, Finding]:
        """The answers; or none, which plan was running when it went wrong, and what it did."""
        running = 0
        try:
            if self._process is None:
                self._start()
            if not self._known:
                self._send({"problem": problem.key, "seed": self._seed, "isa": self.isa})
                self._known = True
            self._send(request)
            while True:
                message = self._receive(self._limit(running))
                if "answers" in message:
                    return message["answers"], 0, Finding("ok")
                running = int(message["running"])
        except TimeoutError:
            error = f"no sign of life for {self._limit(running):.0f} s"
            self.stop()
            return None, running, Finding("timeout", error)
        except (EOFError, BrokenPipeError):
            finding = self._last_words()
            self.stop()
            return None, running, finding

    def _limit(self, running: int) -> float:
        assert self._problem is not None
        flops = self._problem[0].flops
        if self._on_gpu:
            return self.seconds + _GPU_SECONDS + flops / _GPU_SLOWEST
        if running == 0 and not self._usual_seconds:
            return self.seconds + flops / _SLOWEST_FLOPS_PER_SECOND
        return self.seconds + 20 * self._usual_seconds

    @property
    def _on_gpu(self) -> bool:
        return _registry.side(self.isa) != ""

    def _last_words(self) -> Finding:
        assert self._process is not None and self._words is not None
        code = self._process.wait()
        self._words.seek(0)
        lines = self._words.read().decode("utf-8", "replace").strip().splitlines()
        told = " / ".join(lines[-_ERROR_LINES:])
        if code == -signal.SIGKILL:  # not ours: of the system, for want of memory
            return Finding("error", "killed from outside: out of memory?")
        if code < 0:
            return Finding("crashed", f"{signal.Signals(-code).name}: {told}"[:500])
        return Finding("error", f"the process ended with {code}: {told}"[:500])

    def _start(self) -> None:
        # The same jaxwin, wherever it was imported from. XLA's pool counts the CPUs by itself.
        folder = str(Path(jaxwin.__file__).parent.parent)
        paths = [folder, os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "JAX_PLATFORMS": "cuda" if self._on_gpu and not gpu.rehearsing() else "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            # The tuner's own process may hold a part of the GPU's memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        environment.pop("NPROC", None)
        self._words = tempfile.TemporaryFile()
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxwin.tuner.worker", self.isa or str(self.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the tuner
        )
        try:
            self._receive(_START_SECONDS)
        except (EOFError, TimeoutError) as wrong:
            ended = isinstance(wrong, EOFError)
            error = self._last_words().error if ended else "it does not answer"
            self.stop()
            raise LaboratoryError(f"the measuring process does not start: {error}") from None

    def _send(self, message: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self, seconds: float) -> Any:
        """The next message.

        Raises:
            TimeoutError: none came in time.
            EOFError: the process has ended.
        """
        assert self._process is not None and self._process.stdout is not None
        stream = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            data = os.read(stream, 65536)
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)
