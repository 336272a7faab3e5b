// SPDX-License-Identifier: Apache-2.0

#include "algorithms/registry.h"

#include <unistd.h>

#include <algorithm>
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

std::string rejects(const Algorithm& a, const Problem& p) {
  if (std::find(a.dtypes.begin(), a.dtypes.end(), p.dtype) == a.dtypes.end()) {
    return std::string("no ") + kDtypeRows[p.dtype].name + " kernels";
  }
  return a.rejects(p);
}

const Algorithm* choose_algorithm(const Problem& p, const Target& t, int64_t max_workspace) {
  const Algorithm* best = nullptr;
  double best_cost = std::numeric_limits<double>::infinity();
  for (const Algorithm* a : algorithms()) {
    if (!rejects(*a, p).empty()) continue;
    const Params params = a->defaults(p, t);
    if (!a->check(p, t, params).empty()) continue;
    if (max_workspace >= 0 && a->workspace(p, t, params) * t.kernels->size > max_workspace) {
      continue;
    }
    const double cost = a->cost(p, t, params);
    if (cost < best_cost) {
      best_cost = cost;
      best = a;
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
  // Waking a thread costs some five microseconds: about a million operations' worth.
  constexpr double kFlopsPerThread = 1e6;
  const double useful = p.flops() / kFlopsPerThread;
  return std::clamp<int64_t>(static_cast<int64_t>(std::min(useful, 1e6)), 1, threads);
}

void add_skipped_nonfinite(const Problem& p, const Operands& o, const Execution& e) {
  if (!p.touches_padding()) return;
  const int64_t size = p.g * p.k * p.reduction();
  if (e.target.kernels->finite[p.dtype](o.w - p.w_first, size) != 0) return;
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
