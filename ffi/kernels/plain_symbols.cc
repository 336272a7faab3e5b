// SPDX-License-Identifier: Apache-2.0
//
// Plain symbols (jaxwin_test_*) around one instruction set's micro-kernels, for the tests: leaf
// code behind one table look-up. Linked with the objects of the extension itself, never into it.

#include <cstdint>

#include "kernels/channels.h"
#include "kernels/kernels.h"
#include "kernels/transforms.h"

#define JAXWIN_PASTE(a, b) JAXWIN_PASTE_(a, b)
#define JAXWIN_PASTE_(a, b) a##b

extern "C" {
#define JAXWIN_SYMBOL(name) \
  __attribute__((visibility("default"))) void JAXWIN_PASTE(name, JAXWIN_TARGET)
#define JAXWIN_TABLE (*jaxwin::JAXWIN_TARGET::kernels(static_cast<jaxwin::Word>(word)))
JAXWIN_SYMBOL(jaxwin_test_gemm_)
(int64_t word, int64_t mr, int64_t nv, int64_t form, const jaxwin::GemmArgs* args) {
  const jaxwin::Kernels& k = JAXWIN_TABLE;
  if (form >= 4) return (form == 4 ? k.narrow : form == 5 ? k.narrow_ahead : k.near)[mr](args);
  (form == 0 ? k.packed : form == 1 ? k.strided : form == 2 ? k.indirect : k.ahead)[nv][mr](args);
}
JAXWIN_SYMBOL(jaxwin_test_lanes_)
(int64_t word, int64_t dtype, int64_t pixels, const jaxwin::GemmArgs* args) {
  JAXWIN_TABLE.lanes[dtype][pixels](args);
}
JAXWIN_SYMBOL(jaxwin_test_lanes_grad_)
(int64_t word, int64_t accumulators, const jaxwin::GemmArgs* args, const int64_t* offsets) {
  JAXWIN_TABLE.lanes_grad[accumulators](args, offsets);
}
JAXWIN_SYMBOL(jaxwin_test_groups_grad_)
(int64_t word, int64_t columns, int64_t channels, int64_t groups, const jaxwin::GemmArgs* args) {
  JAXWIN_TABLE.groups_grad[columns][channels][groups](args);
}
JAXWIN_SYMBOL(jaxwin_test_sweep_)
(int64_t word, int64_t dtype, int64_t form, int64_t window, int64_t stride, int64_t rows,
 const jaxwin::SweepArgs* args) {
  JAXWIN_TABLE.sweep[dtype][form][window][stride][rows](args);
}
JAXWIN_SYMBOL(jaxwin_test_window_)
(int64_t word, int64_t dtype, int64_t stride, int64_t rows, int64_t pixels,
 const jaxwin::WindowArgs* args) {
  JAXWIN_TABLE.window[dtype][stride][rows][pixels](args);
}
JAXWIN_SYMBOL(jaxwin_test_window_filters_)
(int64_t word, int64_t dtype, int64_t stride, void* filters, int64_t cols) {
  const auto change = JAXWIN_TABLE.window_filters[dtype][stride];
  if (change != nullptr) change(filters, cols);
}
JAXWIN_SYMBOL(jaxwin_test_epilogue_)(int64_t word, const jaxwin::EpilogueArgs* args) {
  JAXWIN_TABLE.epilogue(args);
}
JAXWIN_SYMBOL(jaxwin_test_copy_)
(int64_t word, void* dst, int64_t dst_ld, const void* src, int64_t src_ld, int64_t src_step,
 int64_t n, int64_t count) {
  JAXWIN_TABLE.copy(dst, dst_ld, src, src_ld, src_step, n, count);
}
JAXWIN_SYMBOL(jaxwin_test_interleave_)
(int64_t word, void* dst, int64_t dst_ld, const void* const* rows, int64_t n_rows, int64_t src_ld,
 int64_t n, int64_t count) {
  JAXWIN_TABLE.interleave(dst, dst_ld, rows, n_rows, src_ld, n, count);
}
JAXWIN_SYMBOL(jaxwin_test_expand_)
(int64_t word, void* dst, int64_t dst_ld, const void* src, int64_t src_ld, int64_t n,
 const int64_t* table, int64_t multiplicity, int64_t lanes, int64_t span) {
  JAXWIN_TABLE.expand(dst, dst_ld, src, src_ld, n, table, multiplicity, lanes, span);
}
JAXWIN_SYMBOL(jaxwin_test_convert_)
(int64_t word, int64_t kind, int64_t dtype, void* dst, int64_t dst_ld, const void* src,
 int64_t src_ld, int64_t src_step, int64_t n, int64_t count) {
  const jaxwin::Kernels& k = JAXWIN_TABLE;
  (kind == 0   ? k.read
   : kind == 1 ? k.pack
   : kind == 2 ? k.write
               : k.stream)[dtype](dst, dst_ld, src, src_ld, src_step, n, count);
}
JAXWIN_SYMBOL(jaxwin_test_narrow_epilogue_)
(int64_t word, int64_t dtype, const jaxwin::EpilogueArgs* args) {
  const jaxwin::Kernels& k = JAXWIN_TABLE;
  (args->y == nullptr ? k.narrow_epilogue : k.finish)[dtype](args);
}
JAXWIN_SYMBOL(jaxwin_test_accumulate_)
(int64_t word, void* dst, const void* src, int64_t n) { JAXWIN_TABLE.accumulate(dst, src, n); }
JAXWIN_SYMBOL(jaxwin_test_transform_)
(int64_t word, int64_t kind, int64_t scheme, const jaxwin::TransformArgs* args) {
  const auto& t = *jaxwin::JAXWIN_TARGET::transforms(static_cast<jaxwin::Word>(word));
  (kind == 0 ? t.input : kind == 1 ? t.filter : t.output)[scheme](args);
}
#define JAXWIN_CHANNELS (*jaxwin::JAXWIN_TARGET::channel_kernels(static_cast<jaxwin::Word>(word)))
JAXWIN_SYMBOL(jaxwin_test_scale_)(int64_t word, const jaxwin::ScaleArgs* args) {
  JAXWIN_CHANNELS.scale(args);
}
JAXWIN_SYMBOL(jaxwin_test_moments_)(int64_t word, const jaxwin::MomentsArgs* args) {
  JAXWIN_CHANNELS.moments(args);
}
}
