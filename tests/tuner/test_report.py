# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune report`: whole pages from databases that are empty, small and large."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import problems
import pytest
import tuning
from click.testing import CliRunner

from jaxwin import _registry, _tuning
from jaxwin._problem import Problem
from jaxwin.tuner import report, svg
from jaxwin.tuner.cli import main
from jaxwin.tuner.database import Database, Measurement
from jaxwin.tuner.space import Space

_VOID = ("meta", "br", "line", "circle", "rect", "polyline")


class _Page(html.parser.HTMLParser):
    """Checks that elements close in order, and collects them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def _rows(problem: Problem, seed: int, **changes) -> Iterator[Measurement]:
    """A search that never was: the default plan, others, one that crashes, and a winner."""
    chance = random.Random(seed)
    space = Space(problem, _registry.isa(), 1, 2**30)
    default = space.incumbent()
    candidates = [default, *space.neighbours(default), *space.ranked()[:12]]
    base = 1e5 * (1 + seed)
    best = None
    for candidate in dict.fromkeys(candidates):
        ns = base * (1.0 if candidate == default else chance.uniform(0.8, 1.9))
        row = Measurement(
            problem, candidate.algorithm, candidate.parameters, _registry.isa(), 1, "ok",
            ns * 0.99, ns, ns * 0.01, 9, **changes,
        )  # fmt: skip
        yield row
        if best is None or ns < best.ns_median:
            best = row
    crashed = space.ranked()[-1]
    yield Measurement(
        problem, crashed.algorithm, crashed.parameters, _registry.isa(), 1, "crashed",
        error="<script>alert(1)</script> & more", **changes,
    )  # fmt: skip
    yield dataclasses.replace(best, confirmed=True, uid=f"winner {seed} {changes}")


def _database(path: Path, count: int) -> Path:
    with Database(path) as db:
        for seed in range(count):
            problem = problems.make(1 + seed % 7, 8, 16, (12, 13 + seed), (3, 3))
            db.add(_rows(problem, seed))
    return path


def _page(path: Path, **options) -> _Page:
    text = report.page(report.gather(path, **options))
    assert "http" not in text.replace("http-equiv", ""), "the page needs nothing else"
    page = _Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("x", "y", "cx", "cy", "x1", "y1", "width", "height"):
            if tag != "svg" and name in attributes:
                assert math.isfinite(float(attributes[name])), (tag, attributes)
        if tag == "polyline":
            assert "nan" not in attributes["points"]
    return page


def test_a_page_has_every_chart(tmp_path: Path) -> None:
    path = _database(tmp_path / "tuning.db", 3)
    page = _page(path)
    for title in ("Before and after", "Roofline", "How the search went", "Register tiles",
                  "Which parameters matter", "Winners", "Failures"):  # fmt: skip
        assert title in page.words, title
    assert sum(tag == "svg" for tag, _ in page.tags) >= 6
    assert "FMA" in page.text and "memory" in page.text, "measured peaks"
    assert "<script>alert(1)</script> & more" in page.words, "as text"
    assert page.text.count("crashed") >= 1


def test_numbers(tmp_path: Path) -> None:
    path = _database(tmp_path / "tuning.db", 2)
    done = CliRunner().invoke(main, ["report", "--json", "--no-peaks", "--database", str(path)])
    data = json.loads(done.stdout)
    assert len(data["problems"]) == 2 and data["peaks"] == {}
    saved = [row["before_ns"] - row["after_ns"] for row in data["problems"]]
    assert saved == sorted(saved, reverse=True) and saved[-1] >= 0
    with _tuning.reading(path) as connection:
        best = {row["problem"]: row["ns_median"] for row in report.read_winners(connection)}
    assert {row["problem"]: row["after_ns"] for row in data["problems"]} == best
    assert {row["before_ns"] for row in data["problems"]} == {1e5, 2e5}
    assert {failure["status"] for failure in data["failures"]} == {"crashed"}


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_nothing_measured(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuning.db"
    if kind == "empty":
        Database(path).close()
    page = _page(path)
    assert "Nothing is measured yet" in page.words and "jaxwin-tune run --preset" in page.text
    output = tmp_path / "r.html"
    monkeypatch.setenv("JAXWIN_TUNING_DB", str(path))
    done = CliRunner().invoke(main, ["report", str(output)])
    assert done.exit_code == 0 and output.exists()


def test_other_machines_and_kernels_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    abacus = dataclasses.replace(tuning.this_machine(), brand="Abacus <4>", model=999)
    with Database(path) as db:
        db.add(_rows(tuning.DENSE, 0, machine=abacus))
        db.add(_rows(tuning.DENSE, 1, abi="of-yesterday"))
    assert "Nothing is measured yet" in _page(path).words
    everything = _page(path, everything=True, peaks=False)
    assert "Abacus <4>" in everything.text and "convolutions tuned" in everything.words


def test_a_large_database_gives_a_small_page(tmp_path: Path, monkeypatch) -> None:
    path = _database(tmp_path / "tuning.db", 60)
    monkeypatch.setattr(report, "_WINNERS", 20)
    page = _page(path, peaks=False)
    assert "The 40 that gain most, of 60." in page.text
    assert "The first 20 of 60." in page.text


def test_only_failures(tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    with Database(path) as db:
        db.add([tuning.measurement(status="timeout", ns_median=None, error="no sign of life")])
    page = _page(path)
    assert "no sign of life" in page.words and "0" in page.words


def test_a_database_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    path.write_bytes(b"\0garbage" * 100)
    done = CliRunner().invoke(main, ["report", "--database", str(path)])
    assert done.exit_code == 4 and "is damaged" in done.output
    done = CliRunner().invoke(main, ["report", str(tmp_path / "no" / "r.html")], env={
        "JAXWIN_TUNING_DB": str(tmp_path / "none.db")})  # fmt: skip
    assert done.exit_code == 1 and "No such file" in done.output


def test_scales() -> None:
    scale = svg.Log(0.5, 2000.0, 10.0, 110.0)
    assert scale(0.5) == 10 and scale(2000.0) == 110 and scale(1e9) == 110
    assert all(0.5 <= tick <= 2000 for tick in scale.ticks()) and len(scale.ticks()) >= 3
    assert svg.nice_ticks(97.0) == [0, 20, 40, 60, 80]
    assert svg.nice_ticks(0.0) == [0.0]
    assert svg.shortened("abcdef", 4) == "abc…"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    path = _database(tmp_path / "tuning.db", 2)
    output, picture = tmp_path / "report.html", tmp_path / "report.png"
    output.write_text(report.page(report.gather(path, peaks=False)))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}")
    done = subprocess.run(
        [
            "chromium",
            *flags,
            "--window-size=1100,1400",
            f"--screenshot={picture}",
            f"file://{output}",
        ],
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    skimage = pytest.importorskip("PIL.Image")
    colours = skimage.open(picture).convert("RGB").getcolors(1 << 24)
    found = {colour for _, colour in colours}
    assert (0x25, 0x63, 0xEB) in found, "the bars of winners"
    assert len(found) > 50


def test_a_database_that_was_named_must_be_there(tmp_path: Path) -> None:
    arguments = ["report", str(tmp_path / "page.html"), "--database", str(tmp_path / "nope.db")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 4 and "nope.db: does not exist" in done.output
    assert not [*tmp_path.iterdir()]
