// SPDX-License-Identifier: Apache-2.0
//
// A libcuda and a libnvrtc for tests (one of them, by -DFAKE_CUDA or -DFAKE_NVRTC): they check how
// they are called, and fail where they are told to.

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>

#define EXPORT extern "C" __attribute__((visibility("default")))

static std::mutex mutex;
static std::string calls;    // one name a line
static std::string fail_at;  // this function fails
static int fail_code;
static int capability = 90;

static int called(const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  calls += name;
  calls += '\n';
  return fail_at == name ? fail_code : 0;
}

EXPORT void fake_reset(const char* function, int code, int device_capability) {
  const std::lock_guard<std::mutex> lock(mutex);
  calls.clear();
  fail_at = function;
  fail_code = code;
  capability = device_capability;
}
EXPORT const char* fake_calls() { return calls.c_str(); }

#if defined(FAKE_CUDA)
static char contexts[2];  // their addresses; streams from 128 on belong to the second
static thread_local void* pushed;
static thread_local int depth;
static thread_local int capture_mode;
static std::atomic<int> launches;
static std::string image;
static std::atomic<unsigned> last_blocks, last_threads, last_shared;
static void* pointers[5];  // the first ones of the last launch's arguments
static void* last_stream;

EXPORT int fake_depth() { return depth; }
EXPORT int fake_capture_mode() { return capture_mode; }
EXPORT const char* fake_image() { return image.c_str(); }
EXPORT int fake_launches() { return launches; }
EXPORT unsigned fake_last(int what) {
  return what == 0 ? last_blocks : what == 1 ? last_threads : last_shared;
}

EXPORT void* fake_pointer(int i) { return i < 5 ? pointers[i] : last_stream; }

EXPORT int cuInit(unsigned) { return called("cuInit"); }
EXPORT int cuGetErrorName(int error, const char** text) {
  *text = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 999 ? "CUDA_ERROR_UNKNOWN" : nullptr;
  return 0;
}
EXPORT int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
EXPORT int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? called("cuDeviceGet") : 101;
}
EXPORT int cuDeviceGetName(char* name, int size, int) {
  std::snprintf(name, static_cast<size_t>(size), "Fake GPU");
  return called("cuDeviceGetName");
}
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 16   ? 7
           : attribute == 75 ? capability / 10
           : attribute == 76 ? capability % 10
                             : 0;
  return called("cuDeviceGetAttribute");
}
EXPORT int cuStreamGetCtx(void* stream, void** c) {
  *c = &contexts[reinterpret_cast<unsigned long long>(stream) >= 128 ? 1 : 0];
  return called("cuStreamGetCtx");
}
static thread_local void* current;
EXPORT int cuCtxGetCurrent(void** c) {
  *c = current;
  return called("cuCtxGetCurrent");
}
// What tests/gpu/on_device.py takes beside; memory is the host's.
EXPORT int cuDevicePrimaryCtxRetain(void** c, int) {
  *c = &contexts[0];
  return 0;
}
EXPORT int cuCtxSetCurrent(void* c) {
  current = c;
  return 0;
}
EXPORT int cuCtxSynchronize() { return called("cuCtxSynchronize"); }
EXPORT int cuMemAlloc_v2(unsigned long long* address, size_t size) {
  *address = reinterpret_cast<unsigned long long>(std::malloc(size));
  return called("cuMemAlloc");
}
EXPORT int cuMemFree_v2(unsigned long long address) {
  std::free(reinterpret_cast<void*>(address));
  return called("cuMemFree");
}
EXPORT int cuMemcpyHtoD_v2(unsigned long long to, const void* from, size_t size) {
  std::memcpy(reinterpret_cast<void*>(to), from, size);
  return 0;
}
EXPORT int cuMemcpyDtoH_v2(void* to, unsigned long long from, size_t size) {
  std::memcpy(to, reinterpret_cast<void*>(from), size);
  return 0;
}
EXPORT int cuMemsetD8Async(unsigned long long address, unsigned char value, size_t size, void*) {
  std::memset(reinterpret_cast<void*>(address), value, size);
  return 0;
}
EXPORT int cuEventCreate(void** event, unsigned) {
  *event = std::malloc(1);
  return called("cuEventCreate");
}
EXPORT int cuEventDestroy_v2(void* event) {
  std::free(event);
  return called("cuEventDestroy");
}
EXPORT int cuEventRecord(void*, void*) { return called("cuEventRecord"); }
EXPORT int cuEventSynchronize(void*) { return called("cuEventSynchronize"); }
EXPORT int cuEventElapsedTime(float* milliseconds, void*, void*) {
  *milliseconds = 0.25F;
  return called("cuEventElapsedTime");
}
EXPORT int cuCtxPushCurrent_v2(void* c) {
  const int code = called("cuCtxPushCurrent");
  if (code == 0) ++depth;
  pushed = c;
  return code;
}
EXPORT int cuCtxPopCurrent_v2(void** c) {
  *c = pushed;
  --depth;
  return called("cuCtxPopCurrent");
}
EXPORT int cuCtxGetDevice(int* device) {
  *device = 0;
  return depth > 0 ? called("cuCtxGetDevice") : 201;
}
EXPORT int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int old = capture_mode;
  capture_mode = *mode;
  *mode = old;
  return called("cuThreadExchangeStreamCaptureMode");
}
EXPORT int cuModuleLoadData(void** module, const void* data) {
  if (capture_mode != 2) return 900;  // as while a graph is recorded
  {
    const std::lock_guard<std::mutex> lock(mutex);
    image = static_cast<const char*>(data);
  }
  *module = pushed;  // a module belongs to the context that it is loaded in
  if (std::strncmp(static_cast<const char*>(data), "stale", 5) == 0) return 209;
  return called("cuModuleLoadData");
}
EXPORT int cuModuleUnload(void*) { return called("cuModuleUnload"); }
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (std::strncmp(name, "jaxwin_", 7) != 0) return 500;
  *function = module;
  return called("cuModuleGetFunction");
}
EXPORT int cuFuncSetAttribute(void*, int, int) { return called("cuFuncSetAttribute"); }
EXPORT int cuFuncGetAttribute(int* value, int, void*) {
  *value = 1;
  return called("cuFuncGetAttribute");
}
EXPORT int cuLaunchKernel(void* function, unsigned x, unsigned, unsigned, unsigned threads,
                          unsigned, unsigned, unsigned shared, void* stream, void** args, void**) {
  if (args == nullptr || args[0] == nullptr || depth != 1) return 1;
  void* owner = nullptr;
  cuStreamGetCtx(stream, &owner);
  if (stream != nullptr && owner != pushed) return 400;  // CUDA_ERROR_INVALID_HANDLE
  if (function != pushed) return 400;
  const int code = called("cuLaunchKernel");
  if (code == 0) ++launches;
  last_blocks = x;
  last_threads = threads;
  last_shared = shared;
  const std::lock_guard<std::mutex> lock(mutex);
  std::memcpy(pointers, args[0], sizeof(pointers));
  last_stream = stream;
  return code;
}
#endif

#if defined(FAKE_NVRTC)
static std::string log_text =
    "jaxwin_gemm.cu(12): note\njaxwin_gemm.cu(34): error: no such thing\nmore";
static thread_local std::string output;
static const char* word = "image";  // that images begin with
static std::atomic<int> compile_ms;

EXPORT void fake_compiler(const char* first_word, int milliseconds) {
  word = first_word;
  compile_ms = milliseconds;
}

EXPORT int nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return called("nvrtcVersion");
}
EXPORT int nvrtcGetNumSupportedArchs(int* count) {
  *count = 2;
  return 0;
}
EXPORT int nvrtcGetSupportedArchs(int* list) {
  list[0] = 80;
  list[1] = 90;
  return 0;
}
EXPORT int nvrtcCreateProgram(void** program, const char* source, const char*, int,
                              const char* const*, const char* const*) {
  *program = &output;
  return std::strstr(source, "jaxwin") == nullptr ? 3 : called("nvrtcCreateProgram");
}
EXPORT int nvrtcDestroyProgram(void**) { return called("nvrtcDestroyProgram"); }
EXPORT int nvrtcCompileProgram(void*, int count, const char* const* options) {
  output = word;
  std::this_thread::sleep_for(std::chrono::milliseconds(compile_ms));
  for (int i = 0; i < count; ++i) output += std::string(" ") + options[i];
  return called("nvrtcCompileProgram");
}
EXPORT int nvrtcGetProgramLogSize(void*, size_t* size) {
  *size = log_text.size() + 1;
  return 0;
}
EXPORT int nvrtcGetProgramLog(void*, char* text) {
  std::memcpy(text, log_text.c_str(), log_text.size() + 1);
  return 0;
}
EXPORT int nvrtcGetCUBINSize(void*, size_t* size) {
  *size = output.size() + 1;
  return called("nvrtcGetCUBINSize");
}
EXPORT int nvrtcGetCUBIN(void*, char* text) {
  std::memcpy(text, output.c_str(), output.size() + 1);
  return called("nvrtcGetCUBIN");
}
EXPORT int nvrtcGetPTXSize(void*, size_t* size) {
  *size = output.size() + 1;
  return called("nvrtcGetPTXSize");
}
EXPORT int nvrtcGetPTX(void*, char* text) {
  std::memcpy(text, output.c_str(), output.size() + 1);
  return called("nvrtcGetPTX");
}
#endif
