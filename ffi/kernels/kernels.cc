// SPDX-License-Identifier: Apache-2.0
//
// Instantiates every micro-kernel for one instruction set. This file is compiled once per target.

#include "kernels/kernels.h"

#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "kernels/lanes.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

template <typename T, int NV, int MR>
constexpr void fill_tile(Kernels& k) {
  if constexpr (MR > 0) {
    static_assert(MR * NV + NV + 1 <= kRegisters, "the tile does not fit the register file");
    k.packed[NV][MR] = gemm_tile<MR, NV, false, T>;
    k.strided[NV][MR] = gemm_tile<MR, NV, true, T>;
    fill_tile<T, NV, MR - 1>(k);
  }
}

template <typename T, int P>
constexpr void fill_lanes(Kernels& k) {
  if constexpr (P > 0) {
    k.lanes[P] = lanes_tile<P, T>;
    k.lanes_grad[P] = lanes_grad_tile<P, T>;
    fill_lanes<T, P - 1>(k);
  }
}

template <typename T, int KW, int SX, int R = kSweepRows<KW, SX>>
constexpr void fill_sweep(Kernels& k) {
  if constexpr (R > 0) {
    k.sweep[KW][SX][R] = sweep_tile<KW, SX, R, T>;
    fill_sweep<T, KW, SX, R - 1>(k);
  }
}

#define JAXWIN_STRING(x) JAXWIN_STRING_(x)
#define JAXWIN_STRING_(x) #x

// The targets as numbers, so that a tile line of another target compiles to nothing.
enum { target_baseline, target_avx2, target_avx512 };
#define JAXWIN_PASTE(a, b) JAXWIN_PASTE_(a, b)
#define JAXWIN_PASTE_(a, b) a##b

template <typename T, int kTileTarget, int NV, int MR>
constexpr void fill_if_ours(Kernels& k) {
  if constexpr (kTileTarget == JAXWIN_PASTE(target_, JAXWIN_TARGET)) {
    static_assert(NV <= kMaxNv && MR <= kMaxMr);
    k.max_mr[NV] = MR;
    fill_tile<T, NV, MR>(k);
  }
}

template <typename T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

template <typename T>
constexpr Kernels make(Dtype dtype, uint32_t activations) {
  Kernels k{};
  k.isa = JAXWIN_STRING(JAXWIN_TARGET);
  k.dtype = dtype;
  k.size = sizeof(T);
  k.width = kWidth<T>;
#define JAXWIN_TILE(target, NV, MR) fill_if_ours<T, target_##target, NV, MR>(k);
#include "kernels/tiles.inc"
#undef JAXWIN_TILE
  constexpr int kPixels = kRegisters >= 32 ? 16 : 12;
  k.max_pixels = kPixels;
  fill_lanes<T, kPixels>(k);
  if constexpr (std::is_same_v<T, float>) {  // they take long to compile
    fill_sweep<T, 3, 1>(k);
    fill_sweep<T, 5, 1>(k);
    fill_sweep<T, 7, 1>(k);
    fill_sweep<T, 3, 2>(k);
    fill_sweep<T, 5, 2>(k);
    fill_sweep<T, 7, 2>(k);
  }
  k.epilogue = epilogue<T>;
  k.copy = copy<T>;
  k.interleave = interleave<T>;
  k.expand = expand<T>;
  k.peak = peak<T>;
  k.all_finite = all_finite<T>;
  k.accumulate = accumulate<T>;
  k.nan = &kNan<T>;
  k.activations = activations;
  return k;
}

// Constants: looking at the table of a set that this CPU lacks executes none of its instructions.
constexpr Kernels kTables[kDtypes] = {make<float>(kF32, (1U << kActivationCount) - 1),
                                      make<double>(kF64, kExactActivations)};

}  // namespace

const Kernels* kernels(Dtype dtype) { return &kTables[dtype]; }

}  // namespace jaxwin::JAXWIN_TARGET

#if defined(JAXWIN_TEST_KERNELS)
// Plain symbols for the emulator: leaf code behind one table look-up.
extern "C" {
#define JAXWIN_SYMBOL(name) \
  __attribute__((visibility("default"))) void JAXWIN_PASTE(name, JAXWIN_TARGET)
#define JAXWIN_TABLE jaxwin::JAXWIN_TARGET::kTables[dtype]
JAXWIN_SYMBOL(jaxwin_test_gemm_)
(int64_t dtype, int64_t mr, int64_t nv, int64_t strided, const jaxwin::GemmArgs* args) {
  const jaxwin::Kernels& k = JAXWIN_TABLE;
  (strided != 0 ? k.strided : k.packed)[nv][mr](args);
}
JAXWIN_SYMBOL(jaxwin_test_lanes_)(int64_t dtype, int64_t pixels, const jaxwin::GemmArgs* args) {
  JAXWIN_TABLE.lanes[pixels](args);
}
JAXWIN_SYMBOL(jaxwin_test_lanes_grad_)
(int64_t dtype, int64_t accumulators, const jaxwin::GemmArgs* args, const int64_t* offsets) {
  JAXWIN_TABLE.lanes_grad[accumulators](args, offsets);
}
JAXWIN_SYMBOL(jaxwin_test_sweep_)
(int64_t dtype, int64_t window, int64_t stride, int64_t rows, const jaxwin::SweepArgs* args) {
  JAXWIN_TABLE.sweep[window][stride][rows](args);
}
JAXWIN_SYMBOL(jaxwin_test_epilogue_)(int64_t dtype, const jaxwin::EpilogueArgs* args) {
  JAXWIN_TABLE.epilogue(args);
}
JAXWIN_SYMBOL(jaxwin_test_copy_)
(int64_t dtype, void* dst, int64_t dst_ld, const void* src, int64_t src_ld, int64_t src_step,
 int64_t n, int64_t count) {
  JAXWIN_TABLE.copy(dst, dst_ld, src, src_ld, src_step, n, count);
}
JAXWIN_SYMBOL(jaxwin_test_interleave_)
(int64_t dtype, void* dst, int64_t dst_ld, const void* const* rows, int64_t n_rows, int64_t src_ld,
 int64_t n, int64_t count) {
  JAXWIN_TABLE.interleave(dst, dst_ld, rows, n_rows, src_ld, n, count);
}
JAXWIN_SYMBOL(jaxwin_test_expand_)
(int64_t dtype, void* dst, int64_t dst_ld, const void* src, int64_t src_ld, int64_t n,
 const int64_t* table, int64_t multiplicity, int64_t lanes, int64_t span) {
  JAXWIN_TABLE.expand(dst, dst_ld, src, src_ld, n, table, multiplicity, lanes, span);
}
JAXWIN_SYMBOL(jaxwin_test_accumulate_)
(int64_t dtype, void* dst, const void* src, int64_t n) { JAXWIN_TABLE.accumulate(dst, src, n); }
}
#endif
