// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace jaxwin {

// The XLA FFI handler of the custom call `jaxwin_conv`.
void* conv_handler();

}  // namespace jaxwin
