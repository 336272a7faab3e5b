// SPDX-License-Identifier: Apache-2.0
//
// What a result's memory is made of.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace jaxwin {

// Asks for huge pages under a large result. XLA takes its memory from the system anew in every run
// of a program, and clearing it 4 KiB at a time takes longer than many a convolution. Advice only:
// it changes no contents, a system that has no huge pages ignores it, and memory that is mapped
// already stays as it is.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLeast = int64_t{1} << 22;  // below, few whole huge pages lie inside
  if (bytes < kLeast) return;
  static const auto page = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
  // Outwards: the page that two results share would keep a huge one from covering their border.
  const auto before = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)) % page;
  const int64_t size = (before + bytes + page - 1) / page * page;
  static_cast<void>(
      madvise(static_cast<char*>(data) - before, static_cast<size_t>(size), MADV_HUGEPAGE));
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace jaxwin
