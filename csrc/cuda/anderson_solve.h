// The CUDA kernel of csrc/anderson_solve.h: one launch, no allocation and no wait, so a graph can capture it.
#pragma once
#include "../anderson_solve.h"

namespace deqkern {
namespace cuda {

// The pointers are of `device`; `stream` is a cudaStream_t of it; op.threads is not used.
// Throws std::runtime_error with CUDA's own words.
void anderson_solve(const AndersonSolve& op, int device, void* stream);

}  // namespace cuda
}  // namespace deqkern
