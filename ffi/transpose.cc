// SPDX-License-Identifier: Apache-2.0

#include "transpose.h"

#include <algorithm>
#include <cstdlib>

#include "algorithms/registry.h"

namespace jaxwin {
namespace {

constexpr int64_t kLineBytes = 64;

// Dimensions by descending destination stride, merged where they follow each other on both sides.
std::vector<TransposedDim> merged(std::vector<TransposedDim> dims) {
  dims.erase(std::remove_if(dims.begin(), dims.end(), [](const auto& d) { return d.size == 1; }),
             dims.end());
  std::sort(dims.begin(), dims.end(), [](const auto& a, const auto& b) { return a.dst > b.dst; });
  std::vector<TransposedDim> result;
  for (const TransposedDim& d : dims) {
    if (!result.empty() && result.back().src == d.size * d.src &&
        result.back().dst == d.size * d.dst) {
      result.back() = {result.back().size * d.size, d.src, d.dst};
    } else {
      result.push_back(d);
    }
  }
  return result;
}

TransposedDim take(std::vector<TransposedDim>* dims, size_t at) {
  const TransposedDim d = (*dims)[at];
  dims->erase(dims->begin() + static_cast<std::ptrdiff_t>(at));
  return d;
}

// Takes the dimension with the smallest source stride out of the list; {1, 0, 0} out of none.
TransposedDim take_nearest(std::vector<TransposedDim>* dims) {
  if (dims->empty()) return {1, 0, 0};
  const auto nearest = std::min_element(
      dims->begin(), dims->end(),
      [](const auto& a, const auto& b) { return std::abs(a.src) < std::abs(b.src); });
  return take(dims, static_cast<size_t>(nearest - dims->begin()));
}

}  // namespace

void transpose(std::vector<TransposedDim> dims, ConstPtr src, Ptr dst, const Kernels& k,
               const Threads& pool) {
  int64_t words = 1;
  for (const TransposedDim& d : dims) words *= d.size;
  if (words == 0) return;
  dims = merged(std::move(dims));
  // Columns: contiguous in dst. Rows: contiguous in src, where those are not the same.
  const TransposedDim columns = dims.empty() ? TransposedDim{1, 1, 1} : take(&dims, dims.size() - 1);
  const TransposedDim rows = take_nearest(&dims);
  // Walked next, so that a row of src is read as one stream, one of each of a few columns.
  const TransposedDim along = take_nearest(&dims);

  const int64_t line = kLineBytes / k.size;
  const bool turned = columns.src != 1;
  bool lines = turned && rows.src == 1 && columns.dst == 1 && columns.size % line == 0 &&
               reinterpret_cast<uintptr_t>(dst.at) % kLineBytes == 0 && rows.dst % line == 0 &&
               along.dst % line == 0 && words * k.size >= caches().l2;
  int64_t others = 1;
  for (const TransposedDim& d : dims) {
    others *= d.size;
    lines = lines && d.dst % line == 0;
  }
  const CopyFn copy = lines ? k.stream_transpose : k.copy;
  const int64_t block = turned && columns.dst == 1 ? std::min(line, columns.size) : columns.size;
  const int64_t blocks = ceil_div(columns.size, block);
  const int64_t wanted = words * k.size < (1 << 18) ? 1 : 4 * pool.count();
  const int64_t parts =
      std::clamp<int64_t>(ceil_div(wanted, others * blocks), 1, pool.count() == 1 ? 1 : along.size);
  pool.limited(wanted).run(others * blocks * parts, [&](int64_t task, int64_t) {
    const int64_t part = task % parts;
    const int64_t c0 = task / parts % blocks * block;
    int64_t rest = task / parts / blocks;
    int64_t from = c0 * columns.src;
    int64_t to = c0 * columns.dst;
    for (const TransposedDim& d : dims) {
      from += rest % d.size * d.src;
      to += rest % d.size * d.dst;
      rest /= d.size;
    }
    const int64_t count = std::min(block, columns.size - c0);
    for (int64_t i = along.size * part / parts; i < along.size * (part + 1) / parts; ++i) {
      Ptr at = dst + to + i * along.dst;
      ConstPtr read = src + from + i * along.src;
      if (columns.dst == 1) {
        copy(at, rows.dst, read, rows.src, columns.src, rows.size, count);
        continue;
      }
      for (int64_t r = 0; r < rows.size; ++r) {
        for (int64_t c = 0; c < count; ++c) {
          k.copy(at + r * rows.dst + c * columns.dst, 0, read + r * rows.src + c * columns.src, 0, 1,
                 1, 1);
        }
      }
    }
    if (lines) publish_streams();
  });
}

}  // namespace jaxwin
