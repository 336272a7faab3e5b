# SPDX-License-Identifier: Apache-2.0
"""Builds, checks, tunes and times the CUDA kernels against cuDNN through XLA, in one run on a GPU.

    python tests/gpu/measure.py --build --seconds 560 --out results.json

Writes --out after every layer, so a run that is stopped keeps what it has. A layer that fails is
recorded with its error and the run goes on. Times are of whole calls, transforms and packing
included: medians over rounds in which all contenders take turns, each with several copies of the
layer (on other inputs) in one program, so that a launch's overhead in Python does not count.
--rehearse runs everything on the CPU at small sizes, to test this script itself.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
STARTED = time.monotonic()


def say(text: str) -> None:
    """One line of progress, with the seconds since the start."""
    print(f"{time.monotonic() - STARTED:6.1f} {text}", flush=True)


def command(words: list[str], seconds: float, **options: Any) -> dict[str, Any]:
    """Runs a program; what became of it, with the end of what it printed."""
    begin = time.monotonic()
    code: int | str
    try:
        done = subprocess.run(
            words,
            timeout=max(1.0, seconds),
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            **options,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        seen = error.stdout or b""
        code = "timeout"
        output = seen.decode(errors="replace") if isinstance(seen, bytes) else seen
    except OSError as error:
        code, output = "error", str(error)
    taken = round(time.monotonic() - begin, 1)
    return {"code": code, "seconds": taken, "output": output[-4000:]}


def build() -> dict[str, Any]:
    """The extension for this Python, in place."""
    folder = Path(os.environ.get("TMPDIR", "/tmp"), "jaxwin_build")
    steps = []
    configure = ["cmake", "-S", str(ROOT / "ffi"), "-B", str(folder)]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for words in (
        [*configure, *generator, f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", str(folder), "--target", "_ffi", "-j", str(os.cpu_count() or 4)],
    ):
        steps.append(command(words, 900))
        if steps[-1]["code"] != 0:
            raise SystemExit(f"the build failed:\n{steps[-1]['output']}")
    suffixes = (sysconfig.get_config_var("EXT_SUFFIX"), ".abi3.so")
    built = [file for file in folder.glob("_ffi*.so")]
    if not built:
        raise SystemExit("the build made no extension")
    for old in (ROOT / "jaxwin").glob("_ffi*.so"):
        if old.name.endswith(suffixes):
            old.unlink()
    shutil.copy2(built[0], ROOT / "jaxwin" / built[0].name)
    return {"seconds": sum(step["seconds"] for step in steps)}


class Report:
    """The JSON file, written anew after every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema_version": 1, "complete": False, "rows": []}

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1))
        temporary.replace(self.path)


def describe_machine(ffi: Any, jax: Any) -> dict[str, Any]:
    """The GPU and the versions; nothing that tells which machine it is."""
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,memory.total"
    query = command(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], 20)
    return {
        "gpu": ffi.cuda_device(0),
        "nvidia_smi": query["output"].strip().splitlines(),
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "backend": jax.extend.backend.get_backend().platform_version.strip().splitlines()[0][:200],
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


SANITIZED = """
import sys
sys.path[:0] = {paths!r}
import numpy as np, problems, reference
from gpu_cases import plan_of
from test_gpu import _compiled, CANONICAL, _ffi
rng = np.random.default_rng(3)
for algorithm in CANONICAL:
    kind = algorithm if algorithm in ("depthwise", "grouped", "segregated", "weight_grad") else None
    for _ in range(2):
        while True:
            problem = problems.draw(rng, kind)
            if "rejected" not in _ffi.cuda_candidates(problem.native())[algorithm]:
                break
        x, w = problems.operands(problem, rng)
        run = _compiled(problem, plan_of(problem, algorithm), (x, w))
        assert np.array_equal(run(x, w), reference.chain(problem, x, w)), (algorithm, str(problem))
    print("clean", algorithm, flush=True)
"""


def checks(left: float, rehearse: bool) -> dict[str, Any]:
    """The GPU tests, and a small set of them under compute-sanitizer."""
    paths = [str(ROOT), str(ROOT / "tests"), str(HERE)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)]
    result = {"tests": command(tests, min(170.0, left * 0.35), cwd=ROOT, env=environment)}
    say(f"tests: {result['tests']['code']}: {result['tests']['output'].splitlines()[-1:]}")
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if rehearse or not Path(sanitizer).exists():
        result["sanitizer"] = {"code": "skipped"}
        return result
    script = SANITIZED.format(paths=paths)
    environment["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"  # every array its own allocation
    words = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", script]
    result["sanitizer"] = command(words, min(100.0, left * 0.2), cwd=ROOT, env=environment)
    say(f"sanitizer: {result['sanitizer']['code']}")
    return result


def candidates(case: Any, problem: Any, ffi: Any, plan_of: Any, dtype: str) -> list[Any]:
    """Plans that are worth a measurement, the defaults first."""
    family = "canonical" if dtype == "float32" else "tensor"
    rows = ffi.cuda_candidates(problem.native(), dtype=dtype)
    names = [n for n, r in rows.items() if "rejected" not in r and r["family"] == family]
    names.sort(key=lambda n: rows[n]["cost"])
    cheapest = rows[names[0]]["cost"] if names else 0
    plans = []
    for name in names:
        if rows[name]["cost"] > 12 * cheapest:
            continue
        found = [plan_of(problem, name, (), dtype)]
        default = tuple(rows[name]["params"])
        if name in ("im2win", "segregated", "weight_grad"):
            tail = default[8:]
            found += [
                plan_of(problem, name, (*tile, default[6], unroll, *tail), dtype)
                for *tile, unroll in (
                    (128, 128, 16, 8, 8, 3, 8),
                    (128, 128, 8, 8, 8, 4, 4),
                    (128, 64, 16, 8, 8, 3, 8),
                    (64, 64, 16, 8, 4, 3, 8),
                    (64, 128, 16, 8, 8, 3, 8),
                )
            ]
        elif name == "tensor":
            found += [
                plan_of(problem, name, (*tile, default[6]), dtype)
                for tile in (
                    (128, 128, 32, 64, 32, 3),
                    (128, 128, 64, 64, 64, 2),
                    (128, 64, 32, 64, 32, 3),
                    (64, 64, 64, 32, 32, 3),
                )
            ]
        elif name in ("depthwise", "grouped"):
            found += [
                plan_of(problem, name, (strip, vector, 128), dtype)
                for strip, vector in ((8, 1), (4, 2), (2, 4), (8, 4), (1, 4))
            ]
        plans += [plan for plan in found if not isinstance(plan, str)]
    return list(dict.fromkeys(plans))


def prewarm(problem: Any, plans: list[Any], dtype: str) -> None:
    """Compiles kernels side by side, so that the process finds them in the cache on disk."""
    from jaxwin import _cuda, _ffi

    device = _ffi.cuda_device(0)
    if "error" in device:
        return
    architecture = "sm_" + device["capability"].replace(".", "")
    runtime = _ffi.CudaRuntime([], _cuda.nvrtc_libraries(), _cuda.cache_folder())
    buffers = {name: 256 for name in ("x", "w", "y", "workspace")}

    def one(plan: Any) -> None:
        runtime.images(
            problem.native(), plan.algorithm, dtype, False, plan.params, architecture, buffers
        )

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for future in [pool.submit(one, plan) for plan in plans]:
            if (error := future.exception()) is not None:
                say(f"    not compiled: {error}")


def measure(case: Any, dtype: str, seconds: float, rehearse: bool) -> dict[str, Any]:
    """One layer: contenders, their times, and whether results agree."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from gpu_cases import forced, plan_of

    from jaxwin import _ffi

    begin = time.monotonic()
    problem = case.problem(dtype)
    flops = float(_ffi.describe(problem.native())["flops"])
    shapes = case.operand_shapes()
    size = sum(int(np.prod(s)) for s in (*shapes, problem.out_shape)) * 4
    copies = int(max(1, min(8, 6e10 // max(flops, 1), 4e9 // size)))
    seed = time.time_ns() % 2**31
    keys = jax.random.split(jax.random.key(seed), copies + 1)
    first = [jax.random.normal(k, shapes[0], jnp.dtype(dtype)) for k in keys[:-1]]
    second = jax.random.normal(keys[-1], shapes[1], jnp.dtype(dtype))
    row: dict[str, Any] = {
        "name": case.name,
        "direction": case.direction,
        "dtype": dtype,
        "problem": str(problem),
        "flops": flops,
        "copies": copies,
        "cells": {},
    }

    def compiled(function: Any) -> Any:
        def several(a: Any, b: Any) -> Any:
            return [function(one, b) for one in a]

        return jax.jit(several).lower(first, second).compile()

    programs: dict[str, Any] = {}

    def attempt(name: str, make: Any, **facts: Any) -> None:
        cell: dict[str, Any] = {"status": "ok", **facts}
        try:
            programs[name] = make()
        except Exception as error:
            cell = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:400], **facts}
        row["cells"][name] = cell

    exact = "highest" if dtype == "float32" else None
    attempt("xla", lambda: compiled(case.function(False, exact)))
    if dtype == "float32":
        attempt("xla default precision", lambda: compiled(case.function(False, None)))
    plans = [] if rehearse else candidates(case, problem, _ffi, plan_of, dtype)
    prewarm(problem, plans, dtype)
    if rehearse:
        attempt("jaxwin", lambda: compiled(case.function(True, exact)))
    for plan in plans:
        if time.monotonic() - begin > seconds * 0.6:
            row["cut"] = "not all candidates were tried"
            break

        def make(plan: Any = plan) -> Any:
            with forced(plan):
                return compiled(case.function(True, exact))

        name = f"{plan.algorithm} {' '.join(map(str, plan.params))}".strip()
        facts = {"algorithm": plan.algorithm, "params": plan.params}
        attempt(
            name,
            make,
            default=plan.params == plan_of(problem, plan.algorithm, (), dtype).params,
            workspace_bytes=plan.workspace_bytes,
            **facts,
        )

    # Once each, and compared: by kernel, into memory that held NaN before.
    reference = None
    bits = None
    for name in list(programs):
        cell = row["cells"][name]
        try:
            for _ in range(2):
                jnp.full(problem.out_shape, jnp.nan, jnp.float32).block_until_ready().delete()
            result = jax.block_until_ready(programs[name](first, second))[0].astype(jnp.float32)
            if reference is None:
                reference = result
            scale = float(jnp.abs(reference).max())
            cell["difference"] = float(jnp.abs(result - reference).max()) / max(scale, 1e-30)
            if not cell["difference"] < (0.05 if "default" in name or dtype != "float32" else 1e-3):
                cell["status"] = "wrong"
            if name.split()[0] not in ("xla",) and dtype == "float32":
                if bits is None:
                    bits = result
                cell["bits_agree"] = bool((result == bits).all())
                if not cell["bits_agree"]:
                    cell["status"] = "wrong"
        except Exception as error:
            cell.update(status="failed", error=f"{type(error).__name__}: {error}"[:400])
        if cell["status"] != "ok":
            say(f"    {name}: {cell['status']}: {cell.get('error', cell.get('difference'))}")
            del programs[name]

    # In turns; those that are far behind after two rounds drop out.
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(15):
        if turn >= 3 and time.monotonic() - begin > seconds:
            break
        for name in list(programs):
            try:
                start = time.perf_counter()
                jax.block_until_ready(programs[name](first, second))
                times[name].append((time.perf_counter() - start) / copies)
            except Exception as error:
                row["cells"][name].update(status="failed", error=str(error)[:400])
                del programs[name]
        if turn == 2 and programs:
            best = min(min(t) for n, t in times.items() if n in programs)
            for name in list(programs):
                if min(times[name]) > 2.5 * best and not name.startswith("xla"):
                    del programs[name]
    for name, seconds_each in times.items():
        if not seconds_each:
            continue
        middle = statistics.median(seconds_each)
        row["cells"][name] |= {
            "median_us": middle * 1e6,
            "min_us": min(seconds_each) * 1e6,
            "rounds": len(seconds_each),
            "tflops": flops / middle / 1e12,
        }
    timed = {n: c["median_us"] for n, c in row["cells"].items() if "median_us" in c}
    ours = {n: t for n, t in timed.items() if not n.startswith("xla")}
    if ours and "xla" in timed:
        row["best"] = min(ours, key=lambda name: ours[name])
        row["speed_against_xla"] = timed["xla"] / ours[row["best"]]
    return row


def bits_of_the_cpu(case: Any) -> dict[str, Any]:
    """A slice of the batch: the GPU's result for it, within the whole batch, and the CPU's."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from gpu_cases import forced, plan_of

    small = dataclasses.replace(case, n=min(case.n, 4))
    x, w = (jax.random.normal(jax.random.key(9 + i), s) for i, s in enumerate(small.shapes))
    plan = plan_of(small.problem(), "auto")
    with forced(plan):
        result = jax.jit(small.function(True)).lower(x, w).compile()(x, w)[:2]
    cpu = jax.devices("cpu")[0]
    there = jax.device_put((x[:2], w), cpu)
    expected = jax.device_put(jax.jit(small.function(True))(*there), result.device)
    return {"algorithm": plan.algorithm, "equal": bool(jnp.array_equal(result, expected))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "results" / "gpu.json")
    parser.add_argument(
        "--seconds", type=float, default=540.0, help="for everything, the build too"
    )
    parser.add_argument("--build", action="store_true", help="build the extension first")
    parser.add_argument("--no-checks", action="store_true", help="leave out tests and sanitizer")
    parser.add_argument("--only", default="", help="names of sets, separated by commas")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at small sizes")
    options = parser.parse_args()
    deadline = STARTED + options.seconds
    report = Report(options.out)
    if options.build:
        report.data["build"] = build()
        say("built")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.8")
    if not options.no_checks:  # before this process takes the GPU's memory
        report.data["checks"] = checks(deadline - time.monotonic(), options.rehearse)
        report.save()
    if options.rehearse:
        os.environ["JAX_PLATFORMS"] = "cpu"
    import dataclasses

    import jax
    import jax.extend
    from gpu_cases import SETS

    from jaxwin import _ffi

    report.data["machine"] = describe_machine(_ffi, jax)
    if not options.rehearse and jax.default_backend() != "gpu":
        report.data["error"] = f"no GPU: JAX runs on {jax.default_backend()}"
        report.save()
        say(report.data["error"])
        return 1
    chosen = [name for name in options.only.split(",") if name] or list(SETS)
    # The sets take turns, so that a run that is cut short has something of each.
    work: list[tuple[str, Any, str]] = []
    deepest = max(len(SETS[name]) for name in chosen)
    for i in range(deepest):
        work += [(name, SETS[name][i], "float32") for name in chosen if i < len(SETS[name])]
    dense = [c for name in ("paper", "first", "batch 1") if name in chosen for c in SETS[name]]
    work += [("tensor", case, "bfloat16") for case in dense]
    for number, (group, case, dtype) in enumerate(work):
        left = deadline - time.monotonic()
        if left < 8:
            report.data["cut"] = f"{len(work) - number} layers were not reached"
            say(report.data["cut"])
            break
        if options.rehearse:
            size = tuple(min(s, 12 if len(case.size) < 3 else 6) for s in case.size)
            window = tuple(min(s, 3) for s in case.window)
            case = dataclasses.replace(case, n=2, size=size, window=window, padding=1, dilation=1)
        share = min(20.0, max(3.0, 1.6 * left / (len(work) - number)))
        try:
            row = measure(case, dtype, share, options.rehearse)
            if number < 24 and case.direction == "fwd" and dtype == "float32":
                row["cpu_bits"] = bits_of_the_cpu(case) if not options.rehearse else None
        except Exception as error:
            row = {
                "name": case.name,
                "direction": case.direction,
                "dtype": dtype,
                "error": f"{type(error).__name__}: {error}"[:400],
                "trace": traceback.format_exc()[-1500:],
            }
        row["set"] = group
        report.data["rows"].append(row)
        report.save()
        ratio = row.get("speed_against_xla")
        said = f"{ratio:.2f} x XLA ({row['best']})" if ratio else row.get("error", "no comparison")
        say(f"{group}: {case.name} {case.direction} {dtype}: {said}")
        jax.clear_caches()
    report.data["complete"] = "cut" not in report.data
    report.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
