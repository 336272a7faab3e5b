// SPDX-License-Identifier: Apache-2.0
//
// What a result's memory is made of.
#pragma once

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
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  // Outwards: the page that two results share would keep a huge one from covering their border.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes) + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace jaxwin
