# SPDX-License-Identifier: Apache-2.0
"""What every test starts from."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# XLA compiles everything around our calls in a fifth less time; what it makes of that is its own
# affair. Programs that tests start as processes are compiled as everywhere.
jax.config.update("jax_disable_most_optimizations", True)

# What was tuned on the machine that tests must not change what they see. Tests of tuning set it.
os.environ["JAXWIN_MODE"] = "off"
# Nor the problems that its programs were seen to miss, nor what tests leave behind on it.
_CACHE = tempfile.TemporaryDirectory(prefix="jaxwin-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name


@pytest.fixture(autouse=True)
def _no_packaged_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor what jaxwin is shipped with: only tests of that look at it."""
    from jaxwin import _tuning

    monkeypatch.setattr(_tuning, "PACKAGED", tmp_path / "packaged.db")


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor what the user tuned, and missed; nor do tests add to that."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def own_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where JAXWIN_TUNING_DB points: no file yet. No other tier has one. It is read."""
    from jaxwin import _tuning

    place = tmp_path / "tuning.db"
    monkeypatch.setenv("JAXWIN_TUNING_DB", str(place))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAXWIN_MODE", "cached")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    _tuning.reload()
    yield place
    _tuning.reload()
