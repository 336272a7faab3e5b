// SPDX-License-Identifier: Apache-2.0

#include "algorithms/registry.h"

#include <unistd.h>
#include <xmmintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace jaxwin {

const std::vector<const Algorithm*>& algorithms() {
  static const std::vector<const Algorithm*> list{
#define JAXWIN_ALGORITHM(name) &algorithm_##name(),
#include "algorithms/algorithms.inc"
#undef JAXWIN_ALGORITHM
  };
  return list;
}

const Algorithm* find_algorithm(const std::string& name) {
  for (const Algorithm* a : algorithms()) {
    if (name == a->name) return a;
  }
  return nullptr;
}

double unit_roundoff(const Problem& p) {
  switch (kDtypeRows[p.dtype].word) {
    case kFloat:
      return 0x1p-24;
    case kDouble:
      return 0x1p-53;
    default:
      return 0;
  }
}

double chain_error(const Problem& p) {
  return static_cast<double>(p.reduction()) * unit_roundoff(p);
}

bool exact_in_floats(const Problem& p) {
  const double most = p.dtype == kS8 ? 128.0 * 128.0 : p.dtype == kU8 ? 255.0 * 255.0 : 0x1p30;
  return static_cast<double>(p.reduction()) * most <= 0x1p24;
}

Plan choose_plan(const Problem& p, const Targets& targets, int64_t max_workspace, bool any_family) {
  Plan best;
  double best_cost = std::numeric_limits<double>::infinity();
  for (const bool last_resort : {false, true}) {
    if (best.algorithm != nullptr) break;
    for (const Algorithm* a : algorithms()) {
      if (a->last_resort != last_resort || (!any_family && !a->canonical())) continue;
      if (!a->refuses(p).empty()) continue;
      const Target& t = targets[a->word(p.dtype)];
      if (t.kernels == nullptr) continue;
      const Params params = a->defaults(p, t);
      if (!a->check(p, t, params).empty()) continue;
      const double cost = a->cycles(p, t, params);
      if (!(cost < best_cost)) continue;
      const int64_t bytes = a->workspace(p, t, params) * t.kernels->size;
      if (max_workspace >= 0 && bytes > max_workspace) continue;
      best = {a, t, params, bytes};
      best_cost = cost;
    }
  }
  return best;
}

const Caches& caches() {
  static const Caches c = [] {
    const auto size = [](int name, int64_t otherwise) {
      const int64_t bytes = sysconf(name);
      return bytes > 0 ? bytes : otherwise;
    };
    return Caches{size(_SC_LEVEL1_DCACHE_SIZE, 32 << 10), size(_SC_LEVEL2_CACHE_SIZE, 512 << 10),
                  size(_SC_LEVEL3_CACHE_SIZE, 8 << 20)};
  }();
  return c;
}

int64_t useful_threads(const Problem& p, int64_t threads) {
  // What waking a thread costs, in operations.
  constexpr double kFlopsPerThread = 1e6;
  const double useful = p.flops() / kFlopsPerThread;
  return std::clamp<int64_t>(static_cast<int64_t>(std::min(useful, 1e6)), 1, threads);
}

Threads useful_pool(const Problem& p, const Execution& e) {
  return e.pool->limited(useful_threads(p, e.target.threads));
}

double finish_cycles(int64_t tasks, double cycles, int64_t threads) {
  double best = static_cast<double>(tasks) * cycles;
  if (threads == 1) return best;
  const auto helpers = static_cast<double>(threads - 1);
  const double even = (best + helpers * kWakeCycles) / static_cast<double>(threads);
  const int64_t near = static_cast<int64_t>(even / cycles);
  for (int64_t own = near; own <= near + 1 && own < tasks; ++own) {
    const double most = std::ceil(static_cast<double>(tasks - own) / helpers);
    best = std::min(best, std::max(static_cast<double>(own) * cycles, kWakeCycles + most * cycles));
  }
  return best;
}

double lone_element_cycles(const Problem& p) {
  // Each one from a cache line of its own, which other images need again when it is gone. Not those
  // of which the next group follows: they are the channels of a weight gradient.
  constexpr double kCycles = 40;
  const auto lone = [](int64_t channels, int64_t channel, int64_t pixels, int64_t pixel) {
    return !(channels > 1 && channel == 1) && !(pixels > 1 && pixel == 1);
  };
  double total = 0;
  const bool groups_follow = p.g > 1 && p.x.g == p.n;
  if (p.n > 1 && p.x.n == 1 && !groups_follow &&
      lone(p.g * p.c, p.c > 1 ? p.x.c : p.x.g, p.in[2], p.x.sp[2])) {
    total += kCycles * static_cast<double>(p.n * p.g * p.c * p.in[0] * p.in[1] * p.in[2]);
  }
  if (p.n > 1 && p.y.n == 1 && lone(p.g * p.k, p.k > 1 ? p.y.k : p.y.g, p.out[2], p.y.sp[2])) {
    total += kCycles * static_cast<double>(p.n * p.g * p.k * p.pixels());
  }
  return total;
}

double refetch_cycles(int64_t held, double bytes) {
  return held > caches().l2 / 2 ? bytes / 8.0 : 0.0;
}

bool streamable(const Problem& p, const Kernels& k, ConstPtr y) {
  const int64_t vector = k.width * k.size;
  const auto whole = [&](int64_t stride) { return stride * y.size % vector == 0; };
  return p.y.k == 1 && reinterpret_cast<uintptr_t>(y.at) % vector == 0 &&
         (p.n == 1 || whole(p.y.n)) && (p.g == 1 || whole(p.y.g)) &&
         (p.out[0] == 1 || whole(p.y.sp[0])) && (p.out[1] == 1 || whole(p.y.sp[1])) &&
         (p.out[2] == 1 || whole(p.y.sp[2]));
}

void publish_streams() { _mm_sfence(); }

namespace {

// Every window position reads real input for some output, and so leaves its mark there.
bool covers_window(const Problem& p) {
  for (int d = 0; d < 3; ++d) {
    std::vector<bool> seen(p.win[d], false);
    for (int64_t u = 0; u < p.out[d]; ++u) {
      const Progression at = window_positions(p, d, u);
      for (int64_t i = 0; i < at.n; ++i) seen[at.first + i * at.step] = true;
    }
    if (std::find(seen.begin(), seen.end(), false) != seen.end()) return false;
  }
  return true;
}

struct Dimension {
  int64_t stride, size;
};

// A part of an array, as `runs` pieces of memory of `run` elements each.
struct Pieces {
  std::array<Dimension, 6> dims;  // by stride, those of the runs from `outer` on
  size_t outer;
  int64_t first, run, runs;

  // About the time that a look at them takes.
  int64_t cost() const { return runs * (4 + run / 16); }
};

Pieces pieces_of(const std::array<Dimension, 6>& dims) {
  Pieces p{dims, 0, 0, 1, 1};
  for (Dimension& d : p.dims) {
    if (d.stride < 0) p.first += (d.size - 1) * d.stride;
    d.stride = d.size == 1 ? 0 : std::abs(d.stride);
  }
  std::sort(p.dims.begin(), p.dims.end(),
            [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
  while (p.outer < p.dims.size() &&
         (p.dims[p.outer].size == 1 || p.dims[p.outer].stride == p.run)) {
    p.run *= p.dims[p.outer++].size;
  }
  for (size_t d = p.outer; d < p.dims.size(); ++d) p.runs *= p.dims[d].size;
  return p;
}

bool all_finite(const Pieces& p, const Kernels& k, Dtype dtype, ConstPtr array) {
  for (int64_t i = 0; i < p.runs; ++i) {
    ConstPtr at = array + p.first;
    int64_t rest = i;
    for (size_t d = p.outer; d < p.dims.size(); ++d) {
      at = at + rest % p.dims[d].size * p.dims[d].stride;
      rest /= p.dims[d].size;
    }
    if (k.finite[dtype](at, p.run) == 0) return false;
  }
  return true;
}

}  // namespace

void add_skipped_nonfinite(const Problem& p, const Operands& o, const Execution& e) {
  if (!p.touches_padding() || kDtypeRows[p.dtype].word == kPair) return;
  const Kernels& k = *e.target.kernels;
  // The filters may be some of an array's: those that one residue of a transposed convolution sees.
  const Pieces filters = pieces_of({{{p.w.g, p.g},
                                     {p.w.k, p.k},
                                     {p.w.c, p.c},
                                     {p.w.sp[0], p.win[0]},
                                     {p.w.sp[1], p.win[1]},
                                     {p.w.sp[2], p.win[2]}}});
  const Pieces results = pieces_of({{{p.y.n, p.n},
                                     {p.y.g, p.g},
                                     {p.y.k, p.k},
                                     {p.y.sp[0], p.out[0]},
                                     {p.y.sp[1], p.out[1]},
                                     {p.y.sp[2], p.out[2]}}});
  // Whichever is less to read: a result that nothing has changed since, or the filters.
  if (!o.has_epilogue() && results.cost() < filters.cost() && covers_window(p) &&
      all_finite(results, k, p.out_dtype, o.y)) {
    return;
  }
  if (all_finite(filters, k, p.dtype, o.w)) return;
  mark_skipped_nonfinite(p, o, e);
}

void mark_skipped_nonfinite(const Problem& p, const Operands& o, const Execution& e) {
  // Rare and slow: every (feature, window position) with a value that is not finite makes NaN of
  // the outputs for which that position is skipped.
  for (int64_t g = 0; g < p.g; ++g) {
    for (int64_t k = 0; k < p.k; ++k) {
      for (int64_t tap = 0; tap < p.window(); ++tap) {
        const Dim3 v{tap / p.win[2] / p.win[1], tap / p.win[2] % p.win[1], tap % p.win[2]};
        const ConstPtr w =
            o.w + g * p.w.g + k * p.w.k + v[0] * p.w.sp[0] + v[1] * p.w.sp[1] + v[2] * p.w.sp[2];
        bool finite = true;
        for (int64_t c = 0; c < p.c; ++c) {
          finite = finite && e.target.kernels->finite[p.dtype](w + c * p.w.c, 1) != 0;
        }
        if (finite) continue;
        for (int64_t u = 0; u < p.pixels(); ++u) {
          const Dim3 at{u / p.out[2] / p.out[1], u / p.out[2] % p.out[1], u % p.out[2]};
          bool skipped = false;
          for (int d = 0; d < 3; ++d) {
            const int64_t q = at[d] * p.stride[d] - p.pad[d] + v[d] * p.rhs_dilation[d];
            skipped = skipped || q < 0 || q > (p.in[d] - 1) * p.lhs_dilation[d];
          }
          if (!skipped) continue;
          const Ptr y = o.y + g * p.y.g + k * p.y.k + at[0] * p.y.sp[0] + at[1] * p.y.sp[1] +
                        at[2] * p.y.sp[2];
          for (int64_t n = 0; n < p.n; ++n) {
            e.target.kernels->write[p.out_dtype](y + n * p.y.n, 0, e.target.kernels->nan, 0, 1, 1,
                                                 1);
          }
        }
      }
    }
  }
}

}  // namespace jaxwin
