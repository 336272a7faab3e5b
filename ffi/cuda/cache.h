// SPDX-License-Identifier: Apache-2.0
//
// Compiled images on disk. A file is named after the hash of its key, holds the whole key and a
// checksum, and appears by renaming: what cannot be read back exactly counts as absent, and a
// folder that cannot be written to is no error.
#pragma once

#include <cstdint>
#include <string>

namespace jaxwin::cuda {

// Whether there was a good file for the key.
bool read_cached(const std::string& folder, const std::string& key, std::string* image);

// Writes a file, then removes the oldest ones beyond `most_bytes`. Whether it was written.
bool write_cached(const std::string& folder, const std::string& key, const std::string& image,
                  int64_t most_bytes);

uint64_t hash_of(const std::string& text);

}  // namespace jaxwin::cuda
