# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxwin.tuner` is `jaxwin-tune`."""

from jaxwin.tuner.cli import main

main()
