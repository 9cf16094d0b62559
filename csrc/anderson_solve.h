// Batched least squares, one small system per (step, sample):
//
//   gamma = argmin |g - dG gamma|^2 + (ridge mean(diag A) + ridge_absolute) |gamma|^2
//
// A and its right-hand side are the sums of gram and rhs over the scope of step i: the row alone, all steps up to i,
// all steps from i on, or all steps. Rows with an entry that is not finite are left out. The mean is over the non-zero
// diagonal entries. A singular or indefinite system gives the minimum-norm answer of its well-determined part
// (eigenvalues above 1e-12 of the largest). Rows outside the window get zero; so does whatever would
// not be finite, and the first active step unless the chain is implicit.
#pragma once
#include <cstdint>

namespace deqkern {

enum class Scope : int { row = 0, causal = 1, anticausal = 2, joint = 3 };

struct AndersonSolve {
  const double* gram;     // (S, B, m, m)
  const double* rhs;      // (S, B, m)
  const int64_t* window;  // (B, 2)
  float* gamma;           // (S, B, m), written
  int64_t S, B;
  int m;                  // 0 <= m <= 16
  Scope scope;
  double ridge, ridge_absolute;
  bool implicit;
  int threads;
};

}  // namespace deqkern
