// In float64, one sample after the other: the sums over a scope run along the steps. A system is solved by Cholesky;
// a pivot that is too small for that (singular or indefinite) sends it to a Jacobi eigen-decomposition.
#include "../anderson_solve.h"

#include <float.h>
#include <math.h>

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {
namespace {

DEQKERN_INLINE double magnitude(double value) { return __builtin_fabs(value); }
DEQKERN_INLINE bool finite(double value) { return magnitude(value) <= DBL_MAX; }

struct System {
  double matrix[kMaxHistory][kMaxHistory];
  double right[kMaxHistory];
};

// In place: the lower triangle becomes L, right becomes the answer. False when a pivot is too small.
bool solve_cholesky(System& system, int size) {
  auto& a = system.matrix;
  double largest = 0.0;
  for (int p = 0; p < size; ++p) largest = a[p][p] > largest ? a[p][p] : largest;
  for (int p = 0; p < size; ++p) {
    double pivot = a[p][p];
    for (int k = 0; k < p; ++k) pivot -= a[p][k] * a[p][k];
    if (!(pivot > kSmallestPivot * largest)) return false;
    const double inverse = 1.0 / sqrt(pivot);
    a[p][p] = inverse;
    for (int q = p + 1; q < size; ++q) {
      double entry = a[q][p];
      for (int k = 0; k < p; ++k) entry -= a[q][k] * a[p][k];
      a[q][p] = entry * inverse;
    }
  }
  double* y = system.right;
  for (int p = 0; p < size; ++p) {
    for (int k = 0; k < p; ++k) y[p] -= a[p][k] * y[k];
    y[p] *= a[p][p];
  }
  for (int p = size - 1; p >= 0; --p) {
    for (int k = p + 1; k < size; ++k) y[p] -= a[k][p] * y[k];
    y[p] *= a[p][p];
  }
  return true;
}

// One Jacobi rotation of the plane (p, q); it makes a[p][q] zero.
void rotate(double (&a)[kMaxHistory][kMaxHistory], double (&vectors)[kMaxHistory][kMaxHistory], int size, int p,
            int q) {
  const double theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
  const double t = (theta < 0.0 ? -1.0 : 1.0) / (magnitude(theta) + sqrt(theta * theta + 1.0));
  const double c = 1.0 / sqrt(t * t + 1.0), s = t * c;
  for (int k = 0; k < size; ++k) {
    const double kp = a[k][p], kq = a[k][q];
    a[k][p] = c * kp - s * kq;
    a[k][q] = s * kp + c * kq;
  }
  for (int k = 0; k < size; ++k) {
    const double pk = a[p][k], qk = a[q][k];
    a[p][k] = c * pk - s * qk;
    a[q][k] = s * pk + c * qk;
    const double vp = vectors[k][p], vq = vectors[k][q];
    vectors[k][p] = c * vp - s * vq;
    vectors[k][q] = s * vp + c * vq;
  }
  a[p][q] = a[q][p] = 0.0;
}

// right becomes the minimum-norm answer over the eigenvalues that are large enough.
void solve_jacobi(System& system, int size) {
  auto& a = system.matrix;
  double vectors[kMaxHistory][kMaxHistory] = {};
  double norm = 0.0;
  for (int p = 0; p < size; ++p) {
    vectors[p][p] = 1.0;
    for (int q = 0; q < size; ++q) norm += a[p][q] * a[p][q];
  }
  const double negligible = 1e-17 * sqrt(norm);
  bool rotated = true;
  for (int sweep = 0; sweep < kSweeps && rotated; ++sweep) {
    rotated = false;
    for (int p = 0; p < size - 1; ++p)
      for (int q = p + 1; q < size; ++q)
        if (magnitude(a[p][q]) > negligible) {
          rotate(a, vectors, size, p, q);
          rotated = true;
        }
  }
  double largest = 0.0;
  for (int p = 0; p < size; ++p) largest = magnitude(a[p][p]) > largest ? magnitude(a[p][p]) : largest;
  double answer[kMaxHistory] = {};
  for (int p = 0; p < size; ++p) {
    if (!(a[p][p] > kSmallestEigenvalue * largest)) continue;
    double weight = 0.0;
    for (int k = 0; k < size; ++k) weight += vectors[k][p] * system.right[k];
    for (int k = 0; k < size; ++k) answer[k] += vectors[k][p] * (weight / a[p][p]);
  }
  for (int k = 0; k < size; ++k) system.right[k] = answer[k];
}

// gamma of the sums `matrix` (m, m) and `right` (m).
void solve_system(const double* matrix, const double* right, int m, double ridge, double absolute, float* gamma) {
  int place[kMaxHistory], size = 0, diagonals = 0;
  double trace = 0.0;
  for (int p = 0; p < m; ++p) {
    bool used = right[p] != 0.0;
    for (int q = 0; q < m; ++q) used = used || matrix[p * m + q] != 0.0;
    if (used) place[size++] = p;  // ages that do not exist yet leave rows of zeros
    if (matrix[p * m + p] != 0.0) ++diagonals;
    trace += matrix[p * m + p];
    gamma[p] = 0.0f;
  }
  const double shift = ridge * trace / (diagonals > 0 ? diagonals : 1) + absolute;
  System system;
  const auto fill = [&] {
    for (int p = 0; p < size; ++p) {
      for (int q = 0; q < size; ++q) system.matrix[p][q] = matrix[place[p] * m + place[q]] + (p == q ? shift : 0.0);
      system.right[p] = right[place[p]];
    }
  };
  fill();
  if (!solve_cholesky(system, size)) {
    fill();
    solve_jacobi(system, size);
  }
  for (int p = 0; p < size; ++p)
    if (magnitude(system.right[p]) <= FLT_MAX) gamma[place[p]] = static_cast<float>(system.right[p]);
}

// The entries of one sample's gram and rhs are multiplied by a power of two, so that no sum or product overflows.
struct Scale {
  double factor;
  double absolute;  // the absolute ridge in the same unit
};

bool row_is_finite(const AndersonSolve& op, int64_t row) {
  const int64_t square = int64_t{op.m} * op.m;
  for (int64_t j = 0; j < square; ++j)
    if (!finite(op.gram[row * square + j])) return false;
  for (int j = 0; j < op.m; ++j)
    if (!finite(op.rhs[row * op.m + j])) return false;
  return true;
}

Scale scale_of(const AndersonSolve& op, int64_t b, Window window) {
  double largest = 0.0;
  const int64_t square = int64_t{op.m} * op.m;
  for (int64_t i = window.begin; i < window.end; ++i) {
    const int64_t row = i * op.B + b;
    if (!row_is_finite(op, row)) continue;
    for (int64_t j = 0; j < square; ++j) {
      const double entry = magnitude(op.gram[row * square + j]);
      largest = entry > largest ? entry : largest;
    }
    for (int j = 0; j < op.m; ++j) {
      const double entry = magnitude(op.rhs[row * op.m + j]);
      largest = entry > largest ? entry : largest;
    }
  }
  int exponent = 0;
  if (largest > 0.0) frexp(largest, &exponent);
  if (exponent < -1000) exponent = -1000;  // 2^1000 is finite
  return {ldexp(1.0, -exponent), ldexp(op.ridge_absolute, -exponent)};
}

void add_row(const AndersonSolve& op, int64_t row, double factor, double* matrix, double* right) {
  if (!row_is_finite(op, row)) return;
  const int64_t square = int64_t{op.m} * op.m;
  for (int64_t j = 0; j < square; ++j) matrix[j] += factor * op.gram[row * square + j];
  for (int j = 0; j < op.m; ++j) right[j] += factor * op.rhs[row * op.m + j];
}

void solve_sample(const AndersonSolve& op, int64_t b) {
  const int m = op.m;
  const Window window = window_of(op.window, b, op.S);
  const int64_t first = op.implicit ? window.begin : window.begin + 1;  // the first step that mixes
  for (int64_t i = 0; i < op.S; ++i)
    if (i < first || i >= window.end)
      for (int j = 0; j < m; ++j) op.gamma[(i * op.B + b) * m + j] = 0.0f;
  if (first >= window.end) return;
  const Scale scale = scale_of(op, b, window);
  double matrix[kMaxHistory * kMaxHistory] = {}, right[kMaxHistory] = {};
  if (op.scope == Scope::joint)
    for (int64_t i = window.begin; i < window.end; ++i) add_row(op, i * op.B + b, scale.factor, matrix, right);
  for (int64_t t = 0; t < window.end - window.begin; ++t) {
    const int64_t i = window.begin + t;
    const int64_t row = i * op.B + b;
    if (op.scope == Scope::row) {
      for (double& entry : matrix) entry = 0.0;
      for (double& entry : right) entry = 0.0;
    }
    if (op.scope != Scope::joint) add_row(op, row, scale.factor, matrix, right);
    if (i < first) continue;
    float* gamma = op.gamma + row * m;
    if (op.scope == Scope::joint && i > first)
      for (int j = 0; j < m; ++j) gamma[j] = op.gamma[(first * op.B + b) * m + j];
    else
      solve_system(matrix, right, m, op.ridge, scale.absolute, gamma);
  }
}

}  // namespace

void anderson_solve(const AndersonSolve& op) {
  const int team = team_size(op.threads, op.B, op.S * op.B * op.m * op.m * op.m);
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
  for (int64_t b = 0; b < op.B; ++b) solve_sample(op, b);
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
