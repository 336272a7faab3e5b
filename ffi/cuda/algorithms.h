// SPDX-License-Identifier: Apache-2.0
//
// What the CUDA side can compute, and by which kernel launches. Nothing here touches CUDA: a plan
// and its launches can be made, and are tested, on any machine.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "algorithms/algorithm.h"
#include "cuda/args.h"
#include "problem.h"

namespace jaxwin::cuda {

// Of x and w; the numbers are those of JAXWIN_TYPE in kernels/device.cuh.
enum class Type : int { kF32, kBf16, kF16 };
inline constexpr const char* kTypeNames[] = {"float32", "bfloat16", "float16"};
inline constexpr int kTypeCount = 3;
inline int64_t type_bytes(Type t) { return t == Type::kF32 ? 4 : 2; }

struct Types {
  Type operand = Type::kF32;  // bias and residual too
  bool wide_result = false;   // float32 results of narrower operands
};
inline int64_t result_bytes(const Types& t) { return t.wide_result ? 4 : type_bytes(t.operand); }

struct Buffers {
  const void* x = nullptr;
  const void* w = nullptr;
  const void* bias = nullptr;
  const void* residual = nullptr;
  void* y = nullptr;
  void* workspace = nullptr;
  Activation activation = Activation::kNone;

  bool has_epilogue() const {
    return bias != nullptr || residual != nullptr || activation != Activation::kNone;
  }
};

// The definitions that make a kernel out of its source; names are literals.
struct Options {
  static constexpr int kMost = 32;
  struct Definition {
    const char* name;
    int value;
  };
  std::array<Definition, kMost> list{};
  int count = 0;

  void set(const char* name, int64_t value) {
    list[static_cast<size_t>(count++)] = {name, static_cast<int>(value)};
  }
  // "-DJAXWIN_BM=128" and so on, in the order in which they were set.
  std::vector<std::string> text() const;
};

struct Launch {
  const char* kernel;  // the name of the function
  const char* source;  // the file in kernels/, without its ending
  Options options;
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  alignas(8) std::array<unsigned char, sizeof(SumArgs)> args{};
  size_t args_bytes = 0;

  template <typename Args>
  void set_args(const Args& value) {
    static_assert(sizeof(Args) <= sizeof(SumArgs));
    std::memcpy(args.data(), &value, sizeof(Args));
    args_bytes = sizeof(Args);
  }
};

struct Program {
  std::vector<Launch> launches;
  int64_t workspace_bytes = 0;
};

inline constexpr int kMostParams = 12;
using Params = std::array<int64_t, kMostParams>;  // values in the order of Algorithm::params

struct Algorithm {
  const char* name;
  const char* summary;
  const char* source;  // paper and section
  // "canonical": the bits of README.md's contract. "pieces": float32 like those, but sums of
  // several chains. "tensor": tensor cores.
  const char* family;
  const char* files;  // the name of its source here and in kernels/, for `abi`
  std::vector<const char*> dtypes;
  std::vector<ParamSpec> params;
  // Empty where the algorithm can compute the problem, else why not. Constant time.
  std::string (*rejects)(const Problem&, const Types&);
  // Always valid for a problem that is not rejected. Constant time.
  Params (*defaults)(const Problem&, const Types&);
  // Empty where the parameters are valid: they may come from anywhere.
  std::string (*check)(const Problem&, const Types&, const Params&);
  // The launches in order, and the workspace; with null buffers for the latter alone.
  void (*build)(const Problem&, const Types&, const Params&, const Buffers&, Program*);
  // Lower is better: modelled cycles of the whole device. Not measured.
  double (*cost)(const Problem&, const Types&, const Params&);
};

const std::vector<const Algorithm*>& algorithms();
const Algorithm* find_algorithm(const std::string& name);

struct PlanRequest {
  std::string algorithm = "auto";  // "auto": the best of the canonical family
  Types types;
  int64_t max_workspace = -1;   // bytes; negative: any
  std::vector<int64_t> params;  // empty: the algorithm's defaults
};

struct Plan {
  const Algorithm* algorithm = nullptr;
  Params params{};
  int64_t workspace_bytes = 0;
};

// Empty, or why there is no such plan.
std::string make_plan(const Problem& p, const PlanRequest& request, Plan* plan);

// Every source that the kernels are made of, by name; "args" and "device" come before the others.
const char* kernel_source(const std::string& name);

// The state of an algorithm's sources (Algorithm::files): measurements are filed under it.
const char* abi(const std::string& files);

// What NVRTC compiles for a launch: its source with what it includes.
std::string translation_unit(const std::string& source);

}  // namespace jaxwin::cuda
