// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace jaxwin {

// The handlers of the XLA FFI targets for what a batch normalisation does between convolutions
// (kernels/channels.h). Operands are (rows, cols), float32 or float64.
//
// `jaxwin_scale`: x, line (2, cols) and, or not, a residual (rows, cols) to a result (rows, cols).
// `jaxwin_moments`: x, g (rows, cols) to (2, cols).
void* scale_handler();
void* moments_handler();

}  // namespace jaxwin
