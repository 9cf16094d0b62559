#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace deqkern {

#define DEQKERN_DECLARE(name, Struct, ...) void name(const Struct&);
#define DEQKERN_ADDRESS(name, Struct, ...) , name
#define DEQKERN_KERNELS_OF(ISA)                                   \
  namespace ISA {                                                 \
  DEQKERN_OPS(DEQKERN_DECLARE)                                    \
  static const Kernels all = {#ISA DEQKERN_OPS(DEQKERN_ADDRESS)}; \
  }

DEQKERN_KERNELS_OF(baseline)
#ifdef DEQKERN_X86
DEQKERN_KERNELS_OF(avx2)
DEQKERN_KERNELS_OF(avx512)
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
      list[count++] = &avx512::all;
    if (has_avx2) list[count++] = &avx2::all;
#endif
    list[count++] = &baseline::all;
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
    if (std::string(wanted) == available().list[j]->isa) return available().list[j];
    names += std::string(j ? ", " : "") + available().list[j]->isa;
  }
  throw std::runtime_error(std::string("DEQKERN_ISA=") + wanted + " is not available here; choose one of " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}

const char* available_isa(int place) { return place < available().count ? available().list[place]->isa : nullptr; }

}  // namespace deqkern
