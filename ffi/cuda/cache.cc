// SPDX-License-Identifier: Apache-2.0

#include "cuda/cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <vector>

namespace jaxwin::cuda {
namespace {

namespace fs = std::filesystem;

constexpr const char* kEnding = ".cubin";
constexpr char kMagic[] = "jaxwin kernel 1\n";
constexpr size_t kMagicBytes = sizeof(kMagic) - 1;
constexpr size_t kHeaderBytes = kMagicBytes + 3 * sizeof(uint64_t);

std::string file_of(const std::string& folder, const std::string& key) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string name;
  for (uint64_t h = hash_of(key), i = 0; i < 16; ++i, h >>= 4) name += kDigits[h & 15];
  return folder + "/" + name + kEnding;
}

bool read_file(const std::string& path, std::string* text) {
  constexpr off_t kMostBytes = off_t{64} << 20;  // no kernel of ours is near it
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  struct stat status {};
  bool good = fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_size <= kMostBytes;
  if (good) text->resize(static_cast<size_t>(status.st_size));
  for (size_t at = 0; good && at < text->size();) {
    const ssize_t n = read(file, text->data() + at, text->size() - at);
    good = n > 0;
    if (good) at += static_cast<size_t>(n);
  }
  close(file);
  return good;
}

bool write_all(int file, const std::string& text) {
  for (size_t at = 0; at < text.size();) {
    const ssize_t n = write(file, text.data() + at, text.size() - at);
    if (n <= 0) return false;
    at += static_cast<size_t>(n);
  }
  return true;
}

void remove_oldest(const std::string& folder, int64_t most_bytes) {
  struct File {
    fs::path path;
    fs::file_time_type time;
    int64_t bytes;
  };
  std::vector<File> files;
  int64_t total = 0;
  std::error_code wrong;
  const fs::directory_iterator end;
  for (fs::directory_iterator at(folder, wrong); !wrong && at != end; at.increment(wrong)) {
    std::error_code gone;  // other processes clean up too
    const auto bytes = static_cast<int64_t>(at->file_size(gone));
    // What a process that died was writing counts, too.
    if (gone || at->path().filename().string().find(kEnding) == std::string::npos) continue;
    const auto time = at->last_write_time(gone);
    if (gone) continue;
    files.push_back({at->path(), time, bytes});
    total += bytes;
  }
  if (wrong || total <= most_bytes) return;
  std::sort(files.begin(), files.end(),
            [](const File& a, const File& b) { return a.time < b.time; });
  for (const File& f : files) {
    if (total <= most_bytes) return;
    std::error_code gone;
    fs::remove(f.path, gone);
    total -= f.bytes;
  }
}

}  // namespace

uint64_t hash_of(const std::string& text) {  // FNV-1a
  uint64_t h = 0xCBF29CE484222325U;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001B3U;
  return h;
}

bool read_cached(const std::string& folder, const std::string& key, std::string* image) {
  if (folder.empty()) return false;
  const std::string path = file_of(folder, key);
  std::string text;
  if (!read_file(path, &text) || text.size() < kHeaderBytes ||
      text.compare(0, kMagicBytes, kMagic) != 0) {
    return false;
  }
  uint64_t header[3];  // bytes of the key, bytes of the image, checksum of both
  std::memcpy(header, text.data() + kMagicBytes, sizeof(header));
  const size_t rest = text.size() - kHeaderBytes;
  if (header[0] != key.size() || key.size() > rest || header[1] != rest - key.size()) return false;
  if (hash_of(text.substr(kHeaderBytes)) != header[2]) return false;
  if (text.compare(kHeaderBytes, key.size(), key) != 0) return false;
  *image = text.substr(kHeaderBytes + key.size());
  utimensat(AT_FDCWD, path.c_str(), nullptr, 0);  // used lately; in a closed folder it stays old
  return true;
}

bool write_cached(const std::string& folder, const std::string& key, const std::string& image,
                  int64_t most_bytes) {
  if (folder.empty()) return false;
  std::error_code wrong;
  fs::create_directories(folder, wrong);
  if (wrong) return false;
  const std::string path = file_of(folder, key);
  std::string temporary = path + ".XXXXXX";
  const int file = mkostemp(temporary.data(), O_CLOEXEC);
  if (file < 0) return false;
  const uint64_t header[3] = {key.size(), image.size(), hash_of(key + image)};
  std::string text = kMagic;
  text.append(reinterpret_cast<const char*>(header), sizeof(header));
  text += key;
  text += image;
  const bool written = write_all(file, text);
  if (close(file) != 0 || !written || std::rename(temporary.c_str(), path.c_str()) != 0) {
    unlink(temporary.c_str());
    return false;
  }
  remove_oldest(folder, most_bytes);
  return true;
}

}  // namespace jaxwin::cuda
