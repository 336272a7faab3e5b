// SPDX-License-Identifier: Apache-2.0
//
// Unified kernel-segregated transposed convolution (Tida et al., arXiv 2209.03704 and 2502.20493):
// with lhs_dilation l, the outputs of one residue modulo l see one sub-filter only, and among
// themselves form an ordinary convolution without inserted zeros. Any stride, padding and
// dilation; also the input gradient of every strided convolution. The sub-convolutions run on
// whichever forward algorithm suits them; their reductions are the canonical chain over the real
// positions, so the bits do not depend on that choice.

#include <algorithm>
#include <array>

#include "algorithms/gemm_driver.h"
#include "algorithms/registry.h"

namespace jaxwin {
namespace {

struct Part {
  Problem problem;
  int64_t y_offset, w_offset;
  bool empty;  // no real window positions: zeros
};

// The parts one by one; `visit(part)`.
template <typename Visit>
void for_each_part(const Problem& p, const Visit& visit) {
  for (int64_t z = 0; z < residue_period(p, 0); ++z) {
    for (int64_t y = 0; y < residue_period(p, 1); ++y) {
      for (int64_t x = 0; x < residue_period(p, 2); ++x) {
        const std::array<int64_t, 3> at{z, y, x};
        Part part{p, 0, 0, false};
        bool none = false;
        for (int d = 0; d < 3; ++d) {
          const Residue s = residue(p, d, at[d]);
          Problem& q = part.problem;
          q.out[d] = s.out;
          q.win[d] = s.win;
          q.stride[d] = s.stride;
          q.rhs_dilation[d] = s.dilation;
          q.lhs_dilation[d] = 1;
          q.pad[d] = s.pad;
          q.w.sp[d] = p.w.sp[d] * s.step;
          q.y.sp[d] = p.y.sp[d] * residue_period(p, d);
          part.w_offset += s.first * p.w.sp[d];
          part.y_offset += at[d] * p.y.sp[d];
          none = none || s.out == 0;
          part.empty = part.empty || s.win == 0;
        }
        if (!none) visit(part);
      }
    }
  }
}

Plan choose(const Problem& q, const Target& t) {
  Targets targets{};  // parts have the words of the whole
  targets[kDtypeRows[q.dtype].word] = t;
  return choose_plan(q, targets, -1);
}

std::string rejects(const Problem& p) {
  if (!p.dilated_input()) return "no lhs_dilation";
  if (p.chunk_rows > 0) return "the reduction is chunked (weight gradient)";
  double parts = 1;
  for (int d = 0; d < 3; ++d) parts *= static_cast<double>(residue_period(p, d));
  if (parts > 4096) return "more than 4096 residues";
  return {};
}

int64_t workspace(const Problem& p, const Target& t, const Params&) {
  int64_t most = 0;
  for_each_part(p, [&](const Part& part) {
    if (part.empty) return;
    const Plan c = choose(part.problem, t);
    most = std::max(most, c.algorithm->workspace(part.problem, t, c.params));
  });
  return most;
}

void write_zeros(const Problem& q, const Operands& o, const Execution& e) {
  const int64_t size = e.target.kernels->size;
  e.pool->run(q.g * q.n * q.out[0] * q.out[1], [&](int64_t task, int64_t) {
    const int64_t y = task % q.out[1];
    const int64_t z = task / q.out[1] % q.out[0];
    const int64_t n = task / q.out[1] / q.out[0] % q.n;
    const int64_t g = task / q.out[1] / q.out[0] / q.n;
    std::vector<char> zeros(q.out[2] * q.k * size, 0);
    finish_rows(q, *e.target.kernels, o, {zeros.data(), size}, q.k, q.out[2], q.k, g, 0,
                n * q.y.n + g * q.y.g + z * q.y.sp[0] + y * q.y.sp[1]);
  });
}

void run(const Problem& p, const Params&, const Operands& o, const Execution& e) {
  for_each_part(p, [&](const Part& part) {
    Operands q = o;
    q.y = o.y + part.y_offset;
    q.w = o.w + part.w_offset;
    if (o.residual != nullptr) q.residual = o.residual + part.y_offset;
    if (part.empty) {
      write_zeros(part.problem, q, e);
      return;
    }
    const Plan c = choose(part.problem, e.target);
    c.algorithm->run(part.problem, c.params, q, e);
  });
  add_skipped_nonfinite(p, o, e);
}

double cost(const Problem& p, const Target& t, const Params&) {
  double total = 0;
  for_each_part(p, [&](const Part& part) {
    if (part.empty) return;
    const Plan c = choose(part.problem, t);
    total += c.algorithm->cycles(part.problem, t, c.params);
  });
  return total;
}

}  // namespace

const Algorithm& algorithm_segregated() {
  static const Algorithm a = [] {
    Algorithm row{"segregated",
                  "transposed convolution by output residues, no zero insertion",
                  "arXiv 2209.03704, 2502.20493",
                  {kF32, kF64, kBF16, kF16, kS8, kU8, kS16},
                  {},
                  rejects,
                  [](const Problem&, const Target&) { return Params{}; },
                  [](const Problem&, const Target&, const Params&) { return std::string(); },
                  workspace,
                  run,
                  cost};
    row.knows_images = true;
    return row;
  }();
  return a;
}

}  // namespace jaxwin
