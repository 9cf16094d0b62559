// Batched least squares, one small system per (step, sample):
//
//   gamma = argmin |g - dG gamma|^2 + (ridge mean(diag A) + ridge_absolute) |gamma|^2
//
// A and its right-hand side are the sums of gram and rhs over the scope of step i: the row alone, all steps up to i, or
// all steps. Rows with an entry that is not finite are left out. The mean is over the non-zero
// diagonal entries. A singular or indefinite system gives the minimum-norm answer of its well-determined part
// (eigenvalues above kSmallestEigenvalue of the largest). Rows outside the window get zero; so does whatever would
// not be finite, and the first active step unless the chain is implicit.
#pragma once
#include <cstdint>

#include "state.h"

namespace deqkern {

using Scope = scope::Place;

// Of the kernels of both devices: when a system is taken for singular, and how long its eigenvalues are looked for.
constexpr double kSmallestPivot = 1e-10;       // relative to the largest diagonal entry
constexpr double kSmallestEigenvalue = 1e-12;  // relative to the largest
constexpr int kSweeps = 40;

struct AndersonSolve {
  const double* gram;     // (S, B, m, m)
  const double* rhs;      // (S, B, m)
  const int64_t* window;  // (B, 2)
  float* gamma;           // (S, B, m), written
  int64_t S, B;
  int m;  // 1 <= m <= kMaxHistory
  Scope scope;
  double ridge, ridge_absolute;
  bool implicit;
  int threads;
};

}  // namespace deqkern
