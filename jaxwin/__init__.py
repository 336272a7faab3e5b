# SPDX-License-Identifier: Apache-2.0
"""Fast, reproducible convolutions for JAX.

`conv` is the friendly form, `conv_general_dilated` and `conv_transpose` are drop-in for those of
`jax.lax`, `accelerate` and `install` bring them to code that is not yours, `explain` says which
kernel runs and why, `deviation` how much results depend on that, `tune` finds the fastest plans for
this machine.
"""

from jaxwin._accelerate import accelerate
from jaxwin._batch_norm import batch_norm, fold_batch_norm
from jaxwin._conv import conv, pack
from jaxwin._deviation import Deviation, Difference, LayerDeviation, deviation
from jaxwin._explain import Explanation, ExplanationRow, explain
from jaxwin._install import install, installed, is_installed, uninstall
from jaxwin._layouts import from_layout, to_layout
from jaxwin._memory import keep_memory
from jaxwin._pack import PackedWeights, unpack
from jaxwin._primitive import conv_general_dilated, conv_transpose, export_safety_checks
from jaxwin._problem import Problem
from jaxwin._record import Recording, record
from jaxwin._tune import best_layout, tune

__version__ = "0.1.0"

__all__ = [
    "Deviation",
    "Difference",
    "Explanation",
    "ExplanationRow",
    "LayerDeviation",
    "PackedWeights",
    "Problem",
    "Recording",
    "accelerate",
    "batch_norm",
    "best_layout",
    "conv",
    "conv_general_dilated",
    "conv_transpose",
    "deviation",
    "explain",
    "export_safety_checks",
    "fold_batch_norm",
    "from_layout",
    "install",
    "installed",
    "is_installed",
    "keep_memory",
    "pack",
    "record",
    "to_layout",
    "tune",
    "uninstall",
    "unpack",
]
