// SPDX-License-Identifier: Apache-2.0
//
// What the algorithms' launches are made of: arguments, parts, chunks, packed filters.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "cuda/algorithms.h"

namespace jaxwin::cuda {

// A device of some hundred multiprocessors, for heuristics alone: plans are made where there may be
// no device, and no result depends on them.
inline constexpr double kProcessors = 132;
// What every device from compute capability 8.0 on can give a block.
inline constexpr int64_t kMostShared = int64_t{99} << 10;
inline constexpr int64_t kMostBlocks = 0x7FFFFFFF;
inline constexpr int64_t kMostParts = 4096;
inline constexpr int64_t kMostPartialBytes = int64_t{1} << 40;

inline int32_t small(int64_t v) { return static_cast<int32_t>(v); }
inline bool is_power_of_two(int64_t v) { return v > 0 && (v & (v - 1)) == 0; }
inline bool aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}
// Every stride that is used is a multiple of `lanes`; pairs of size and stride.
bool multiples(std::initializer_list<std::pair<int64_t, int64_t>> sizes_and_strides, int64_t lanes);

// Empty, or what no kernel can index.
std::string rejects_size(const Problem& p);
std::string rejects_narrow(const Types& t);

// Takes `bytes` of the workspace, on a boundary that suits every copy.
void* take(const Buffers& b, int64_t bytes, Program* program);

ConvArgs common_args(const Problem& p, const Buffers& b);
// `last`: the launch writes the result, not partial sums.
void set_types(const Types& t, const Buffers& b, bool last, Options* o);
// How many spatial dimensions are not trivial.
int dims(const Problem& p);

// --- parts --------------------------------------------------------------------------------------

int64_t parts_of(const Problem& p);
// The whole problem as one part, inserted zeros included (`direct`).
Part whole(const Problem& p);
// The parts of a convolution: itself, or with lhs_dilation one per residue of the output position
// (arXiv 2209.03704, 2502.20493), in which no zeros are inserted.
std::vector<Part> parts(const Problem& p);

// One launch for every kMaxParts parts; `blocks_of` tells how many blocks of rows a part has, and
// `finish` completes the launch.
template <typename Blocks, typename Finish>
void launch_parts(const std::vector<Part>& list, const ConvArgs& common, const Blocks& blocks_of,
                  const Finish& finish) {
  for (size_t first = 0; first < list.size(); first += kMaxParts) {
    ConvArgs a = common;
    int64_t blocks = 0;
    for (size_t i = first; i < std::min(list.size(), first + kMaxParts); ++i) {
      Part& q = a.part[a.parts++];
      q = list[i];
      q.first_block = small(blocks);
      blocks += blocks_of(q);
    }
    a.row_blocks = small(blocks);
    finish(a);
  }
}

// --- chunked reductions -------------------------------------------------------------------------

struct Chunks {
  int64_t length;    // elements of the reduction
  int64_t count;     // 1: no partial sums are needed
  int64_t capacity;  // chunks of one launch
  int64_t floats;    // of one chunk's partial sums
  int64_t pitch;
};

// The chunks of the numerical contract; none where it has one chain. `at_a_time`: chunks of one
// launch; 0: as many as fit a usual workspace.
Chunks chunks_of(const Problem& p, int64_t at_a_time = 0);
// A reduction that the contract leaves whole, in about so many pieces.
Chunks pieces_of(const Problem& p, int64_t pieces);
int64_t partial_bytes(const Chunks& c);

inline constexpr int kHelperThreads = 256;

// The launch that adds the chunks [first, first + capacity) of `a` to the sum so far.
void launch_sum(const Problem& p, const Types& t, const Buffers& b, const Chunks& c,
                const ConvArgs& a, float* partial, bool images_first, int64_t first,
                Program* program);

// `launch(args)` makes the launch for so many chunks; sums follow each, if there are several.
template <typename LaunchChunks>
void launch_chunked(const Problem& p, const Types& t, const Buffers& b, const Chunks& c,
                    const ConvArgs& whole_args, bool images_first, const LaunchChunks& launch,
                    Program* program) {
  if (c.count <= 1) {
    ConvArgs a = whole_args;
    a.chunk_length = small(c.length);
    launch(a);
    return;
  }
  auto* const partial = static_cast<float*>(take(b, partial_bytes(c), program));
  for (int64_t first = 0; first < c.count; first += c.capacity) {
    ConvArgs a = whole_args;
    a.y = partial;
    a.k_pitch = small(c.pitch);
    a.chunk_length = small(c.length);
    a.first_chunk = small(first);
    a.chunks = small(std::min(c.capacity, c.count - first));
    launch(a);
    launch_sum(p, t, b, c, a, partial, images_first, first, program);
  }
}

// --- filters in a regular order -----------------------------------------------------------------

// The same problem on a filter packed as [g][x][y][z][c][k], k padded to `pitch`.
Problem packed_problem(const Problem& p, int64_t pitch);
void launch_pack(const Problem& p, const Types& t, const Buffers& b, int64_t pitch, void* dst,
                 Program* program);

// --- the rows of the registry -------------------------------------------------------------------

std::vector<Algorithm> gemm_algorithms();
std::vector<Algorithm> few_channels_algorithms();
std::vector<Algorithm> lanes_algorithms();

}  // namespace jaxwin::cuda
