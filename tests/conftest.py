# SPDX-License-Identifier: Apache-2.0
"""What every test starts from."""

from __future__ import annotations

import os
import tempfile

# What was tuned on the machine that tests must not change what they see. Tests of tuning set it.
os.environ["JAXWIN_MODE"] = "off"

# Nor the problems that its programs were seen to miss, nor what tests leave behind on it.
_CACHE = tempfile.TemporaryDirectory(prefix="jaxwin-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
