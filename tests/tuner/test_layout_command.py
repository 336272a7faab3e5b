# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune layout`."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from jaxwin.tuner import exits, layout_command, measure
from jaxwin.tuner.cli import main


def _run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["layout", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_it_adds_up_and_says_the_least() -> None:
    code, out, err = _run(
        "6x5 c4 k8 w3 p1", "6x5 c8 k4 w1 *2", "--batch", "9", "--direction", "fwd,dx,dw",
        "--rounds", "2", "--json",
    )  # fmt: skip
    assert code in (exits.OK, exits.BUSY), err
    told = json.loads(out)
    assert [row["name"] for row in told["rows"]][2] == "conversions"
    assert told["rows"][1]["count"] == 2
    for layout in layout_command.LAYOUTS:
        total = sum(row["ns"][layout] for row in told["rows"])
        assert told["total_ns"][layout] == pytest.approx(total)
        assert total > 0
        assert len(told["rows"][0]["algorithms"][layout]) == 3
    assert told["rows"][2]["ns"]["NHWC"] == 0
    assert told["rows"][2]["ns"]["CHWN8"] > 0
    assert told["best"] == min(told["total_ns"], key=told["total_ns"].__getitem__)


def _samples(fastest: str, deviation: float) -> object:
    def interleave(computations: dict[str, measure.Timed], **_: object) -> object:
        result = {}
        for name in computations:
            ns = 1000.0 if name.startswith(f"{fastest} ") else 2000.0
            result[name] = measure.Samples(1, [ns * (1 - deviation), ns, ns * (1 + deviation)])
        return result

    return interleave


@pytest.mark.parametrize(("deviation", "code"), [(0.0, exits.OK), (0.3, exits.BUSY)])
def test_table(monkeypatch: pytest.MonkeyPatch, deviation: float, code: int) -> None:
    monkeypatch.setattr(measure, "interleave", _samples("CHWN", deviation))
    found, out, err = _run("5x5 c2 k3 w3", "--source", "NCHW", "--quiet")
    assert found == code
    assert ("too busy" in err) == (code == exits.BUSY)
    # One convolution and two conversions, none of them where the chain begins in that layout.
    totals = next(line for line in out.splitlines() if " all " in line).split("│")
    assert [float(cell) for cell in totals[3:-1]] == [0.006, 0.002, 0.003, 0.006, 0.006]
    assert "best for the whole: NCHW" in out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((), exits.USAGE, "nothing to do"),
        (("5x5 c2 k3 w3 s2 transposed",), exits.USAGE, "transposed convolution"),
        (("5x5 c2 k3 w3", "--source", "CHWN8"), exits.USAGE, "--source"),
    ],
)
def test_errors(arguments: tuple[str, ...], code: int, text: str) -> None:
    found, _, err = _run(*arguments)
    assert found == code
    assert text in err


def test_nothing_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXWIN_DISABLE", "1")
    code, _, err = _run("5x5 c2 k3 w3")
    assert code == exits.UNSUPPORTED
    assert "native kernel" in err
