// SPDX-License-Identifier: Apache-2.0

#include "cuda/runtime.h"

#include <dlfcn.h>

#include <algorithm>
#include <utility>

#include "cuda/cache.h"

namespace jaxwin::cuda {
namespace {

constexpr int kAttributeProcessors = 16;  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int kAttributeMajor = 75;       // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kAttributeMinor = 76;
constexpr int kFunctionDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kFunctionRegisters = 4;      // CU_FUNC_ATTRIBUTE_NUM_REGS
constexpr int kOutOfMemory = 2;            // CUDA_ERROR_OUT_OF_MEMORY
constexpr int kCaptureRelaxed = 2;         // CU_STREAM_CAPTURE_MODE_RELAXED
constexpr int kOldest = 80;                // compute capability 8.0
constexpr int64_t kDefaultShared = int64_t{48} << 10;

Status unavailable(std::string text) { return {Failure::kUnavailable, std::move(text)}; }

void* open_first(const std::vector<std::string>& names, std::string* why) {
  for (const std::string& name : names) {
    void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) return library;
  }
  const char* const text = dlerror();
  *why = text == nullptr ? "no name was given" : text;
  return nullptr;
}

// One line of it, and not all of a long one.
std::string first_error(const std::string& log) {
  constexpr size_t kMost = 300;
  size_t at = log.find("error");
  at = at == std::string::npos ? 0 : log.rfind('\n', at) + 1;
  const std::string line = log.substr(at, log.find('\n', at) - at);
  return line.size() > kMost ? line.substr(0, kMost) + "..." : line;
}

template <typename Call>
class AtExit {
 public:
  explicit AtExit(Call call) : call_(std::move(call)) {}
  ~AtExit() { call_(); }
  AtExit(const AtExit&) = delete;
  AtExit& operator=(const AtExit&) = delete;

 private:
  Call call_;
};

// The same for launches that need the same function; cheap, since every call asks.
std::string quick_key(const Launch& launch) {
  std::string key = launch.kernel;
  for (int i = 0; i < launch.options.count; ++i) {
    const int value = launch.options.list[static_cast<size_t>(i)].value;
    key.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  key.append(reinterpret_cast<const char*>(&launch.shared_bytes), sizeof(launch.shared_bytes));
  return key;
}

std::vector<std::string> compiler_options(const Launch& launch, const std::string& architecture) {
  std::vector<std::string> options{"--gpu-architecture=" + architecture,
                                   "--std=c++17",
                                   "--ftz=true",
                                   "--fmad=false",
                                   "--prec-div=true",
                                   "--prec-sqrt=true"};
  for (std::string& text : launch.options.text()) options.push_back(std::move(text));
  return options;
}

}  // namespace

Runtime::Runtime(RuntimeOptions options) : options_(std::move(options)) {}

// Modules and libraries stay: contexts may be gone already when a process ends.
Runtime::~Runtime() = default;

std::string Runtime::error(const char* what, int code) const {
  const char* name = nullptr;
  if (driver_.error_name != nullptr) driver_.error_name(code, &name);
  return std::string(what) + ": " + (name == nullptr ? "error " + std::to_string(code) : name);
}

Status Runtime::failed(const char* what, int code) const {
  return {code == kOutOfMemory ? Failure::kOutOfMemory : Failure::kInternal, error(what, code)};
}

Status Runtime::open_driver() {
  if (driver_library_ != nullptr) return {};
  std::string why;
  void* const library = open_first(options_.cuda, &why);
  if (library == nullptr) return unavailable("the CUDA driver cannot be opened: " + why);
  Driver d;
#define JAXWIN_CUDA_SYMBOL(symbol, name, parameters)                    \
  d.name = reinterpret_cast<decltype(d.name)>(dlsym(library, #symbol)); \
  if (d.name == nullptr) return unavailable("the CUDA driver has no " #symbol ": update it");
#include "cuda/symbols.inc"
#undef JAXWIN_CUDA_SYMBOL
  if (const int code = d.init(0); code != 0) {
    driver_.error_name = d.error_name;
    return unavailable(error("cuInit", code));
  }
  driver_ = d;
  driver_library_ = library;
  return {};
}

Status Runtime::open_nvrtc() {
  if (nvrtc_library_ != nullptr) return {};
  std::string why;
  void* const library = open_first(options_.nvrtc, &why);
  if (library == nullptr) {
    return unavailable("NVRTC cannot be opened (pip install nvidia-cuda-nvrtc): " + why);
  }
  Nvrtc n;
#define JAXWIN_NVRTC_SYMBOL(symbol, name, parameters)                   \
  n.name = reinterpret_cast<decltype(n.name)>(dlsym(library, #symbol)); \
  if (n.name == nullptr) return unavailable("NVRTC has no " #symbol ": version too old");
#include "cuda/symbols.inc"
#undef JAXWIN_NVRTC_SYMBOL
  int major = 0;
  int minor = 0;
  if (n.version(&major, &minor) != 0) return unavailable("nvrtcVersion failed");
  nvrtc_version_ = major * 100 + minor;
  nvrtc_ = n;
  nvrtc_library_ = library;
  return {};
}

Status Runtime::compile(const Launch& launch, const std::string& architecture, std::string* image) {
  const bool binary = architecture.compare(0, 3, "sm_") == 0;
  const std::vector<std::string> options = compiler_options(launch, architecture);
  std::vector<const char*> list;
  list.reserve(options.size());
  for (const std::string& text : options) list.push_back(text.c_str());

  const std::string unit = translation_unit(launch.source);
  const std::string name = "jaxwin_" + std::string(launch.source) + ".cu";
  void* program = nullptr;
  if (const int code = nvrtc_.create(&program, unit.c_str(), name.c_str(), 0, nullptr, nullptr);
      code != 0) {
    return {Failure::kInternal, "nvrtcCreateProgram: error " + std::to_string(code)};
  }
  const AtExit destroy([&] { nvrtc_.destroy(&program); });
  if (const int code = nvrtc_.compile(program, static_cast<int>(list.size()), list.data());
      code != 0) {
    size_t bytes = 0;
    std::string log;
    if (nvrtc_.log_size(program, &bytes) == 0 && bytes > 0) {
      log.resize(bytes);
      if (nvrtc_.log(program, log.data()) != 0) log.clear();
      log.resize(std::min(log.size(), log.find('\0')));
    }
    return {Failure::kInternal, "NVRTC cannot compile " + std::string(launch.kernel) + " for " +
                                    architecture + ": error " + std::to_string(code) + ": " +
                                    first_error(log)};
  }
  size_t bytes = 0;
  int code = binary ? nvrtc_.cubin_size(program, &bytes) : nvrtc_.ptx_size(program, &bytes);
  if (code == 0) {
    image->resize(bytes);
    code = binary ? nvrtc_.cubin(program, image->data()) : nvrtc_.ptx(program, image->data());
  }
  if (code != 0 || image->empty()) {
    return {Failure::kInternal,
            "NVRTC gives no image for " + architecture + ": error " + std::to_string(code)};
  }
  return {};
}

Status Runtime::image(const Launch& launch, const std::string& architecture, std::string* image,
                      Source* source) {
  std::string key = std::string(kernel_source("hash")) + " nvrtc ";
  std::shared_ptr<Compiling> mine;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (Status s = open_nvrtc(); !s.ok()) return s;
    key += std::to_string(nvrtc_version_) + " " + launch.source;
    for (const std::string& option : compiler_options(launch, architecture)) key += " " + option;
    // Several devices often need the same kernel at the same moment: one of them compiles it.
    std::shared_ptr<Compiling>& place = compiling_[key];
    if (place != nullptr) {
      const std::shared_ptr<Compiling> theirs = place;
      compiled_.wait(lock, [&] { return theirs->done; });
      *image = theirs->image;
      *source = theirs->source;
      return theirs->status;
    }
    place = mine = std::make_shared<Compiling>();
    mine->status = {Failure::kInternal, "another thread gave up compiling"};  // by an exception
  }
  const AtExit finish([&] {
    const std::lock_guard<std::mutex> lock(mutex_);
    mine->done = true;
    compiling_.erase(key);
    compiled_.notify_all();
  });
  // Without the lock: NVRTC may be used by several threads, and takes seconds.
  const bool cached =
      *source != Source::kCompiled && read_cached(options_.cache, key, &mine->image);
  mine->status = cached ? Status{} : compile(launch, architecture, &mine->image);
  if (!mine->status.ok()) return mine->status;
  if (!cached) write_cached(options_.cache, key, mine->image, options_.cache_bytes);
  *source = mine->source = cached ? Source::kDisk : Source::kCompiled;
  *image = mine->image;
  const std::lock_guard<std::mutex> lock(mutex_);
  ++(cached ? counters_.from_disk : counters_.compiled);
  return {};
}

Status Runtime::device(int ordinal, Device* device) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (Status s = open_driver(); !s.ok()) return s;
  int handle = 0;
  if (const int code = driver_.device_get(&handle, ordinal); code != 0) {
    return failed("cuDeviceGet", code);
  }
  char name[256] = {};
  int major = 0;
  int minor = 0;
  int code = driver_.device_name(name, sizeof(name) - 1, handle);
  if (code == 0) code = driver_.device_attribute(&device->processors, kAttributeProcessors, handle);
  if (code == 0) code = driver_.device_attribute(&major, kAttributeMajor, handle);
  if (code == 0) code = driver_.device_attribute(&minor, kAttributeMinor, handle);
  if (code != 0) return failed("cuDeviceGetAttribute", code);
  device->name = name;
  device->capability = 10 * major + minor;
  return {};
}

// For the device of the current context.
Status Runtime::architecture(std::string* name) {
  int device = 0;
  int major = 0;
  int minor = 0;
  int code = driver_.context_device(&device);
  if (code == 0) code = driver_.device_attribute(&major, kAttributeMajor, device);
  if (code == 0) code = driver_.device_attribute(&minor, kAttributeMinor, device);
  if (code != 0) return failed("cuCtxGetDevice", code);
  return architecture_of(10 * major + minor, name);
}

std::string Runtime::unusable(int ordinal) {
  Device found;
  std::string name;
  return device(ordinal, &found).ok() ? architecture_of(found.capability, &name).text : "";
}

Status Runtime::architecture_of(int capability, std::string* name) {
  if (capability < kOldest) {
    return unavailable("the GPU has compute capability " + std::to_string(capability / 10) + "." +
                       std::to_string(capability % 10) + ", at least 8.0 is needed");
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (Status s = open_nvrtc(); !s.ok()) return s;
  }
  int count = 0;
  std::vector<int> known;
  if (nvrtc_.count_architectures(&count) == 0 && count > 0) {
    known.resize(static_cast<size_t>(count));
    if (nvrtc_.architectures(known.data()) != 0) known.clear();
  }
  if (known.empty() || std::find(known.begin(), known.end(), capability) != known.end()) {
    *name = "sm_" + std::to_string(capability);
    return {};
  }
  // A device that is newer than this NVRTC: the driver compiles the newest code that there is.
  int newest = 0;
  for (const int k : known) newest = k < capability ? std::max(newest, k) : newest;
  if (newest < kOldest) return unavailable("NVRTC knows no architecture of this GPU: update it");
  *name = "compute_" + std::to_string(newest);
  return {};
}

Status Runtime::load(const Launch& launch, Function* loaded) {
  std::string name;
  if (Status s = architecture(&name); !s.ok()) return s;
  std::string binary;
  Source source = Source::kAny;
  if (Status s = image(launch, name, &binary, &source); !s.ok()) return s;
  Status s = load_image(launch, binary, loaded);
  if (s.failure == Failure::kInternal && source == Source::kDisk) {
    // The driver may have changed since: what it refuses must not stay in the way.
    source = Source::kCompiled;
    if (Status again = image(launch, name, &binary, &source); !again.ok()) return again;
    s = load_image(launch, binary, loaded);
  }
  return s;
}

Status Runtime::load_image(const Launch& launch, const std::string& binary, Function* loaded) {
  // While XLA records a graph on this thread, loading would be refused as unsafe for the graph.
  int mode = kCaptureRelaxed;
  const bool exchanged = driver_.exchange_capture_mode(&mode) == 0;
  const AtExit restore([&] {
    if (exchanged) driver_.exchange_capture_mode(&mode);
  });
  if (const int code = driver_.load_module(&loaded->module, binary.c_str()); code != 0) {
    return failed("cuModuleLoadData", code);
  }
  const auto unload = [&](const char* what, int code) {
    driver_.unload_module(loaded->module);
    return failed(what, code);
  };
  if (const int code = driver_.get_function(&loaded->function, loaded->module, launch.kernel);
      code != 0) {
    return unload("cuModuleGetFunction", code);
  }
  if (launch.shared_bytes > kDefaultShared) {
    if (const int code = driver_.set_attribute(loaded->function, kFunctionDynamicShared,
                                               static_cast<int>(launch.shared_bytes));
        code != 0) {
      return unload("cuFuncSetAttribute", code);
    }
  }
  // With lazy loading this is what brings the code to the device, before anything is recorded.
  int registers = 0;
  if (const int code = driver_.get_attribute(&registers, kFunctionRegisters, loaded->function);
      code != 0) {
    return unload("cuFuncGetAttribute", code);
  }
  return {};
}

Status Runtime::context_of(void* stream, void** context) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (Status s = open_driver(); !s.ok()) return s;
  }
  const int code = stream == nullptr ? driver_.current_context(context)
                                     : driver_.stream_context(stream, context);
  if (code != 0) return failed("cuStreamGetCtx", code);
  if (*context == nullptr) return {Failure::kInternal, "no CUDA context is current"};
  return {};
}

Status Runtime::function(const Launch& launch, void* context, void** function) {
  const std::pair<void*, std::string> key{context, quick_key(launch)};
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = functions_.find(key);
    if (found != functions_.end()) {
      *function = found->second.function;
      return {};
    }
  }
  // Two threads may load the same kernel: the first one is kept, the other does no harm.
  Function loaded;
  if (Status s = load(launch, &loaded); !s.ok()) return s;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto [place, inserted] = functions_.emplace(key, loaded);
  if (inserted) ++counters_.loaded;
  *function = place->second.function;
  return {};
}

Status Runtime::run(const Program& program, void* stream) {
  void* context = nullptr;
  if (Status s = context_of(stream, &context); !s.ok()) return s;
  if (const int code = driver_.push_context(context); code != 0) {
    return failed("cuCtxPushCurrent", code);
  }
  const AtExit pop([&] {
    void* popped = nullptr;
    driver_.pop_context(&popped);
  });
  // All of them before the first launch: a failure then leaves no half of the work behind.
  std::vector<void*> functions(program.launches.size());
  for (size_t i = 0; i < functions.size(); ++i) {
    if (Status s = function(program.launches[i], context, &functions[i]); !s.ok()) return s;
  }
  for (size_t i = 0; i < functions.size(); ++i) {
    const Launch& l = program.launches[i];
    void* args[] = {const_cast<unsigned char*>(l.args.data())};
    if (const int code = driver_.launch(
            functions[i], static_cast<unsigned>(l.blocks), 1, 1, static_cast<unsigned>(l.threads),
            1, 1, static_cast<unsigned>(l.shared_bytes), stream, args, nullptr);
        code != 0) {
      return failed(("cuLaunchKernel of " + std::string(l.kernel)).c_str(), code);
    }
  }
  return {};
}

Runtime::Counters Runtime::counters() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return counters_;
}

namespace {
RuntimeOptions& process_options() {
  static RuntimeOptions options;
  return options;
}
}  // namespace

void configure_process_runtime(RuntimeOptions options) { process_options() = std::move(options); }

Runtime& process_runtime() {
  static auto* const runtime = new Runtime(process_options());  // outlives everything that runs
  return *runtime;
}

}  // namespace jaxwin::cuda
