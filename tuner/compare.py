# SPDX-License-Identifier: Apache-2.0
"""The comparisons that the papers behind the algorithms make, on this machine.

Each has the convolutions and contenders of its paper, as far as they are known, and the paper's
figures beside those that were measured. The stopwatch, the peers and the checks are those of
`jaxwin-tune bench`. What algorithms and layouts there are is asked from the registry and from
`jaxwin.conv`.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from typing import Any

import jaxwin
from jaxwin import _ffi, _layouts, _registry
from jaxwin.tuner import bench, measure, peers, report, svg
from jaxwin.tuner.problems import Conv, preset
from jaxwin.tuner.search import duration

SCHEMA_VERSION = 3
MIB = 2**20
# How much is measured: a first look, what shows the papers' figures, or every layer in every way.
EXTENTS = ("quick", "usual", "full")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of a paper and what it is here.

    source: the paper, and where in it. ours: None where it could not be measured. met: whether
    ours is at least (or at most) what the paper has; None where there is nothing to meet.
    """

    what: str
    paper: str
    source: str
    ours: str | None
    met: bool | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """Convolutions that one set of contenders computes. Of all directions, `layout` is nhwc."""

    convs: tuple[Conv, ...]
    directions: tuple[str, ...]
    peers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A paper's comparison.

    tasks: what is measured, by extent. figures: the paper's, from all rows. against: the contender
    that others are compared with in the charts.
    """

    name: str
    title: str
    what: str
    against: str
    tasks: Callable[[str], list[Task]]
    figures: Callable[[Sequence[bench.Row]], Iterable[Figure]]


@dataclasses.dataclass
class Section:
    """What came of a comparison."""

    comparison: Comparison
    result: bench.Result
    figures: list[Figure] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Run:
    """Some comparisons, complete or interrupted."""

    base: bench.Result
    extent: str
    sections: list[Section] = dataclasses.field(default_factory=list)
    complete: bool = False

    def wrong(self) -> list[str]:
        """Where a result of jaxwin was wrong."""
        return [
            f"{row.name} {row.direction}: {name}: {row.cells[name].reason}"
            for section in self.sections
            for row, name in section.result.wrong()
            if peers.is_ours(name)
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything, for `json.dumps`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "extent": self.extent,
            "complete": self.complete,
            "comparisons": [
                {
                    "name": section.comparison.name,
                    "title": section.comparison.title,
                    "figures": [dataclasses.asdict(figure) for figure in section.figures],
                    **section.result.to_json(),
                }
                for section in self.sections
            ],
        }


def measured(
    run: Run,
    names: Sequence[str],
    progress: Callable[[str, str], None] = lambda row, what: None,
    finished: Callable[[], object] = lambda: None,
) -> None:
    """Measures comparisons, adding sections to `run`; may be interrupted.

    finished: called after each comparison.

    The machine of `run` is that of `bench.prepare` with `contenders(names, extent)`.
    """
    for name in names:
        comparison = COMPARISONS[name]
        result = dataclasses.replace(run.base, rows=[], peers=[], complete=False)
        section = Section(comparison, result)
        run.sections.append(section)
        try:
            for task in comparison.tasks(run.extent):
                _measure(result, task, progress)
            result.complete = True
        finally:
            for row in result.rows:
                for peer in result.peers:
                    row.cells.setdefault(peer, bench.Cell("unsupported", "not compared here"))
            section.figures += comparison.figures(result.rows)
        finished()
    run.complete = True


def _measure(result: bench.Result, task: Task, progress: Callable[[str, str], None]) -> None:
    """Adds a task's rows to a result."""
    chosen = [peer for peer in task.peers if peer not in result.missing]
    result.peers += [peer for peer in chosen if peer not in result.peers]
    part = dataclasses.replace(result, peers=chosen)  # its rows are the same list
    pairs = [(conv, direction) for direction in task.directions for conv in task.convs]
    try:
        bench.run(part, pairs, progress)
    finally:
        result.load_after = part.load_after
        result.others_share, result.stolen_share = part.others_share, part.stolen_share


def contenders(names: Iterable[str], extent: str) -> list[str]:
    """All peers of comparisons."""
    found: dict[str, None] = {}
    for name in names:
        for task in COMPARISONS[name].tasks(extent):
            found |= dict.fromkeys(task.peers)
    return list(found)


def rows(names: Iterable[str], extent: str) -> int:
    """How many rows comparisons have."""
    return sum(
        len(task.convs) * len(task.directions)
        for name in names
        for task in COMPARISONS[name].tasks(extent)
    )


# --- what the figures are made of ------------------------------------------------------------


def _speed(rows: Iterable[bench.Row], ours: str, theirs: str) -> list[float]:
    """How many times faster `ours` is than `theirs`, on the rows that have both."""
    return [ratio for row in rows if (ratio := row.relative(ours, theirs)) is not None]


def _at_least(
    what: str, times: float, source: str, ratios: Sequence[float], paper: str = ""
) -> Figure:
    """Of a geometric mean of speeds."""
    paper = paper or f"{times:g}x"
    if not ratios:
        return Figure(what, paper, source, None)
    mean = measure.geomean(ratios)
    spread = f"{mean:.2f}x ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} layers)"
    return Figure(what, paper, source, spread, mean >= times)


def _told(what: str, paper: str, source: str, ratios: Sequence[float]) -> Figure:
    """The same, where the paper's figure is none that could be met."""
    return dataclasses.replace(_at_least(what, 0, source, ratios, paper), met=None)


def workspace(conv: Conv, algorithm: str, layout: str = "nhwc", **changes: int) -> int | None:
    """Bytes that an algorithm needs with some parameters changed; None where it refuses."""
    try:
        return peers.plan(conv.problem("fwd", layout), algorithm, changes).workspace_bytes
    except peers.Unsupported:
        return None


def _measured_workspace(rows: Iterable[bench.Row], peer: str) -> list[int]:
    cells = [row.cells[peer] for row in rows if peer in row.cells]
    return [c.workspace_bytes for c in cells if c.status == "ok" and c.workspace_bytes is not None]


def _some(convs: tuple[Conv, ...], names: Iterable[str], extent: str) -> tuple[Conv, ...]:
    return tuple(conv for conv in convs if extent != "quick" or conv.name in names)


# --- im2win ----------------------------------------------------------------------------------

_IM2WIN, _FULL = "jaxwin:im2win", "jaxwin:im2win:full=1"
_IM2COL = "jaxwin:im2col:full=1"
_PAPER = "arXiv 2306.14320"
_QUICK_LAYERS = ("cv1", "cv5", "cv9", "cv12")


def _im2win_tasks(extent: str) -> list[Task]:
    convs = _some(preset("paper"), _QUICK_LAYERS, extent)
    names = (_IM2WIN, _FULL, _IM2COL, "jaxwin:direct", "torch-native", "loops")
    return [Task(convs, ("fwd",), names)]


def _im2win_figures(rows: Sequence[bench.Row]) -> Iterator[Figure]:
    convs = preset("paper")
    # Without the packed filters (pack 0), which both have and the paper does not count.
    full = [workspace(conv, "im2win", full=1, pack=0) for conv in convs]
    patches = [workspace(conv, "im2col", full=1, pack=0) for conv in convs]
    shares = [a / b for a, b in zip(full, patches, strict=True) if a is not None and b]
    mean = sum(shares) / len(shares)
    yield Figure(
        "memory of the whole window tensor, as a share of im2col's (mean of the twelve layers)",
        "41.6 %",
        f"{_PAPER}, abstract",
        f"{mean:.1%} ({min(shares):.1%} to {max(shares):.1%})",
        mean <= 0.416,
    )
    strips = [
        strip / _registry.threads()
        for batch in (1, 128)
        for conv in preset("paper", batch=batch)
        if (strip := workspace(conv, "im2win", pack=0)) is not None
    ]
    yield Figure(
        "memory of the blocked form per thread, batch 1 and 128 (the largest)",
        "not in the paper; ours to keep: 1 MiB",
        "this project",
        f"{max(strips) / MIB:.2f} MiB",
        max(strips) <= MIB,
    )
    torch = _speed(rows, _IM2WIN, "torch-native")
    yield _at_least(
        "im2win against PyTorch's im2col convolution (oneDNN off), geometric mean",
        3.6,
        f"{_PAPER}, abstract",
        torch,
    )
    loops = _speed(rows, _IM2WIN, "loops")
    yield _at_least(
        "im2win against a plain direct loop nest in C (-O3 -march=native), geometric mean",
        5.3,
        f"{_PAPER}, abstract",
        loops,
    )
    yield _told(
        "blocked against whole im2win, geometric mean",
        "not in the paper",
        "this project",
        _speed(rows, _IM2WIN, _FULL),
    )
    yield _told(
        "im2win against im2col with the same micro-kernels, geometric mean",
        "not in the paper",
        "this project",
        _speed(rows, _IM2WIN, _IM2COL),
    )


# --- layouts ---------------------------------------------------------------------------------

_LAYOUTS_PAPER = "arXiv 2408.00278"
_LAYOUT_ALGORITHMS = ("im2win", "direct")


def _in_layout(algorithm: str, layout: str) -> str:
    return f"jaxwin:{algorithm}@{layout}"


def _layout_tasks(extent: str) -> list[Task]:
    convs = _some(preset("paper", batch=16), ("cv1", "cv9", "cv12"), extent)
    if extent != "full":  # 76 gigaflops a call say nothing that the others do not
        convs = tuple(conv for conv in convs if conv.name != "cv4")
    names = tuple(
        _in_layout(algorithm, layout)
        for algorithm in _LAYOUT_ALGORITHMS
        for layout in _layouts.names()
    )
    return [Task(convs, ("fwd",), names)]


def _layout_figures(rows: Sequence[bench.Row]) -> Iterator[Figure]:
    for algorithm in _LAYOUT_ALGORITHMS:
        for layout in _layouts.names()[1:]:
            ratios = _speed(rows, _in_layout(algorithm, "NHWC"), _in_layout(algorithm, layout))
            known = algorithm == "im2win" and layout == "NCHW"
            if ratios:
                yield _told(
                    f"{algorithm}, NHWC against {layout}",
                    "1.11x to 4.55x" if known else "not known to us",
                    f"{_LAYOUTS_PAPER}, abstract",
                    ratios,
                )
    for algorithm in _LAYOUT_ALGORITHMS:
        shares = [
            row.cells[name].peak_share or 0.0
            for row in rows
            for name in (_in_layout(algorithm, layout) for layout in _layouts.names())
            if row.time(name) is not None
        ]
        paper = {"im2win": "95 %", "direct": "94 %"}[algorithm]
        if shares:
            yield Figure(
                f"{algorithm}, largest share of the measured peak in any layout",
                f"up to {paper}",
                f"{_LAYOUTS_PAPER}, abstract",
                f"{max(shares):.0%}",
            )


# --- low memory ------------------------------------------------------------------------------


def _dense_algorithms() -> dict[str, str]:
    """Peers for the registry's algorithms that compute a plain layer, by their names.

    In channels last, or where an algorithm does not take those, in channels first.
    """
    (conv,) = (conv for conv in preset("paper") if conv.name == "cv9")
    found: dict[str, str] = {}
    for layout in ("NHWC", "NCHW"):
        native = conv.problem("fwd", layout.lower()).native()
        for name, row in _ffi.candidates(native, isa=_registry.isa()).items():
            if "rejected" not in row:
                found.setdefault(name, _in_layout(name, layout))
    return found


def _memory_tasks(extent: str) -> list[Task]:
    convs = _some(preset("paper"), _QUICK_LAYERS, extent)
    return [Task(convs, ("fwd",), (_IM2COL, *_dense_algorithms().values()))]


def _memory_figures(rows: Sequence[bench.Row]) -> Iterator[Figure]:
    sources = {row["name"]: row["source"] for row in _registry.registry()["algorithms"]}
    for name, peer in _dense_algorithms().items():
        ratios = _speed(rows, peer, _IM2COL)
        bytes_ = _measured_workspace(rows, peer)
        if not ratios or not bytes_ or name == "im2col":
            continue
        told = _told(name, "", "", ratios)
        yield Figure(
            f"{name}: speed against whole im2col; most memory of a layer",
            _CLAIMS.get(name.removeprefix("kn2").partition("_")[2], "not known to us"),
            sources[name],
            f"{told.ours}; {max(bytes_) / MIB:.2f} MiB",
        )
    yield Figure(
        "im2col whole: most memory of a layer",
        "K² times the input",
        sources["im2col"],
        f"{max(_measured_workspace(rows, _IM2COL), default=0) / MIB:.2f} MiB",
    )


# By the end of the name: what the abstract and the taxonomy of arXiv 1709.03395 say.
_CLAIMS = {
    "as": "as fast as the best that build patches; memory of one output",
    "aa": "as fast as the best that build patches; memory of K rows",
}


# --- transposed ------------------------------------------------------------------------------

_SEGREGATED = "jaxwin:segregated"


def _transposed_tasks(extent: str) -> list[Task]:
    images = tuple(c for c in preset("transposed") if c.size == (224, 224) and c.features == 1)
    gan = _some(preset("gan"), ("dc1", "gp3", "eb6"), extent)
    names = ("jaxwin", _SEGREGATED, "zeros", "zeros-xla", "xla", "onednn", "torch-native", "ort")
    return [Task((*images, *gan), ("fwd",), names)]


def _transposed_figures(rows: Sequence[bench.Row]) -> Iterator[Figure]:
    images = [row for row in rows if row.name.endswith(".224")]
    gan = [row for row in rows if row not in images]
    source = "arXiv 2502.20493, abstract"
    for ours, who in (("jaxwin", "jaxwin's choice"), (_SEGREGATED, "segregated")):
        yield _at_least(
            f"{who} against zero insertion with the same kernels, 224x224x3, windows 3, 4, 5",
            3.89,
            source,
            _speed(images, ours, "zeros"),
            "3.89x (Xeon), 2.03x (RTX 2070)",
        )
        yield _at_least(
            f"{who} against zero insertion with the same kernels, layers of four GANs",
            3.5,
            source,
            _speed(gan, ours, "zeros"),
            "3.5x",
        )
        yield _told(
            f"{who} against zero insertion by XLA, all layers",
            "not in the paper",
            "this project",
            _speed(rows, ours, "zeros-xla"),
        )
    eb = [row for row in gan if row.name.startswith("eb")]
    # Of both dense convolutions the one that needs less besides: most of that are the zeros.
    with_zeros = [
        min(_measured_workspace([row], "zeros") + _measured_workspace([row], "zeros-xla"))
        for row in eb
        if row.time("zeros") is not None or row.time("zeros-xla") is not None
    ]
    without = _measured_workspace(eb, _SEGREGATED)
    if len(with_zeros) == len(without) > 1:
        saved = (sum(with_zeros) - sum(without)) / MIB
        yield Figure(
            "memory saved in EB-GAN, sum of its layers",
            "up to 35 MB",
            source,
            f"{saved:.1f} MiB",
        )


# --- 1-D -------------------------------------------------------------------------------------

_LONG_SOURCE = "arXiv 2104.08002, abstract"


def _long_tasks(extent: str) -> list[Task]:
    names = ("jaxwin", "xla", "xla-eigen", "onednn", "onednn-nchw", "torch-native", "ort")
    fast = ("jaxwin", "xla-eigen", "onednn", "onednn-nchw")
    # In channels last these gradients take oneDNN ten seconds a call.
    gradients = ("jaxwin", "xla-eigen", "onednn-nchw")
    tasks = []
    for dtype in ("float32", "bfloat16"):
        convs = preset("long1d", dtype=dtype)
        if extent == "full":
            tasks.append(Task(convs, ("fwd", "dx", "dw"), names))
            continue
        paper = tuple(conv for conv in convs if conv.name == "s51d8")
        tasks.append(Task(paper, ("fwd",), names))
        if extent == "quick":
            continue
        others = tuple(conv for conv in convs if conv.name != "s51d8")
        if dtype == "float32":
            tasks.append(Task(paper, ("dx", "dw"), fast))
            tasks.append(Task(others, ("fwd", "dx"), fast))
            tasks.append(Task(others, ("dw",), gradients))
        else:
            tasks.append(Task(paper, ("dx", "dw"), gradients))
            tasks.append(Task(others, ("fwd",), fast))
    return tasks


def _long_figures(rows: Sequence[bench.Row]) -> Iterator[Figure]:
    for dtype in ("float32", "bfloat16"):
        of_type = [row for row in rows if row.dtype == dtype]
        for direction in dict.fromkeys(row.direction for row in of_type):
            chosen = [row for row in of_type if row.direction == direction]
            best = []
            for row in chosen:
                against = (row.relative("jaxwin", p) for p in ("onednn", "onednn-nchw"))
                if known := [ratio for ratio in against if ratio is not None]:
                    best.append(min(known))
            yield _told(
                f"{dtype} {direction}: against the faster form of oneDNN",
                "up to 6.86x, whole training",
                _LONG_SOURCE,
                best,
            )
    shares = [
        share
        for row in rows
        if row.time("jaxwin") is not None and (share := row.cells["jaxwin"].peak_share) is not None
    ]
    if shares:
        yield Figure(
            "float32: largest share of the measured peak",
            "up to 80 %",
            _LONG_SOURCE,
            f"{max(shares):.0%}",
        )


COMPARISONS: dict[str, Comparison] = {
    comparison.name: comparison
    for comparison in (
        Comparison(
            "im2win",
            "im2win against im2col and direct convolution",
            "The twelve layers of arXiv 2306.14320, batch 1, float32. torch-native is PyTorch's "
            "own im2col convolution; loops is a plain loop nest in C, features innermost, compiled "
            "with -O3 -march=native.",
            _IM2COL,
            _im2win_tasks,
            _im2win_figures,
        ),
        Comparison(
            "layouts",
            "layouts of activations",
            "The twelve layers but cv4 (--full: with it), batch 16, in every layout that "
            "jaxwin.conv has; operands are in that layout before.",
            _in_layout("im2win", "NHWC"),
            _layout_tasks,
            _layout_figures,
        ),
        Comparison(
            "lowmem",
            "low-memory algorithms against im2col",
            "The twelve layers, batch 1, by every algorithm of the registry that computes them; "
            "those of other numerical families too.",
            _IM2COL,
            _memory_tasks,
            _memory_figures,
        ),
        Comparison(
            "transposed",
            "segregated transposed convolution against zero insertion",
            "224x224 images of 3 channels with windows of 3, 4 and 5, stride 2, and the generators "
            "of DCGAN, ArtGAN, GP-GAN and EB-GAN as they are usually built, batch 1, float32. "
            "zeros writes the input out with zeros between its pixels.",
            "zeros",
            _transposed_tasks,
            _transposed_figures,
        ),
        Comparison(
            "conv1d",
            "one-dimensional dilated convolution",
            "C = K = 15, window 51, dilation 8, width 60400 of arXiv 2104.08002, and a sweep "
            "around it, batch 1, in float32 and bfloat16, with both gradients. With --full also "
            "gradients of the sweep in bfloat16, and those for which oneDNN takes seconds.",
            "onednn",
            _long_tasks,
            _long_figures,
        ),
    )
}


# --- text ------------------------------------------------------------------------------------

FIGURES = ("figure", "in the paper", "here", "met", "source")


def _figure_lines(section: Section) -> bench.Grid:
    words = {True: "yes", False: "no", None: ""}
    return [
        list(FIGURES),
        *(
            [f.what, f.paper, f.ours or "not measured", words[f.met], f.source]
            for f in section.figures
        ),
    ]


def _label(row: bench.Row, among: Sequence[bench.Row]) -> str:
    """A row's name, with what tells it from others."""
    words = [row.name]
    words += [row.direction] * (len({other.direction for other in among}) > 1)
    words += [row.dtype] * (len({other.dtype for other in among}) > 1)
    return " ".join(words)


def grids(section: Section) -> dict[str, bench.Grid]:
    """Title -> header and lines: the papers' figures, times, workspaces."""
    title = section.comparison.title
    found = {f"{title}: figures": _figure_lines(section)}
    shown = section.result.rows
    names = [n for n in section.result.peers if any(r.time(n) is not None for r in shown)]
    times = [["layer", "convolution", *names]]
    memory = [["layer", *(n for n in names if _measured_workspace(shown, n))]]
    for row in shown:
        label = _label(row, shown)
        taken = (row.time(name) for name in names)
        times.append([label, row.problem, *("-" if t is None else duration(t) for t in taken)])
        cells = (row.cells[name] for name in memory[0][1:])
        memory.append(
            [label, *("-" if c.status != "ok" else bench.mib(c.workspace_bytes) for c in cells)]
        )
    found[f"{title}: time of a call"] = times
    found[f"{title}: workspace in MiB"] = memory
    return found


def notes(section: Section) -> list[str]:
    """Lines below the tables of a comparison."""
    return [section.comparison.what, *bench.notes(section.result, best="")]


# --- pictures --------------------------------------------------------------------------------


def _bars(section: Section) -> str:
    """Speed against one contender, and workspace, as geometric means and ranges."""
    against, shown = section.comparison.against, section.result.rows
    speeds = {name: _speed(shown, name, against) for name in section.result.peers}
    speeds = {name: ratios for name, ratios in speeds.items() if ratios}
    if not speeds:
        return ""
    label, width, row = 250.0, 1060.0, 24.0
    low = min(1.0, min(min(ratios) for ratios in speeds.values()))
    high = max(1.0, max(max(ratios) for ratios in speeds.values()))
    scale = svg.Log(low * 0.9, high * 1.1, label, width - 170)
    height = 34 + row * len(speeds)
    parts = [svg.text(width - 156, 12, "mean, most workspace", "tick")]
    for tick in scale.ticks():
        kind = "base" if tick == 1 else "grid"
        parts.append(svg.line(scale(tick), 16, scale(tick), height - 16, kind))
        parts.append(svg.text(scale(tick), height - 3, f"{svg.plain(tick)}x", "tick", "middle"))
    for i, (name, ratios) in enumerate(speeds.items()):
        y, mean = 30 + i * row, measure.geomean(ratios)
        memory = _measured_workspace(shown, name)
        tip = f"{name}: {mean:.2f}x, {min(ratios):.2f} to {max(ratios):.2f}"
        parts.append(svg.text(label - 10, y + 4, svg.shortened(name, 38), "label", "end"))
        parts.append(svg.line(scale(min(ratios)), y, scale(max(ratios)), y, "base"))
        parts += [svg.dot(scale(ratio), y, 2.5, "trial", tip) for ratio in ratios]
        kind = "after" if peers.is_ours(name) else "before"
        parts.append(svg.dot(scale(mean), y, 6, kind, tip))
        most = f", {max(memory) / MIB:.2f} MiB" if memory else ""
        parts.append(svg.text(width - 156, y + 4, f"{mean:.2f}x{most}", "label"))
    words = f"how many times faster than {against} each contender is"
    return svg.picture(width, height, parts, words)


def _per_layer(section: Section) -> str:
    """Time of every layer, logarithmic."""
    shown = section.result.rows
    names = [n for n in section.result.peers if any(r.time(n) is not None for r in shown)]
    times = [t / 1e6 for r in shown for n in names if (t := r.time(n)) is not None]
    if not times:
        return ""
    label, width, row = 250.0, 1060.0, 20.0
    scale = svg.Log(min(times) * 0.9, max(times) * 1.1, label, width - 20)
    height = 34 + row * len(shown)
    parts = []
    for tick in scale.ticks():
        parts.append(svg.line(scale(tick), 8, scale(tick), height - 20, "grid"))
        parts.append(svg.text(scale(tick), height - 6, f"{svg.plain(tick)} ms", "tick", "middle"))
    for i, entry in enumerate(shown):
        y = 18 + i * row
        words = _label(entry, shown)
        parts.append(svg.text(label - 10, y + 4, words, "label", "end"))
        for number, name in enumerate(names):
            if (taken := entry.time(name)) is not None:
                tip = f"{words}, {name}: {duration(taken)}"
                kind = f"point a{number % report.COLOURS}"
                parts.append(svg.dot(scale(taken / 1e6), y, 4.5, kind, tip))
    legend = "".join(
        f'<span><i class="swatch a{number % report.COLOURS}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    picture = svg.picture(width, height, parts, "time of each layer")
    return f'<div class="legend">{legend}</div>{picture}'


def page(run: Run) -> str:
    """The whole run as one HTML page that needs nothing else."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = [
        "<h1>The papers' comparisons, here</h1>",
        f"<p>{escape(str(run.base.machine))}, threads: {run.base.options.threads}. "
        f"jaxwin {jaxwin.__version__}, {now}.</p>",
    ]
    for section in run.sections:
        header, *lines = _figure_lines(section)
        body.append(f"<section><h2>{escape(section.comparison.title)}</h2>")
        body.append(f"<p>{escape(section.comparison.what)}</p>")
        body.append(report.table(header, lines, ()))
        body.append(
            f"<p>Speed against {escape(section.comparison.against)}: each layer, and the geometric "
            "mean. To the right is faster.</p>"
        )
        body += [_bars(section), "<p>Time of each layer. To the left is faster.</p>"]
        body.append(_per_layer(section))
        for title, (header, *lines) in list(grids(section).items())[1:]:
            numeric = range(1 + ("convolution" in header), len(header))
            body.append(f"<p>{escape(title.partition(': ')[2].capitalize())}</p>")
            body.append(report.table(header, lines, numeric))
        below = "".join(f"<p>{escape(line)}</p>" for line in bench.notes(section.result, best=""))
        body.append(f"{below}</section>")
    return report.document("jaxwin and the papers", "".join(body))
