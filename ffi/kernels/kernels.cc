// SPDX-License-Identifier: Apache-2.0
//
// Instantiates every micro-kernel for one instruction set. This file is compiled once per target.

#include "kernels/kernels.h"

#include <cstdint>

#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "kernels/lanes.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

template <int NV, int MR>
constexpr void fill_tile(Kernels& k) {
  if constexpr (MR > 0) {
    static_assert(MR * NV + NV + 1 <= kRegisters, "the tile does not fit the register file");
    k.packed[NV][MR] = gemm_tile<MR, NV, false>;
    k.strided[NV][MR] = gemm_tile<MR, NV, true>;
    fill_tile<NV, MR - 1>(k);
  }
}

template <int P>
constexpr void fill_lanes(Kernels& k) {
  if constexpr (P > 0) {
    k.lanes[P] = lanes_tile<P>;
    k.lanes_grad[P] = lanes_grad_tile<P>;
    fill_lanes<P - 1>(k);
  }
}

template <int KW, int SX, int R = kSweepRows<KW, SX>>
constexpr void fill_sweep(Kernels& k) {
  if constexpr (R > 0) {
    k.sweep[KW][SX][R] = sweep_tile<KW, SX, R>;
    fill_sweep<KW, SX, R - 1>(k);
  }
}

#define JAXWIN_STRING(x) JAXWIN_STRING_(x)
#define JAXWIN_STRING_(x) #x

// The targets as numbers, so that a tile line of another target compiles to nothing.
enum { target_baseline, target_avx2, target_avx512 };
#define JAXWIN_PASTE(a, b) JAXWIN_PASTE_(a, b)
#define JAXWIN_PASTE_(a, b) a##b

template <int kTileTarget, int NV, int MR>
constexpr void fill_if_ours(Kernels& k) {
  if constexpr (kTileTarget == JAXWIN_PASTE(target_, JAXWIN_TARGET)) {
    static_assert(NV <= kMaxNv && MR <= kMaxMr);
    k.max_mr[NV] = MR;
    fill_tile<NV, MR>(k);
  }
}

constexpr Kernels make() {
  Kernels k{};
  k.isa = JAXWIN_STRING(JAXWIN_TARGET);
  k.width = kWidth;
#define JAXWIN_TILE(target, NV, MR) fill_if_ours<target_##target, NV, MR>(k);
#include "kernels/tiles.inc"
#undef JAXWIN_TILE
  constexpr int kPixels = kRegisters >= 32 ? 16 : 12;
  k.max_pixels = kPixels;
  fill_lanes<kPixels>(k);
  fill_sweep<3, 1>(k);
  fill_sweep<5, 1>(k);
  fill_sweep<7, 1>(k);
  fill_sweep<3, 2>(k);
  fill_sweep<5, 2>(k);
  fill_sweep<7, 2>(k);
  k.epilogue = epilogue;
  k.copy = copy;
  k.interleave = interleave;
  k.expand = expand;
  k.peak = peak;
  k.all_finite = all_finite;
  return k;
}

// A constant: looking at the table of a set that this CPU lacks executes none of its instructions.
constexpr Kernels kTable = make();

}  // namespace

const Kernels* kernels() { return &kTable; }

}  // namespace jaxwin::JAXWIN_TARGET

#if defined(JAXWIN_TEST_KERNELS)
// Plain symbols for the emulator: leaf code behind one table look-up.
extern "C" {
#define JAXWIN_SYMBOL(name) \
  __attribute__((visibility("default"))) void JAXWIN_PASTE(name, JAXWIN_TARGET)
JAXWIN_SYMBOL(jaxwin_test_gemm_)
(int64_t mr, int64_t nv, int64_t strided, const jaxwin::GemmArgs* args) {
  using jaxwin::JAXWIN_TARGET::kTable;
  (strided != 0 ? kTable.strided : kTable.packed)[nv][mr](args);
}
JAXWIN_SYMBOL(jaxwin_test_lanes_)(int64_t pixels, const jaxwin::GemmArgs* args) {
  jaxwin::JAXWIN_TARGET::kTable.lanes[pixels](args);
}
JAXWIN_SYMBOL(jaxwin_test_lanes_grad_)
(int64_t accumulators, const jaxwin::GemmArgs* args, const int64_t* offsets) {
  jaxwin::JAXWIN_TARGET::kTable.lanes_grad[accumulators](args, offsets);
}
JAXWIN_SYMBOL(jaxwin_test_sweep_)
(int64_t window, int64_t stride, int64_t rows, const jaxwin::SweepArgs* args) {
  jaxwin::JAXWIN_TARGET::kTable.sweep[window][stride][rows](args);
}
JAXWIN_SYMBOL(jaxwin_test_epilogue_)(const jaxwin::EpilogueArgs* args) {
  jaxwin::JAXWIN_TARGET::kTable.epilogue(args);
}
JAXWIN_SYMBOL(jaxwin_test_copy_)
(float* dst, int64_t dst_ld, const float* src, int64_t src_ld, int64_t src_step, int64_t n,
 int64_t count) {
  jaxwin::JAXWIN_TARGET::kTable.copy(dst, dst_ld, src, src_ld, src_step, n, count);
}
JAXWIN_SYMBOL(jaxwin_test_interleave_)
(float* dst, int64_t dst_ld, const float* const* rows, int64_t n_rows, int64_t src_ld, int64_t n,
 int64_t count) {
  jaxwin::JAXWIN_TARGET::kTable.interleave(dst, dst_ld, rows, n_rows, src_ld, n, count);
}
JAXWIN_SYMBOL(jaxwin_test_expand_)
(float* dst, int64_t dst_ld, const float* src, int64_t src_ld, int64_t n, const int64_t* table,
 int64_t multiplicity, int64_t lanes, int64_t span) {
  jaxwin::JAXWIN_TARGET::kTable.expand(dst, dst_ld, src, src_ld, n, table, multiplicity, lanes,
                                       span);
}
}
#endif
