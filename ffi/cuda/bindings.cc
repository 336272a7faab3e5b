// SPDX-License-Identifier: Apache-2.0

#include "cuda/bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>

#include "cuda/algorithms.h"
#include "cuda/handler.h"
#include "cuda/runtime.h"
#include "module.h"

namespace nb = nanobind;
namespace jaxwin::cuda {
namespace {

struct Asked {
  Problem problem;
  PlanRequest request;
  Plan plan;
};

// Empty, or why there is no plan.
std::string ask(const nb::dict& problem, const std::string& algorithm, const std::string& dtype,
                bool wide_result, int64_t max_workspace, const std::vector<int64_t>& params,
                Asked* asked) {
  std::string wrong = make_problem(conv_params(problem), &asked->problem);
  if (!wrong.empty()) return wrong;
  int type = 0;
  while (type < kTypeCount && dtype != kTypeNames[type]) ++type;
  if (type == kTypeCount) return "dtype: no kernels for " + dtype;
  asked->request = {algorithm, {static_cast<Type>(type), wide_result}, max_workspace, params};
  return make_plan(asked->problem, asked->request, &asked->plan);
}

nb::dict plan_to_dict(const Asked& a) {
  nb::dict d;
  nb::list params;
  for (size_t i = 0; i < a.plan.algorithm->params.size(); ++i) params.append(a.plan.params[i]);
  d["algorithm"] = a.plan.algorithm->name;
  d["family"] = a.plan.algorithm->family;
  d["params"] = params;
  d["workspace_bytes"] = a.plan.workspace_bytes;
  d["cost"] = a.plan.algorithm->cost(a.problem, a.request.types, a.plan.params);
  return d;
}

// {"plan": {...}} or {"error": text}.
nb::dict make_plan_dict(const nb::dict& problem, const std::string& algorithm,
                        const std::string& dtype, bool wide_result, int64_t max_workspace,
                        const std::vector<int64_t>& params) {
  nb::dict result;
  Asked a;
  const std::string wrong = ask(problem, algorithm, dtype, wide_result, max_workspace, params, &a);
  if (wrong.empty()) {
    result["plan"] = plan_to_dict(a);
  } else {
    result["error"] = wrong;
  }
  return result;
}

// Every algorithm's view of a problem: name -> {"rejected": text} or its default plan.
nb::dict candidates(const nb::dict& problem, const std::string& dtype, bool wide_result) {
  nb::dict result;
  for (const Algorithm* algorithm : algorithms()) {
    Asked a;
    const std::string wrong = ask(problem, algorithm->name, dtype, wide_result, -1, {}, &a);
    nb::dict row;
    if (wrong.empty()) {
      row = plan_to_dict(a);
    } else {
      row["rejected"] = wrong;
    }
    result[algorithm->name] = row;
  }
  return result;
}

// Addresses, as numbers: tests have memory of their own.
Buffers buffers_of(const nb::dict& d) {
  const auto pointer = [&](const char* name) {
    // NOLINTNEXTLINE(performance-no-int-to-ptr)
    return d.contains(name) ? reinterpret_cast<void*>(nb::cast<uintptr_t>(d[name])) : nullptr;
  };
  Buffers b;
  b.x = pointer("x");
  b.w = pointer("w");
  b.bias = pointer("bias");
  b.residual = pointer("residual");
  b.y = pointer("y");
  b.workspace = pointer("workspace");
  if (d.contains("activation")) {
    b.activation = static_cast<Activation>(nb::cast<int64_t>(d["activation"]));
  }
  return b;
}

Program program_of(const nb::dict& problem, const std::string& algorithm, const std::string& dtype,
                   bool wide_result, const std::vector<int64_t>& params, const nb::dict& buffers) {
  Asked a;
  const std::string wrong = ask(problem, algorithm, dtype, wide_result, -1, params, &a);
  if (!wrong.empty()) throw std::invalid_argument(wrong);
  Program program;
  a.plan.algorithm->build(a.problem, a.request.types, a.plan.params, buffers_of(buffers), &program);
  return program;
}

nb::list launches(const nb::dict& problem, const std::string& algorithm, const std::string& dtype,
                  bool wide_result, const std::vector<int64_t>& params, const nb::dict& buffers) {
  nb::list result;
  for (const Launch& l :
       program_of(problem, algorithm, dtype, wide_result, params, buffers).launches) {
    nb::dict d;
    d["kernel"] = l.kernel;
    d["source"] = l.source;
    d["options"] = nb::cast(l.options.text());
    d["blocks"] = l.blocks;
    d["threads"] = l.threads;
    d["shared_bytes"] = l.shared_bytes;
    d["args"] = nb::bytes(reinterpret_cast<const char*>(l.args.data()), l.args_bytes);
    result.append(d);
  }
  return result;
}

RuntimeOptions options_of(const std::vector<std::string>& cuda,
                          const std::vector<std::string>& nvrtc, const std::string& cache,
                          int64_t cache_bytes) {
  RuntimeOptions options;
  options.cuda = cuda;
  options.nvrtc = nvrtc;
  options.cache = cache;
  options.cache_bytes = cache_bytes;
  return options;
}

const char* failure_name(Failure f) {
  switch (f) {
    case Failure::kNone:
      return "";
    case Failure::kUnavailable:
      return "unavailable";
    case Failure::kInvalid:
      return "invalid";
    case Failure::kInternal:
      return "internal";
    case Failure::kOutOfMemory:
      return "out of memory";
  }
  return "";
}

// ("", "") or (what kind of failure, text).
nb::tuple to_tuple(const Status& s) { return nb::make_tuple(failure_name(s.failure), s.text); }

nb::dict device_dict(Runtime* runtime, int ordinal) {
  Device device;
  Status s;
  {
    const nb::gil_scoped_release release;
    s = runtime->device(ordinal, &device);
  }
  nb::dict d;
  if (!s.ok()) {
    d["error"] = s.text;
    return d;
  }
  d["name"] = device.name;
  d["processors"] = device.processors;
  d["capability"] =
      std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10);
  return d;
}

nb::dict counters_dict(const Runtime& runtime) {
  const Runtime::Counters c = runtime.counters();
  nb::dict d;
  d["compiled"] = c.compiled;
  d["from_disk"] = c.from_disk;
  d["loaded"] = c.loaded;
  return d;
}

// The images of all kernels of a plan, by options, for an architecture such as "sm_90a".
nb::list images(Runtime* runtime, const nb::dict& problem, const std::string& algorithm,
                const std::string& dtype, bool wide_result, const std::vector<int64_t>& params,
                const std::string& architecture, const nb::dict& buffers) {
  const Program program = program_of(problem, algorithm, dtype, wide_result, params, buffers);
  nb::list result;
  for (const Launch& l : program.launches) {
    std::string image;
    Status s;
    Runtime::Source source{};
    {
      const nb::gil_scoped_release release;
      s = runtime->image(l, architecture, &image, &source);
    }
    if (!s.ok()) throw std::runtime_error(s.text);
    nb::dict d;
    d["kernel"] = l.kernel;
    d["options"] = nb::cast(l.options.text());
    d["image"] = nb::bytes(image.data(), image.size());
    result.append(d);
  }
  return result;
}

}  // namespace

nb::dict registry() {
  nb::list rows;
  for (const Algorithm* a : algorithms()) {
    nb::list dtypes;
    for (const char* name : a->dtypes) dtypes.append(name);
    nb::dict row;
    row["name"] = a->name;
    row["summary"] = a->summary;
    row["source"] = a->source;
    row["family"] = a->family;
    row["abi"] = abi(a->files);
    row["dtypes"] = nb::tuple(dtypes);
    row["params"] = param_specs(a->params);
    rows.append(row);
  }
  nb::dict result;
  result["algorithms"] = rows;
  return result;
}

void bind(nb::module_& m) {
  m.def("cuda_handler", [] { return nb::capsule(conv_handler()); });
  m.def(
      "cuda_configure",
      [](const std::vector<std::string>& nvrtc, const std::string& cache) {
        RuntimeOptions options;
        options.nvrtc = nvrtc;
        options.cache = cache;
        configure_process_runtime(options);
      },
      nb::arg("nvrtc"), nb::arg("cache"));
  m.def(
      "cuda_device", [](int ordinal) { return device_dict(&process_runtime(), ordinal); },
      nb::arg("ordinal") = 0);
  m.def(
      "cuda_unusable", [](int ordinal) { return process_runtime().unusable(ordinal); },
      nb::arg("ordinal") = 0, nb::call_guard<nb::gil_scoped_release>());
  m.def("cuda_make_plan", &make_plan_dict, nb::arg("problem"), nb::arg("algorithm") = "auto",
        nb::arg("dtype") = "float32", nb::arg("wide_result") = false, nb::arg("max_workspace") = -1,
        nb::arg("params") = std::vector<int64_t>{});
  m.def("cuda_candidates", &candidates, nb::arg("problem"), nb::arg("dtype") = "float32",
        nb::arg("wide_result") = false);
  m.def("cuda_launches", &launches, nb::arg("problem"), nb::arg("algorithm"), nb::arg("dtype"),
        nb::arg("wide_result"), nb::arg("params"), nb::arg("buffers"));
  m.def("cuda_source", [](const std::string& source) { return translation_unit(source); });
  nb::class_<Runtime>(m, "CudaRuntime")
      .def(
          "__init__",
          [](Runtime* self, const std::vector<std::string>& cuda,
             const std::vector<std::string>& nvrtc, const std::string& cache, int64_t cache_bytes) {
            new (self) Runtime(options_of(cuda, nvrtc, cache, cache_bytes));
          },
          nb::arg("cuda"), nb::arg("nvrtc"), nb::arg("cache") = "",
          nb::arg("cache_bytes") = int64_t{256} << 20)
      .def(
          "run",
          [](Runtime* self, const nb::dict& problem, const std::string& algorithm,
             const std::string& dtype, bool wide_result, const std::vector<int64_t>& params,
             const nb::dict& buffers, uintptr_t stream, int64_t only) {
            Program program = program_of(problem, algorithm, dtype, wide_result, params, buffers);
            if (only >= 0) {
              program.launches = {program.launches.at(static_cast<size_t>(only))};
            }
            Status s;
            {
              const nb::gil_scoped_release release;
              // NOLINTNEXTLINE(performance-no-int-to-ptr)
              s = self->run(program, reinterpret_cast<void*>(stream));
            }
            return to_tuple(s);
          },
          nb::arg("problem"), nb::arg("algorithm"), nb::arg("dtype") = "float32",
          nb::arg("wide_result") = false, nb::arg("params") = std::vector<int64_t>{},
          nb::arg("buffers") = nb::dict(), nb::arg("stream") = 0, nb::arg("only") = -1)
      .def("images", &images, nb::arg("problem"), nb::arg("algorithm"),
           nb::arg("dtype") = "float32", nb::arg("wide_result") = false,
           nb::arg("params") = std::vector<int64_t>{}, nb::arg("architecture") = "sm_80",
           nb::arg("buffers") = nb::dict())
      .def("device", &device_dict, nb::arg("ordinal") = 0)
      .def("unusable", &Runtime::unusable, nb::arg("ordinal") = 0,
           nb::call_guard<nb::gil_scoped_release>())
      .def("counters", [](const Runtime& self) { return counters_dict(self); });
}

}  // namespace jaxwin::cuda
