# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune deviation`."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from jaxwin.tuner.cli import main


def _run(*arguments: str):
    return CliRunner().invoke(main, ["deviation", *arguments])


def test_a_shape_by_two_ways() -> None:
    arguments = ("10x10 c4 k4 w3 p1", "--variant", "sfc", "--variant", "xla")
    result = _run(*arguments)
    assert result.exit_code == 0, result.output
    assert "sfc: " in result.output and "results of the program" not in result.output
    rows = json.loads(_run(*arguments, "--json").output)
    assert [row["variant"] for row in rows] == ["default", "sfc", "xla"]
    assert {row["text"] for row in rows} == {"n1 10x10 c4 k4 w3x3 p1:1x1:1"}
    assert all(0 <= row["difference"]["differing"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "blame"),
    [
        ((), "nothing to do"),
        (("10x10 c4 k4 w3", "--variant", "abacus"), "variants: 'abacus' is not"),
        (("10x10 c4",), ""),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], blame: str) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2 and blame in result.output
