# SPDX-License-Identifier: Apache-2.0
"""CUDA: which kernel computes a convolution there, and the call that runs it.

Nothing here needs a GPU, so programs can be lowered and exported for CUDA anywhere. Kernels are
compiled by NVRTC for the device that a program runs on.
"""

from __future__ import annotations

import functools
import os
import site
import sys
from pathlib import Path
from typing import Any

import jax
from jax import lax

from jaxwin import _ffi, _registry, _settings, _tuning
from jaxwin._plan import Decision, Plan
from jaxwin._problem import Problem

THREADS = 1  # of plans, and of what is filed
ISA = _registry.GPU_ISAS[0]  # of plans; of measurements: those with the bits of the contract
MODES = ("auto", "all", "off")
_SIXTEEN_BITS = ("bfloat16", "float16")
_INCUMBENT = "cuDNN through XLA, until a kernel is measured to be faster on this GPU"


def register(target: str) -> None:
    """Registers the handler of a custom-call target, and says where NVRTC and the cache may be."""
    jax.ffi.register_ffi_target(target, _ffi.cuda_handler(), platform="CUDA")
    _ffi.cuda_configure(nvrtc=nvrtc_libraries(), cache=cache_folder())


def nvrtc_libraries() -> list[str]:
    """Where NVRTC may be, the best place first: NVIDIA's wheels, the loader's path, the toolkit."""
    found: list[str] = []
    folders = dict.fromkeys([*sys.path, *site.getsitepackages(), site.getusersitepackages()])
    for folder in folders:
        wheels = Path(folder or ".", "nvidia")
        if wheels.is_dir():
            for version in (13, 12):
                found += map(str, sorted(wheels.glob(f"*/lib/libnvrtc.so.{version}")))
    names = [f"libnvrtc.so.{version}" for version in (13, 12)]
    return [*found, *names, *(f"/usr/local/cuda/lib64/{name}" for name in names)]


def cache_folder() -> str:
    """Where compiled kernels are kept: `JAXWIN_KERNEL_CACHE`, or the user's cache; "" for "off"."""
    named = _settings.settings().kernel_cache
    if named:
        return "" if named.lower() in ("0", "off") else os.path.expanduser(named)
    tuning = _tuning.user_file()
    return "" if tuning is None else str(tuning.with_name("kernels"))


@functools.cache
def registry() -> dict[str, dict[str, Any]]:
    """The CUDA algorithms of the native core's registry, by name."""
    return {row["name"]: row for row in _ffi.registry()["cuda"]["algorithms"]}


def mode() -> str:
    """What `JAXWIN_GPU` says: "auto" (the default), "all" or "off".

    Raises:
        ValueError: it says something else.
    """
    text = _settings.settings().gpu
    if text not in MODES:
        raise ValueError(f"JAXWIN_GPU: {text!r} is not one of {', '.join(MODES)}")
    return text


def is_exact(precision: Any) -> bool:
    """Whether a convolution's precision asks for float32 arithmetic, not for tensor cores."""
    high = (lax.Precision.HIGH, lax.Precision.HIGHEST)
    return isinstance(precision, tuple) and any(p in high for p in precision)


def isa_of(problem: Problem, exact: bool) -> str:
    """What a problem's measurements are filed under: `ISA` where the contract on bits holds."""
    return ISA if exact and problem.lhs_dtype == "float32" else _registry.TENSOR_ISA


def filed_under(problem: Problem, exact: bool, gpu_mode: str) -> str:
    """`isa_of` as dispatch sees it: JAXWIN_GPU=all takes exact kernels where others would do."""
    return isa_of(problem, exact or gpu_mode == "all")


def families(isa: str) -> tuple[str, ...]:
    """The numerical families that may compute what is filed under an instruction set."""
    if isa == ISA:
        return ("canonical",)
    return tuple(dict.fromkeys(row["family"] for row in registry().values()))


def family(algorithm: str) -> str:
    """The numerical family of an algorithm; "" where there is no such algorithm."""
    row = registry().get(algorithm)
    return "" if row is None else str(row["family"])


@functools.cache
def algorithms() -> tuple[str, ...]:
    """What can be asked for by name."""
    return "auto", *registry(), _registry.XLA, "any"


@functools.lru_cache(maxsize=4096)
def decide(
    problem: Problem,
    algorithm: str,
    max_workspace: int | None,
    exact: bool,
    gpu_mode: str,
    table: _tuning.Table | None,
) -> Decision:
    """The plan for a problem on CUDA.

    algorithm: "auto", "any" (its numbers may be XLA's where the contract holds), "xla", or the name
    of a CUDA algorithm. exact: whether precision forbids tensor cores.

    Raises:
        ValueError: the algorithm is unknown, was asked for by name and cannot compute the problem
            within max_workspace, or is below the precision asked for.
    """
    if algorithm not in algorithms():
        names = ", ".join(algorithms())
        raise ValueError(f"algorithm: {algorithm!r} is on CUDA not one of {names}")
    if algorithm == _registry.XLA:
        return Decision("xla", None, "asked for")
    if algorithm in ("auto", "any"):
        return _automatic(problem, algorithm, max_workspace, exact, gpu_mode, table)
    if exact and family(algorithm) == "tensor":
        raise ValueError(f"algorithm: {algorithm!r} is below the precision that was asked for")
    isa = isa_of(problem, exact)
    row = None if table is None else table.named(problem, isa, 1, algorithm)
    if row is not None:
        plan = propose(problem, row, max_workspace)
        if isinstance(plan, Plan):
            return Decision("requested", plan, row=row)
    plan = _make_plan(problem, algorithm, (), max_workspace)
    if isinstance(plan, str):
        raise ValueError(f"algorithm: {algorithm!r} cannot compute {problem}: {plan}")
    return Decision("requested", plan)


def _automatic(
    problem: Problem,
    algorithm: str,
    max_workspace: int | None,
    exact: bool,
    gpu_mode: str,
    table: _tuning.Table | None,
) -> Decision:
    if gpu_mode == "off":
        return Decision("xla", None, "JAXWIN_GPU=off")
    reason = unsupported(problem) or unusable()
    if reason:
        return Decision("xla", None, reason)
    single = problem.lhs_dtype == "float32"
    isa = filed_under(problem, exact, gpu_mode)
    # What takes no measurement to be taken: kernels with the bits of the contract.
    ours = isa == ISA and (gpu_mode == "all" or _weak_in_cudnn(problem))
    if table is not None:
        xla = table.named(problem, isa, 1, _registry.XLA)
        if xla is not None and xla.wins and (isa != ISA or algorithm == "any"):
            return Decision("tuned", None, "XLA was measured to be faster", xla)
        row = table.exact(problem, isa, 1)
        if row is not None:
            plan = propose(problem, row, max_workspace)
            if isinstance(plan, Plan):
                return Decision("tuned", plan, row=row)
        for row in table.nearest(problem, isa, 1):
            if ours or _beats_xla(table, row):
                plan = propose(problem, row, max_workspace)
                if isinstance(plan, Plan):
                    return Decision("transferred", plan, row=row)
    plan = _make_plan(problem, "auto", (), max_workspace)
    if ours:
        return Decision("xla", None, plan) if isinstance(plan, str) else Decision("heuristic", plan)
    if single and not exact:
        reason = "precision below HIGHEST: tensor cores are allowed"
    else:
        reason = _INCUMBENT if single else f"{problem.lhs_dtype}: {_INCUMBENT}"
    return Decision("xla", None, reason, incumbent=isinstance(plan, Plan))


def _beats_xla(table: _tuning.Table, row: _tuning.Row) -> bool:
    """Whether a row's plan was compared with XLA on its own problem, and was not slower."""
    xla = table.named(row.problem, row.isa, row.threads, _registry.XLA)
    return xla is not None and not xla.wins


def propose(problem: Problem, row: _tuning.Row, max_workspace: int | None) -> Plan | str:
    """The plan that a row's parameters give for a problem, or why there is none."""
    if family(row.algorithm) not in families(row.isa):
        return f"{row.algorithm} is of a family that {row.isa} does not allow"
    return _make_plan(problem, row.algorithm, row.params, max_workspace)


def _weak_in_cudnn(problem: Problem) -> bool:
    """Groups and transposed convolutions, with their gradients: users' reports, not measured."""
    groups = max(problem.feature_group_count, problem.batch_group_count)
    return groups > 1 or any(d > 1 for d in problem.lhs_dilation)


def unsupported(problem: Problem) -> str:
    """Why no CUDA kernel can take a problem, as far as Python knows; else empty."""
    if problem.lhs_dtype != problem.rhs_dtype:
        return f"no kernels for {problem.lhs_dtype} with {problem.rhs_dtype}"
    if problem.lhs_dtype not in ("float32", *_SIXTEEN_BITS):
        return f"no kernels for {problem.lhs_dtype}"
    if problem.out_dtype not in (problem.lhs_dtype, "float32"):
        return f"no kernels for {problem.lhs_dtype} with a result in {problem.out_dtype}"
    if not 1 <= problem.spatial_rank <= 3:
        return f"no kernels for {problem.spatial_rank} spatial dimensions"
    return ""


@functools.cache
def unusable() -> str:
    """Why our kernels cannot run on this machine's first GPU: it is too old, or NVRTC is missing.

    Empty where they can, and where there is no GPU: the program is for another machine then.
    """
    return str(_ffi.cuda_unusable(0))


def operand_dtype(problem: Problem, algorithm: str) -> str:
    """The dtype in which an algorithm reads a problem: its own, or float32 after conversion."""
    own = algorithm != "auto" and problem.lhs_dtype in registry()[algorithm]["dtypes"]
    return problem.lhs_dtype if own else "float32"


def ask(
    problem: Problem,
    algorithm: str,
    params: tuple[int, ...] = (),
    max_workspace: int | None = None,
) -> dict[str, Any]:
    """The native core's answer: {"plan": {...}} or {"error": text}. No params: the defaults."""
    reason = unsupported(problem)
    if reason:
        return {"error": reason}
    dtype = operand_dtype(problem, algorithm)
    answer: dict[str, Any] = _ffi.cuda_make_plan(
        problem.native(),
        algorithm=algorithm,
        dtype=dtype,
        wide_result=dtype != "float32" and problem.out_dtype == "float32",
        max_workspace=-1 if max_workspace is None else max_workspace,
        params=params,
    )
    return answer


def plan_from(plan: dict[str, Any]) -> Plan:
    """A plan that `ask` gave."""
    return Plan(
        algorithm=plan["algorithm"],
        isa=ISA,
        threads=1,
        params=tuple(plan["params"]),
        workspace_bytes=plan["workspace_bytes"],
    )


def _make_plan(
    problem: Problem, algorithm: str, params: tuple[int, ...], max_workspace: int | None
) -> Plan | str:
    answer = ask(problem, algorithm, params, max_workspace)
    return plan_from(answer["plan"]) if "plan" in answer else str(answer["error"])


def rejections(problem: Problem, decision: Decision) -> dict[str, str]:
    """Why each of the other algorithms was not taken, by name."""
    if decision.plan is None or unsupported(problem):
        return {}
    rejected = {}
    for name, row in registry().items():
        if name == decision.plan.algorithm:
            continue
        answer = _make_plan(problem, name, (), None)
        if isinstance(answer, str):
            rejected[name] = answer
        elif decision.tier == "requested":
            rejected[name] = "not asked for"
        elif decision.row is not None:
            rejected[name] = f"not the {decision.tier} choice"
        elif row["family"] != "canonical":
            rejected[name] = "another numerical family: only where asked for"
        else:
            rejected[name] = "slower by the cost model"
    return rejected
