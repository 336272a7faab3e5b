# SPDX-License-Identifier: Apache-2.0
"""Fast, reproducible convolutions for JAX."""
