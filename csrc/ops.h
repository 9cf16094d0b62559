// The one list of ops. Everything that is said of each of them follows from it: the table of kernels per instruction
// set, the functions of deqkern._C and, by the names alone, what CMake compiles.
//
// OP(name, struct, members): the members are what a call from Python fills, in the order of its arguments: the tensors,
// the sizes, the numbers; `threads` comes after them (csrc/bindings.cpp). Memory safety asks this of them:
//
//   TENSOR(x)                 an address; null only if a size is zero
//   OPTIONAL(x)               an address or null
//   TENSOR_IF(x, condition)   an address; null only if the condition does not hold
//   BANDS(x)                  a TENSOR of K + 1 integers from 0 to D, not decreasing
//   INDEX(x, length, bound)   a TENSOR of so many integers within 0 .. bound - 1
//   SIZE(x)                   not negative; if one is zero, nothing is done
//   BETWEEN(x, low, high)     within low .. high
//   NUMBER(x)                 any value
#pragma once
#include "anderson_gram.h"
#include "anderson_mix.h"
#include "anderson_solve.h"
#include "band_moments.h"
#include "dct2.h"
#include "ddim_scan.h"
#include "extrapolate_states.h"
#include "interpolate_outputs.h"
#include "secant_slope.h"
#include "update_convergence.h"

// clang-format off
#define DEQKERN_OPS(OP)                                                                                                \
  OP(dct2, Dct2, TENSOR(image), TENSOR(spectrum), INDEX(rows, op.N, op.R), TENSOR(dct_h), TENSOR(dct_w),               \
     OPTIONAL(colour), INDEX(order, op.C * op.H * op.W, op.C * op.H * op.W), TENSOR(place), SIZE(N), SIZE(C), SIZE(H), \
     SIZE(W), SIZE(R), NUMBER(inverse))                                                                                \
  OP(ddim_scan, DdimScan, TENSOR(x), TENSOR(e), OPTIONAL(z), TENSOR(a), TENSOR(b), OPTIONAL(c), TENSOR_IF(n, op.z),    \
     TENSOR(slope), BANDS(bands), TENSOR(window), TENSOR(f), TENSOR(g), TENSOR(norms), SIZE(S), SIZE(B), SIZE(D),      \
     SIZE(K), NUMBER(beta), NUMBER(implicit))                                                                          \
  OP(band_moments, BandMoments, TENSOR(dx), TENSOR(e), TENSOR(e_prev), BANDS(bands), TENSOR(window), TENSOR(moments),  \
     SIZE(S), SIZE(B), SIZE(D), SIZE(K))                                                                               \
  OP(secant_slope, SecantSlope, TENSOR(moments), TENSOR(low), TENSOR(high), TENSOR(slope), SIZE(S), SIZE(B), SIZE(K),  \
     NUMBER(prior_weight))                                                                                             \
  OP(interpolate_outputs, InterpolateOutputs, TENSOR(x), TENSOR(slope), BANDS(bands),                                  \
     INDEX(rows, 3 * op.N, op.S * op.B), TENSOR(path), TENSOR(e), SIZE(S), SIZE(B), SIZE(D), SIZE(K), SIZE(N))         \
  OP(extrapolate_states, ExtrapolateStates, TENSOR(x), TENSOR(last_change), TENSOR(e), OPTIONAL(z),                    \
     TENSOR(constant_x0), TENSOR_IF(n, op.z), TENSOR(previous_window), TENSOR(window), TENSOR(skip), SIZE(S), SIZE(B), \
     SIZE(D), NUMBER(beta), NUMBER(implicit))                                                                          \
  OP(anderson_gram, AndersonGram, TENSOR(g_ring), TENSOR(window), TENSOR(gram), TENSOR(rhs),                           \
     BETWEEN(m, 1, kMaxHistory), SIZE(S), SIZE(B), SIZE(D), BETWEEN(head, 0, op.m), BETWEEN(count, 0, op.m))           \
  OP(anderson_solve, AndersonSolve, TENSOR(gram), TENSOR(rhs), TENSOR(window), TENSOR(gamma), SIZE(S), SIZE(B),        \
     BETWEEN(m, 1, kMaxHistory), BETWEEN(scope, 0, scope::count - 1), NUMBER(ridge), NUMBER(ridge_absolute),           \
     NUMBER(implicit))                                                                                                 \
  OP(anderson_mix, AndersonMix, TENSOR(f_ring), TENSOR(gamma), TENSOR(window), TENSOR(out),                            \
     BETWEEN(m, 1, kMaxHistory), SIZE(S), SIZE(B), SIZE(D), BETWEEN(head, 0, op.m), BETWEEN(count, 0, op.m))           \
  OP(update_convergence, UpdateConvergence, TENSOR(norms), TENSOR(scale), OPTIONAL(first_interpolated),                \
     TENSOR(tolerance), TENSOR(convergence), TENSOR(window), TENSOR(diverged), SIZE(S), SIZE(B), NUMBER(rtol),         \
     NUMBER(best_contraction), NUMBER(growth), BETWEEN(window_size, 1, op.S), NUMBER(implicit))
// clang-format on
