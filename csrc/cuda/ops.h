// The ops that have a CUDA kernel, <name>.cu: deqkern._C has cuda_<name> for each, with the members of csrc/ops.h and
// then the device and the stream.
#pragma once
#include "anderson_solve.h"

// clang-format off
#define DEQKERN_CUDA_OPS(OP) \
  OP(anderson_solve, AndersonSolve)
// clang-format on
