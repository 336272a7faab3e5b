// SPDX-License-Identifier: Apache-2.0
//
// The micro-kernels, as a table of function pointers per instruction set. This header is compiled
// for every target and therefore holds plain structs only.
//
// Notation: W = lanes of a vector; a tile is MR rows (output pixels) x NV vectors of columns
// (output features). Strides and offsets count elements, of the
// type that the table is for.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace jaxwin {

// How kernels store results: as words, or made elements in one of these ways. Bfloat16 is rounded
// by integers, or by the CPU (AVX512-BF16), which gives the same bits where denormals are flushed.
enum Store { kStoreNot, kStoreWords, kStoreBF16, kStoreBF16ByCpu, kStoreF16, kStoreS32 };

// One contiguous piece of the reduction: `len` steps, starting at these offsets in A and B.
struct Run {
  int64_t a;
  int64_t b;
  int64_t len;
};

// C[r, j] (op)= chain over runs t, steps i of A[r, t, i] * B[t, i, j], for r < MR, j < cols:
//   A[r, t, i] = a[r * a_row + run[t].a + i * a_step]
//   B[t, i, j] = b[run[t].b + i * b_step + j]
// The chain is one fma per (t, i) in this order; it starts from C where `load`, else from zero.
// Where `add`, its value is added to C with one more rounding (chunked reductions), else stored.
// Reads of B: columns [0, NV * W) by the packed form, [0, cols) by the strided form.
// The form with prefetches is the packed one, and brings one cache line per step into the
// second-level cache: that of ahead[s * ahead_step] in step s. No address is invalid there.
// The narrow forms are the packed one for one vector of columns, and pay where runs are of eight
// steps or more and the CPU does not load as fast as it multiplies. That with prefetches, and the
// near form, for other CPUs, bring the cache lines from `ahead` on into the first-level cache, one
// per step.
// The indirect form finds every row of A by itself, in a table of offsets; -1 stands for zeros:
//   A[r, t, i] = (o < 0 ? zeros : a + o)[i],  o = table[r * table_row + run[t].a]
struct GemmArgs {
  const void* a;
  const void* b;
  void* c;
  const Run* runs;
  int64_t n_runs;
  int64_t a_row;
  int64_t a_step;  // ignored by the packed form (1)
  int64_t b_step;
  int64_t c_row;
  int64_t cols;  // (NV - 1) * W < cols <= NV * W
  int64_t load;
  int64_t add;
  int64_t stream;   // stores pass the caches by; cols = NV * W, C in whole aligned vectors, no add
  int64_t blocks;   // LanesFn only
  int64_t b_block;  // LanesFn only
  const int64_t* table;  // these three: the indirect form only
  int64_t table_row;
  const void* zeros;
  const void* ahead;  // these two: the forms with prefetches only
  int64_t ahead_step;
  int64_t result;  // LanesFn only: how C is stored, a Store
};
using GemmFn = void (*)(const GemmArgs*);

// Channels as lanes, `blocks` vectors of them, read as elements and stored as those of a result:
// for p < P pixels, j < cols:
//   C[p, j] = chain over runs t of X[p, t, j] * B[t, j]   (Run.len is not used)
//   X[p, t, j] = a[p * a_row + run[t].a + j],  B[t, j] = b[j / W * b_block + run[t].b + j % W]
// where (blocks - 1) * W < cols <= blocks * W. Reads of B: whole vectors.
using LanesFn = void (*)(const GemmArgs*);

// Weight gradient with channels as lanes: for q < Q accumulators, j < cols <= W:
//   C[q, j] = chain, from C where `load`, over runs t, steps i of X[q, t, i, j] * B[t, i, j]
//   X = a[offsets[q] + run[t].a + i * a_step + j],  B = b[run[t].b + i * b_step + j]
// Reads of X: whole vectors, as masked loads are no operands of products.
using LanesGradFn = void (*)(const GemmArgs*, const int64_t* offsets);

// Weight gradient of G groups whose features are a vector's lanes in turn: lane j is of group
// j % G, and the i-th channels of all groups lie side by side, which takes one load to spread. For
// u < KW columns of the result, i < C channels, j < W:
//   C[u, i, j] = chain, from C, over runs t, steps s of X[u, t, s, i, j] * B[t, s, j]
//   X = a[u * a_row + run[t].a + s * a_step + i * G + j % G],  B = b[run[t].b + s * b_step + j]
//   C[u, i, j] = c[u * c_row + i * W + j]
using GroupsGradFn = void (*)(const GemmArgs*);

// Features as lanes, a window of KW columns swept along SX-strided output columns: for r < R output
// rows, o < n output columns, j < cols:
//   Y[r, o, j] = chain over columns kx < KW, runs t, channels i < channels of
//                X[r, o * SX + kx, t, i, j] * B[kx, t, i, j]
//   X[r, q, t, i, j] = x[r * x_row + q * x_col + run[t].a + j / W * span + table[i * W + j % W]],
//   and zero where run[t].len + r * row_step, its row of the input, is outside [0, rows); columns q
//   outside [q_begin, q_end) are skipped.
//   B[kx, t, i, j] = w[j / W * w_block + kx * w_col + run[t].b + i * W + j % W]
//   Y[r, o, j] = y[r * y_row + o * y_col + j]
// Permuted: a vector of `span` channels is loaded once for all positions of the window that it
// belongs to, and spread over the lanes in a register. Own: a lane reads the channel of its own
// number; channels = 1, span = W, no table. Broadcast: all lanes of a vector read the same
// channels, (first + j) / features * channels + i in place of those of span and table, each once
// for all positions; a row that is no input is read at `zeros`. Reads of B: whole vectors; of x:
// in_cols channels.
enum SweepForm { kSweepOwn, kSweepPermuted, kSweepBroadcast, kSweepForms };
struct SweepArgs {
  const void* x;
  const void* w;
  void* y;
  const Run* runs;
  int64_t n_runs;
  int64_t n;
  int64_t cols;
  int64_t x_row, x_col, q_begin, q_end;
  int64_t w_col, w_block;
  int64_t y_row, y_col;
  int64_t row_step, rows;
  int64_t border;  // some row of the input is outside [0, rows)
  int64_t in_cols;
  int64_t channels, span;
  const int32_t* table;
  int64_t first, features;  // broadcast: features before these, features of a group
  const void* zeros;        // and `channels` zeros
  int64_t result;           // how Y is stored, a Store
  int64_t follow;           // row r + 1 of a run is row r of the next one; a hint
};
using SweepFn = void (*)(const SweepArgs*);

// Depthwise, a whole 3x3 window of a tile of R x P output pixels, SX columns and rows apart, for
// channels j < cols:
//   Y[r, p, j] = chain over kx, ky of X[r * SX + ky, p * SX + kx, j] * B[kx, ky, j]
//   X[a, b, j] = x[a * x_row + b * x_col + j],  Y[r, p, j] = y[r * y_row + p * y_col + j]
//   B[kx, ky, j] = w[((j / W * 3 + kx) * 3 + ky) * W + j % W]
// without the rows a whose bit of `rows` is not set, without the window's first column for the
// first pixel where `edges` has kWindowLeft, its last column for the last pixel where kWindowRight.
// x and y are addresses of row and column 0, where that is input or not. Reads of B: whole vectors.
// Kernels::window_filters may have made something else of w.
inline constexpr int kWindow = 3;
inline constexpr int64_t kWindowLeft = 1;
inline constexpr int64_t kWindowRight = 2;
struct WindowArgs {
  const void* x;  // elements
  const void* w;
  void* y;
  int64_t cols;
  int64_t x_row, x_col;
  int64_t y_row, y_col;
  int64_t rows;
  int64_t edges;
  int64_t result;  // how Y is stored, a Store
};
using WindowFn = void (*)(const WindowArgs*);
using WindowFiltersFn = void (*)(void* filters, int64_t cols);

enum class Activation : int64_t { kNone, kRelu, kRelu6, kGelu, kSilu, kLeakyRelu, kTanh, kSigmoid };
inline constexpr const char* kActivationNames[] = {"none", "relu",       "relu6", "gelu",
                                                   "silu", "leaky_relu", "tanh",  "sigmoid"};
inline constexpr int kActivationCount = 8;

// C[r, j] = act(C[r, j] + bias + residual) for r < rows, j < cols. The bias value is
// bias[r * bias_row + j * bias_col] (0 and 1, or 1 and 0, or absent); each addition rounds once.
struct EpilogueArgs {
  void* c;
  int64_t c_row;
  int64_t rows;
  int64_t cols;
  const void* bias;  // may be null
  int64_t bias_row;
  int64_t bias_col;
  const void* residual;  // may be null
  int64_t residual_row;
  Activation activation;
  void* y = nullptr;  // finish: result [r, j] is element r * y_row + j of it, not in c
  int64_t y_row = 0;
};

using CopyFn = void (*)(void* dst, int64_t dst_ld, const void* src, int64_t src_ld,
                        int64_t src_step, int64_t n, int64_t count);

inline constexpr int kMaxNv = 4;
inline constexpr int kMaxMr = 16;
inline constexpr int kMaxIndirectMr = 8;   // each row of A takes an address register
inline constexpr int kMaxSweep = 7;        // output rows
inline constexpr int kMaxSweepWindow = 7;  // columns
inline constexpr int kMaxSweepStride = 2;
inline constexpr int kMaxGradColumns = 3;  // of the result
inline constexpr int kMaxGradChannels = 8;
inline constexpr int kMaxGradGroups = 8;
inline constexpr int kMaxWindowRows = 2;
inline constexpr int kMaxWindowPixels = 7;
inline constexpr int kMaxWindowStride = 2;

struct Kernels {
  const char* isa;
  int64_t size;      // of a word, in bytes
  int64_t channels;  // of the reduction that are one word
  int width;
  int max_mr[kMaxNv + 1];                 // by NV; 0: no such tile
  GemmFn packed[kMaxNv + 1][kMaxMr + 1];  // [NV][MR]
  GemmFn ahead[kMaxNv + 1][kMaxMr + 1];   // may be null
  GemmFn narrow[kMaxMr + 1];              // NV = 1; may be null, as the next two
  GemmFn narrow_ahead[kMaxMr + 1];
  GemmFn near[kMaxMr + 1];
  bool loads_two;  // the CPU loads as many vectors in a cycle as it multiplies
  GemmFn strided[kMaxNv + 1][kMaxMr + 1];
  GemmFn indirect[kMaxNv + 1][kMaxMr + 1];  // up to kMaxIndirectMr
  Dtype word;                               // arrays of this type are words
  // The kernels with channels as lanes: by the type of their input, one of whose elements is a
  // word.
  LanesFn lanes[kDtypes][kMaxMr + 1];  // [P]; may be null
  LanesGradFn lanes_grad[kMaxMr + 1];  // [Q]
  // [KW][C][G], where KW is 1 or 3, and C and G are powers of two; may be null
  GroupsGradFn groups_grad[kMaxGradColumns + 1][kMaxGradChannels + 1][kMaxGradGroups + 1];
  // [KW][SX][R]; may be null
  SweepFn sweep[kDtypes][kSweepForms][kMaxSweepWindow + 1][kMaxSweepStride + 1][kMaxSweep + 1];
  // [SX][R][P]; may be null
  WindowFn window[kDtypes][kMaxWindowStride + 1][kMaxWindowRows + 1][kMaxWindowPixels + 1];
  // Makes of packed filters what these tiles read in their place; null where that is the same.
  WindowFiltersFn window_filters[kDtypes][kMaxWindowStride + 1];
  Store stores[kDtypes];  // results of a type, without an epilogue; see stores_result
  void (*epilogue)(const EpilogueArgs*);
  // dst[j * dst_ld + c] = src[j * src_ld + c * src_step], j < n, c < count.
  CopyFn copy;
  // The same between words and the elements of an array; null where that is not a type of theirs.
  // Read: `count` neighbours become words, the last one filled up with zero. Pack: n do.
  CopyFn read[kDtypes];
  CopyFn pack[kDtypes];
  CopyFn write[kDtypes];
  // Write where `count` neighbours are whole vectors of the array, on whole vectors; they pass the
  // caches by. May be null.
  CopyFn stream[kDtypes];
  CopyFn write_bf16_by_cpu, stream_bf16_by_cpu;  // may be null
  // The epilogue on words, with bias and residual of this type, neither of which is the words'.
  void (*narrow_epilogue[kDtypes])(const EpilogueArgs*);
  // The same, with results of this type too, at y.
  void (*finish[kDtypes])(const EpilogueArgs*);
  void (*finish_bf16_by_cpu)(const EpilogueArgs*);  // may be null
  // dst[i * dst_ld + r * count + c] = rows[r][i * src_ld + c] for i < n, r < n_rows, c < count
  // <= 4 and dst_ld >= n_rows * count; a null row counts as zeros.
  void (*interleave)(void* dst, int64_t dst_ld, const void* const* rows, int64_t n_rows,
                     int64_t src_ld, int64_t n, int64_t count);
  // dst[i * dst_ld + m * W + l] = src[i * src_ld + table[m * W + l]] for l < lanes; lanes beyond
  // hold unspecified finite-or-not values that no caller stores.
  // Where 0 < span <= W, every index lies in [0, W), elements from span on are not read and count
  // as zeros, and dst may be src if multiplicity == 1 and src_ld == dst_ld >= W.
  void (*expand)(void* dst, int64_t dst_ld, const void* src, int64_t src_ld, int64_t n,
                 const int64_t* table, int64_t multiplicity, int64_t lanes, int64_t span);
  // Runs chains of fma that nothing holds up; returns the floating-point operations done.
  double (*peak)(int64_t iterations);
  // 1 if every word, or element of this type, of src[0, n) is finite.
  int64_t (*all_finite)(const void* src, int64_t n);
  int64_t (*finite[kDtypes])(const void* src, int64_t n);
  // dst[i] += src[i], i < n.
  void (*accumulate)(void* dst, const void* src, int64_t n);
  const void* nan;       // one element
  uint32_t activations;  // bit i: the epilogue has Activation i
};

// The form for one vector of columns and runs of eight steps or more, if any is better than the
// packed one. Windows that `overlap` have read most of the next pixels already.
static inline GemmFn narrow_form(const Kernels& k, int64_t mr, bool overlap) {
  if (k.loads_two) return overlap ? nullptr : k.near[mr];
  return overlap ? k.narrow[mr] : k.narrow_ahead[mr];
}

// Output pixels of the widest tile of channels as lanes; 0: there is none.
static inline int max_lanes(const Kernels& k, Dtype dtype) {
  int pixels = kMaxMr;
  while (pixels > 0 && k.lanes[dtype][pixels] == nullptr) --pixels;
  return pixels;
}

// Output rows of the highest tile for such a window; 0: there is none.
static inline int max_sweep(const Kernels& k, Dtype dtype, int form, int64_t window,
                            int64_t stride) {
  if (window > kMaxSweepWindow || stride > kMaxSweepStride) return 0;
  int rows = kMaxSweep;
  while (rows > 0 && k.sweep[dtype][form][window][stride][rows] == nullptr) --rows;
  return rows;
}

// Pixels of the widest tile of whole windows with so many rows; 0: there is none.
static inline int max_window(const Kernels& k, Dtype dtype, int64_t stride, int64_t rows) {
  if (stride > kMaxWindowStride || rows < 1 || rows > kMaxWindowRows) return 0;
  int pixels = kMaxWindowPixels;
  while (pixels > 0 && k.window[dtype][stride][rows][pixels] == nullptr) --pixels;
  return pixels;
}

// Channels of the widest tile of the weight gradient of so many interleaved groups, of several
// channels each; 0: there is none.
static inline int max_grad_channels(const Kernels& k, int64_t groups) {
  int channels = kMaxGradChannels;
  while (channels > 0 &&
         (groups > kMaxGradGroups || k.groups_grad[1][channels][groups] == nullptr)) {
    channels /= 2;
  }
  return channels;
}

// Whether those that read one type store results of another themselves.
static inline bool stores_result(const Kernels& k, Dtype operand, Dtype result) {
  const Store store = k.stores[result];
  return store == kStoreWords || store == kStoreS32 || (store != kStoreNot && operand == result);
}

// Whether results of this type are words as they are.
static inline bool is_word(const Kernels& k, Dtype result) { return k.write[result] == k.copy; }

// Whether there is an epilogue with this activation, for operands of this type.
static inline bool has_activation(const Kernels& k, Dtype operand, Activation a) {
  return (k.activations >> static_cast<int>(a) & 1U) != 0 &&
         (is_word(k, operand) || k.narrow_epilogue[operand] != nullptr);
}

namespace baseline {
const Kernels* kernels(Word word);  // null where there are none
}
namespace avx2 {
const Kernels* kernels(Word word);  // null where there are none
}
namespace avx512vnni {  // avx512 with dot products: of pairs, and of floats windows of bytes only
const Kernels* kernels(Word word);
}
namespace avx512 {
const Kernels* kernels(Word word);  // null where there are none
}

}  // namespace jaxwin
