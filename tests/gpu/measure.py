# SPDX-License-Identifier: Apache-2.0
"""Builds, checks, times and tunes the CUDA kernels beside cuDNN, in one run on a GPU's machine.

    python tests/gpu/measure.py --build --seconds 560 --out results/gpu.json

It is written for a machine that is there for ten minutes, once. All that touches the GPU runs in
processes of its own: a kernel that crashes or hangs costs its own measurement, which says so, and
the next process goes on without it. --out is written anew after every result. The phases, in this
order, each with its share of the time that is left:

    build       the extension, in place (only with --build)
    warm        NVRTC compiles the kernels side by side, while the next two check
    bits        every algorithm by the driver alone: drawn problems, against the scalar chain
    sanitizer   a few of these under compute-sanitizer's tools, where it is installed
    layers      every layer beside cuDNN at equal precision: the default plans
    launches    the papers' layers: each kernel of plans with several, transforms apart
    more        the same with more candidates, as far as the time goes
    tests       tests/gpu through XLA
    tune        `jaxwin-tune run` on the paper's layers, into a database beside --out

Times are of whole calls through XLA, packing and transforms included: `jaxwin.tuner.gpu` says how.
--dry runs all of it on the CPU at small sizes (kernels in the tests' shim, layers with the CPU's
kernels), to test this script itself.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import os
import queue
import random
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PATHS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "cuda"), str(HERE)]
STARTED = time.monotonic()
KINDS = {"lanes_grad": "weight_grad"}
FAULT = "JAXWIN_MEASURE_FAULT"  # for tests: "KEY ALGORITHM" of what kills its process
# Of each kernel that shares memory between threads.
WITH_BARRIERS = ("im2win", "tensor", "few_channels")
DRAWN = ("depthwise", "grouped", "segregated", "weight_grad")


def say(text: str) -> None:
    """One line of progress, with the seconds since the start."""
    print(f"{time.monotonic() - STARTED:6.1f} {text}", flush=True)


class Report:
    """The JSON file, written anew after every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema_version": 2, "complete": False, "rows": []}

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1))
        temporary.replace(self.path)


def environment(dry: bool) -> dict[str, str]:
    """That of every process that is started."""
    paths = [*PATHS, os.environ.get("PYTHONPATH", "")]
    result = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONUNBUFFERED": "1",
        "JAXWIN_MODE": "off",  # no measurement of before decides
    }
    if dry:
        result |= {"JAX_PLATFORMS": "cpu", "JAXWIN_TUNER_REHEARSAL": "1"}
    return result


_started: list[subprocess.Popen[Any]] = []  # what may still run when this script ends


def start(words: list[str], **options: Any) -> subprocess.Popen[Any]:
    """Starts a program in a session of its own, so that `end` finds all that it starts."""
    process: subprocess.Popen[Any] = subprocess.Popen(
        words, cwd=ROOT, start_new_session=True, **options
    )
    _started.append(process)
    return process


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a process that `start` gave, and all that it started."""
    if process not in _started:
        return  # its number may be somebody else's by now
    _started.remove(process)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def command(words: list[str], seconds: float, **options: Any) -> dict[str, Any]:
    """Runs a program; what became of it, with the end of what it printed.

    Nothing that it started goes on after its time: it would disturb what is timed next.
    """
    begin = time.monotonic()
    code: int | str
    text = options.pop("input", None)
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        try:
            process = start(
                words,
                text=True,
                stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
                stdout=printed,
                stderr=subprocess.STDOUT,
                **options,
            )
            try:
                process.communicate(text, timeout=max(1.0, seconds))
                code = process.returncode
            except subprocess.TimeoutExpired:
                code = "timeout"
            finally:
                end(process)
        except OSError as error:
            code = "error"
            printed.write(str(error))
        printed.seek(0)
        output = printed.read()
    taken = round(time.monotonic() - begin, 1)
    return {"code": code, "seconds": taken, "output": output[-4000:]}


# --- processes that may die ------------------------------------------------------------------


class Child:
    """This script as another process, which answers requests one by one."""

    def __init__(self, role: str, dry: bool) -> None:
        self._role, self._dry = role, dry
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: Any = None

    def _start(self) -> None:
        words = [sys.executable, str(Path(__file__).resolve()), "--child", self._role]
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        self._process = start(
            words + (["--dry"] if self._dry else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
            env=environment(self._dry),
        )
        lines = self._lines = queue.Queue()
        stream: Any = self._process.stdout

        def read() -> None:
            for line in stream:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()

    def stop(self) -> str:
        """Ends the process; its last words."""
        if self._process is None:
            return ""
        end(self._process)
        code = self._process.returncode
        self._process = None
        self._errors.seek(0)
        words = self._errors.read().strip()[-600:]
        self._errors.close()
        return f"exit status {code}: {words}"

    def ask(self, request: dict[str, Any], silence: float, deadline: float) -> dict[str, Any]:
        """{"done": ...}, or what went wrong: {"lost": why, "at": what it was doing}."""
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        at = "the start"
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            while True:
                wait = min(silence, deadline - time.monotonic())
                line = self._lines.get(timeout=max(wait, 0.1))
                if line is None:
                    return {"lost": self.stop(), "at": at}
                if not line.startswith("{"):
                    continue  # whatever a library prints
                message = json.loads(line)
                if "done" in message:
                    return message
                at = message["at"]
        except queue.Empty:
            out_of_time = time.monotonic() >= deadline - 0.2
            why = "the time is over" if out_of_time else f"silent for {silence:.0f} s"
            return {"lost": f"{why}; {self.stop()}", "at": at, "over": out_of_time}
        except OSError as error:
            return {"lost": f"{error}; {self.stop()}", "at": at}


def serve(answer: Callable[[dict[str, Any], Callable[[str], None]], Any]) -> None:
    """The other side of `Child`."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    for line in sys.stdin:
        send({"done": answer(json.loads(line), lambda text: send({"at": text}))})


# --- build -----------------------------------------------------------------------------------


def build(seconds: float) -> dict[str, Any]:
    """The extension for this Python, in place."""
    folder = Path(tempfile.gettempdir(), "jaxwin_build")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    steps = []
    for words in (
        [
            *("cmake", "-S", str(ROOT / "ffi"), "-B", str(folder), *generator),
            f"-DPython_EXECUTABLE={sys.executable}",
        ],
        ["cmake", "--build", str(folder), "--target", "_ffi", "-j", str(os.cpu_count() or 4)],
    ):
        steps.append(command(words, seconds - sum(step["seconds"] for step in steps)))
        if steps[-1]["code"] != 0:
            return steps[-1]
    built = list(folder.glob("_ffi*.so"))
    if not built:
        return {"code": "error", "output": "the build made no extension"}
    endings = (sysconfig.get_config_var("EXT_SUFFIX"), ".abi3.so")
    for old in (ROOT / "jaxwin").glob("_ffi*.so"):
        if old.name.endswith(endings):
            old.unlink()
    shutil.copy2(built[0], ROOT / "jaxwin" / built[0].name)
    return {"code": 0, "seconds": sum(step["seconds"] for step in steps)}


def describe_machine(dry: bool) -> dict[str, Any]:
    """The GPU and the versions; nothing that tells which machine it is."""
    script = (
        "import json, sys, jax, jaxlib\n"
        "from jaxwin import _cuda, _ffi\n"
        "b = jax.extend.backend.get_backend()\n"
        "print(json.dumps({'gpu': _ffi.cuda_device(0), 'python': sys.version.split()[0],\n"
        "  'jax': jax.__version__, 'jaxlib': jaxlib.__version__, 'platform': b.platform,\n"
        "  'backend': b.platform_version.strip()[:200]}))\n"
    )
    words = [sys.executable, "-c", "import jax.extend\n" + script]
    told = command(words, 90, env=environment(dry))
    lines = [line for line in told["output"].splitlines() if line.startswith("{")]
    facts = json.loads(lines[-1]) if told["code"] == 0 and lines else {"error": told}
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,memory.total"
    query = command(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], 20)
    return facts | {
        "nvidia_smi": query["output"].strip().splitlines(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# --- bits ------------------------------------------------------------------------------------


def bits_child(dry: bool) -> None:
    """Answers {"algorithm", "seeds"} with how many problems had the bits of the chain."""
    import numpy as np
    import problems
    import reference

    from jaxwin import _cuda, _ffi, _registry

    if dry:
        from cuda_shim import run
    else:
        from on_device import run
    rows = {row["name"]: row for row in _registry.rows("cuda")}

    def params_of(problem: Any, algorithm: str, rng: Any) -> tuple[int, ...]:
        """Parameters at random, valid ones."""
        for _ in range(200):
            drawn = tuple(int(rng.choice(s["values"])) for s in rows[algorithm]["params"])
            if "plan" in _ffi.cuda_make_plan(problem.native(), algorithm, params=list(drawn)):
                return drawn
        return ()

    def agree(problem: Any, algorithm: str, params: tuple[int, ...], rng: Any) -> str:
        single = dataclasses.replace(problem, lhs_dtype="float32", rhs_dtype="float32")
        (x, w), dtype = problems.operands(single, rng), problem.lhs_dtype
        given = x, w
        if dtype != "float32":
            (x_given, x), (w_given, w) = (reference.rounded(a, dtype) for a in (x, w))
            given = x_given, w_given
        result = run(problem, *given, algorithm, params=params, dtype=dtype)
        if rows[algorithm]["family"] == "canonical":
            expected = reference.chain(problem, x, w)
            if dtype != "float32":
                expected = reference.rounded(expected, dtype)[0]
            wrong = int((result != expected).sum())
            return f"{wrong} of {result.size} values differ" if wrong else ""
        exact, size = reference.float64(problem, x, w)
        bound = 2.0**-18 if rows[algorithm]["family"] == "pieces" else 2.0**-9
        bound = max(bound, 2.0**-8 if dtype == "bfloat16" else 0.0)
        result = reference.widened(result, dtype)
        worst = float((np.abs(result - exact) / np.maximum(size, 1e-20)).max())
        return "" if worst <= bound else f"error {worst:g} of the magnitude, allowed {bound:g}"

    def answer(request: dict[str, Any], tell: Callable[[str], None]) -> Any:
        algorithm = request["algorithm"]
        kind = KINDS.get(algorithm, algorithm if algorithm in DRAWN else None)
        found: dict[str, Any] = {"right": 0, "wrong": []}
        cases = []
        for seed in request["seeds"]:
            rng = np.random.default_rng(seed)
            while True:
                problem = problems.draw(rng, kind)
                small = problem.flops < 4e5  # the chain in numpy takes its time
                if small and "rejected" not in _ffi.cuda_candidates(problem.native())[algorithm]:
                    break
            tried = [(problem, params_of(problem, algorithm, rng))]
            for dtype in rows[algorithm]["dtypes"]:
                dtypes = dict.fromkeys(("lhs_dtype", "rhs_dtype", "out_dtype"), dtype)
                tried.insert(-1, (dataclasses.replace(problem, **dtypes), ()))
            for case, params in tried[: len(tried) - dry]:
                cases.append((f"{seed} {case} {algorithm} {params}", case, params, rng))
        tell("compiling")
        if not dry:
            for _, problem, params, _ in cases:
                answer = _cuda.ask(problem, algorithm, params)
                images(problem, [_cuda.plan_from(answer["plan"])], wait=False)
            images(None, [])
        for text, problem, params, rng in cases:
            tell(text)
            if wrong := agree(problem, algorithm, params, rng):
                found["wrong"].append(f"{text}: {wrong}"[:400])
            else:
                found["right"] += 1
        return found

    serve(answer)


def bits(report: Report, deadline: float, dry: bool, algorithms: list[str]) -> None:
    """The phase: {algorithm: {"right": count, "wrong": [...], "lost": ...}}."""
    results = report.data["bits"] = {}
    child = Child("bits", dry)
    seeds = [[report.data["seed"], i] for i in range(1 if dry else 6)]
    for algorithm in algorithms[: 1 if dry else None]:
        if time.monotonic() > deadline - 2:
            results[algorithm] = {"lost": "not reached"}
            continue
        got = child.ask({"algorithm": algorithm, "seeds": seeds}, 30.0 + 60 * dry, deadline)
        results[algorithm] = got.get("done") or {"lost": got["lost"], "at": got["at"]}
        row = results[algorithm]
        if row.get("wrong") or "lost" in row:
            say(f"    {algorithm}: {json.dumps(row)[:600]}")
        report.save()
    child.stop()
    good = [a for a, r in results.items() if r.get("right") and not r["wrong"] and "lost" not in r]
    say(f"bits: {len(good)} of {len(results)} algorithms are right: {', '.join(good)}")


def sanitize(report: Report, seconds: float, algorithms: list[str]) -> None:
    """A few plans under compute-sanitizer: memory of each algorithm, races and barriers of some."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        report.data["sanitizer"] = {"code": "not installed"}
        return
    seeds = [[report.data["seed"], 0]]
    deadline = time.monotonic() + seconds
    found: dict[str, Any] = {}
    report.data["sanitizer"] = {"code": 0, "tools": found}
    for share, name in ((0.5, "memcheck"), (0.6, "racecheck"), (1.0, "synccheck")):
        words = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "20"]
        words += [sys.executable, str(Path(__file__).resolve()), "--child", "bits"]
        some = [a for a in algorithms if name == "memcheck" or a in WITH_BARRIERS]
        asked = "".join(json.dumps({"algorithm": a, "seeds": seeds}) + "\n" for a in some)
        left = (deadline - time.monotonic()) * share
        done = found[name] = command(words, left, input=asked, env=environment(False))
        report.data["sanitizer"]["code"] = report.data["sanitizer"]["code"] or done["code"]
        report.save()
        tail = [line for line in done["output"].splitlines() if "SUMMARY" in line]
        say(f"sanitizer: {name}: {done['code']} {' '.join(tail)}")


# --- layers ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """A layer at a precision: float32 "highest" and "default", or bfloat16."""

    group: str
    index: int
    dtype: str
    precision: str

    @property
    def exact(self) -> bool:
        return self.precision == "highest"


def key_of(work: Work) -> str:
    return f"{work.group}/{work.index}/{work.dtype}/{work.precision}"


def all_work(groups: list[str], sets: dict[str, list[Any]], dry: bool) -> list[Work]:
    """The sets take turns, so that a run that is cut short has something of each."""
    found: list[Work] = []
    precisions = [("float32", "highest"), ("float32", "default"), ("bfloat16", "")]
    for dtype, precision in precisions[:: 2 if dry else 1]:
        names = groups
        if precision != "highest":
            dense = ("paper", "first", "dilated", "volume", "transposed", "batch 1", "depthwise")
            names = [name for name in groups if name in dense]
        deepest = max((len(sets[name]) for name in names), default=0)
        for i in range(1 if dry else deepest):
            found += [Work(n, i, dtype, precision) for n in names if i < len(sets[n])]
    return found


def case_of(work: Work, dry: bool) -> Any:
    from gpu_cases import SETS

    case = SETS[work.group][work.index]
    if not dry:
        return case
    size = tuple(min(s, 12 if len(case.size) < 3 else 6) for s in case.size)
    window = tuple(min(s, 3) for s in case.window)
    groups = 4 if case.groups > 1 else 1
    c, k = (groups * max(1, v // case.groups // 64) for v in (case.c, case.k))
    return dataclasses.replace(
        case, n=2, size=size, window=window, c=c, k=k, groups=groups, padding=1, dilation=1
    )


def plans_of(problem: Any, isa: str, most: int, near: list[Any]) -> dict[str, Any]:
    """Plans by name: the defaults that the cost model finds plausible, then `most` further ones.

    near: what was the fastest before, as [algorithm, parameters].
    """
    from jaxwin.tuner.space import Space

    space = Space(problem, isa, 1, 8 << 30)
    defaults = sorted(space.defaults.values(), key=lambda c: (space.cost(c), c))
    chosen = [c for c in defaults if space.cost(c) <= 12 * space.cost(defaults[0])][:5]
    if most:
        centres = [space.candidate(algorithm, params) for algorithm, params in near[:2]]
        around = [c for centre in centres for c in space.neighbours(centre)]
        ranked = [c for c in space.ranked() if c.algorithm in {x.algorithm for x in centres}]
        mixed = [c for pair in zip(around, ranked, strict=False) for c in pair]
        others = list(dict.fromkeys([*mixed, *around, *ranked]))
        chosen = list(dict.fromkeys([*centres, *(c for c in others if c not in centres)]))[:most]
    return {str(c): space.plan(c) for c in chosen if space.plan(c) is not None}


def layers_child(dry: bool) -> None:
    """Answers a `Work` with its row."""
    from jaxwin import _cuda, _ffi
    from jaxwin._plan import Plan
    from jaxwin.tuner import gpu, measure

    def answer(request: dict[str, Any], tell: Callable[[str], None]) -> Any:
        work = Work(**request["work"])
        case = case_of(work, dry)
        problem = case.problem(work.dtype)
        isa = _cuda.isa_of(problem, work.exact)
        flops = float(_ffi.describe(problem.native())["flops"])
        begin = time.monotonic()
        tell("data")
        subject = gpu.Subject(problem.key, time.time_ns() % 2**31, isa)
        row: dict[str, Any] = {
            "name": case.name,
            "direction": case.direction,
            "problem": str(problem),
            "flops": flops,
            "calls": subject.calls,
            "cells": {},
        }
        plans = {"xla": Plan("xla", isa, 1, (), 0)}
        plans |= plans_of(problem, isa, request["most"], request["near"])
        timed: dict[str, Any] = {}
        tell("data")
        if not dry:
            images(problem, [plan for name, plan in plans.items() if name != "xla"])
        for name, plan in plans.items():
            if name in request["skip"]:
                row["cells"][name] = {"status": "lost", "error": request["skip"][name]}
                continue
            if name != "xla" and timed and time.monotonic() - begin > 0.6 * request["seconds"]:
                row["cut"] = "not all candidates were tried"
                break
            tell(name)
            cell: dict[str, Any] = {"algorithm": plan.algorithm, "params": plan.params}
            start = time.monotonic()
            if os.environ.get(FAULT) == f"{key_of(work)} {plan.algorithm}":
                os.abort()
            try:
                call, cell["status"], cell["error"] = subject.compile(plan)
                cell["temporary_bytes"] = subject.temporary_bytes
                if cell["status"] == "ok":
                    timed[name] = measure.Timed(call)
            except Exception as error:
                if gpu.is_sick():
                    raise
                cell |= {"status": "failed", "error": measure.first_line(error)[:400]}
            cell["compile_seconds"] = round(time.monotonic() - start, 2)
            row["cells"][name] = cell
        samples = measure.interleave(
            timed,
            threads=0,
            rounds=2 if dry else 7,
            min_seconds=1e-6 if dry else 0.01,
            budget_seconds=max(0.3, request["seconds"] / max(len(timed), 1) / 2),
            rng=random.Random(1),
            slower_than=2.5,
            keep=("xla",),
            progress=tell,
        )
        failed = [name for name, taken in samples.items() if taken.error]
        if failed and gpu.is_sick():
            tell(failed[0])
            raise RuntimeError(samples[failed[0]].error)
        for name, taken in samples.items():
            cell = row["cells"][name]
            if taken.error or not taken.ns:
                cell |= {"status": "failed", "error": taken.error}
                continue
            middle = taken.median_ns / subject.calls
            cell |= {
                "median_us": middle / 1e3,
                "min_us": min(taken.ns) / subject.calls / 1e3,
                "spread": taken.mad_ns / taken.median_ns,
                "rounds": len(taken.ns),
                "tflops": flops / middle / 1e3,
            }
        return row

    serve(answer)


def culprit_of(at: str) -> str:
    """The plan's name in what a child last said: the stopwatch adds words to it."""
    if at.startswith("round "):
        return at.partition(": ")[2]
    return at.removesuffix(": warm-up")


def merge_rows(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """One row of two; where both timed a plan, relative to cuDNN the later counts."""
    cells = old.get("cells", {}) | new.get("cells", {})
    before, after = (r.get("cells", {}).get("xla", {}).get("median_us") for r in (old, new))
    if before and after:  # so that clocks that changed in between do not decide
        for name, cell in old["cells"].items():
            if name not in new["cells"] and "median_us" in cell:
                cells[name] = cell | {"median_us": cell["median_us"] * after / before}
    return old | new | {"cells": cells}


def conclude(row: dict[str, Any]) -> None:
    """The best plan beside XLA, and the memory of both."""
    timed = {n: c["median_us"] for n, c in row["cells"].items() if "median_us" in c}
    ours = {name: us for name, us in timed.items() if name != "xla"}
    if not ours:
        return
    row["best"] = min(ours, key=lambda name: ours[name])
    if "xla" in timed:
        row["speed_against_xla"] = timed["xla"] / ours[row["best"]]
        theirs = row["cells"]["xla"].get("temporary_bytes")
        mine = row["cells"][row["best"]].get("temporary_bytes")
        if theirs and mine is not None:
            row["memory_of_xlas_percent"] = 100.0 * mine / theirs


def layers(
    report: Report, deadline: float, dry: bool, work: list[Work], most: int, least: float
) -> None:
    """A phase over all layers, or until the deadline; `most`: further plans for known rows."""
    rows: dict[str, dict[str, Any]] = {row["key"]: row for row in report.data["rows"]}
    child = Child("layers", dry)
    for number, each in enumerate(work):
        left = deadline - time.monotonic()
        if left < least:
            report.data.setdefault("cut", []).append(f"{len(work) - number} of {len(work)} rows")
            break
        key = key_of(each)
        known = rows.get(key)
        timed = [c for c in (known or {}).get("cells", {}).values() if "median_us" in c]
        near = sorted((c for c in timed if c["algorithm"] != "xla"), key=lambda c: c["median_us"])
        if most and not near:
            continue
        seconds = min(25.0, max(3.0, 1.8 * left / (len(work) - number)))
        request = {
            "work": dataclasses.asdict(each),
            "most": most,
            "near": [[c["algorithm"], c["params"]] for c in near],
            "skip": {},
            "seconds": seconds,
        }
        facts = {"set": each.group, "dtype": each.dtype, "precision": each.precision, "key": key}
        row: dict[str, Any] = {}
        for _ in range(4):  # a plan that kills the process is left out then
            got = child.ask(request, 60.0, deadline)
            row = got.get("done") or {"error": f"{got['lost']} at {got['at']}"[:900], "cells": {}}
            if "done" in got or got.get("over") or got["at"] in ("the start", "data"):
                break
            culprit = culprit_of(got["at"])
            say(f"    {culprit}: {got['lost'][:300]}")
            request["skip"][culprit] = got["lost"][:400]
        row = merge_rows(known, row) if known else row
        row |= facts
        conclude(row)
        rows[key] = row
        report.data["rows"] = list(rows.values())
        report.save()
        for name, cell in row["cells"].items():
            if cell.get("status") not in ("ok", None):
                say(f"    {name}: {cell['status']}: {cell.get('error', '')[:300]}")
        said = row.get("error", "no comparison")
        if ratio := row.get("speed_against_xla"):
            said = f"{ratio:.2f} x XLA, {row['best']}"
        say(f"{key}: {row.get('name', '')} {row.get('direction', '')}: {said}")
    child.stop()


def warm(dry: bool, work: list[Work]) -> subprocess.Popen[bytes] | None:
    """Starts to compile the kernels of all layers into the cache on disk."""
    if dry:
        return None
    words = [sys.executable, str(Path(__file__).resolve()), "--child", "warm"]
    process = start(words, stdin=subprocess.PIPE, env=environment(False), stdout=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.write(json.dumps([dataclasses.asdict(each) for each in work]).encode())
    process.stdin.close()
    return process


def launch_times(request: dict[str, Any], tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """The kernels of a plan of a `Work` in their order, with the time of each alone."""
    import on_device

    work = Work(**request["work"])
    problem = case_of(work, False).problem(work.dtype)
    tell(request["algorithm"])
    params = tuple(request["params"])
    times = on_device.launch_times(problem, request["algorithm"], params, dtype=work.dtype)
    return [
        {"kernel": name, "median_us": statistics.median(us), "min_us": min(us)}
        for name, us in times
    ]


def launches(report: Report, deadline: float, work: list[Work]) -> None:
    """By row of the papers' layers: what the kernels of `im2win_full` and of the best plan take."""
    rows = {row["key"]: row for row in report.data["rows"]}
    child = Child("launches", False)
    for each in work:
        row = rows.get(key_of(each))
        if row is None or each.group != "paper" or not each.exact:
            continue
        plans = {n for n, c in row["cells"].items() if c.get("algorithm") == "im2win_full"}
        for name in sorted(plans | {row.get("best", "")} - {"", "xla"}):
            if time.monotonic() > deadline - 2:
                break
            request = {"work": dataclasses.asdict(each)}
            request |= {key: row["cells"][name][key] for key in ("algorithm", "params")}
            got = child.ask(request, 20.0, deadline)
            told = got.get("done") or {"lost": f"{got['lost']} at {got['at']}"[:600]}
            row.setdefault("launches", {})[name] = told
            report.save()
    child.stop()
    count = sum(len(row.get("launches", {})) for row in rows.values())
    say(f"launches: {count} plans taken apart")


def warm_child() -> None:
    from jaxwin import _cuda

    for fields in json.loads(sys.stdin.read()):
        work = Work(**fields)
        problem = case_of(work, False).problem(work.dtype)
        plans = plans_of(problem, _cuda.isa_of(problem, work.exact), 0, [])
        images(problem, list(plans.values()), wait=False)
    images(None, [])


@functools.cache
def _compilers() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(max(2, (os.cpu_count() or 4) - 2))


@functools.cache
def _runtime() -> tuple[Any, str]:
    from jaxwin import _cuda, _ffi

    capability = _ffi.cuda_device(0)["capability"]
    runtime = _ffi.CudaRuntime([], _cuda.nvrtc_libraries(), _cuda.cache_folder())
    return runtime, "sm_" + capability.replace(".", "")


_under_way: list[Any] = []


def images(problem: Any, plans: list[Any], wait: bool = True) -> None:
    """Compiles plans' kernels side by side, so that programs find them in the cache on disk.

    What does not compile shows again, with its name, where it is to run.
    """
    from jaxwin import _cuda

    def one(plan: Any) -> None:
        runtime, architecture = _runtime()
        dtype = _cuda.operand_dtype(problem, plan.algorithm)
        wide = dtype != "float32" and problem.out_dtype == "float32"
        buffers = {name: 256 for name in ("x", "w", "y", "workspace")}
        runtime.images(
            problem.native(), plan.algorithm, dtype, wide, plan.params, architecture, buffers
        )

    _under_way.extend(_compilers().submit(one, plan) for plan in plans)
    if wait:
        concurrent.futures.wait(_under_way)
        _under_way.clear()


# --- the end ---------------------------------------------------------------------------------


def sum_of_memory(rows: list[dict[str, Any]]) -> float | None:
    """What the best plans take beside operands and results, of what cuDNN takes, in percent."""
    mine = theirs = 0
    for row in rows:
        pair = [row["cells"].get(n, {}).get("temporary_bytes") for n in (row.get("best"), "xla")]
        if None not in pair:
            mine, theirs = mine + pair[0], theirs + pair[1]
    return 100.0 * mine / theirs if theirs else None


def summary(data: dict[str, Any]) -> dict[str, Any]:
    """By set and precision: how the best plans compare with cuDNN, and what did not work."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        groups.setdefault(f"{row['set']}, {row['dtype']} {row['precision']}", []).append(row)
    result = {}
    for name, rows in groups.items():
        ratios = [row["speed_against_xla"] for row in rows if "speed_against_xla" in row]
        memory = [r["memory_of_xlas_percent"] for r in rows if "memory_of_xlas_percent" in r]
        bad = [
            f"{row.get('name')}: {plan}: {cell['status']}"
            for row in rows
            for plan, cell in row["cells"].items()
            if cell.get("status") not in ("ok", None)
        ]
        result[name] = {
            "rows": len(rows),
            "compared": len(ratios),
            "faster": sum(ratio > 1 for ratio in ratios),
            "geomean": math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None,
            "range": [min(ratios), max(ratios)] if ratios else None,
            "memory_percent": statistics.median(memory) if memory else None,
            "memory_percent_of_the_sum": sum_of_memory(rows),
            "bad": bad,
        }
    return result


def print_summary(data: dict[str, Any]) -> None:
    print("\nset, precision: rows compared, faster than cuDNN; speed relative to it; memory")
    for name, s in data["summary"].items():
        told = "nothing compared"
        if s["geomean"]:
            low, high = s["range"]
            memory = "-" if s["memory_percent"] is None else f"{s['memory_percent']:.0f} %"
            told = f"{s['compared']}, {s['faster']}; {s['geomean']:.2f} ({low:.2f} to {high:.2f}); "
            told += memory
        print(f"  {name}: {told}")
        for text in s["bad"][:6]:
            print(f"    {text}")
    for row in data["rows"]:
        if row["set"] == "paper":
            cells = row["cells"]
            best, xla = cells.get(row.get("best", ""), {}), cells.get("xla", {})
            print(
                f"  {row.get('name')} {row['dtype']} {row['precision']}: "
                f"{best.get('median_us', 0):.0f} us, {best.get('tflops', 0):.1f} TFLOP/s; cuDNN "
                f"{xla.get('median_us', 0):.0f} us"
            )
    for phase in ("build", "bits", "sanitizer", "tests", "tune"):
        told = data.get(phase)
        code = told.get("code", "see rows") if isinstance(told, dict) else "left out"
        print(f"  {phase}: {code}")


def tune(report: Report, seconds: float, dry: bool) -> None:
    """The front door, `jaxwin-tune run`; its database stays beside the report."""
    missing = [n for n in ("click", "optuna", "rich", "sqlite_utils") if not _importable(n)]
    if missing:
        report.data["tune"] = {"code": "left out", "output": f"not installed: {missing}"}
        say(f"tune: left out, not installed: {', '.join(missing)}")
        return
    database = report.path.with_suffix(".db")
    what = ["n1 6x7 c4 k8 w3"] if dry else ["--preset", "paper", "--batch", "64"]
    words = [sys.executable, "-m", "jaxwin.tuner", "run", *what, "--device", "cuda", "--quiet"]
    words += ["--precision", "highest", "--effort", "quick", "--budget", str(int(seconds * 0.8))]
    words += ["--database", str(database), "--json"]
    report.data["tune"] = command(words, seconds, env=environment(dry))
    say(f"tune: {report.data['tune']['code']}")


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def phases(options: argparse.Namespace, report: Report) -> Iterator[None]:
    """Everything, with a stop after each phase; see the head of this file."""
    deadline = STARTED + options.seconds

    def left() -> float:
        return deadline - time.monotonic()

    data = report.data
    link = ROOT / "jaxwin" / "tuner"
    if not link.exists():  # in a checkout that was never installed
        link.symlink_to("../tuner")
    if options.build:
        data["build"] = build(min(200.0, left() * 0.4))
        say(f"build: {data['build']['code']}")
        yield
        if data["build"]["code"] != 0:
            data["error"] = "the build failed"
            return
    data["machine"] = describe_machine(options.dry)
    say(f"machine: {json.dumps(data['machine'])[:500]}")
    yield
    if data["machine"].get("platform") not in ("gpu", "cuda") and not options.dry:
        data["error"] = "no GPU that JAX can use"
        return
    sys.path[:0] = PATHS
    from gpu_cases import SETS

    from jaxwin import _registry

    groups = [name for name in options.only.split(",") if name] or list(SETS)
    work = all_work(groups, SETS, options.dry)
    algorithms = [row["name"] for row in _registry.rows("cuda")]
    data["seed"] = options.seed if options.seed is not None else time.time_ns() % 2**31
    compiling = warm(options.dry, work)
    skipped = options.skip.split(",")
    if "bits" not in skipped:
        bits(report, time.monotonic() + min(90.0, left() * 0.25), options.dry, algorithms)
        yield
    if "sanitizer" not in skipped and not options.dry:
        sanitize(report, min(60.0, left() * 0.15), algorithms)
        yield
    if compiling is not None:
        try:
            data["warm"] = {"code": compiling.wait(timeout=min(60.0, left() * 0.2))}
        except subprocess.TimeoutExpired:
            data["warm"] = {"code": "timeout"}
        end(compiling)
        say(f"kernels compiled: {data['warm']['code']}")
        yield
    layers(report, time.monotonic() + left() * 0.65, options.dry, work, 0, 4.0)
    yield
    if "launches" not in skipped and not options.dry:
        launches(report, time.monotonic() + min(30.0, left() * 0.15), work)
        yield
    # The layers of the papers first; what is kept is for the last two phases.
    exact = sorted((each for each in work if each.exact), key=lambda each: each.group != "paper")
    kept = 0.0 if options.dry else min(110.0, left() * 0.55)
    if "more" not in skipped:
        some = exact[: 1 if options.dry else None]
        layers(report, deadline - kept - 5, options.dry, some, 3 if options.dry else 8, 6.0)
        yield
    if "tests" not in skipped and not options.dry and left() > 20:
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=8"]
        tests = command(
            [*words, str(HERE / "test_gpu.py")],
            min(60.0, left() * 0.5),
            env=environment(False),
        )
        data["tests"] = tests
        say(f"tests: {tests['code']}: {tests['output'].splitlines()[-1:]}")
        yield
    if "tune" not in skipped and left() > 20:
        tune(report, left() - 8, options.dry)
    yield
    data["complete"] = "cut" not in data


class _EndedError(Exception):
    """Somebody wants this script to end: what there is of the report is written."""


def _stop(*_: Any) -> None:
    raise _EndedError("ended by a signal")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "results" / "gpu.json")
    parser.add_argument(
        "--seconds", type=float, default=560.0, help="for everything, the build too"
    )
    parser.add_argument("--build", action="store_true", help="build the extension first")
    parser.add_argument(
        "--skip", default="", help="phases to leave out, separated by commas: bits, sanitizer, ..."
    )
    parser.add_argument("--seed", type=int, help="of the problems that are drawn; else a new one")
    parser.add_argument("--only", default="", help="names of sets, separated by commas")
    parser.add_argument("--dry", action="store_true", help="on the CPU, at small sizes")
    parser.add_argument(
        "--child", choices=("bits", "layers", "launches", "warm"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.child:
        sys.path[:0] = PATHS
        if options.child == "warm":
            warm_child()
        elif options.child == "bits":
            bits_child(options.dry)
        elif options.child == "launches":
            serve(launch_times)
        else:
            layers_child(options.dry)
        return 0
    report = Report(options.out)
    signal.signal(signal.SIGTERM, _stop)
    try:
        for _ in phases(options, report):
            report.save()
    except Exception:
        report.data["error"] = traceback.format_exc()[-3000:]
        say(report.data["error"])
    finally:
        for process in [*_started]:
            end(process)
    report.data["summary"] = summary(report.data)
    report.save()
    print_summary(report.data)
    return 1 if "error" in report.data else 0


if __name__ == "__main__":
    sys.exit(main())
