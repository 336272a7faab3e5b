// SPDX-License-Identifier: Apache-2.0
//
// What an algorithm is: a row of the registry. Adding one means a new file in this folder that
// defines such a row, and its line in algorithms.inc; Python, the tuner, the tests and the
// documentation learn of it from there.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "problem.h"
#include "threads.h"

namespace jaxwin {

// A place in an array whose elements have a size that is known at run time: the algorithms move
// elements about and leave their values to the kernels.
struct ConstPtr {
  const char* at = nullptr;
  int64_t size = 0;  // of an element, in bytes

  ConstPtr operator+(int64_t elements) const { return {at + elements * size, size}; }
  ConstPtr operator-(int64_t elements) const { return *this + -elements; }
  // NOLINTNEXTLINE(google-explicit-constructor): what a kernel takes
  operator const void*() const { return at; }
};
struct Ptr {
  char* at = nullptr;
  int64_t size = 0;

  Ptr operator+(int64_t elements) const { return {at + elements * size, size}; }
  Ptr& operator+=(int64_t elements) { return *this = *this + elements; }
  void zero(int64_t elements) const {
    if (elements > 0) std::memset(at, 0, elements * size);  // else there may be no place
  }
  // NOLINTNEXTLINE(google-explicit-constructor)
  operator void*() const { return at; }
  // NOLINTNEXTLINE(google-explicit-constructor)
  operator ConstPtr() const { return {at, size}; }
};

struct Operands {
  ConstPtr x;
  ConstPtr w;
  ConstPtr bias;      // k per group, all groups; may be null
  ConstPtr residual;  // the layout of y; may be null
  Ptr y;
  Activation activation = Activation::kNone;

  bool has_epilogue() const {
    return bias.at != nullptr || residual.at != nullptr || activation != Activation::kNone;
  }
};

// What a plan was made for: it fixes the workspace. The kernels are those of
// the words that the algorithm computes the problem with.
struct Target {
  const Kernels* kernels;
  int64_t threads;
};

struct Execution {
  Target target;
  const Threads* pool;
  Ptr workspace;
  const void* prepared = nullptr;  // what Algorithm::prepare made for this plan, or null
};

inline constexpr int kMaxParams = 9;
using Params = std::array<int64_t, kMaxParams>;  // values in the order of Algorithm::params

// The unit roundoff of what a problem is computed in; 0 for integers, whose sums are exact.
double unit_roundoff(const Problem& p);
// Algorithm::error_bound of one chain over the whole reduction.
double chain_error(const Problem& p);

// Whether all partial sums of an integer problem are below 2^24.
bool exact_in_floats(const Problem& p);

// One tunable, as data: the tuner builds its search space from these.
struct ParamSpec {
  const char* name;
  const char* description;
  std::vector<int64_t> values;  // worth trying; `check` decides what is valid
  // False: what it is worth depends on the rest of a program, which a measurement of one
  // convolution does not see.
  bool tuned = true;
};

// The family of all algorithms that give the bits which README.md promises.
inline constexpr const char* kCanonical = "canonical";

// Modelled cycles of moving, one by one, elements of x and y that have neither channels nor pixels
// for neighbours (images are: CHWN): what such layouts cost an algorithm that takes no images as
// lanes.
double lone_element_cycles(const Problem& p);

// Modelled cycles of reading so many bytes of filters again, where all of a pass, `held` bytes, do
// not stay in the second-level cache.
double refetch_cycles(int64_t held, double bytes);

struct Algorithm {
  const char* name;
  const char* summary;
  const char* source;         // paper and section
  std::vector<Dtype> dtypes;  // of operands
  std::vector<ParamSpec> params;
  // Empty where the algorithm can compute the problem, else why not. Constant time.
  std::string (*rejects)(const Problem&);
  // Always valid for a problem that is not rejected. Constant time.
  Params (*defaults)(const Problem&, const Target&);
  // Empty where the parameters are valid: they may come from anywhere.
  std::string (*check)(const Problem&, const Target&, const Params&);
  // Workspace in words.
  int64_t (*workspace)(const Problem&, const Target&, const Params&);
  void (*run)(const Problem&, const Params&, const Operands&, const Execution&);
  // Lower is better: the analytic order of preference, in modelled cycles.
  double (*cost)(const Problem&, const Target&, const Params&);
  // Whether it can take filters that are packed already (Problem::panel).
  bool takes_packed = false;
  // What `run` would otherwise derive from the plan in every call; may be null.
  std::shared_ptr<const void> (*prepare)(const Problem&, const Target&, const Params&) = nullptr;
  // Algorithms of another numerical family round otherwise: they run only where they are named or
  // where any family is allowed ("any"), and are held to error_bound instead of equal bits. Their
  // bits may depend on nothing but the problem and the parameters.
  const char* family = kCanonical;
  // How far a result may be from the exact one, before it is rounded to its dtype, as a multiple of
  // max |x| times the sum of |w| over its feature's filter. Null: that of the canonical chain.
  double (*error_bound)(const Problem&, const Params&) = nullptr;

  // Whether it reads neighbouring images as vectors (CHWN), or `cost` knows what they are to it.
  bool knows_images = false;
  // There to be compared with: where another one computes a problem, it is not asked what it costs.
  bool last_resort = false;
  // Whether 8-bit integers become floats instead of pairs of channels, where no sum of theirs is
  // beyond what a float holds exactly.
  bool integers_as_floats = false;

  Word word(Dtype dtype) const {
    const Word own = kDtypeRows[dtype].word;
    return integers_as_floats && own == kPair ? kFloat : own;
  }

  // `cost`, and what it need not know about.
  double cycles(const Problem& p, const Target& t, const Params& params) const {
    return cost(p, t, params) + (knows_images ? 0.0 : lone_element_cycles(p));
  }
  bool canonical() const { return std::strcmp(family, kCanonical) == 0; }
  double error(const Problem& p, const Params& params) const {
    return error_bound != nullptr ? error_bound(p, params) : chain_error(p);
  }

  // `rejects`, and what it need not know about.
  std::string refuses(const Problem& p) const {
    if (std::find(dtypes.begin(), dtypes.end(), p.dtype) == dtypes.end()) {
      return std::string("no ") + kDtypeRows[p.dtype].name + " kernels";
    }
    if (word(p.dtype) != kDtypeRows[p.dtype].word && !exact_in_floats(p)) {
      return "sums are beyond the integers that floats hold";
    }
    if (p.panel > 0 && !takes_packed) return "the filters are packed for other algorithms";
    if (p.panel > 0 && !p.plain()) return "packed filters must be float32 or float64";
    return rejects(p);
  }
};

// Data cache sizes in bytes.
struct Caches {
  int64_t l1, l2, l3;
};
const Caches& caches();

// The number of threads that is worth waking for this much arithmetic.
int64_t useful_threads(const Problem& p, int64_t threads);

// Those of the call's threads that are worth waking for the problem.
Threads useful_pool(const Problem& p, const Execution& e);

// Some five microseconds, until a thread of the pool that sleeps has begun.
inline constexpr double kWakeCycles = 15000;

// Cycles until equal tasks of so many cycles each are done, the helpers of the caller being late by
// the time that it takes to wake them.
double finish_cycles(int64_t tasks, double cycles, int64_t threads);

// Stores of whole vectors of features may pass the caches by: they are aligned in y.
bool streamable(const Problem& p, const Kernels& k, ConstPtr y);
// Makes such stores of this thread visible to the others.
void publish_streams();

// Adds to y what 0 * w gives for window positions on padding where w is not finite: NaN, as in
// lax. For algorithms that skip those positions. (Inserted zeros are no operands, in lax neither.)
void add_skipped_nonfinite(const Problem& p, const Operands& o, const Execution& e);
// The same without a look at all filters first.
void mark_skipped_nonfinite(const Problem& p, const Operands& o, const Execution& e);

}  // namespace jaxwin
