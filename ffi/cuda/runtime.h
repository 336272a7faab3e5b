// SPDX-License-Identifier: Apache-2.0
//
// Kernels at run time: libcuda and NVRTC by dlopen, compiled images in memory and on disk,
// launches. Nothing is opened before the first use, so a machine without a GPU never notices.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/algorithms.h"

namespace jaxwin::cuda {

// The functions of libcuda and of libnvrtc.
struct Driver {
#define JAXWIN_CUDA_SYMBOL(symbol, name, parameters) int(*name) parameters = nullptr;
#include "cuda/symbols.inc"
#undef JAXWIN_CUDA_SYMBOL
};
struct Nvrtc {
#define JAXWIN_NVRTC_SYMBOL(symbol, name, parameters) int(*name) parameters = nullptr;
#include "cuda/symbols.inc"
#undef JAXWIN_NVRTC_SYMBOL
};

struct RuntimeOptions {
  std::vector<std::string> cuda{"libcuda.so.1"};  // the first that opens is taken
  std::vector<std::string> nvrtc{"libnvrtc.so.13", "libnvrtc.so.12"};
  std::string cache;                         // a folder; "": no cache on disk
  int64_t cache_bytes = int64_t{256} << 20;  // about; the oldest files go first
};

struct Device {
  std::string name;
  int processors = 0;
  int capability = 0;  // 10 * major + minor
};

// What a failure was, for the status that XLA is given.
enum class Failure { kNone, kUnavailable, kInvalid, kInternal, kOutOfMemory };
struct Status {
  Failure failure = Failure::kNone;
  std::string text;  // one line
  bool ok() const { return failure == Failure::kNone; }
};

class Runtime {
 public:
  explicit Runtime(RuntimeOptions options);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  // Launches in order on a stream (null: the default stream of the current context).
  Status run(const Program& program, void* stream);

  // The image of a launch's kernel, from the cache or compiled. architecture: such as "sm_90a".
  // source: kCompiled to compile it anyway, else kAny; then where it came from.
  enum class Source { kAny, kDisk, kCompiled };
  Status image(const Launch& launch, const std::string& architecture, std::string* image,
               Source* source);

  Status device(int ordinal, Device* device);

  // Why kernels cannot run on a device. Empty where they can, and where there is no such device:
  // programs may be made for another machine.
  std::string unusable(int ordinal);

  // How often NVRTC compiled, and how often a file of the cache was used, until now.
  struct Counters {
    int64_t compiled = 0, from_disk = 0, loaded = 0;
  };
  Counters counters() const;

 private:
  struct Function {
    void* module = nullptr;
    void* function = nullptr;
  };
  struct Compiling {  // what one thread compiles and others may wait for
    bool done = false;
    Status status;
    std::string image;
    Source source = Source::kCompiled;
  };
  Status open_driver();
  Status open_nvrtc();
  Status compile(const Launch& launch, const std::string& architecture, std::string* image);
  Status context_of(void* stream, void** context);
  Status function(const Launch& launch, void* context, void** function);
  Status load(const Launch& launch, Function* loaded);
  Status load_image(const Launch& launch, const std::string& binary, Function* loaded);
  Status architecture(std::string* name);
  Status architecture_of(int capability, std::string* name);
  std::string error(const char* what, int code) const;
  Status failed(const char* what, int code) const;

  RuntimeOptions options_;
  mutable std::mutex mutex_;
  Driver driver_;
  Nvrtc nvrtc_;
  void* driver_library_ = nullptr;
  void* nvrtc_library_ = nullptr;
  int nvrtc_version_ = 0;
  Counters counters_;
  std::map<std::string, std::shared_ptr<Compiling>> compiling_;  // by the image's key
  std::condition_variable compiled_;
  std::map<std::pair<void*, std::string>, Function> functions_;
};

// The one that the process uses; `configure` before its first use, or it has no effect.
Runtime& process_runtime();
void configure_process_runtime(RuntimeOptions options);

}  // namespace jaxwin::cuda
