// Residual, scan over all steps with one slope per band, update and squared norms, in one pass over memory.
//
//   p[i] = a[i] x[i] + b[i] e[i] + c[i] e[i-1] + n[i] z[i]                      r[i+1] = p[i] - x[i+1]
//   g[i+1] = (a[i] + b[i] slope[i]) g[i] + c[i] slope[i-1] g[i-1] + r[i+1],     g[begin] = g[begin-1] = 0
//   f[i+1] = x[i+1] + beta g[i+1],                                              f[begin+1] = p[begin]
//   norms[i] = |r[i+1]|^2, |g[i+1]|^2, |x[i+1]|^2                               (zero outside the window)
//
// With c, e[begin-1] is read, outside the window; c[0] is not.
//
// implicit: e[i] is the model's output at x[i+1], so that
//
//   g[i+1] = (a[i] g[i] + r[i+1]) / (1 - b[i] slope[i]),        f[i+1] = x[i+1] + beta g[i+1] everywhere
//
// Index i of f, g and norms belongs to state i+1. Rows of f and g outside the window are not written.
#pragma once
#include <cstdint>

#include "state.h"

namespace deqkern {

struct DdimScan {
  const float* x;         // (S+1, B, D)
  const float* e;         // (S, B, D)
  const float* z;         // (S, B, D) or null
  const float* a;         // (S,)
  const float* b;         // (S,)
  const float* c;         // (S,) or null; not read if implicit
  const float* n;         // (S,), not read when z is null
  const float* slope;     // (S, B, K)
  const int64_t* bands;   // (K+1,), from 0 to D, not decreasing
  const int64_t* window;  // (B, 2)
  float* f;               // (S, B, D), written; either disjoint from x or exactly x[1:]
  float* g;               // (S, B, D), written
  double* norms;          // (S, B, norm::count), written
  int64_t S, B, D, K;
  float beta;
  bool implicit;
  int threads;
};

}  // namespace deqkern
