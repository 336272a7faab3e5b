# SPDX-License-Identifier: Apache-2.0
"""Runs jax's own tests of convolution with jaxwin in place of lax's.

    git clone --depth 1 --branch jax-v0.10.2 https://github.com/jax-ml/jax
    python tests/upstream.py jax                  # the tag must be the version that is installed
    python tests/upstream.py jax --cases 100      # more drawn cases per test; jax's default is 10

Not collected by pytest: jax's wheel and sdist lack its tests, so it needs a checkout. Three runs:
`lax` is jax as it is, to know what fails without us; `install` runs under `jaxwin.install()`;
`replace` puts jaxwin's functions in place of lax's. Exits with 1 if a test fails that passes with
lax, and is not listed in KNOWN; or if our kernels computed nothing.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FILES = ("lax_test.py", "lax_vmap_test.py", "lax_autodiff_test.py")
SELECT = "conv and not convert"  # in any case
MODES = ("lax", "install", "replace")
# Tests that may fail: a pattern of their names, and why.
KNOWN: dict[str, str] = {}
_MODE, _RESULT = "JAXWIN_UPSTREAM_MODE", "JAXWIN_UPSTREAM_RESULT"


# -- in the process that runs jax's tests, where this file is a pytest plugin


class _Plugin:
    def __init__(self, mode: str, result: Path) -> None:
        self.result = result
        self.outcomes: dict[str, str] = {}
        self.decisions: collections.Counter[str] = collections.Counter()
        if mode == "lax":
            return

        import jax

        import jaxwin
        from jaxwin import _dispatch

        decide = _dispatch.decide

        def counting(*args: Any, **kwargs: Any) -> Any:
            decision = decide(*args, **kwargs)
            plan = decision.plan
            self.decisions[plan.algorithm if plan else f"lax: {decision.reason}"] += 1
            return decision

        _dispatch.decide = counting
        if mode == "install":
            jaxwin.install()
            return
        # lax's other functions (conv, conv_with_general_padding, ...) find it in their module
        inside = sys.modules[jax.lax.conv_general_dilated.__module__]
        for name in ("conv_general_dilated", "conv_transpose"):
            for module in (inside, jax.lax):
                setattr(module, name, getattr(jaxwin, name))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        self.result.write_text(
            json.dumps({"outcomes": self.outcomes, "decisions": dict(self.decisions)})
        )


def pytest_configure(config: Any) -> None:
    """Called by pytest, which loads this file by `-p upstream`."""
    config.pluginmanager.register(_Plugin(os.environ[_MODE], Path(os.environ[_RESULT])))


# -- in the process that reports


def _run(mode: str, checkout: Path, cases: int, extra: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        # absolute, since pytest runs in the checkout
        paths = [str(Path(__file__).resolve().parent)]
        paths += [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(":") if p]
        environment = {
            **os.environ,
            _MODE: mode,
            _RESULT: str(result),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_GENERATED_CASES": str(cases),
            "PYTHONPATH": ":".join(paths),
        }
        files = [f"tests/{name}" for name in FILES]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "upstream", "-k", SELECT]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", "--tb=short", *extra, *files],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
        )
        if not result.exists():
            sys.exit(f"pytest did not finish:\n{done.stdout}{done.stderr}")
        return {"output": done.stdout, **json.loads(result.read_text())}


def _check_version(checkout: Path) -> None:
    import jax

    text = (checkout / "jax" / "version.py").read_text()
    match = re.search(r'^_version = "(.*)"', text, re.MULTILINE)
    if match and match[1] != jax.__version__:
        print(f"warning: the checkout is jax {match[1]}, installed is {jax.__version__}")


def main() -> int:
    """Runs the modes asked for and prints what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a checkout of github.com/jax-ml/jax")
    parser.add_argument("--cases", type=int, default=10, help="drawn cases per test")
    parser.add_argument("--mode", choices=MODES, action="append", help="default: all three")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    options = parser.parse_args()
    for name in FILES:
        if not (options.checkout / "tests" / name).is_file():
            parser.error(f"{options.checkout} has no tests/{name}")
    if (options.checkout / "jax" / "version.py").is_file():
        _check_version(options.checkout)

    wrong = False
    fails_with_lax: set[str] = set()
    for mode in options.mode or MODES:
        run = _run(mode, options.checkout.resolve(), options.cases, options.pytest)
        counts = collections.Counter(run["outcomes"].values())
        print(f"{mode}: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())))
        for decision, count in sorted(run["decisions"].items(), key=lambda item: -item[1]):
            print(f"    {count:5} {decision}")
        failed = {test for test, outcome in run["outcomes"].items() if outcome == "failed"}
        if mode == "lax":
            fails_with_lax = failed
        elif all(name.startswith("lax: ") for name in run["decisions"]):
            print("  our kernels computed nothing")
            wrong = True
        unexpected = False
        for test in sorted(failed):
            reasons = [why for part, why in KNOWN.items() if re.search(part, test)]
            if test in fails_with_lax:
                reasons.append("fails with lax too")
            print(f"  failed: {test}: {reasons[0] if reasons else 'NOT KNOWN'}")
            unexpected |= not reasons
        if unexpected or not counts["passed"]:
            print(run["output"])
            wrong = True
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
