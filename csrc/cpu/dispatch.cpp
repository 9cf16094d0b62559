#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace deqkern {

#define DEQKERN_DECLARE(ISA)                   \
  namespace ISA {                              \
  void dct2(const Dct2&);                      \
  void ddim_scan(const DdimScan&);             \
  void band_moments(const BandMoments&);       \
  void secant_slope(const SecantSlope&);       \
  void interpolate_outputs(const InterpolateOutputs&);             \
  void extrapolate_states(const ExtrapolateStates&);                  \
  void anderson_gram(const AndersonGram&);     \
  void anderson_solve(const AndersonSolve&);   \
  void anderson_mix(const AndersonMix&);       \
  void update_convergence(const UpdateConvergence&);              \
  }                                            \
  static const Kernels ISA##_kernels = {#ISA,                \
                                        ISA::dct2,           \
                                        ISA::ddim_scan,      \
                                        ISA::band_moments,   \
                                        ISA::secant_slope,   \
                                        ISA::interpolate_outputs,      \
                                        ISA::extrapolate_states,         \
                                        ISA::anderson_gram,  \
                                        ISA::anderson_solve, \
                                        ISA::anderson_mix,   \
                                        ISA::update_convergence};

DEQKERN_DECLARE(baseline)
#ifdef DEQKERN_X86
DEQKERN_DECLARE(avx2)
DEQKERN_DECLARE(avx512)
#endif

namespace {

struct Available {
  const Kernels* list[4] = {};
  int count = 0;

  Available() {
#ifdef DEQKERN_X86
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      list[count++] = &avx512_kernels;
    if (has_avx2) list[count++] = &avx2_kernels;
#endif
    list[count++] = &baseline_kernels;
  }
};

const Available& available() {
  static const Available found;
  return found;
}

const Kernels* choose() {
  const char* wanted = std::getenv("DEQKERN_ISA");
  if (wanted == nullptr || *wanted == '\0') return available().list[0];
  std::string names;
  for (int j = 0; j < available().count; ++j) {
    if (std::string(wanted) == available().list[j]->name) return available().list[j];
    names += std::string(j ? ", " : "") + available().list[j]->name;
  }
  throw std::runtime_error(std::string("DEQKERN_ISA=") + wanted + " is not available here; choose one of " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}

const char* available_isa(int place) { return place < available().count ? available().list[place]->name : nullptr; }

}  // namespace deqkern
