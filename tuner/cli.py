# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune`: what the native core can do, what dispatch decides, whether all is well."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import click
import jax
import jax.numpy as jnp
import numpy as np
from click import shell_completion
from rich.table import Table

import jaxwin
from jaxwin import _compat, _cuda, _ffi, _record, _registry, _settings
from jaxwin.tuner import bench as benchmark
from jaxwin.tuner import (
    compare_command,
    database_commands,
    deviation_command,
    exits,
    layout_command,
    machine,
    model_bench,
    models,
    options,
    output,
    peers,
    problems,
    record_command,
    report_command,
    tune_command,
    verify_command,
)

PACKAGES = ("jaxwin", "jax", "jaxlib", "numpy", "optuna", "sqlite-utils", "click", "rich")
_OPTIONAL = ("flax", "equinox", "torch", "onnxruntime", "ai-edge-litert", "psycopg")

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


class _Group(click.Group):
    """Ctrl-C in any command ends with the exit code that the help tells; click's own is 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            sys.exit(exits.INTERRUPTED)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"\b\nExit codes:\n{exits.table()}\n\n`record` exits as the program does that it runs.",
)
@click.version_option(jaxwin.__version__, prog_name="jaxwin-tune")
@click.pass_context
def main(context: click.Context) -> None:
    """Ask jaxwin what it can do and what it decides; tune it for this machine."""
    context.with_resource(_record.misses_ignored())  # what commands compile is no program's


for _command in (
    tune_command.run,
    record_command.record,
    compare_command.command,
    verify_command.command,
    deviation_command.command,
    report_command.command,
    layout_command.command,
    *database_commands.COMMANDS,
):
    main.add_command(_command)


@main.command("list")
@_json
def list_(as_json: bool) -> None:
    """List algorithms with their parameters, instruction sets with their tiles, and presets.

    Algorithms of one family give the same bits.

    \b
    Example:
      jaxwin-tune list --json | python -m json.tool
    """
    registry = _registry.registry()
    if as_json:
        presets = {name: what for name, (what, _) in problems.PRESETS.items()}
        click.echo(json.dumps(registry | {"presets": presets}))
        return
    algorithms = Table(title="algorithms")
    for column in ("name", "what", "family", "dtypes", "parameters", "source"):
        algorithms.add_column(column)
    for row in registry["algorithms"]:
        parameters = " ".join(spec["name"] for spec in row["params"])
        dtypes = " ".join(row["dtypes"])
        algorithms.add_row(
            row["name"], row["summary"], row["family"], dtypes, parameters, row["source"]
        )
    output.show(algorithms)
    sets = Table(title="instruction sets")
    for column in ("name", "lanes", "register tiles (rows x vectors)", "runs here"):
        sets.add_column(column)
    for row in registry["isas"]:
        tiles = ", ".join(f"{mr}x{nv}" for mr, nv in row["tiles"])
        sets.add_row(row["name"], str(row["width"]), tiles, "yes" if row["runnable"] else "no")
    output.show(sets)
    presets_table = Table(title="presets")
    for column in ("name", "what", "convolutions"):
        presets_table.add_column(column)
    for name, (what, _) in problems.PRESETS.items():
        presets_table.add_row(name, what, str(len(problems.preset(name))))
    output.show(presets_table)


class _Sizes(click.ParamType):  # type: ignore[type-arg]
    """Positive integers with commas between them."""

    name = "sizes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers such as 8,56,56,64", param, ctx)
        if any(size < 1 for size in sizes):
            self.fail(f"{value!r} holds a size below 1", param, ctx)
        if any(size >= 2**31 for size in sizes):
            self.fail(f"{value!r} holds a size that is too large", param, ctx)
        return sizes


def _explained_arrays(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: str,
    groups: int,
    dtype: str,
    grad: str,
) -> jaxwin.Explanation:
    try:
        x, w = (_abstract(shape, dtype) for shape in (x_shape, w_shape))
        rank = len(x_shape) - 2

        def f(x: jax.Array, w: jax.Array) -> jax.Array:
            return jaxwin.conv(
                x,
                w,
                stride=stride * rank if len(stride) == 1 else stride,
                dilation=dilation * rank if len(dilation) == 1 else dilation,
                padding=cast(Any, int(padding) if padding.lstrip("-").isdecimal() else padding),
                groups=groups,
            )

        if grad == "none":
            return jaxwin.explain(f, x, w)
        y = jax.eval_shape(f, x, w)
        argument = ("input", "filter").index(grad)

        def transposed(operand: jax.Array, cotangent: jax.Array) -> Any:
            def linear(v: jax.Array) -> jax.Array:
                return f(v, operand) if argument == 0 else f(operand, v)

            return jax.linear_transpose(linear, (x, w)[argument])(cotangent)

        return jaxwin.explain(transposed, (w, x)[argument], y)
    except (OverflowError, TypeError, ValueError) as error:
        raise click.UsageError(str(error).splitlines()[0]) from error


_EXPLAIN_HELP = f"""Show what dispatch decides for convolutions, and why not otherwise.

A convolution is a SHAPE, all those of a --preset or of a recorded file, or --input and --filter as
arrays have them. It says which tier decided (tuned, transferred, heuristic, requested, xla), the
plan, its workspace, the measurement behind it, and why other measurements and algorithms were not
taken. Nothing is computed.

{options.catalogue()}
\b
Example:
  jaxwin-tune explain "n8 56x56 c64 k128 w3 s2 p1" --direction fwd,dx,dw
  jaxwin-tune explain --preset resnet50 --batch 8 --json
  jaxwin-tune explain recorded.jsonl
  jaxwin-tune explain --input 8,56,56,64 --filter 3,3,64,128 --stride 2
  jaxwin-tune explain --input 1,56,56,128 --filter 3,3,1,128 --groups 128 --grad filter
"""


@main.command(help=_EXPLAIN_HELP)
@click.argument("shapes", metavar="[SHAPE]...", nargs=-1)
@options.preset
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Of shapes."
)
@click.option(
    "--direction",
    "directions",
    type=options.Choices(problems.DIRECTIONS),
    default="fwd",
    show_default=True,
    help="Of shapes: fwd, dx (input gradient) and dw (weight gradient).",
)
@click.option(
    "--layout",
    type=click.Choice(problems.LAYOUTS),
    default="nhwc",
    show_default=True,
    help="Of shapes.",
)
@click.option("--input", "x_shape", type=_Sizes(), help="N,[[D,]H,]W,C")
@click.option("--filter", "w_shape", type=_Sizes(), help="[[KD,]KH,]KW,C/groups,K")
@click.option("--stride", type=_Sizes(), default=(1,), help="One value, or one per dimension.")
@click.option("--dilation", type=_Sizes(), default=(1,), help="Of the filter.")
@click.option(
    "--padding",
    help="SAME, VALID or a number.  [default: SAME for --input, VALID for shapes]",
)
@click.option("--groups", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--grad", type=click.Choice(["none", "input", "filter"]), default="none")
@_json
def explain(
    shapes: tuple[str, ...],
    presets: tuple[str, ...],
    batch: int,
    directions: tuple[str, ...],
    layout: str,
    x_shape: tuple[int, ...] | None,
    w_shape: tuple[int, ...] | None,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: str | None,
    groups: int,
    dtype: str,
    grad: str,
    as_json: bool,
) -> None:
    if (x_shape is None) != (w_shape is None):
        raise click.UsageError("--input and --filter: give both of them")
    if x_shape is not None and w_shape is not None:
        if shapes or presets:
            raise click.UsageError("--input: give either that or a SHAPE")
        explanation = _explained_arrays(
            x_shape, w_shape, stride, dilation, padding or "SAME", groups, dtype, grad
        )
    else:
        found: dict[jaxwin.Problem, None] = {}
        files = [shape for shape in shapes if options.is_file(shape)]
        rest = [shape for shape in shapes if not options.is_file(shape)]
        try:
            if rest or presets or not files:
                if padding is not None and padding.lower() not in problems.PADDINGS:
                    raise click.UsageError("--padding: shapes say numbers themselves, as in p1")
                given: dict[str, Any] = {
                    "batch": batch,
                    "padding": (padding or "valid").lower(),
                    "dtype": dtype,
                }
                for conv in options.convolutions(rest, presets, **given):
                    found |= dict.fromkeys(conv.problem(d, layout) for d in directions)
            for file in files:
                found |= dict.fromkeys(task.problem for task in options.recorded(file))
            lines = [row for problem in found for row in jaxwin.explain(problem)]
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        explanation = jaxwin.Explanation(tuple(lines))
    if as_json:
        rows = [dataclasses.asdict(row) | {"text": str(row.problem)} for row in explanation]
        click.echo(json.dumps(rows))
        return
    click.echo(str(explanation))
    for row in explanation:
        if row.rejected and len(explanation) > 1:
            click.echo(str(row.problem))
        for name, reason in row.rejected.items():
            click.echo(f"  not {name}: {reason}")


@main.command()
@click.option(
    "--repair", is_flag=True, help="Upgrade old tuning databases, set aside damaged ones."
)
@_json
def doctor(repair: bool, as_json: bool) -> None:
    """Say what jaxwin sees of this machine, and what is wrong.

    Exits with 1 where something is wrong.

    \b
    Example:
      jaxwin-tune doctor
      jaxwin-tune doctor --repair
    """
    problems: list[str] = []
    repairs = database_commands.repair() if repair else []
    facts: dict[str, Any] = {
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    for package in _OPTIONAL:
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    facts["jaxwin is in"] = str(Path(jaxwin.__file__).parent)
    registry = _registry.registry()
    facts["instruction sets"] = [row["name"] for row in registry["isas"] if row["runnable"]]
    try:
        facts["instruction set in use"] = _registry.isa()
        facts["mode"], facts["family"] = _settings.mode(), _settings.family()
    except ValueError as error:
        problems.append(str(error))
    facts["kernels"] = ", ".join(_registry.kernels())
    facts["threads"] = _registry.threads()
    facts["caches"] = registry["caches"]
    facts |= machine.conditions()
    try:
        facts["jax platform"] = jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS names one that is not there
        facts["jax platform"] = "none"
        problems.append(str(error).splitlines()[0])
    for variable in (*_settings.VARIABLES, "JAX_PLATFORMS", "XLA_FLAGS"):
        if variable in os.environ:
            facts[variable] = os.environ[variable]
    on_gpu = facts["jax platform"] == "gpu" and "cuda" in _compat.platform_version().lower()
    if on_gpu:
        gpu = _ffi.cuda_device(0)
        told = "{name}, {processors} processors, compute capability {capability}"
        facts["GPU"] = gpu.get("error") or told.format(**gpu)
        if why := gpu.get("error") or _cuda.unusable():
            problems.append(f"the kernels of the GPU cannot run: {why}")
    elif facts["jax platform"] not in ("cpu", "none"):
        problems.append(
            f"JAX's default platform is {facts['jax platform']}: jaxwin has kernels for CPUs and "
            "NVIDIA GPUs"
        )
    if not problems:
        problems += _self_test(on_gpu)
    database_facts, database_problems = database_commands.examine()
    facts |= database_facts
    if repair:
        facts["repairs"] = repairs if as_json else "; ".join(repairs) or "nothing to repair"
    problems += database_problems
    if as_json:
        click.echo(json.dumps({"facts": facts, "problems": problems}))
    else:
        for name, value in facts.items():
            click.echo(f"{name}: {database_commands.as_text(value)}")
        for problem in problems:
            click.echo(f"problem: {problem}", err=True)
        if not problems:
            click.echo("all is well")
    sys.exit(1 if problems else 0)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands and options; put it where the shell reads it.

    \b
    Example:
      jaxwin-tune completion bash > ~/.local/share/bash-completion/completions/jaxwin-tune
      jaxwin-tune completion zsh > ~/.zfunc/_jaxwin-tune
      jaxwin-tune completion fish > ~/.config/fish/completions/jaxwin-tune.fish
    """
    source = shell_completion.get_completion_class(shell)
    assert source is not None
    click.echo(source(main, {}, "jaxwin-tune", "_JAXWIN_TUNE_COMPLETE").source())


# --- bench -----------------------------------------------------------------------------------


class _Peers(click.ParamType):  # type: ignore[type-arg]
    """Names of peers, with commas between them."""

    name = "peers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[str]:
        # Checked when it is known whether they are peers of single convolutions or of models.
        return value if isinstance(value, list) else str(value).split(",")


class _Batches(_Sizes):
    """Batches, with commas between them."""

    name = "batches"


def _catalogue() -> str:
    def listed(title: str, what: dict[str, str]) -> list[str]:
        width = max(map(len, what))
        return ["\b", title, *(f"  {name:<{width}} {text}" for name, text in what.items()), ""]

    return "\n".join(
        [
            options.catalogue(),
            *listed("Peers:", peers.summaries()),
            *listed("Measured where --peers names them:", peers.baselines()),
            *listed("Models:", {name: model.summary for name, model in models.MODELS.items()}),
            *listed("Peers of models:", model_bench.summaries()),
        ]
    )


_BENCH_HELP = f"""Compare jaxwin with XLA and with other libraries.

It measures one convolution at a time, or with --model whole networks with random weights, the same
numbers in every library.

{_catalogue()}
All peers run in one process, on the same CPUs, in rounds of random order. Before each sample the
process sleeps and the peer runs untimed, once or with several threads for 10 ms, so that no thread
of the peer before it still spins and its own are awake.
Each peer's result is compared with that of jax.lax in float64; a wrong one is reported and not
counted. What is not installed is named as missing. Results of models are compared with those of
jax.lax, of a training step the losses and every parameter's gradient.

Times are medians over the rounds. Ratios are medians over the rounds of the ratios in each: that is
steadier where the speed of the machine changes for seconds.

With one thread the clock is the CPU time of the process, since other processes may take a share of
the core that wall-clock time would count. With more threads it is wall-clock time, since CPU time
adds up the threads. Peers marked "output kept" write into memory that they keep, the others into
fresh memory in each call, whose page faults are part of their time. The former are compared with
jaxwin-loop, many convolutions in one program that uses one result's memory, the latter with jaxwin.
jaxwin-donated, single calls that get their result's memory back, shows what fresh memory costs.

"jaxwin / best" is of jaxwin that is given plain weights in each call. "jaxwin / best alike"
compares the peers marked "weights packed before" with jaxwin-packed or jaxwin-packed-loop,
whose weights come from jaxwin.pack, and the others with jaxwin as it is; where no kernel of jaxwin
reads packed weights, all of them. ± is the standard error of a ratio, from how the rounds differ.
What differs from one process to the next is not in it, and the best of several peers is one
that luck favoured.

Exits with 1 where jaxwin's result is wrong or --fail-under says so, and with 130 after Ctrl-C,
which prints what was measured so far.

\b
Example:
  jaxwin-tune bench --preset paper --batch 1 --threads 1
  jaxwin-tune bench --preset resnet50 --direction fwd,dx,dw --peers xla,jaxwin --markdown out.md
  jaxwin-tune bench "n8 56x56 c64 k128 w3 s2 p1" "1000 c64 k64 w5" --json - > out.json
  jaxwin-tune bench 56x56,c128,k128,w3,p1,g128 --algorithm direct --fail-under 1
  jaxwin-tune bench --model resnet50 --model mobilenetv2 --threads 1
"""


@main.command(help=_BENCH_HELP)
@click.argument("shapes", metavar="[SHAPE]...", nargs=-1)
@options.preset
@click.option(
    "--model",
    "chosen_models",
    multiple=True,
    metavar="NAME",
    type=click.Choice(list(models.MODELS)),
    help="A whole network instead; see above; may be given several times.",
)
@click.option(
    "--batch",
    "batches",
    type=_Batches(),
    metavar="N[,N]...",
    help="One, or with --model several.  [default: 1; the model's own]",
)
@options.padding
@options.direction
@options.dtype
@click.option("--threads", type=click.IntRange(min=1), help="CPUs to use.  [default: all usable]")
@click.option(
    "--layout",
    type=click.Choice(problems.LAYOUTS),
    default="nhwc",
    show_default=True,
    help="Of the arrays of XLA and jaxwin.",
)
@click.option("--peers", "names", type=_Peers(), help="Of those above.  [default: all]")
@click.option(
    "--algorithm",
    "algorithms",
    multiple=True,
    metavar="NAME",
    help="Also measure jaxwin with this algorithm; may be given several times.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=11, show_default=True)
@click.option(
    "--min-time",
    type=click.FloatRange(min=0, min_open=True),
    default=20.0,
    show_default=True,
    help="Milliseconds per sample, at least.",
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0),
    default=20.0,
    show_default=True,
    help="Seconds per peer and row, after which it gets no more samples.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the data and the order.")
@click.option(
    "--keep-memory",
    is_flag=True,
    help="Have the process keep its memory, for every peer: jaxwin.keep_memory.",
)
@click.option(
    "--json",
    "json_file",
    type=output.Output(),
    metavar="FILE",
    help="Write everything as JSON; - is stdout.",
)
@click.option(
    "--markdown",
    "markdown_file",
    type=output.Output(),
    metavar="FILE",
    help="Likewise as Markdown tables.",
)
@click.option(
    "--fail-under",
    type=float,
    metavar="R",
    help="Exit with 1 if the geometric mean of jaxwin / best is below R.",
)
@click.option("--dry-run", is_flag=True, help="List the convolutions and stop.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.pass_context
def bench(
    ctx: click.Context,
    shapes: tuple[str, ...],
    presets: tuple[str, ...],
    chosen_models: tuple[str, ...],
    batches: tuple[int, ...] | None,
    padding: str,
    directions: tuple[str, ...],
    dtype: str,
    threads: int | None,
    layout: str,
    names: list[str] | None,
    algorithms: tuple[str, ...],
    rounds: int,
    min_time: float,
    budget: float,
    seed: int,
    keep_memory: bool,
    json_file: str | None,
    markdown_file: str | None,
    fail_under: float | None,
    dry_run: bool,
    quiet: bool,
) -> None:
    usable = len(machine.usable_cpus())
    if threads is not None and threads > usable:
        raise click.UsageError(f"--threads: {threads}, but this process may use {usable} CPUs")
    for algorithm in algorithms:
        known = _registry.algorithm_names()
        if algorithm not in known:
            raise click.UsageError(f"--algorithm: {algorithm!r} is not one of {', '.join(known)}")
    try:
        if chosen_models:
            _only_convolutions(ctx, shapes)
            work = _of_models(chosen_models, batches, names)
        else:
            work = _of_convolutions(shapes, presets, batches, padding, dtype, directions, names)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--peers'") from error
    if dry_run:
        click.echo("\n".join(work.descriptions))
        return
    chosen = work.peers + [f"jaxwin:{name}" for name in dict.fromkeys(algorithms)]
    if fail_under is not None and not (
        any(map(peers.is_ours, chosen)) and not all(map(peers.is_ours, chosen))
    ):
        raise click.UsageError("--fail-under: needs jaxwin and another peer among --peers")
    settings = benchmark.Options(
        threads=usable if threads is None else threads,
        layout=layout,
        rounds=rounds,
        min_seconds=min_time / 1e3,
        budget_seconds=budget,
        seed=seed,
        keep_memory=keep_memory,
    )
    if keep_memory and not jaxwin.keep_memory():
        raise click.UsageError("--keep-memory: needs glibc, which is not this C library")
    try:
        result = work.prepare(chosen, settings)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    for name, reason in result.missing.items():
        click.echo(f"missing peer {name}: {reason}", err=True)
    if warning := result.load_warning():
        click.echo(f"WARNING: {warning}", err=True)
    if not result.peers:
        raise click.ClickException("none of the peers is installed: pip install 'jaxwin[bench]'")
    progress = output.Progress(work.rows, quiet)
    try:
        work.run(result, progress)
    except KeyboardInterrupt:
        pass  # what was measured is printed; the exit code tells
    finally:
        progress.done()
    tables, notes = work.grids(result), work.notes(result)
    taken = output.write(
        {
            json_file: lambda: output.as_json(result.to_json()),
            markdown_file: lambda: benchmark.markdown(tables, notes),
        }
    )
    if not taken:
        output.tables(tables)
        output.notes(notes)
    if not result.complete:
        sys.exit(exits.INTERRUPTED)
    mean = result.mean_ratio()
    ours_wrong = [name for _, name in result.wrong() if peers.is_ours(name)]
    slow = fail_under is not None and (mean is None or mean < fail_under)
    if slow:
        click.echo(f"jaxwin / best is {_or_none(mean)}, below {fail_under:g}", err=True)
    sys.exit(1 if ours_wrong or slow else 0)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a benchmark is of: single convolutions, or whole models."""

    descriptions: list[str]
    peers: list[str]
    rows: int
    prepare: Callable[[list[str], benchmark.Options], benchmark.Result]
    run: Callable[[benchmark.Result, Callable[[str, str], None]], None]
    grids: Callable[[benchmark.Result], dict[str, benchmark.Grid]]
    notes: Callable[[benchmark.Result], list[str]]


def _of_convolutions(
    shapes: tuple[str, ...],
    presets: tuple[str, ...],
    batches: tuple[int, ...] | None,
    padding: str,
    dtype: str,
    directions: tuple[str, ...],
    names: list[str] | None,
) -> _Work:
    if batches is not None and len(batches) > 1:
        raise click.UsageError("--batch: takes several only with --model")
    batch = 1 if batches is None else batches[0]
    convs = options.convolutions(shapes, presets, batch=batch, padding=padding, dtype=dtype)
    tasks = [(conv, direction) for direction in directions for conv in convs]
    for conv, direction in tasks:
        if conv.dtype in problems.INTEGERS and direction != "fwd":
            raise click.UsageError(f"{conv}: integers have no gradients ({direction})")

    def described(conv: problems.Conv) -> str:
        times = f"{conv.count} times " if conv.count > 1 else ""
        return f"{conv.name}: {conv}, {times}{conv.flops / 1e6:.1f} MFLOP"

    return _Work(
        [described(conv) for conv in convs],
        benchmark.select(peers.names() if names is None else names),
        len(tasks),
        benchmark.prepare,
        lambda result, progress: benchmark.run(result, tasks, progress),
        benchmark.grids,
        benchmark.notes,
    )


def _of_models(
    chosen: tuple[str, ...], batches: tuple[int, ...] | None, names: list[str] | None
) -> _Work:
    pairs = [
        (name, batch)
        for name in dict.fromkeys(chosen)
        for batch in batches or (models.MODELS[name].batch,)
    ]
    return _Work(
        [f"{name}: {models.MODELS[name].summary}, batch {batch}" for name, batch in pairs],
        model_bench.select(model_bench.names() if names is None else names),
        len(pairs),
        model_bench.prepare,
        lambda result, progress: model_bench.run(result, pairs, progress),
        model_bench.grids,
        model_bench.notes,
    )


def _only_convolutions(ctx: click.Context, shapes: tuple[str, ...]) -> None:
    """Refuses what has no meaning for whole models."""
    ignored = {
        "presets": "--preset",
        "padding": "--padding",
        "directions": "--direction",
        "dtype": "--dtype",
        "layout": "--layout",
        "algorithms": "--algorithm",
    }
    given = ["SHAPE"] * bool(shapes)
    for parameter, option in ignored.items():
        if ctx.get_parameter_source(parameter) is not click.core.ParameterSource.DEFAULT:
            given.append(option)
    if given:
        raise click.UsageError(f"--model cannot be combined with {', '.join(given)}")


def _or_none(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _abstract(shape: tuple[int, ...], dtype: str) -> Any:
    """An array's shape and dtype without the array."""
    try:
        known = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"--dtype: {dtype!r} is no dtype such as float32") from error
    return jax.eval_shape(lambda: jnp.zeros(shape, known))


def _self_test(on_gpu: bool) -> list[str]:
    """One small convolution against lax: what is wrong with it."""
    # On a GPU cuDNN would compute it, if no kernel were named.
    convolve = functools.partial(jaxwin.conv, algorithm="im2win" if on_gpu else "auto")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 12, 13, 8), np.float32))
    w = jnp.asarray(rng.standard_normal((3, 3, 8, 16), np.float32))
    numbers = ("NHWC", "HWIO", "NHWC")
    (row,) = jaxwin.explain(convolve, x, w)
    if row.algorithm == "xla":
        return [row.reason]
    try:  # by name: this convolution needs no tuned row
        ours = jax.jit(functools.partial(jaxwin.conv, algorithm=row.algorithm))(x, w)
    except Exception as error:  # whatever it is, the user wants to read it here
        return [f"a small convolution failed: {error}"]
    theirs = jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, precision="highest"
    )
    if not np.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
        return ["a small convolution differs from lax's"]
    return []
