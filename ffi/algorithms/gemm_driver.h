// SPDX-License-Identifier: Apache-2.0
//
// The loops around the dense micro-kernel, shared by every algorithm whose inner operation is
// C[pixel, feature] = sum over the reduction of A[pixel, r] * B[r, feature]. The algorithms differ
// in where A comes from.
#pragma once

#include "algorithms/algorithm.h"

namespace jaxwin {

enum class Lowering {
  kDirect,    // A is the input itself
  kRows,      // A is a copy of the input rows with their padding, channels innermost
  kWindow,    // A is a strip in window order: im2win
  kColumns,   // A is the explicit patch matrix: im2col
  kWidth,     // A is lowered along the width only: MEC
  kIndirect,  // A is the input itself, each pixel of a window found in a buffer of offsets
};

// Positions in Params.
enum GemmParam { kMr, kNv, kKc, kRows, kCols, kPack, kFull, kStream, kGemmParams };

std::vector<Dtype> gemm_dtypes(Lowering lowering);
std::vector<ParamSpec> gemm_param_specs(Lowering lowering);
std::string gemm_rejects(const Problem& p, Lowering lowering);
Params gemm_defaults(const Problem& p, const Target& t, Lowering lowering);
std::string gemm_check(const Problem& p, const Target& t, const Params& params, Lowering lowering);
std::shared_ptr<const void> gemm_prepare(const Problem& p, const Target& t, const Params& params,
                                         Lowering lowering);
int64_t gemm_workspace(const Problem& p, const Target& t, const Params& params, Lowering lowering);
void gemm_run(const Problem& p, const Params& params, const Operands& o, const Execution& e,
              Lowering lowering);
double gemm_cost(const Problem& p, const Target& t, const Params& params, Lowering lowering);

// The registry's row of an algorithm on this driver.
template <Lowering kLowering>
Algorithm gemm_algorithm(const char* name, const char* summary, const char* source) {
  return {name,
          summary,
          source,
          gemm_dtypes(kLowering),
          gemm_param_specs(kLowering),
          [](const Problem& p) { return gemm_rejects(p, kLowering); },
          [](const Problem& p, const Target& t) { return gemm_defaults(p, t, kLowering); },
          [](const Problem& p, const Target& t, const Params& q) {
            return gemm_check(p, t, q, kLowering);
          },
          [](const Problem& p, const Target& t, const Params& q) {
            return gemm_workspace(p, t, q, kLowering);
          },
          [](const Problem& p, const Params& q, const Operands& o, const Execution& e) {
            gemm_run(p, q, o, e, kLowering);
          },
          [](const Problem& p, const Target& t, const Params& q) {
            return gemm_cost(p, t, q, kLowering);
          },
          true,
          [](const Problem& p, const Target& t, const Params& q) {
            return gemm_prepare(p, t, q, kLowering);
          }};
}

// Modelled cycles of one reduction step of a tile; the tile that this prefers for rows x columns.
// a_cycles: what an element of A takes besides, each time that a tile of vectors of 512 bits reads
// it: where the caches near by have it, or where each pass over A finds it further away. unit: nv
// is a multiple of it.
struct Tile {
  int64_t mr, nv;
};
inline constexpr double kNearCycles = 0.09;
inline constexpr double kFarCycles = 0.25;
double tile_step_cycles(const Kernels& k, int64_t mr, int64_t nv, double a_cycles = kNearCycles);
Tile best_tile(const Kernels& k, int64_t rows, int64_t columns, int64_t most = kMaxMr,
               double a_cycles = kNearCycles, int64_t unit = 1);

// Applies the epilogue to `words` (all set but the residual) and writes them to y as its
// elements, where those are not words: element [r][j] to y_offset + r * y_row + j * y_col. Stream:
// past the caches, as Kernels::stream demands it.
void finish_words(const Problem& p, const Kernels& k, const Operands& o, EpilogueArgs words,
                  int64_t y_offset, int64_t y_row, int64_t y_col, bool stream = false);

// Writes `rows x cols` finished results (leading dimension ld) to y and applies the epilogue.
// What is not plain is changed in c on its way. Row r is output pixel x = j0 + r of the output row
// at `y_offset` (from o.y), columns are features k0... of group g.
void finish_rows(const Problem& p, const Kernels& k, const Operands& o, Ptr c, int64_t ld,
                 int64_t rows, int64_t cols, int64_t g, int64_t k0, int64_t y_offset,
                 bool stream = false);

// The same for c[feature][pixel]: pixels [0, n) of features k0 .. k0 + features, which may be in y
// already where neighbouring pixels are neighbours there. p.y.sp[2] is the distance of two pixels.
void finish_planes(const Problem& p, const Kernels& k, const Operands& o, Ptr c, int64_t ld,
                   int64_t features, int64_t n, int64_t g, int64_t k0, int64_t y_offset);

}  // namespace jaxwin
