#include <limits.h>

#include "anderson_solve.cuh"
#include "anderson_solve.h"
#include "check.h"

namespace deqkern {
namespace cuda {
namespace {

template <int M>
struct Launch {
  static void run(const AndersonSolve* op, cudaStream_t stream) {
    const int64_t count = blocks<M>(*op);
    if (count > INT_MAX) throw std::runtime_error("CUDA: anderson_solve has more steps than a grid has blocks");
    anderson_solve_kernel<M><<<static_cast<unsigned>(count), kThreads, 0, stream>>>(*op, unit_of(op->S));
    check(cudaGetLastError());
  }
};

}  // namespace

void anderson_solve(const AndersonSolve& op, int device, void* stream) {
  const OnDevice here(device);
  with_size<Launch>(op.m, &op, static_cast<cudaStream_t>(stream));
}

}  // namespace cuda
}  // namespace deqkern
