// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace jaxwin {

// The parts of the XLA FFI target `jaxwin_conv`: its handlers by stage, and the type of the state
// that each call site keeps between calls.
struct ConvHandlers {
  void* instantiate;
  void* execute;
  void* type_id;
  const void* type_info;
};
ConvHandlers conv_handlers();

}  // namespace jaxwin
