// Which build of the CPU kernels runs: the best one that this machine has, or the one DEQKERN_ISA names.
#pragma once
#include "../ops.h"

namespace deqkern {

#define DEQKERN_KERNEL(name, Struct, ...) void (*name)(const Struct&);
struct Kernels {
  const char* isa;
  DEQKERN_OPS(DEQKERN_KERNEL)
};
#undef DEQKERN_KERNEL

const Kernels& kernels();              // throws std::runtime_error when DEQKERN_ISA names one that is not available
const char* available_isa(int place);  // best first; null after the last

}  // namespace deqkern
