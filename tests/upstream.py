# SPDX-License-Identifier: Apache-2.0
"""Runs JAX's own convolution tests on jaxwin's kernels.

    python tests/upstream.py PATH_TO_A_JAX_CHECKOUT

The checkout must be of the release that is installed (JAX's wheels hold no tests). The convolution
cases of its lax, autodiff and vmap tests run twice: under `jaxwin.install()`, and with jaxwin's
functions in the place of `jax.lax.conv_general_dilated` and `conv_transpose`. Exits with 1 where a
test fails that is not named below. Not collected by pytest; it is also the plugin of its own runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

FILES = ("lax_test.py", "lax_autodiff_test.py", "lax_vmap_test.py")
SELECTION = "(Conv or conv) and not ConvertElement"
MODES = ("install", "replace")

# Why a test of JAX's cannot pass.
EXCEPTIONS = {
    "install": {
        "testConvPreferredElement8": "compares, to 1e-6, a float32 convolution (ours) with one "
        "through another dtype (lax's): two orders of summation"
    },
    "replace": {},
}


def pytest_configure() -> None:
    """The plugin: brings jaxwin into the test process before JAX's tests are imported."""
    import jax

    import jaxwin

    if os.environ["JAXWIN_UPSTREAM"] == "install":
        jaxwin.install()
    else:
        jax.lax.conv_general_dilated = jaxwin.conv_general_dilated
        jax.lax.conv_transpose = jaxwin.conv_transpose


def main() -> int:
    """Runs both modes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="of https://github.com/jax-ml/jax")
    checkout = parser.parse_args().checkout
    files = [checkout / "tests" / name for name in FILES]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        parser.error(f"checkout: no {', '.join(missing)}")
    status = 0
    here = Path(__file__).resolve().parent
    for mode in MODES:
        print(f"== {mode}", flush=True)
        selection = SELECTION
        for name, reason in EXCEPTIONS[mode].items():
            print(f"not run: {name}: {reason}")
            selection += f" and not {name}"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "upstream", "-p", "no:cacheprovider"]
        paths = [str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "JAXWIN_UPSTREAM": mode,
            "PYTHONPATH": os.pathsep.join(paths),
        }
        run = subprocess.run(
            [*command, "-k", selection, *map(str, files)], env=environment, check=False
        )
        status = status or int(run.returncode != 0)
    return status


if __name__ == "__main__":
    sys.exit(main())
