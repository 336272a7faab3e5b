# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune layout`."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import jaxwin
from jaxwin.tuner import exits, layout, machine, measure
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
    for name in layout.LAYOUTS:
        total = sum(row["ns"][name] for row in told["rows"])
        assert told["total_ns"][name] == pytest.approx(total)
        assert total > 0
        assert len(told["rows"][0]["algorithms"][name]) == 3
        parts = [row["parts"]["dw"][name] for row in told["rows"][:2]]
        ratios = [
            part / row["parts"]["dw"]["NHWC"]
            for part, row in zip(parts, told["rows"][:2], strict=True)
        ]
        assert told["relative"]["dw"][name][1:] == pytest.approx([min(ratios), max(ratios)])
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


def _step(layout: str):
    """A training step, written for any layout; its transposed convolution is none of conv's."""

    def net(weights, x):
        h = jaxwin.to_layout(x, layout)
        h = jaxwin.conv(h, weights[0], activation="relu", layout=layout)
        h = jaxwin.conv(h, weights[1], stride=2, layout=layout)
        h = jaxwin.conv(h, weights[1], layout=layout)
        return jaxwin.from_layout(h, layout, batch=x.shape[0] if layout[-1].isdigit() else None)

    return net, jax.value_and_grad(lambda weights, x: (net(weights, x) ** 2).sum())


def _arguments() -> tuple[list[jax.Array], jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (3, 3, 3, 8), (3, 3, 8, 8)
    weights = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)]
    return weights, jax.random.normal(keys[2], (9, 7, 6, 3))


def test_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "interleave", _samples("CHWN8", 0))
    net, step = _step("NHWC")
    arguments = _arguments()
    forward = jaxwin.best_layout(net, *arguments)
    assert forward.directions == ("fwd",)
    assert [row.name.split()[2] for row in forward.rows[:-1]] == ["c3", "c8", "c8"]
    training = jaxwin.best_layout(step, *arguments)
    assert training.directions == ("fwd", "dx", "dw")
    assert [row.name for row in training.rows] == [row.name for row in forward.rows]
    assert training.best == "CHWN8" and not training.busy and training.ties == ()
    assert str(training).startswith("best for the whole: CHWN8 (NHWC 0.")
    # The choice can be used, and changes no bit.
    chosen, _ = _step(training.best)
    np.testing.assert_array_equal(chosen(*arguments), net(*arguments))


def test_of_a_function_without_convolutions() -> None:
    with pytest.raises(ValueError, match="no convolution"):
        jaxwin.best_layout(lambda x: x + 1, jnp.ones(3))
    with pytest.raises(ValueError, match="source must be one of 'NHWC'"):
        jaxwin.best_layout(_step("NHWC")[0], *_arguments(), source="CHWN8")


def test_of_a_recorded_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that trains: its gradients are directions, no convolutions of their own."""
    file = tmp_path / "step.jsonl"
    with jaxwin.record(file):
        jax.jit(_step("NHWC")[1]).lower(*_arguments()).compile()
    assert len(file.read_text().splitlines()) > 3
    monkeypatch.setattr(measure, "interleave", _samples("CHWN", 0))
    code, out, err = _run(str(file), "--json", "--quiet")
    assert code == exits.OK, err
    told = json.loads(out)
    assert told["directions"] == ["fwd", "dx", "dw"]
    assert len(told["rows"]) == 4
    assert told["best"] == "CHWN"


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = []

    def interleave(computations: dict[str, measure.Timed], **options: object) -> object:
        clocks.append(options["threads"])
        return _samples("NHWC", 0)(computations)  # type: ignore[operator]

    monkeypatch.setattr(measure, "interleave", interleave)
    monkeypatch.setattr(machine, "pin", lambda threads: machine.usable_cpus()[:threads])
    monkeypatch.setattr(machine, "pool_threads", lambda: 0)
    assert _run("5x5 c2 k3 w3", "--threads", "1")[0] == exits.OK
    assert set(clocks) == {1}
    monkeypatch.setattr(machine, "pool_threads", lambda: 2)
    code, _, err = _run("5x5 c2 k3 w3", "--threads", "1")
    assert code == exits.USAGE and "XLA has 2" in err
    assert _run("5x5 c2 k3 w3", "--threads", "1000")[0] == exits.USAGE


def test_nothing_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXWIN_DISABLE", "1")
    code, _, err = _run("5x5 c2 k3 w3")
    assert code == exits.UNSUPPORTED
    assert "native kernel" in err
