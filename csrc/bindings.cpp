// The Python module deqkern._C: raw pointers as integers (0 is null), sizes, scalars, the number of threads.
// It checks only what memory safety needs; everything else is validated once, in Python.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "build_info.h"
#include "cpu/dispatch.h"
#ifdef DEQKERN_CUDA
#include "cuda/anderson_solve.h"
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace deqkern;
using Address = std::uintptr_t;

namespace {

constexpr int kMaxHistory = 16;

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

template <class T>
T* pointer(Address address, bool needed, const char* name) {
  if (needed && address == 0) throw std::invalid_argument(std::string(name) + " is null");
  return reinterpret_cast<T*>(address);
}

void check_bands(const int64_t* bands, int64_t K, int64_t D) {
  require(bands[0] == 0 && bands[K] == D, "bands must go from 0 to D");
  for (int64_t k = 0; k < K; ++k) require(bands[k] <= bands[k + 1], "bands must not decrease");
}

void check_history(int m, int head, int count) {
  require(m >= 0 && m <= kMaxHistory, "m must be within 0 .. 16");
  require(head >= 0 && head <= m, "head must be within 0 .. m");
  require(count >= 0 && count <= m, "count must be within 0 .. m");
}

void check_indices(const int64_t* index, int64_t length, int64_t bound, const char* message) {
  for (int64_t j = 0; j < length; ++j) require(index[j] >= 0 && index[j] < bound, message);
}

void dct2(Address image, Address spectrum, Address rows, Address dct_h, Address dct_w, Address colour, Address order,
          int64_t N, int64_t C, int64_t H, int64_t W, int64_t R, bool inverse, int threads) {
  require(N >= 0 && C >= 0 && H >= 0 && W >= 0 && R >= 0, "sizes must not be negative");
  if (N == 0 || C == 0 || H == 0 || W == 0) return;
  Dct2 op{pointer<float>(image, true, "image"),
          pointer<float>(spectrum, true, "spectrum"),
          pointer<const int64_t>(rows, true, "rows"),
          pointer<const float>(dct_h, true, "dct_h"),
          pointer<const float>(dct_w, true, "dct_w"),
          pointer<const float>(colour, false, "colour"),
          pointer<const int64_t>(order, true, "order"),
          N, C, H, W, R, inverse, threads};
  check_indices(op.rows, N, R, "rows must be within 0 .. R-1");
  check_indices(op.order, C * H * W, C * H * W, "order must be within 0 .. C*H*W-1");
  kernels().dct2(op);
}

void ddim_scan(Address x, Address e, Address z, Address a, Address b, Address c, Address n, Address slope,
               Address bands, Address window, Address f, Address g, Address norms, int64_t S, int64_t B, int64_t D, int64_t K,
               float beta, bool implicit, int threads) {
  require(S >= 0 && B >= 0 && D >= 0 && K >= 0, "sizes must not be negative");
  if (S == 0 || B == 0) return;
  const bool data = D > 0;
  DdimScan op{pointer<const float>(x, data, "x"),
              pointer<const float>(e, data, "e"),
              pointer<const float>(z, false, "z"),
              pointer<const float>(a, true, "a"),
              pointer<const float>(b, true, "b"),
              pointer<const float>(c, false, "c"),
              pointer<const float>(n, z != 0, "n"),
              pointer<const float>(slope, K > 0, "slope"),
              pointer<const int64_t>(bands, true, "bands"),
              pointer<const int64_t>(window, true, "window"),
              pointer<float>(f, data, "f"),
              pointer<float>(g, data, "g"),
              pointer<double>(norms, true, "norms"),
              S, B, D, K, beta, implicit, threads};
  require(c == 0 || !implicit, "c must be null for an implicit chain");
  check_bands(op.bands, K, D);
  kernels().ddim_scan(op);
}

void band_moments(Address dx, Address e, Address e_prev, Address bands, Address window, Address moments, int64_t S,
                  int64_t B, int64_t D, int64_t K, int threads) {
  require(S >= 0 && B >= 0 && D >= 0 && K >= 0, "sizes must not be negative");
  if (S == 0 || B == 0 || K == 0) return;
  const bool data = D > 0;
  BandMoments op{pointer<const float>(dx, data, "dx"),
                 pointer<const float>(e, data, "e"),
                 pointer<const float>(e_prev, data, "e_prev"),
                 pointer<const int64_t>(bands, true, "bands"),
                 pointer<const int64_t>(window, true, "window"),
                 pointer<double>(moments, true, "moments"),
                 S, B, D, K, threads};
  check_bands(op.bands, K, D);
  kernels().band_moments(op);
}

void secant_slope(Address moments, Address low, Address high, Address slope, int64_t S, int64_t B, int64_t K,
                  double pull) {
  require(S >= 0 && B >= 0 && K >= 0, "sizes must not be negative");
  if (S == 0 || B == 0 || K == 0) return;
  kernels().secant_slope({pointer<const double>(moments, true, "moments"),
                          pointer<const double>(low, true, "low"),
                          pointer<const double>(high, true, "high"),
                          pointer<float>(slope, true, "slope"),
                          S, B, K, pull});
}

void interpolate_outputs(Address x, Address slope, Address bands, Address rows, Address path, Address e, int64_t S, int64_t B,
               int64_t D, int64_t K, int64_t N, int threads) {
  require(S >= 0 && B >= 0 && D >= 0 && K >= 0 && N >= 0, "sizes must not be negative");
  if (S == 0 || B == 0 || K == 0 || N == 0) return;
  const bool data = D > 0;
  InterpolateOutputs op{pointer<const float>(x, data, "x"),
              pointer<const float>(slope, true, "slope"),
              pointer<const int64_t>(bands, true, "bands"),
              pointer<const int64_t>(rows, true, "rows"),
              pointer<const double>(path, true, "path"),
              pointer<float>(e, data, "e"),
              S, B, D, K, N, threads};
  check_bands(op.bands, K, D);
  check_indices(op.rows, 3 * N, S * B, "rows must be within 0 .. S*B-1");
  kernels().interpolate_outputs(op);
}

void extrapolate_states(Address x, Address moved, Address e, Address z, Address held, Address n, Address before, Address window,
            Address skip, int64_t S, int64_t B, int64_t D, float beta, bool implicit, int threads) {
  require(S >= 0 && B >= 0 && D >= 0, "sizes must not be negative");
  if (S == 0 || B == 0 || D == 0) return;
  kernels().extrapolate_states({pointer<float>(x, true, "x"),
                    pointer<float>(moved, true, "moved"),
                    pointer<const float>(e, true, "e"),
                    pointer<const float>(z, false, "z"),
                    pointer<const float>(held, true, "held"),
                    pointer<const float>(n, z != 0, "n"),
                    pointer<const int64_t>(before, true, "before"),
                    pointer<const int64_t>(window, true, "window"),
                    pointer<const int64_t>(skip, true, "skip"),
                    S, B, D, beta, implicit, threads});
}

void anderson_gram(Address g_ring, Address window, Address gram, Address rhs, int64_t S, int64_t B, int64_t D, int m,
                   int head, int count, int threads) {
  require(S >= 0 && B >= 0 && D >= 0, "sizes must not be negative");
  check_history(m, head, count);
  if (S == 0 || B == 0 || m == 0) return;
  kernels().anderson_gram({pointer<const float>(g_ring, D > 0, "g_ring"),
                           pointer<const int64_t>(window, true, "window"),
                           pointer<double>(gram, true, "gram"),
                           pointer<double>(rhs, true, "rhs"),
                           S, B, D, m, head, count, threads});
}

AndersonSolve anderson_solve_op(Address gram, Address rhs, Address window, Address gamma, int64_t S, int64_t B, int m,
                                int scope, double ridge, double ridge_absolute, bool implicit, int threads) {
  require(S >= 0 && B >= 0, "sizes must not be negative");
  check_history(m, 0, 0);
  require(scope >= 0 && scope <= 3, "scope must be 0 (row), 1 (causal), 2 (anticausal) or 3 (joint)");
  const bool data = S > 0 && B > 0 && m > 0;
  return {pointer<const double>(gram, data, "gram"),
          pointer<const double>(rhs, data, "rhs"),
          pointer<const int64_t>(window, data, "window"),
          pointer<float>(gamma, data, "gamma"),
          S, B, m, static_cast<Scope>(scope), ridge, ridge_absolute, implicit, threads};
}

void anderson_solve(Address gram, Address rhs, Address window, Address gamma, int64_t S, int64_t B, int m, int scope,
                    double ridge, double ridge_absolute, bool implicit, int threads) {
  const AndersonSolve op = anderson_solve_op(gram, rhs, window, gamma, S, B, m, scope, ridge, ridge_absolute, implicit,
                                             threads);
  if (S > 0 && B > 0 && m > 0) kernels().anderson_solve(op);
}

void anderson_mix(Address f_ring, Address gamma, Address window, Address out, int64_t S, int64_t B, int64_t D, int m,
                  int head, int count, int threads) {
  require(S >= 0 && B >= 0 && D >= 0, "sizes must not be negative");
  check_history(m, head, count);
  if (S == 0 || B == 0 || D == 0) return;
  kernels().anderson_mix({pointer<const float>(f_ring, true, "f_ring"),
                          pointer<const float>(gamma, count > 0, "gamma"),
                          pointer<const int64_t>(window, true, "window"),
                          pointer<float>(out, true, "out"),
                          S, B, D, m, head, count, threads});
}

void update_convergence(Address norms, Address scale, Address gap, Address tolerance, Address errors, Address window,
              Address diverged, int64_t S, int64_t B, double rtol, double contraction, double growth, int64_t size,
              bool implicit) {
  require(S >= 0 && B >= 0, "sizes must not be negative");
  if (S == 0 || B == 0) return;
  kernels().update_convergence({pointer<const double>(norms, true, "norms"),
                      pointer<const double>(scale, true, "scale"),
                      pointer<const int64_t>(gap, false, "gap"),
                      pointer<const double>(tolerance, true, "tolerance"),
                      pointer<double>(errors, true, "errors"),
                      pointer<int64_t>(window, true, "window"),
                      pointer<int64_t>(diverged, true, "diverged"),
                      S, B, rtol, contraction, growth, size, implicit});
}

#ifdef DEQKERN_CUDA
constexpr bool kCudaCompiled = true;
int cuda_device_count() { return cuda::device_count(); }

void cuda_anderson_solve(Address gram, Address rhs, Address window, Address gamma, int64_t S, int64_t B, int m,
                         int scope, double ridge, double ridge_absolute, bool implicit, int device, Address stream) {
  const AndersonSolve op = anderson_solve_op(gram, rhs, window, gamma, S, B, m, scope, ridge, ridge_absolute, implicit,
                                             0);
  if (S > 0 && B > 0 && m > 0) cuda::anderson_solve(op, device, reinterpret_cast<void*>(stream));
}
#else
constexpr bool kCudaCompiled = false;
int cuda_device_count() { throw std::runtime_error("deqkern was built without CUDA: " DEQKERN_CUDA_REASON); }
#endif

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
  using py::arg;
  using NoGil = py::call_guard<py::gil_scoped_release>;

  module.def("dct2", &dct2, NoGil(), arg("image"), arg("spectrum"), arg("rows"), arg("dct_h"), arg("dct_w"),
             arg("colour"), arg("order"), arg("N"), arg("C"), arg("H"), arg("W"), arg("R"), arg("inverse"),
             arg("threads"));
  module.def("ddim_scan", &ddim_scan, NoGil(), arg("x"), arg("e"), arg("z"), arg("a"), arg("b"), arg("c"),
             arg("n"), arg("slope"), arg("bands"), arg("window"), arg("f"), arg("g"), arg("norms"), arg("S"), arg("B"),
             arg("D"), arg("K"), arg("beta"), arg("implicit"), arg("threads"));
  module.def("band_moments", &band_moments, NoGil(), arg("dx"), arg("e"), arg("e_prev"), arg("bands"), arg("window"),
             arg("moments"), arg("S"), arg("B"), arg("D"), arg("K"), arg("threads"));
  module.def("secant_slope", &secant_slope, NoGil(), arg("moments"), arg("low"), arg("high"), arg("slope"), arg("S"),
             arg("B"), arg("K"), arg("pull"));
  module.def("interpolate_outputs", &interpolate_outputs, NoGil(), arg("x"), arg("slope"), arg("bands"), arg("rows"), arg("path"),
             arg("e"), arg("S"), arg("B"), arg("D"), arg("K"), arg("N"), arg("threads"));
  module.def("extrapolate_states", &extrapolate_states, NoGil(), arg("x"), arg("moved"), arg("e"), arg("z"), arg("held"), arg("n"),
             arg("before"), arg("window"), arg("skip"), arg("S"), arg("B"), arg("D"), arg("beta"), arg("implicit"),
             arg("threads"));
  module.def("update_convergence", &update_convergence, NoGil(), arg("norms"), arg("scale"), arg("gap"), arg("tolerance"), arg("errors"),
             arg("window"), arg("diverged"), arg("S"), arg("B"), arg("rtol"), arg("contraction"), arg("growth"),
             arg("size"), arg("implicit"));
  module.def("anderson_gram", &anderson_gram, NoGil(), arg("g_ring"), arg("window"), arg("gram"), arg("rhs"), arg("S"),
             arg("B"), arg("D"), arg("m"), arg("head"), arg("count"), arg("threads"));
  module.def("anderson_solve", &anderson_solve, NoGil(), arg("gram"), arg("rhs"), arg("window"), arg("gamma"),
             arg("S"), arg("B"), arg("m"), arg("scope"), arg("ridge"), arg("ridge_absolute"), arg("implicit"),
             arg("threads"));
  module.def("anderson_mix", &anderson_mix, NoGil(), arg("f_ring"), arg("gamma"), arg("window"), arg("out"), arg("S"),
             arg("B"), arg("D"), arg("m"), arg("head"), arg("count"), arg("threads"));

  module.def("isa", [] { return kernels().name; }, "The instruction set in use; DEQKERN_ISA forces one.");
  module.def("isas", &isas, "The instruction sets that this build and this machine both have, best first.");
  module.def("cuda_compiled", [] { return kCudaCompiled; });
  module.def("cuda_device_count", &cuda_device_count, NoGil(), "Raises RuntimeError with CUDA's own words.");
#ifdef DEQKERN_CUDA
  module.def("cuda_anderson_solve", &cuda_anderson_solve, NoGil(), arg("gram"), arg("rhs"), arg("window"),
             arg("gamma"), arg("S"), arg("B"), arg("m"), arg("scope"), arg("ridge"), arg("ridge_absolute"),
             arg("implicit"), arg("device"), arg("stream"));
#endif
  module.def("build_info", &build_info, "Compiler, CUDA version (empty without CUDA, then cuda_reason says why).");
}
