# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune compare`: contenders that are the convolution, figures, tables and pages."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from jaxwin import _layouts, _registry
from jaxwin.tuner import bench, compare, machine, peers, problems
from jaxwin.tuner.cli import main

TINY = {
    "paper": ("n2 8x9 c4 k16 w3", ("cv1", "cv5", "cv9", "cv12")),
    "transposed": ("224x224 c2 k1 w3 s2 p1 transposed", ("t3.224",)),
    "gan": ("4x4 c8 k8 w4 s2 p1 transposed", ("dc1", "gp3", "eb6")),
    "long1d": ("60 c5 k5 w7 rd2", ("s51d8",)),
}


def _tiny(name: str, **given) -> tuple[problems.Conv, ...]:
    shape, layers = TINY[name]
    return tuple(problems.parse(shape, name=layer, **given) for layer in layers)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers in place of the papers', in a process that keeps its CPUs."""
    monkeypatch.setattr(machine, "pin", lambda threads: machine.usable_cpus()[:threads])
    monkeypatch.setattr(machine, "pool_threads", lambda: 0)
    monkeypatch.setattr(compare, "preset", _tiny)


def _run(*arguments: str):
    return CliRunner().invoke(main, ["compare", *arguments])


def _task(text: str, threads: int = 1) -> peers.Task:
    conv = problems.parse(text)
    rng = np.random.default_rng(0)
    shapes = (conv.x_shape, conv.w_shape, conv.y_shape)
    x, w, y = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return peers.Task(conv, "fwd", "nhwc", threads, x, w, y)


DENSE = "n3 9x10 c6 k18 w3x2 s2x1 p1 rd1x2"
TRANSPOSED = "n2 5x6 c4 k6 w4 s2 p1 transposed"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("loops", DENSE),
        ("zeros", TRANSPOSED),
        ("zeros-xla", TRANSPOSED),
        ("jaxwin:im2win:full=1:pack=0", DENSE),
        ("jaxwin:im2col:full=1", TRANSPOSED.replace("s2 ", "").replace("transposed", "")),
        *((f"jaxwin:im2win@{layout}", DENSE) for layout in _layouts.names()),
    ],
)
def test_contenders_compute_the_convolution(name: str, text: str) -> None:
    if name == "loops" and not shutil.which("cc"):
        pytest.skip("no C compiler")
    task = _task(text)
    prepared = peers.make(name).prepare(task)
    with jax.enable_x64(True):
        expected = bench.reference(task)
    np.testing.assert_allclose(prepared.result(), expected, rtol=1e-4, atol=1e-5)
    assert prepared.facts["workspace_bytes"] >= 0


def test_zero_insertion_has_its_buffer() -> None:
    task = _task("32x32 c8 k4 w4 s2 p1 transposed")
    upsampled = 4 * 63 * 63 * 8
    for name in ("zeros", "zeros-xla"):
        assert peers.make(name).prepare(task).facts["workspace_bytes"] >= upsampled
    assert peers.make("jaxwin:segregated").prepare(task).facts["workspace_bytes"] < upsampled


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("loops", TRANSPOSED),
        ("zeros", DENSE),
        ("jaxwin:im2win@CHWN8", TRANSPOSED),
        ("jaxwin:im2win:nonsense=1", DENSE),
        ("jaxwin:im2win:mr=999", DENSE),
        ("jaxwin:depthwise@NHWC", DENSE),
    ],
)
def test_what_a_contender_cannot_do(name: str, text: str) -> None:
    with pytest.raises(peers.Unsupported):
        peers.make(name).prepare(_task(text))


def test_the_loops_are_for_one_thread() -> None:
    with pytest.raises(peers.Unsupported, match="one thread"):
        peers.make("loops").prepare(_task(DENSE, threads=2))


def test_memory_of_im2win_is_what_the_paper_says() -> None:
    """No measurement: the plans' workspaces of the twelve layers themselves."""
    full, blocked, *_ = compare._im2win_figures([])
    assert full.met and blocked.met


def test_every_layout_and_dense_algorithm_takes_part() -> None:
    (task,) = compare.COMPARISONS["layouts"].tasks("usual")
    assert {name.split("@")[1] for name in task.peers} == set(_layouts.names())
    (task,) = compare.COMPARISONS["lowmem"].tasks("usual")
    asked = {name.split(":")[1].split("@")[0] for name in task.peers}
    assert {"im2win", "im2col", "direct"} <= asked <= set(_registry.algorithm_names())
    for comparison in compare.COMPARISONS.values():
        for extent in compare.EXTENTS:
            for task in comparison.tasks(extent):
                for name in task.peers:
                    peers.make(name)


def test_extents() -> None:
    """Each measures what the one before it does, and the usual one calls nothing for seconds."""
    for name, comparison in compare.COMPARISONS.items():
        rows = [compare.rows([name], extent) for extent in compare.EXTENTS]
        assert rows == sorted(rows), name
        keys = [
            {(conv, d) for t in comparison.tasks(extent) for conv in t.convs for d in t.directions}
            for extent in compare.EXTENTS
        ]
        assert keys[0] <= keys[1] <= keys[2], name
    for task in compare.COMPARISONS["conv1d"].tasks("usual"):
        for conv in task.convs:
            for direction in task.directions:
                slow = direction == "dw" or (direction == "dx" and conv.dtype == "bfloat16")
                if slow and conv.name != "s51d8":
                    assert "onednn" not in task.peers


class _Balanced(HTMLParser):
    """Checks that every element is closed."""

    EMPTY = ("meta", "line", "rect", "circle", "polyline", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag


def test_all_comparisons(tiny: None, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "html", "markdown")}
    arguments = [part for kind, path in files.items() for part in (f"--{kind}", str(path))]
    done = _run("--quick", "--rounds", "1", "--quiet", *arguments)
    assert done.exit_code == 0, done.output
    data = json.loads(files["json"].read_text())
    assert data["complete"] and data["extent"] == "quick"
    assert [entry["name"] for entry in data["comparisons"]] == list(compare.COMPARISONS)
    for entry in data["comparisons"]:
        ours = [cell for row in entry["rows"] for n, cell in row["cells"].items() if "jaxwin" in n]
        assert ours and all(cell["status"] in ("ok", "unsupported") for cell in ours)
        assert sum(cell["status"] == "ok" for cell in ours) >= len(entry["rows"])
        assert entry["figures"] and all(f["source"] for f in entry["figures"])
        assert any(figure["ours"] for figure in entry["figures"])
    page = _Balanced()
    text = files["html"].read_text()
    page.feed(text)
    assert not page.open and {"svg", "table"} <= page.seen
    for comparison in compare.COMPARISONS.values():
        assert comparison.title in text and comparison.title in files["markdown"].read_text()
        assert comparison.title in done.output
    assert "arXiv 2306.14320" in done.output and "<script" not in text


def test_an_interrupted_run_says_what_it_has(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench._row
    rows = []

    def once(*args):
        if rows:
            raise KeyboardInterrupt
        rows.append(real(*args))
        return rows[0]

    monkeypatch.setattr(bench, "_row", once)
    done = _run("conv1d", "transposed", "--quick", "--rounds", "1", "--quiet", "--json", "-")
    assert done.exit_code == 130
    data = json.loads(done.stdout)
    assert not data["complete"]
    (entry,) = data["comparisons"]
    assert len(entry["rows"]) == 1 and not entry["complete"]


def test_files_are_kept_while_it_runs(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process that is killed leaves the comparisons that were done; SIGTERM is Ctrl-C."""
    kept, file = [], tmp_path / "out.json"
    tasks = compare.COMPARISONS["conv1d"].tasks

    def stopped(extent: str) -> list[compare.Task]:
        kept.append(json.loads(file.read_text()))
        signal.raise_signal(signal.SIGTERM)
        return tasks(extent)

    changed = dataclasses.replace(compare.COMPARISONS["conv1d"], tasks=stopped)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(compare, "contenders", lambda names, extent: ["jaxwin"])
    monkeypatch.setattr(compare, "rows", lambda names, extent: 2)
    monkeypatch.setitem(compare.COMPARISONS, "conv1d", changed)
    done = _run("transposed", "conv1d", "--quick", "--rounds", "1", "--quiet", "--json", str(file))
    assert done.exit_code == 130, done.output
    assert signal.getsignal(signal.SIGTERM) == before
    assert [entry["name"] for entry in kept[0]["comparisons"]] == ["transposed"]
    assert kept[0]["comparisons"][0]["complete"] and not kept[0]["complete"]
    assert len(json.loads(file.read_text())["comparisons"]) == 2
    assert compare.COMPARISONS["transposed"].title in done.output


def test_a_wrong_result_is_an_error(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = peers.JaxwinWith.prepare

    def wrong(self, task):
        prepared = real(self, task)
        return peers.Prepared(prepared.timed, lambda: prepared.result() + 1, prepared.facts)

    monkeypatch.setattr(peers.JaxwinWith, "prepare", wrong)
    done = _run("transposed", "--quick", "--rounds", "1", "--quiet")
    assert done.exit_code == 1
    assert "WRONG: " in done.output and "jaxwin:segregated" in done.output


def test_wrong_usage() -> None:
    assert _run("nonsense").exit_code == 2
    assert _run("--threads", "1000").exit_code == 2
    assert _run("--quick", "--full").exit_code == 2
    done = _run("conv1d", "--dry-run", "--full")
    assert done.exit_code == 0 and "60400" in done.output and "fwd,dx,dw" in done.output
