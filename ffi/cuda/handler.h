// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace jaxwin::cuda {

// The FFI handler of the target `jaxwin_conv` on platform CUDA.
void* conv_handler();

}  // namespace jaxwin::cuda
