// The Python module deqkern._C. An op is called with the addresses of its tensors as integers (0 is null), its sizes,
// its numbers and the number of threads, in the order of csrc/ops.h. What memory safety needs is checked here; the rest
// is validated once, in Python.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "build_info.h"
#include "cpu/dispatch.h"
#ifdef DEQKERN_CUDA
#include "cuda/device.h"
#include "cuda/ops.h"
#else
#define DEQKERN_CUDA_OPS(OP)
#endif

namespace py = pybind11;
using namespace deqkern;

namespace {

enum class Kind { tensor, tensor_if, bands, index, size, between, number };

// A member of an op, and what is asked of it as functions of the whole op: first and second are whether a tensor is
// needed; the number of bands and their end; the length and the bound of an index; the ends of a range.
template <class Op, class T>
struct Member {
  Kind kind;
  const char* name;
  T Op::* place;
  int64_t (*first)(const Op&);
  int64_t (*second)(const Op&);
};

template <class Op, class T>
constexpr Member<Op, T> member(Kind kind, const char* name, T Op::* place, int64_t (*first)(const Op&) = nullptr,
                               int64_t (*second)(const Op&) = nullptr) {
  return {kind, name, place, first, second};
}

#define OF_OP(expression) +[](const Op& op) { return static_cast<void>(op), static_cast<int64_t>(expression); }
#define TENSOR(x) member(Kind::tensor, #x, &Op::x)
#define TENSOR_IF(x, condition) member(Kind::tensor_if, #x, &Op::x, OF_OP((condition) != nullptr))
#define OPTIONAL(x) member(Kind::tensor_if, #x, &Op::x, OF_OP(0))
#define BANDS(x) member(Kind::bands, #x, &Op::x, OF_OP(op.K), OF_OP(op.D))
#define INDEX(x, length, bound) member(Kind::index, #x, &Op::x, OF_OP(length), OF_OP(bound))
#define SIZE(x) member(Kind::size, #x, &Op::x)
#define BETWEEN(x, low, high) member(Kind::between, #x, &Op::x, OF_OP(low), OF_OP(high))
#define NUMBER(x) member(Kind::number, #x, &Op::x)
#define MEMBERS(name, Struct, ...)           \
  constexpr auto members_of(const Struct*) { \
    using Op = Struct;                       \
    return std::make_tuple(__VA_ARGS__);     \
  }
DEQKERN_OPS(MEMBERS)

// Takes one argument after the other.
class Reader {
 public:
  Reader(PyObject* const* arguments, Py_ssize_t count) : next_(arguments), end_(arguments + count) {}

  template <class T>
  void read(T& target) {
    if (next_ == end_) throw py::type_error("too few arguments");
    target = convert<T>(*next_++);
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  }

  void finish() const {
    if (next_ != end_) throw py::type_error("too many arguments");
  }

 private:
  template <class T>
  static T convert(PyObject* value) {
    if constexpr (std::is_pointer_v<T>)
      return reinterpret_cast<T>(PyLong_AsSize_t(value));
    else if constexpr (std::is_same_v<T, bool>)
      return PyObject_IsTrue(value) != 0;
    else if constexpr (std::is_floating_point_v<T>)
      return static_cast<T>(PyFloat_AsDouble(value));
    else
      return static_cast<T>(PyLong_AsLong(value));
  }

  PyObject* const* next_;
  PyObject* const* end_;
};

[[noreturn]] void refuse(const char* name, const std::string& what) { throw std::invalid_argument(name + what); }

template <class Op, class T>
bool is_zero_size(const Op& op, const Member<Op, T>& member) {
  if constexpr (std::is_same_v<T, int64_t>) {
    if (member.kind != Kind::size) return false;
    if (op.*member.place < 0) refuse(member.name, " must not be negative");
    return op.*member.place == 0;
  }
  return false;
}

template <class Op, class T>
void check_range(const Op& op, const Member<Op, T>& member) {
  if constexpr (std::is_integral_v<T> || std::is_enum_v<T>) {
    if (member.kind != Kind::between) return;
    const int64_t value = static_cast<int64_t>(op.*member.place), low = member.first(op), high = member.second(op);
    if (value < low || value > high)
      refuse(member.name, " must be within " + std::to_string(low) + " .. " + std::to_string(high));
  }
}

template <class Op, class T>
void check_address(const Op& op, const Member<Op, T>& member) {
  if constexpr (std::is_pointer_v<T>) {
    const bool needed = member.kind != Kind::tensor_if || member.first(op) != 0;
    if (needed && op.*member.place == nullptr) refuse(member.name, " is null");
  }
}

template <class Op, class T>
void check_contents(const Op& op, const Member<Op, T>& member) {
  if constexpr (std::is_same_v<T, const int64_t*>) {
    const int64_t* values = op.*member.place;
    bool good = true;
    if (member.kind == Kind::bands) {
      const int64_t count = member.first(op), end = member.second(op);
      good = values[0] == 0 && values[count] == end;
      for (int64_t k = 0; k < count; ++k) good = good && values[k] <= values[k + 1];
      if (!good) refuse(member.name, " must go from 0 to " + std::to_string(end) + " and not decrease");
    } else if (member.kind == Kind::index) {
      const int64_t length = member.first(op), bound = member.second(op);
      for (int64_t j = 0; j < length; ++j) good = good && values[j] >= 0 && values[j] < bound;
      if (!good) refuse(member.name, " must be within 0 .. " + std::to_string(bound - 1));
    }
  }
}

// Fills the members; false if there is nothing to do.
template <class Op>
bool fill(Op& op, Reader& reader) {
  const auto fill_members = [&](const auto&... members) {
    (reader.read(op.*members.place), ...);
    return !(is_zero_size(op, members) | ...);
  };
  return std::apply(fill_members, members_of(&op));
}

// contents: whether the host can read the tensors.
template <class Op>
void check(const Op& op, bool contents) {
  const auto check_members = [&](const auto&... members) {
    (check_range(op, members), ...);
    (check_address(op, members), ...);
    if (contents) (check_contents(op, members), ...);
  };
  std::apply(check_members, members_of(&op));
}

// The result of a call, or the Python error of what it threw.
template <class Call>
PyObject* returned(const Call& call) {
  try {
    call();
    return Py_NewRef(Py_None);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <class Op, void (*Kernels::*kernel)(const Op&)>
PyObject* run(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return returned([&] {
    Op op{};
    Reader reader(arguments, count);
    const bool has_work = fill(op, reader);
    reader.read(op.threads);
    reader.finish();
    if (!has_work) return;
    check(op, true);
    py::gil_scoped_release released;
    (kernels().*kernel)(op);
  });
}

#ifdef DEQKERN_CUDA
template <class Op, void (*kernel)(const Op&, int, void*)>
PyObject* run_cuda(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return returned([&] {
    Op op{};
    Reader reader(arguments, count);
    const bool has_work = fill(op, reader);
    int device = 0;
    void* stream = nullptr;
    reader.read(device);
    reader.read(stream);
    reader.finish();
    if (!has_work) return;
    check(op, false);
    py::gil_scoped_release released;
    kernel(op, device, stream);
  });
}

constexpr bool kCudaCompiled = true;
int cuda_device_count() { return cuda::device_count(); }
#else
constexpr bool kCudaCompiled = false;
int cuda_device_count() { throw std::runtime_error("deqkern was built without CUDA: " DEQKERN_CUDA_REASON); }
#endif

template <class Function>
PyMethodDef method(const char* name, Function function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

#define METHOD(name, Struct, ...) method(#name, &run<Struct, &Kernels::name>),
#define CUDA_METHOD(name, Struct) method("cuda_" #name, &run_cuda<Struct, &cuda::name>),
PyMethodDef methods[] = {DEQKERN_OPS(METHOD) DEQKERN_CUDA_OPS(CUDA_METHOD){nullptr, nullptr, 0, nullptr}};

template <class Op>
py::list names_of(const Op* op) {
  py::list names;
  std::apply([&](const auto&... members) { (names.append(members.name), ...); }, members_of(op));
  return names;
}

// What other languages name or number too, for the test that compares them.
py::dict shared() {
  py::dict ops, all;
#define ADD_NAMES(name, Struct, ...) ops[#name] = names_of(static_cast<const Struct*>(nullptr));
  DEQKERN_OPS(ADD_NAMES)
  all["ops"] = ops;
  all["Norms"] = norm::names;
  all["Moments"] = moment::names;
  all["Convergence"] = convergence::names;
  all["ConstantX0"] = constant_x0::names;
  all["OutputPath"] = output_path::names;
  all["SCOPES"] = scope::names;
  all["MAX_HISTORY"] = kMaxHistory;
  all["SMALLEST_EIGENVALUE"] = kSmallestEigenvalue;
  all["SMALLEST_CHANGE"] = kSmallestChange;
  all["LEAST_LEFT"] = kLeastLeft;
  return all;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = DEQKERN_COMPILER;
  info["cuda"] = DEQKERN_CUDA_VERSION;
  info["cuda_reason"] = DEQKERN_CUDA_REASON;
  info["cuda_architectures"] = DEQKERN_CUDA_ARCHITECTURES;
  return info;
}

py::list isas() {
  py::list names;
  for (int j = 0; const char* name = available_isa(j); ++j) names.append(name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
  module.def("isa", [] { return kernels().isa; }, "The instruction set in use; DEQKERN_ISA forces one.");
  module.def("isas", &isas, "The instruction sets that this build and this machine both have, best first.");
  module.def("cuda_compiled", [] { return kCudaCompiled; });
  module.def("cuda_device_count", &cuda_device_count, py::call_guard<py::gil_scoped_release>(),
             "Raises RuntimeError with CUDA's own words.");
  module.def("build_info", &build_info, "Compiler, CUDA version (empty without CUDA, then cuda_reason says why).");
  module.def("shared", &shared, "The names and constants that other languages have too.");
}
