# SPDX-License-Identifier: Apache-2.0
"""What every test starts from."""

from __future__ import annotations

import os

# What was tuned on the machine that tests must not change what they see. Tests of tuning set it.
os.environ["JAXWIN_MODE"] = "off"
