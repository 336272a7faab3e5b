// SPDX-License-Identifier: Apache-2.0
//
// Instantiates every micro-kernel for one instruction set. This file is compiled once per target.

#include "kernels/kernels.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/convert.h"
#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "kernels/lanes.h"
#include "kernels/window.h"
#include "kernels/window_dots.h"

namespace jaxwin::JAXWIN_TARGET {
namespace {

template <typename T, int NV, int MR>
constexpr void fill_tile(Kernels& k) {
  if constexpr (MR > 0) {
    static_assert(MR * NV + NV + 1 <= kRegisters, "the tile does not fit the register file");
    k.packed[NV][MR] = gemm_tile<MR, NV, Form::kPacked, T>;
    if constexpr (std::is_same_v<T, float>) {
      k.ahead[NV][MR] = gemm_tile<MR, NV, Form::kAhead, T>;
      // With fewer rows the latency of products decides, with shorter vectors not the loads.
      if constexpr (NV == 1 && MR >= 8 && kVectorBytes == 64) {
        k.narrow[MR] = gemm_tile<MR, NV, Form::kNarrow, T>;
        k.narrow_ahead[MR] = gemm_tile<MR, NV, Form::kNarrowAhead, T>;
        k.near[MR] = gemm_tile<MR, NV, Form::kNear, T>;
      }
    }
    // Integers are packed always.
    if constexpr (!std::is_same_v<T, Pair>) {
      k.strided[NV][MR] = gemm_tile<MR, NV, Form::kStrided, T>;
      if constexpr (MR <= kMaxIndirectMr) {
        k.indirect[NV][MR] = gemm_tile<MR, NV, Form::kIndirect, T>;
      }
    }
    fill_tile<T, NV, MR - 1>(k);
  }
}

template <typename T, typename S, int P>
constexpr void fill_lanes(Kernels& k, Dtype dtype) {
  if constexpr (P > 0) {
    k.lanes[dtype][P] = lanes_tile<P, T, S>;
    if constexpr (std::is_same_v<S, T>) k.lanes_grad[P] = lanes_grad_tile<P, T>;
    fill_lanes<T, S, P - 1>(k, dtype);
  }
}

template <typename T, typename S, int KW, int SX, SweepForm kForm,
          int R = kSweepRows<T, S, KW, SX, kForm>>
constexpr void fill_sweep(Kernels& k, Dtype dtype) {
  if constexpr (R > 0) {
    k.sweep[dtype][kForm][KW][SX][R] = sweep_tile<KW, SX, R, kForm, T, S>;
    fill_sweep<T, S, KW, SX, kForm, R - 1>(k, dtype);
  }
}

#if defined(__AVX2__)  // else fma is emulated
// Groups of two channels or more, as many as a vector holds.
template <int G, int C = std::min(kGroupsGradChannels, kWidth<float> / G)>
constexpr void fill_groups_grad(Kernels& k) {
  if constexpr (C > 0) {
    k.groups_grad[1][C][G] = groups_grad_tile<1, C, G>;
    k.groups_grad[3][C][G] = groups_grad_tile<3, C, G>;
    fill_groups_grad<G, C / 2>(k);
  } else if constexpr (4 * G <= kWidth<float>) {
    fill_groups_grad<2 * G>(k);
  }
}
#endif

// Each lane its own channel.
template <typename T, typename S>
constexpr void fill_own_sweeps(Kernels& k, Dtype dtype) {
  fill_sweep<T, S, 3, 1, kSweepOwn>(k, dtype);
  fill_sweep<T, S, 5, 1, kSweepOwn>(k, dtype);
  fill_sweep<T, S, 7, 1, kSweepOwn>(k, dtype);
  fill_sweep<T, S, 3, 2, kSweepOwn>(k, dtype);
  fill_sweep<T, S, 5, 2, kSweepOwn>(k, dtype);
  fill_sweep<T, S, 7, 2, kSweepOwn>(k, dtype);
}

// Channels spread over the lanes of their group.
template <typename T, typename S, SweepForm kForm>
constexpr void fill_spread_sweeps(Kernels& k, Dtype dtype) {
  fill_sweep<T, S, 3, 1, kForm>(k, dtype);
  fill_sweep<T, S, 3, 2, kForm>(k, dtype);
  if constexpr (kForm == kSweepPermuted && std::is_same_v<S, T>) {
    // What a stride makes of 3x3 and 4x4 windows in input gradients. Elements become words first.
    fill_sweep<T, S, 1, 1, kForm>(k, dtype);
    fill_sweep<T, S, 2, 1, kForm>(k, dtype);
  }
}

template <typename T, typename S, int SX, int R, int... P>
constexpr void fill_window(Kernels& k, Dtype dtype, std::integer_sequence<int, P...>) {
  ((k.window[dtype][SX][R][P] = window_tile<SX, R, P, T, S>), ...);
}

template <typename T, typename S>
constexpr void fill_windows(Kernels& k, Dtype dtype) {
  // A tile, with a filter and an input vector, fits the registers; halves have two of each.
  constexpr bool kFits = kRegisters >= 32 && !kByHalves<S>;
  using Narrow = std::integer_sequence<int, 1, 2, 4, 7>;
  using Wide = std::conditional_t<kFits, Narrow, std::integer_sequence<int, 1, 2, 4>>;
  fill_window<T, S, 1, 1>(k, dtype, Narrow{});
  fill_window<T, S, 1, 2>(k, dtype, Wide{});
  fill_window<T, S, 2, 1>(k, dtype, Narrow{});
  fill_window<T, S, 2, 2>(k, dtype, Wide{});
#if defined(__AVX512F__)
  if constexpr (kByHalves<S>) {
    k.window_filters[dtype][1] = k.window_filters[dtype][2] = halve_filters;
  }
#endif
}

#define JAXWIN_STRING(x) JAXWIN_STRING_(x)
#define JAXWIN_STRING_(x) #x

// The targets as numbers, so that a tile line of another target compiles to nothing.
enum { target_baseline, target_avx2, target_avx512, target_avx512vnni = target_avx512 };
#if defined(__AVX512VNNI__)
constexpr const char* kIsa = "avx512";
#else
constexpr const char* kIsa = JAXWIN_STRING(JAXWIN_TARGET);
#endif
#define JAXWIN_PASTE(a, b) JAXWIN_PASTE_(a, b)
#define JAXWIN_PASTE_(a, b) a##b

template <typename T, int kTileTarget, int NV, int MR>
constexpr void fill_if_ours(Kernels& k) {
  if constexpr (kTileTarget == JAXWIN_PASTE(target_, JAXWIN_TARGET)) {
    static_assert(NV <= kMaxNv && MR <= kMaxMr);
    // The products of pairs need one register more, unless they are added at once.
    constexpr int kFit = (kRegisters - NV - 2) / NV;
    constexpr int kRows = std::is_same_v<T, Pair> && kFit < MR ? kFit : MR;
    k.max_mr[NV] = kRows;
    fill_tile<T, NV, kRows>(k);
  }
}

template <typename T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

template <typename T>
constexpr Kernels make(int64_t channels, uint32_t activations) {
  Kernels k{};
  k.isa = kIsa;
  k.size = sizeof(T);
  k.channels = channels;
  k.width = kWidth<T>;
#define JAXWIN_TILE(target, NV, MR) fill_if_ours<T, target_##target, NV, MR>(k);
#include "kernels/tiles.inc"
#undef JAXWIN_TILE
  // Pairs are moved as floats are.
  k.copy = copy<std::conditional_t<std::is_same_v<T, Pair>, float, T>>;
  k.activations = activations;
  if constexpr (!std::is_same_v<T, Pair>) {
    constexpr int kPixels = kRegisters >= 32 ? 16 : 12;
    k.word = sizeof(T) == sizeof(float) ? kF32 : kF64;
    k.stores[k.word] = kStoreWords;
    fill_lanes<T, T, kPixels>(k, k.word);
    if constexpr (std::is_same_v<T, float>) {  // they take long to compile
      fill_own_sweeps<T, T>(k, k.word);
      fill_spread_sweeps<T, T, kSweepPermuted>(k, k.word);
      fill_spread_sweeps<T, T, kSweepBroadcast>(k, k.word);
    }
    k.epilogue = epilogue<T, T, T>;
    k.interleave = interleave<T>;
    k.expand = expand<T>;
    k.peak = peak<T>;
    k.all_finite = all_finite<T>;
    k.accumulate = accumulate<T>;
    k.nan = &kNan<T>;
  }
  return k;
}

template <typename S, typename T>
constexpr void add_operand(Kernels& k, Dtype dtype) {
  k.read[dtype] = read<S, T>;
  k.pack[dtype] = pack<S, T>;
  if constexpr (std::is_integral_v<S>) {
    k.finite[dtype] = always_finite;
  } else {
    k.narrow_epilogue[dtype] = epilogue<float, S, float>;
    k.finish[dtype] = epilogue<float, S, S>;
    k.finite[dtype] = narrow_finite<S>;
  }
}

#if defined(__AVX2__)  // else fma is emulated, and its code long
// What reads elements in place of words, for channels as lanes.
template <typename S>
constexpr void fill_elements(Kernels& k, Dtype dtype) {
  fill_lanes<float, S, 8>(k, dtype);
  fill_windows<float, S>(k, dtype);
  fill_own_sweeps<float, S>(k, dtype);
  fill_spread_sweeps<float, S, kSweepPermuted>(k, dtype);
}
#endif

constexpr Kernels make_float() {
  Kernels k = make<float>(kWordChannels[kFloat], (1U << kActivationCount) - 1);
  fill_windows<float, float>(k, kF32);
#if defined(__AVX2__)
  fill_elements<BFloat16>(k, kBF16);
  fill_elements<Float16>(k, kF16);
  fill_elements<int8_t>(k, kS8);
  fill_elements<uint8_t>(k, kU8);
  fill_groups_grad<1>(k);
  k.stores[kBF16] = kStoreBF16;
  k.stores[kF16] = kStoreF16;
  k.stores[kS32] = k.stores[kU32] = kStoreS32;
  k.stream[kBF16] = narrow_streams<BFloat16>;
  k.stream[kF16] = narrow_streams<Float16>;
#endif
  add_operand<BFloat16, float>(k, kBF16);
  add_operand<Float16, float>(k, kF16);
  add_operand<int8_t, float>(k, kS8);
  add_operand<uint8_t, float>(k, kU8);
  k.write[kBF16] = write<float, BFloat16>;
#if defined(JAXWIN_BF16_BY_CPU)
  k.write_bf16_by_cpu = write<float, BFloat16ByCpu>;
  k.stream_bf16_by_cpu = narrow_streams<BFloat16ByCpu>;
  k.finish_bf16_by_cpu = epilogue<float, BFloat16, BFloat16ByCpu>;
#endif
  k.write[kF16] = write<float, Float16>;
  k.write[kS8] = k.write[kU8] = write<float, uint8_t>;
  k.write[kS16] = k.write[kU16] = write<float, uint16_t>;
  k.write[kS32] = k.write[kU32] = write<float, int32_t>;
  k.read[kF32] = k.pack[kF32] = k.write[kF32] = k.copy;
  k.finite[kF32] = k.all_finite;
  return k;
}

constexpr Kernels make_double() {
  Kernels k = make<double>(kWordChannels[kDouble], kExactActivations);
#if defined(__AVX2__)
  fill_spread_sweeps<double, double, kSweepPermuted>(k, kF64);
  fill_spread_sweeps<double, double, kSweepBroadcast>(k, kF64);
  fill_windows<double, double>(k, kF64);
#endif
  k.read[kF64] = k.pack[kF64] = k.write[kF64] = k.copy;
  k.finite[kF64] = k.all_finite;
  return k;
}

constexpr Kernels make_pair() {
  Kernels k = make<Pair>(kWordChannels[kPair], 0);
  add_operand<int8_t, Pair>(k, kS8);
  add_operand<uint8_t, Pair>(k, kU8);
  add_operand<int16_t, Pair>(k, kS16);
  k.write[kS8] = k.write[kU8] = write<Pair, uint8_t>;
  k.write[kS16] = k.write[kU16] = write<Pair, uint16_t>;
  k.write[kS32] = k.write[kU32] = k.copy;
  k.all_finite = always_finite;
  return k;
}

#if defined(__AVX512VNNI__)
template <typename S, int R, int... P>
constexpr void fill_dots(Kernels& k, Dtype dtype, std::integer_sequence<int, P...>) {
  ((k.window[dtype][1][R][P] = dot_tile<R, P, S>), ...);
}

template <typename S>
constexpr void fill_dots(Kernels& k, Dtype dtype) {
  using Pixels = std::integer_sequence<int, 1, 2, 4, 7>;
  fill_dots<S, 1>(k, dtype, Pixels{});
  fill_dots<S, 2>(k, dtype, Pixels{});
  k.window_filters[dtype][1] = dot_filters<S>;
}

constexpr Kernels make_dots() {
  Kernels k{};
  fill_dots<int8_t>(k, kS8);
  fill_dots<uint8_t>(k, kU8);
  return k;
}
#endif

// Constants: looking at the table of a set that this CPU lacks executes none of its instructions.
#if defined(__AVX512VNNI__)
constexpr Kernels kTables[kWords] = {make_dots(), {}, make_pair()};
#else
constexpr Kernels kTables[kWords] = {make_float(), make_double(), make_pair()};
#endif

}  // namespace

const Kernels* kernels(Word word) { return &kTables[word]; }

}  // namespace jaxwin::JAXWIN_TARGET
