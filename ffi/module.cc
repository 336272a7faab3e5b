// SPDX-License-Identifier: Apache-2.0
//
// What Python may ask the native core: the registry, plans, the FFI handler.

#include "module.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "algorithms/registry.h"
#include "channels.h"
#include "cuda/bindings.h"
#include "handler.h"
#include "isa.h"
#include "neighbours.h"
#include "plan.h"
#include "problem.h"

namespace nb = nanobind;
namespace jaxwin {
namespace {

// The fields of a problem are read for every convolution that is compiled: the plain interface of
// Python takes a third of the time of nanobind's casts. The name is made once and kept for ever.
struct Name {
  explicit Name(const char* text) : text(text), object(PyUnicode_InternFromString(text)) {}
  const char* text;
  PyObject* object;
};

PyObject* field(const nb::dict& d, const Name& name) {
  PyObject* value = PyDict_GetItemWithError(d.ptr(), name.object);  // borrowed
  if (value == nullptr) throw nb::key_error(name.text);
  return value;
}

int64_t integer(PyObject* value) {
  const long long number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred() != nullptr) throw nb::python_error();
  return number;
}

template <class Use>
void for_each(PyObject* values, Use use) {
  const bool tuple = PyTuple_Check(values);
  if (!tuple && !PyList_Check(values)) throw nb::type_error("neither a tuple nor a list");
  const Py_ssize_t size = tuple ? PyTuple_Size(values) : PyList_Size(values);
  for (Py_ssize_t i = 0; i < size; ++i) {
    use(tuple ? PyTuple_GetItem(values, i) : PyList_GetItem(values, i));
  }
}

std::vector<int64_t> integers(PyObject* values) {
  std::vector<int64_t> result;
  result.reserve(5);  // the highest rank with kernels
  for_each(values, [&](PyObject* value) { result.push_back(integer(value)); });
  return result;
}

Dtype dtype(PyObject* name) {
  if (!PyUnicode_Check(name)) throw nb::type_error("dtype: not a text");
  for (int i = 0; i < kDtypes; ++i) {
    if (PyUnicode_CompareWithASCIIString(name, kDtypeRows[i].name) == 0) {
      return static_cast<Dtype>(i);
    }
  }
  return kDtypes;  // a problem may still be described
}

}  // namespace

ConvParams conv_params(const nb::dict& d) {
  static const std::pair<Name, std::vector<int64_t> ConvParams::*> kLists[] = {
      {Name("lhs_shape"), &ConvParams::lhs_shape},
      {Name("rhs_shape"), &ConvParams::rhs_shape},
      {Name("out_shape"), &ConvParams::out_shape},
      {Name("lhs_spec"), &ConvParams::lhs_spec},
      {Name("rhs_spec"), &ConvParams::rhs_spec},
      {Name("out_spec"), &ConvParams::out_spec},
      {Name("window_strides"), &ConvParams::window_strides},
      {Name("lhs_dilation"), &ConvParams::lhs_dilation},
      {Name("rhs_dilation"), &ConvParams::rhs_dilation},
      {Name("rhs_reversal"), &ConvParams::rhs_reversal},
  };
  static const std::pair<Name, int64_t ConvParams::*> kNumbers[] = {
      {Name("feature_group_count"), &ConvParams::feature_group_count},
      {Name("batch_group_count"), &ConvParams::batch_group_count},
      {Name("rhs_panel"), &ConvParams::rhs_panel},
  };
  static const std::pair<Name, Dtype ConvParams::*> kDtypeFields[] = {
      {Name("lhs_dtype"), &ConvParams::dtype},
      {Name("out_dtype"), &ConvParams::out_dtype},
  };
  static const Name kPadding("padding");
  ConvParams p;
  for (const auto& [name, member] : kLists) p.*member = integers(field(d, name));
  for (const auto& [name, member] : kNumbers) p.*member = integer(field(d, name));
  for (const auto& [name, member] : kDtypeFields) p.*member = dtype(field(d, name));
  if (p.rhs_reversal.empty()) p.rhs_reversal.resize(p.window_strides.size());
  for_each(field(d, kPadding), [&](PyObject* pair) {
    std::vector<int64_t>* end = &p.padding_low;
    for_each(pair, [&](PyObject* value) {
      end->push_back(integer(value));
      end = &p.padding_high;
    });
  });
  return p;
}

nb::list param_specs(const std::vector<ParamSpec>& specs) {
  nb::list rows;
  for (const ParamSpec& s : specs) {
    nb::dict row;
    row["name"] = s.name;
    row["description"] = s.description;
    row["values"] = nb::cast(s.values);
    row["tuned"] = s.tuned;
    rows.append(row);
  }
  return rows;
}

namespace {

std::vector<int64_t> params_of(const Plan& plan) {
  return {plan.params.begin(), plan.params.begin() + plan.algorithm->params.size()};
}

nb::dict plan_to_dict(const Problem& p, const Plan& plan) {
  nb::dict d;
  d["algorithm"] = plan.algorithm->name;
  d["isa"] = plan.target.kernels->isa;
  d["threads"] = plan.target.threads;
  d["params"] = nb::cast(params_of(plan));
  d["workspace_bytes"] = plan.workspace_bytes;
  d["cost"] = plan.algorithm->cycles(p, plan.target, plan.params);
  d["family"] = plan.algorithm->family;
  d["error_bound"] = plan.algorithm->error(p, plan.params);
  return d;
}

// Empty, or why there is no such plan.
std::string ask(const ConvParams& problem, const PlanRequest& request, Problem* p, Plan* plan) {
  std::string wrong = make_problem(problem, p);
  return wrong.empty() ? make_plan(*p, request, plan) : wrong;
}

// {"plan": {...}} or {"error": text}.
nb::dict make_plan_dict(const nb::dict& problem, const std::string& algorithm,
                        const std::string& isa, int64_t threads, int64_t max_workspace,
                        const std::vector<int64_t>& params) {
  nb::dict result;
  Problem p;
  Plan plan;
  const std::string wrong =
      ask(conv_params(problem), {algorithm, isa, threads, max_workspace, params}, &p, &plan);
  if (wrong.empty()) {
    result["plan"] = plan_to_dict(p, plan);
  } else {
    result["error"] = wrong;
  }
  return result;
}

// A convolution as dispatch asks about it: what Python says of it is read once for all questions.
struct Asked {
  ConvParams conv;     // as the kernels compute it
  std::string dtypes;  // of the operands and the result
  bool epilogue = false;
};

// widened: float32 kernels compute it between conversions.
Asked asked(const nb::dict& problem, bool widened) {
  static const Name kDtypeNames[] = {Name("lhs_dtype"), Name("rhs_dtype"), Name("out_dtype")};
  static const Name kEpilogue[] = {Name("bias"), Name("residual"), Name("activation")};
  Asked result{conv_params(problem), {}, false};
  if (widened) result.conv.dtype = result.conv.out_dtype = kF32;
  for (const Name& name : kDtypeNames) {
    result.dtypes += nb::cast<const char*>(nb::handle(field(problem, name)));
    result.dtypes += ' ';
  }
  for (const Name& name : kEpilogue) {
    result.epilogue = result.epilogue || PyObject_IsTrue(field(problem, name)) != 0;
  }
  return result;
}

// The same as make_plan_dict for dispatch, which asks for every convolution that is compiled: the
// fields of Python's Plan, or why there is none.
nb::object plan(const Asked& problem, const std::string& algorithm, const std::string& isa,
                int64_t threads, int64_t max_workspace, const std::vector<int64_t>& params) {
  Problem p;
  Plan plan;
  const std::string wrong =
      ask(problem.conv, {algorithm, isa, threads, max_workspace, params}, &p, &plan);
  if (!wrong.empty()) return nb::cast(wrong);
  return nb::make_tuple(plan.algorithm->name, plan.target.kernels->isa, threads,
                        nb::tuple(nb::cast(params_of(plan))), plan.workspace_bytes);
}

// Whether it is what make_plan answers to "auto".
bool is_heuristic_plan(const nb::dict& problem, const std::string& algorithm,
                       const std::string& isa, int64_t threads,
                       const std::vector<int64_t>& params) {
  Problem p;
  return make_problem(conv_params(problem), &p).empty() &&
         is_heuristic(p, {algorithm, isa, threads, -1, params});
}

// A problem's sizes as Neighbours compares them, with two that are not the problem's.
std::vector<int64_t> all_sizes(const Asked& problem, bool same_machine) {
  std::vector<int64_t> result = sizes(problem.conv);
  result.insert(result.end(), {problem.epilogue ? 2 : 1, same_machine ? 1 : 2});
  return result;
}

// Threads share an image by rows: what one takes at once, two cannot halve (28x28 with 128 channels
// took 1.2 times the heuristic's time), and sixteen would mostly wait.
std::string whole_kind(const Asked& problem, const std::string& isa, int64_t threads) {
  return kind(problem.conv) + ' ' + problem.dtypes + isa + ' ' + std::to_string(threads);
}

void bind_neighbours(nb::module_& m) {
  m.def("direction", [](const nb::dict& problem) { return direction(conv_params(problem)); });
  m.def("sizes", &all_sizes, nb::arg("problem"), nb::arg("same_machine"));
  nb::class_<Neighbours>(m, "Neighbours")
      .def(nb::init<const std::vector<double>&, size_t, double>(), nb::arg("weights"),
           nb::arg("leading"), nb::arg("limit"))
      .def(
          "add",
          [](Neighbours* self, const Asked& problem, const std::string& isa, int64_t threads,
             bool same_machine) {
            self->add(whole_kind(problem, isa, threads), all_sizes(problem, same_machine));
          },
          nb::arg("problem"), nb::arg("isa"), nb::arg("threads"), nb::arg("same_machine"))
      .def(
          "nearest",
          [](const Neighbours& self, const Asked& problem, const std::string& isa,
             int64_t threads) {
            return self.nearest(whole_kind(problem, isa, threads), all_sizes(problem, true));
          },
          nb::arg("problem"), nb::arg("isa"), nb::arg("threads"));
}

// Every algorithm's view of a problem: name -> {"rejected": text} or its default plan.
nb::dict candidates(const nb::dict& problem, const std::string& isa, int64_t threads) {
  nb::dict result;
  Problem p;
  const std::string wrong = make_problem(conv_params(problem), &p);
  for (const Algorithm* a : algorithms()) {
    nb::dict row;
    Plan plan;
    const std::string why =
        wrong.empty() ? make_plan(p, {a->name, isa, threads, -1, {}}, &plan) : wrong;
    if (why.empty()) {
      row = plan_to_dict(p, plan);
    } else {
      row["rejected"] = why;
    }
    result[a->name] = row;
  }
  return result;
}

// The problem's size, the order of its reduction, and how many of so many threads are worth waking,
// as the core understands it.
nb::dict describe(const nb::dict& problem, int64_t threads) {
  nb::dict d;
  Problem p;
  const std::string wrong = make_problem(conv_params(problem), &p);
  if (!wrong.empty()) {
    d["error"] = wrong;
    return d;
  }
  d["flops"] = p.flops();
  d["chunk_rows"] = p.chunk_rows;
  d["dilated_input"] = p.dilated_input();
  d["useful_threads"] = useful_threads(p, std::max<int64_t>(1, threads));
  return d;
}

using Array = nb::ndarray<nb::c_contig, nb::device::cpu>;

ConstPtr elements(const Array& array) {
  return {static_cast<const char*>(array.data()), static_cast<int64_t>(array.itemsize())};
}

// Runs a plan outside XLA, on its own threads, into the caller's result and workspace: for tests
// that poison and guard both, and for measurements. Empty, or what is wrong.
std::string run(const nb::dict& problem, const std::string& algorithm, const std::string& isa,
                int64_t threads, const std::vector<int64_t>& params, const Array& x, const Array& w,
                const Array& y, const Array& workspace, const std::optional<Array>& bias,
                const std::optional<Array>& residual, int64_t activation) {
  const ConvParams conv = conv_params(problem);
  Problem p;
  Plan plan;
  std::string wrong = ask(conv, {algorithm, isa, threads, -1, params}, &p, &plan);
  if (!wrong.empty()) return wrong;
  const auto size = [](const std::vector<int64_t>& shape) {
    size_t n = 1;
    for (const int64_t d : shape) n *= static_cast<size_t>(d);
    return n;
  };
  const auto& w_shape = conv.rhs_panel > 0 ? packed_shape(conv) : conv.rhs_shape;
  if (x.size() != size(conv.lhs_shape) || w.size() != size(w_shape) ||
      y.size() != size(conv.out_shape)) {
    return "an array has a wrong size";
  }
  if (bias.has_value() && bias->size() != static_cast<size_t>(p.g * p.k)) return "bias: wrong size";
  if (residual.has_value() && residual->size() != y.size()) return "residual: wrong size";
  for (const auto& [array, dtype] :
       {std::pair{&x, conv.dtype}, {&w, conv.dtype}, {&y, conv.out_dtype}}) {
    if (static_cast<int64_t>(array->itemsize()) != kDtypeRows[dtype].size) {
      return "an array has elements of a wrong size";
    }
  }
  for (const auto* array : {&bias, &residual}) {
    if (array->has_value() &&
        static_cast<int64_t>((*array)->itemsize()) != kDtypeRows[conv.dtype].size) {
      return "bias, residual: elements of a wrong size";
    }
  }
  if (workspace.size() * workspace.itemsize() < static_cast<size_t>(plan.workspace_bytes)) {
    return "the workspace is too small";
  }
  const bool epilogue = bias.has_value() || residual.has_value() || activation != 0;
  if (activation < 0 || activation >= kActivationCount ||
      (epilogue &&
       !has_activation(*plan.target.kernels, conv.dtype, static_cast<Activation>(activation)))) {
    return "activation: unknown, or not one of these kernels";
  }
  const int64_t bytes = plan.target.kernels->size;
  const Operands o{elements(x),
                   elements(w) + p.w_first,
                   bias.has_value() ? elements(*bias) : ConstPtr{},
                   residual.has_value() ? elements(*residual) : ConstPtr{},
                   {static_cast<char*>(y.data()), kDtypeRows[conv.out_dtype].size},
                   static_cast<Activation>(activation)};
  const nb::gil_scoped_release release;
  std::mutex mutex;
  std::vector<std::thread> running;
  const Threads pool(
      [&](std::function<void()> work) {
        const std::lock_guard<std::mutex> lock(mutex);
        running.emplace_back(std::move(work));
      },
      threads);
  plan.algorithm->run(p, plan.params, o,
                      {plan.target, &pool, {static_cast<char*>(workspace.data()), bytes}});
  for (std::thread& t : running) t.join();
  return {};
}

// The state of an algorithm's sources, as the build saw them (abi.cmake).
const char* abi(const std::string& algorithm) {
#define JAXWIN_ABI(name, hash) \
  if (algorithm == #name) return hash;
#include "abi.inc"
#undef JAXWIN_ABI
  return "";
}

nb::dict registry() {
  nb::list algorithm_rows;
  for (const Algorithm* a : algorithms()) {
    nb::dict row;
    row["name"] = a->name;
    row["summary"] = a->summary;
    row["source"] = a->source;
    row["family"] = a->family;
    row["abi"] = abi(a->name);
    nb::list dtypes;
    for (const Dtype d : a->dtypes) dtypes.append(kDtypeRows[d].name);
    row["dtypes"] = dtypes;
    row["params"] = param_specs(a->params);
    row["takes_packed"] = a->takes_packed;
    algorithm_rows.append(row);
  }
  nb::list isa_rows;
  for (const Isa& set : isas()) {
    const Kernels* k = set.kernels(kFloat);
    nb::list tiles;
    for (int nv = 1; nv <= kMaxNv; ++nv) {
      if (k->max_mr[nv] > 0) tiles.append(nb::make_tuple(k->max_mr[nv], nv));
    }
    nb::dict row;
    row["name"] = k->isa;
    row["width"] = k->width;  // float32 lanes
    row["tiles"] = tiles;
    row["max_pixels"] = max_lanes(*k, k->word);
    nb::list lanes, sweeps, windows;
    for (int d = 0; d < kDtypes; ++d) {
      const auto dtype = static_cast<Dtype>(d);
      for (const Word word : {kFloat, kDouble}) {
        const Kernels& own = *set.kernels(word);
        const int pixels = max_lanes(own, dtype);
        if (pixels > 0) lanes.append(nb::make_tuple(kDtypeRows[d].name, pixels));
        for (int form = 0; form < kSweepForms; ++form) {
          for (int window = 1; window <= kMaxSweepWindow; ++window) {
            for (int stride = 1; stride <= kMaxSweepStride; ++stride) {
              const int rows = max_sweep(own, dtype, form, window, stride);
              if (rows == 0) continue;
              sweeps.append(nb::make_tuple(kDtypeRows[d].name, form, window, stride, rows));
            }
          }
        }
        for (int stride = 1; stride <= kMaxWindowStride; ++stride) {
          for (int rows = 1; rows <= kMaxWindowRows; ++rows) {
            std::vector<int> pixels;
            for (int i = 1; i <= max_window(own, dtype, stride, rows); ++i) {
              if (own.window[d][stride][rows][i] != nullptr) pixels.push_back(i);
            }
            if (pixels.empty()) continue;
            windows.append(nb::make_tuple(kDtypeRows[d].name, stride, rows, pixels));
          }
        }
      }
    }
    row["lanes"] = lanes;
    row["sweeps"] = sweeps;
    row["windows"] = windows;
    row["runnable"] = set.runnable;
    isa_rows.append(row);
  }
  nb::list activations;
  for (const char* name : kActivationNames) activations.append(name);
  nb::dict dtype_rows;
  for (int d = 0; d < kDtypes; ++d) {
    if (kDtypeRows[d].word == kWords) continue;
    const Kernels* k = isas()[0].kernels(kDtypeRows[d].word);
    const ChannelKernels* channels = isas()[0].channels(kDtypeRows[d].word);
    const bool plain = is_plain(static_cast<Dtype>(d), static_cast<Dtype>(d));
    nb::list fused, scaled, results;
    for (int r = 0; r < kDtypes; ++r) {
      if (has_kernels(static_cast<Dtype>(d), static_cast<Dtype>(r))) {
        results.append(kDtypeRows[r].name);
      }
    }
    for (int i = 0; i < kActivationCount; ++i) {
      if (has_activation(*k, static_cast<Dtype>(d), static_cast<Activation>(i))) {
        fused.append(kActivationNames[i]);
      }
      if (plain && (channels->activations >> i & 1U) != 0) scaled.append(kActivationNames[i]);
    }
    nb::dict row;
    row["word"] = kWordSizes[kDtypeRows[d].word];  // bytes
    row["results"] = results;
    row["takes_packed"] = plain;
    row["activations"] = fused;
    row["scale_activations"] = scaled;  // of passes by channel; empty: there are none
    dtype_rows[kDtypeRows[d].name] = row;
  }
  nb::dict cache_sizes;
  cache_sizes["l1"] = caches().l1;
  cache_sizes["l2"] = caches().l2;
  cache_sizes["l3"] = caches().l3;
  nb::dict result;
  result["algorithms"] = algorithm_rows;
  result["isas"] = isa_rows;
  result["activations"] = activations;
  result["dtypes"] = dtype_rows;
  result["caches"] = cache_sizes;
  result["cuda"] = cuda::registry();
  return result;
}

}  // namespace
}  // namespace jaxwin

NB_MODULE(_ffi, m) {
  m.def("registrations", [] {
    const jaxwin::ConvHandlers h = jaxwin::conv_handlers();
    nb::dict handlers;
    handlers["instantiate"] = nb::capsule(h.instantiate);
    handlers["execute"] = nb::capsule(h.execute);
    nb::dict type;
    type["type_id"] = nb::capsule(h.type_id);
    type["type_info"] = nb::capsule(h.type_info);
    nb::dict target;
    target["handlers"] = handlers;
    target["state_type"] = type;
    nb::dict targets;
    targets["jaxwin_conv"] = target;
    targets["jaxwin_scale"] = nb::capsule(jaxwin::scale_handler());
    targets["jaxwin_moments"] = nb::capsule(jaxwin::moments_handler());
    return targets;
  });
  m.def("registry", &jaxwin::registry);
  jaxwin::cuda::bind(m);
  m.def("make_plan", &jaxwin::make_plan_dict, nb::arg("problem"), nb::arg("algorithm") = "auto",
        nb::arg("isa") = "", nb::arg("threads") = 1, nb::arg("max_workspace") = -1,
        nb::arg("params") = std::vector<int64_t>{});
  nb::class_<jaxwin::Asked>(m, "Asked")
      .def(
          "__init__",
          [](jaxwin::Asked* self, const nb::dict& problem, bool widened) {
            new (self) jaxwin::Asked(jaxwin::asked(problem, widened));
          },
          nb::arg("problem"), nb::arg("widened"));
  m.def("plan", &jaxwin::plan, nb::arg("problem"), nb::arg("algorithm"), nb::arg("isa"),
        nb::arg("threads"), nb::arg("max_workspace"), nb::arg("params"));
  m.def("candidates", &jaxwin::candidates, nb::arg("problem"), nb::arg("isa") = "",
        nb::arg("threads") = 1);
  m.def("run", &jaxwin::run, nb::arg("problem"), nb::arg("algorithm"), nb::arg("isa"),
        nb::arg("threads"), nb::arg("params"), nb::arg("x"), nb::arg("w"), nb::arg("y"),
        nb::arg("workspace"), nb::arg("bias") = nb::none(), nb::arg("residual") = nb::none(),
        nb::arg("activation") = 0);
  m.def("describe", &jaxwin::describe, nb::arg("problem"), nb::arg("threads") = 1);
  m.def(
      "measure_peak",
      [](const std::string& isa, int64_t iterations) {
        const jaxwin::Kernels* kernels = jaxwin::find_kernels(isa, jaxwin::kFloat);
        if (kernels == nullptr) throw std::invalid_argument("isa: this CPU does not run it");
        return kernels->peak(iterations);
      },
      nb::arg("isa"), nb::arg("iterations"), nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "best_isa",
      [](const std::string& cap) {
        const jaxwin::Isa* set = jaxwin::best_isa(cap);
        return set == nullptr ? std::string() : std::string(set->name);
      },
      nb::arg("cap") = "");
  m.def("is_heuristic", &jaxwin::is_heuristic_plan, nb::arg("problem"), nb::arg("algorithm"),
        nb::arg("isa"), nb::arg("threads"), nb::arg("params"));
  jaxwin::bind_neighbours(m);
}
