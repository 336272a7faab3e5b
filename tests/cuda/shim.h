// SPDX-License-Identifier: Apache-2.0
//
// The CUDA kernels on the CPU, for tests: one block at a time, its threads as fibers. Shared memory
// begins as NaN; an asynchronous copy leaves NaN where it will write until somebody waits for it;
// blocks run their threads in ascending and descending order in turn, so that a missing barrier
// shows; a barrier that not all threads reach is an error. Matrix instructions follow the fragment
// layouts of the PTX ISA, lane by lane.
#pragma once

#include <ucontext.h>
#include <xmmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#define JAXWIN_SHIM 1
#define JAXWIN_KERNEL(threads, blocks) inline void
#define JAXWIN_ARGS const
#define JAXWIN_DYNAMIC_SHARED(name) unsigned char* const name = shim::shared
#define JAXWIN_DEVICE inline
#define __CUDA_ARCH__ 800

struct Dim {
  unsigned x;
};
static Dim threadIdx, blockIdx;

namespace shim {

enum class State { kReady, kBlock, kWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool real;
};

struct Fiber {
  ucontext_t context;
  State state;
  std::vector<std::vector<Copy>> groups;  // committed ones, oldest first
  std::vector<Copy> open;
  int collectives;
};

constexpr int kMostThreads = 512;
constexpr size_t kStack = 1 << 16;
constexpr int kLaneBytes = 32;
alignas(128) static unsigned char shared[256 * 1024];
static int shared_bytes;
static Fiber fibers[kMostThreads];
static ucontext_t scheduler;
static unsigned char exchange[kMostThreads / 32][2][32][kLaneBytes];
static char problem[200];

inline void fail(const char* text) {
  if (problem[0] == 0) std::snprintf(problem, sizeof(problem), "block %u: %s", blockIdx.x, text);
}

inline void yield(State state) {
  Fiber& f = fibers[threadIdx.x];
  f.state = state;
  swapcontext(&f.context, &scheduler);
}

// What every lane of this warp gives; the result stays until the collective after the next.
template <typename T>
const T* all_lanes(const T& mine) {
  static_assert(sizeof(T) == kLaneBytes);
  Fiber& f = fibers[threadIdx.x];
  auto& slots = exchange[threadIdx.x / 32][f.collectives++ % 2];
  std::memcpy(slots[threadIdx.x % 32], &mine, sizeof(T));
  yield(State::kWarp);
  return reinterpret_cast<const T*>(slots);
}

template <typename Body>
void run_block(int threads, int bytes, const Body& body) {
  static std::unique_ptr<unsigned char[]> stacks(new unsigned char[kMostThreads * kStack]);
  static const Body* current;
  current = &body;
  std::memset(shared, 0xFF, sizeof(shared));
  shared_bytes = bytes;
  for (int t = 0; t < threads; ++t) {
    Fiber& f = fibers[t];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks.get() + static_cast<size_t>(t) * kStack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &scheduler;
    f.state = State::kReady;
    f.groups.clear();
    f.open.clear();
    f.collectives = 0;
    makecontext(
        &f.context,
        +[] {
          (*current)();
          fibers[threadIdx.x].state = State::kDone;
        },
        0);
  }
  const bool backwards = blockIdx.x % 2 == 1;
  for (;;) {
    for (int i = 0; i < threads; ++i) {
      const int t = backwards ? threads - 1 - i : i;
      if (fibers[t].state != State::kReady) continue;
      threadIdx.x = static_cast<unsigned>(t);
      swapcontext(&scheduler, &fibers[t].context);
    }
    int done = 0, at_barrier = 0;
    bool released = false;
    for (int t = 0; t < threads; ++t) {
      done += fibers[t].state == State::kDone ? 1 : 0;
      at_barrier += fibers[t].state == State::kBlock ? 1 : 0;
    }
    for (int warp = 0; warp * 32 < threads; ++warp) {
      int lanes = 0;
      for (int l = 0; l < 32; ++l) lanes += fibers[warp * 32 + l].state == State::kWarp ? 1 : 0;
      if (lanes != 32) continue;
      for (int l = 0; l < 32; ++l) fibers[warp * 32 + l].state = State::kReady;
      released = true;
    }
    if (done == threads) break;
    if (at_barrier == threads) {
      for (int t = 0; t < threads; ++t) fibers[t].state = State::kReady;
    } else if (!released) {
      fail("not all threads reach a barrier");
      break;
    }
  }
  for (size_t i = static_cast<size_t>(bytes); i < sizeof(shared); ++i) {
    if (shared[i] != 0xFF) {
      fail("a write behind the shared memory that was asked for");
      break;
    }
  }
}

}  // namespace shim

inline void __syncthreads() { shim::yield(shim::State::kBlock); }

namespace jaxwin {
namespace cuda {

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float add(float a, float b) { return a + b; }
inline float sub(float a, float b) { return a - b; }
inline float mul(float a, float b) { return a * b; }
inline float div(float a, float b) { return a / b; }
inline int float_bits(float a) {
  int r;
  std::memcpy(&r, &a, 4);
  return r;
}
inline float bits_float(int a) {
  float r;
  std::memcpy(&r, &a, 4);
  return r;
}

template <int kBytes>
void copy_async(void* to, const void* from, bool real) {
  const auto at = static_cast<unsigned char*>(to) - shim::shared;
  if (at < 0 || at + kBytes > shim::shared_bytes) return shim::fail("a copy outside shared memory");
  if (at % kBytes != 0) shim::fail("a copy to an address that is not aligned");
  if (real && reinterpret_cast<uintptr_t>(from) % kBytes != 0) {
    shim::fail("a copy from an address that is not aligned");
  }
  std::memset(to, 0xFF, kBytes);
  shim::fibers[threadIdx.x].open.push_back({to, from, kBytes, real});
}
inline void commit_group() {
  shim::Fiber& f = shim::fibers[threadIdx.x];
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
template <int kGroups>
void wait_groups() {
  auto& groups = shim::fibers[threadIdx.x].groups;
  while (groups.size() > static_cast<size_t>(kGroups)) {
    for (const shim::Copy& c : groups.front()) {
      if (c.real) {
        std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
      } else {
        std::memset(c.to, 0, static_cast<size_t>(c.bytes));
      }
    }
    groups.erase(groups.begin());
  }
}

struct Address {
  const unsigned short* row;
  unsigned char unused[shim::kLaneBytes - sizeof(void*)];
};
inline void load_matrices_as(unsigned (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) shim::fail("ldmatrix: a row is not aligned");
  Address mine{};
  mine.row = static_cast<const unsigned short*>(row);
  const Address* const lanes = shim::all_lanes(mine);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned m = 0; m < 4; ++m) {
    unsigned short pair[2];
    for (unsigned q = 0; q < 2; ++q) {
      const unsigned line = lane / 4, column = lane % 4 * 2 + q;
      pair[q] = transposed ? lanes[m * 8 + column].row[line] : lanes[m * 8 + line].row[column];
    }
    r[m] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
  }
}
inline void load_matrices(unsigned (&r)[4], const void* row) { load_matrices_as(r, row, false); }
inline void load_matrices_transposed(unsigned (&r)[4], const void* row) {
  load_matrices_as(r, row, true);
}

inline float bf16_to_float(unsigned short a) { return bits_float(static_cast<int>(a) << 16); }
inline float f16_to_float(unsigned short a) {
  _Float16 h;
  std::memcpy(&h, &a, 2);
  return static_cast<float>(h);
}
inline unsigned short float_to_bf16(float a) {
  const auto bits = static_cast<unsigned>(float_bits(a));
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<unsigned short>(bits >> 16 | 0x40U);
  return static_cast<unsigned short>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}
inline unsigned short float_to_f16(float a) {
  const auto h = static_cast<_Float16>(a);
  unsigned short r;
  std::memcpy(&r, &h, 2);
  return r;
}
inline unsigned to_tf32(float a) {
  return (static_cast<unsigned>(float_bits(a)) + 0x1000U) & ~0x1FFFU;
}

// Operand registers of a lane: a[4], b[2].
struct Registers {
  unsigned a[4], b[2], unused[2];
};
// The layouts of PTX's m16n8k8 (tf32) and m16n8k16 (16 bits).
template <int kPerRegister, typename Widen>
void multiply_matrices(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                       const Widen& widen) {
  Registers mine{};
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const Registers* const lanes = shim::all_lanes(mine);
  constexpr int kDepth = 8 * kPerRegister;
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < kDepth; ++k) {
      const int half = k / (kDepth / 2), within = k % (kDepth / 2);
      const int quad = within / kPerRegister, element = within % kPerRegister;
      const unsigned left = lanes[row % 8 * 4 + quad].a[half * 2 + row / 8];
      const unsigned right = lanes[column * 4 + quad].b[half];
      sum += static_cast<double>(widen(left, element)) * widen(right, element);
    }
    d[i] = static_cast<float>(sum);
  }
}
inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  multiply_matrices<1>(d, a, b, [](unsigned r, int) { return bits_float(static_cast<int>(r)); });
}
inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  multiply_matrices<2>(d, a, b, [](unsigned r, int i) {
    return bf16_to_float(static_cast<unsigned short>(r >> 16 * i));
  });
}
inline void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  multiply_matrices<2>(d, a, b, [](unsigned r, int i) {
    return f16_to_float(static_cast<unsigned short>(r >> 16 * i));
  });
}

}  // namespace cuda
}  // namespace jaxwin
