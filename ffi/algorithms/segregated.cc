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
#include <memory>
#include <vector>

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

struct Planned {
  Part part;
  Plan plan;  // none of an empty part
  std::shared_ptr<const void> prepared;
};

struct Prepared {
  std::vector<Planned> parts;
  bool at_once;    // each part by a thread of its own, else one after the other by all of them
  Target of_part;  // what a part is planned for
  int64_t floats;  // workspace of a part
};

// Whether all threads are done sooner if each takes whole parts, the largest first, than if they
// take every part together: then they meet after each of them.
bool sooner_at_once(const std::vector<Planned>& parts, const Target& t, int64_t threads) {
  const double flops_per_cycle = 2.5 * static_cast<double>(t.kernels->width);
  std::vector<double> busy(threads, kWakeCycles);
  double together = 0;
  for (const Planned& one : parts) {
    const double cycles = one.part.problem.flops() / flops_per_cycle;
    const int64_t helped = useful_threads(one.part.problem, threads);
    together += cycles / static_cast<double>(helped) + (helped > 1 ? kWakeCycles / 2 : 0.0);
    *std::min_element(busy.begin(), busy.end()) += cycles;
  }
  return *std::max_element(busy.begin(), busy.end()) < together;
}

Prepared make_parts(const Problem& p, const Target& t) {
  Prepared made{{}, false, t, 0};
  for_each_part(p, [&](const Part& part) { made.parts.push_back({part, {}, nullptr}); });
  const int64_t threads = useful_threads(p, t.threads);
  if (threads > 1) {
    std::stable_sort(made.parts.begin(), made.parts.end(), [](const Planned& a, const Planned& b) {
      return a.part.problem.flops() > b.part.problem.flops();
    });
    made.at_once = sooner_at_once(made.parts, t, threads);
    if (made.at_once) made.of_part.threads = 1;
  }
  for (Planned& one : made.parts) {
    if (one.part.empty) continue;
    one.plan = choose(one.part.problem, made.of_part);
    const int64_t floats =
        one.plan.algorithm->workspace(one.part.problem, made.of_part, one.plan.params);
    made.floats = std::max(made.floats, round_up(floats, 16));
  }
  return made;
}

std::shared_ptr<const void> prepare(const Problem& p, const Target& t, const Params&) {
  auto made = std::make_shared<Prepared>(make_parts(p, t));
  for (Planned& one : made->parts) {
    if (one.part.empty || one.plan.algorithm->prepare == nullptr) continue;
    one.prepared = one.plan.algorithm->prepare(one.part.problem, made->of_part, one.plan.params);
  }
  return made;
}

int64_t workspace(const Problem& p, const Target& t, const Params&) {
  const Prepared made = make_parts(p, t);
  return made.floats * (made.at_once ? useful_threads(p, t.threads) : 1);
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

void run_part(const Planned& one, const Operands& o, const Execution& e) {
  const Part& part = one.part;
  Operands q = o;
  q.y = o.y + part.y_offset;
  q.w = o.w + part.w_offset;
  if (o.residual != nullptr) q.residual = o.residual + part.y_offset;
  if (part.empty) {
    write_zeros(part.problem, q, e);
  } else {
    one.plan.algorithm->run(part.problem, one.plan.params, q, e);
  }
}

void run(const Problem& p, const Params& params, const Operands& o, const Execution& e) {
  std::shared_ptr<const void> own;
  if (e.prepared == nullptr) own = prepare(p, e.target, params);
  const auto& made = *static_cast<const Prepared*>(e.prepared != nullptr ? e.prepared : own.get());
  if (made.at_once) {
    const Threads alone = e.pool->limited(1);
    useful_pool(p, e).run(static_cast<int64_t>(made.parts.size()),
                          [&](int64_t task, int64_t worker) {
                            const Planned& one = made.parts[task];
                            const Ptr workspace = e.workspace + worker * made.floats;
                            run_part(one, o, {made.of_part, &alone, workspace, one.prepared.get()});
                          });
  } else {
    for (const Planned& one : made.parts) {
      run_part(one, o, {made.of_part, e.pool, e.workspace, one.prepared.get()});
    }
  }
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
    row.prepare = prepare;
    return row;
  }();
  return a;
}

}  // namespace jaxwin
