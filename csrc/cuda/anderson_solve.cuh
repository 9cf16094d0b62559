// The kernel itself. It uses nothing of CUDA but threadIdx, blockIdx, __shared__, __syncthreads, __ballot_sync,
// __shfl_sync and __shfl_xor_sync, so that the tests can run it lane by lane without a GPU.
//
// A group of 8 or 16 lanes holds one system in registers: lane p its column p, which by symmetry is its row p, and the
// right-hand side's entry p. No array is indexed by a variable and all lanes of a warp take the same branches; a lane
// that has nothing to do computes something that is not used.
//
// A block does kGroups consecutive steps of one sample, in the order of the sum. What lies before them is summed again
// by every block: cheaper than to wait for another block, and always in the same order.
#pragma once
#include <float.h>
#include <math.h>

#include "../anderson_solve.h"

namespace deqkern {
namespace cuda {

constexpr int kThreads = 256;
constexpr unsigned kWarp = 0xffffffffu;
constexpr double kOrthogonal = 1e-15;  // cosine of two columns

// M: the longest history that it holds.
template <int M>
struct Layout {
  static constexpr int kLanes = M <= 8 ? 8 : 16;  // per system
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kEntries = M * (M + 1);   // the matrix row by row, then the right-hand side
  static constexpr int kAhead = M <= 8 ? 4 : 2;  // rows that are read before the first is added
};

// What one lane holds.
template <int M>
struct Column {
  double matrix[M];
  double right;
};

__device__ inline bool finite(double value) { return fabs(value) <= DBL_MAX; }
__device__ inline int64_t within(int64_t step, int64_t S) { return step < 0 ? 0 : step < S ? step : S; }

template <int kLanes>
__device__ inline double group_sum(double value) {
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWarp, value, step, kLanes);
  return value;
}

template <int kLanes>
__device__ inline double group_max(double value) {
  for (int step = kLanes / 2; step > 0; step /= 2) value = fmax(value, __shfl_xor_sync(kWarp, value, step, kLanes));
  return value;
}

template <int kLanes>
__device__ inline bool group_all(bool holds) {
  const unsigned group = (threadIdx.x % 32) / kLanes * kLanes;
  return (__ballot_sync(kWarp, !holds) >> group & ((1u << kLanes) - 1u)) == 0u;
}

// e with 2^(e-1) <= value < 2^e, so that value 2^-e is below 1; not so small that 2^-e would overflow.
__device__ inline int exponent_of(double value) {
  const int exponent = value > 0.0 ? ilogb(value) + 1 : 0;
  return exponent < -1000 ? -1000 : exponent;
}

// The lane's part of one row of gram and rhs.
template <int M>
__device__ inline void load(const AndersonSolve& op, int64_t row, int lane, bool exists, Column<M>& column) {
  const int m = op.m;
  const bool mine = exists && lane < m;
  const double* gram = op.gram + row * m * m + lane;
#pragma unroll
  for (int k = 0; k < M; ++k) column.matrix[k] = mine && k < m ? gram[k * m] : 0.0;
  column.right = mine ? op.rhs[row * m + lane] : 0.0;
}

// Multiplies it by `factor`, or by zero when any lane's part is not finite.
template <int M>
__device__ inline void leave_out_if_not_finite(Column<M>& column, double factor) {
  bool all = finite(column.right);
#pragma unroll
  for (int k = 0; k < M; ++k) all = all && finite(column.matrix[k]);
  all = group_all<Layout<M>::kLanes>(all);
#pragma unroll
  for (int k = 0; k < M; ++k) column.matrix[k] = all ? factor * column.matrix[k] : 0.0;
  column.right = all ? factor * column.right : 0.0;
}

template <int M>
__device__ inline void put(double* shared, int lane, const Column<M>& column) {  // shared (M+1, M)
  if (lane >= M) return;
#pragma unroll
  for (int k = 0; k < M; ++k) shared[k * M + lane] = column.matrix[k];
  shared[M * M + lane] = column.right;
}

template <int M>
__device__ inline void get(const double* shared, int lane, Column<M>& column) {
  const bool mine = lane < M;
#pragma unroll
  for (int k = 0; k < M; ++k) column.matrix[k] = mine ? shared[k * M + lane] : 0.0;
  column.right = mine ? shared[M * M + lane] : 0.0;
}

// L D L^T. Every lane's right becomes its entry of the answer; false when a pivot is too small.
template <int M>
__device__ inline bool eliminate(Column<M> column, int lane, double largest, double& answer) {
  constexpr int kLanes = Layout<M>::kLanes;
  bool good = true;
  double inverse_of_mine = 0.0;
#pragma unroll
  for (int p = 0; p < M; ++p) {
    const double pivot = __shfl_sync(kWarp, column.matrix[p], p, kLanes);
    good = good && pivot > kSmallestPivot * largest;
    const double inverse = 1.0 / pivot;
    if (lane == p) inverse_of_mine = inverse;
    const double factor = lane > p ? column.matrix[p] * inverse : 0.0;
#pragma unroll
    for (int k = p + 1; k < M; ++k) column.matrix[k] -= __shfl_sync(kWarp, column.matrix[k], p, kLanes) * factor;
    column.right -= __shfl_sync(kWarp, column.right, p, kLanes) * factor;
  }
#pragma unroll
  for (int p = M - 1; p > 0; --p) {
    const double known = __shfl_sync(kWarp, column.right * inverse_of_mine, p, kLanes);
    if (lane < p) column.right -= column.matrix[p] * known;
  }
  answer = column.right * inverse_of_mine;
  return good;
}

// The minimum-norm answer over the eigenvalues that are large enough. One-sided Jacobi: with A scaled so that all its
// eigenvalues are within -1 .. 1, the columns of A + 1 are rotated in pairs until they are orthogonal; then they are
// the eigenvectors, as long as the eigenvalues of A + 1. In turn s lane p meets lane p xor s: a sweep holds every pair
// once.
template <int M>
__device__ inline double minimum_norm(const Column<M>& column, int lane, bool used) {
  constexpr int kLanes = Layout<M>::kLanes;
  double bound = 0.0;
#pragma unroll
  for (int k = 0; k < M; ++k) bound += fabs(column.matrix[k]);
  bound = group_max<kLanes>(bound);
  const int exponent = exponent_of(bound);
  const double factor = ldexp(1.0, -exponent);
  double w[M];
#pragma unroll
  for (int k = 0; k < M; ++k) w[k] = factor * column.matrix[k] + (k == lane ? 1.0 : 0.0);
  bool rotated = true;
  for (int sweep = 0; sweep < kSweeps && rotated; ++sweep) {
    rotated = false;
    for (int turn = 1; turn < kLanes; ++turn) {
      double other[M], mine = 0.0, theirs = 0.0, cross = 0.0;
#pragma unroll
      for (int k = 0; k < M; ++k) {
        other[k] = __shfl_xor_sync(kWarp, w[k], turn, kLanes);
        mine += w[k] * w[k];
        theirs += other[k] * other[k];
        cross += w[k] * other[k];
      }
      const bool turns = fabs(cross) > kOrthogonal * sqrt(mine * theirs);
      const double theta = (theirs - mine) / (2.0 * cross);
      const bool negative = theta < 0.0 || (theta == 0.0 && (lane & turn & -turn) != 0);  // the two lanes differ
      const double t = (negative ? -1.0 : 1.0) / (fabs(theta) + sqrt(theta * theta + 1.0));
      const double cosine = turns ? 1.0 / sqrt(t * t + 1.0) : 1.0, sine = turns ? t * cosine : 0.0;
#pragma unroll
      for (int k = 0; k < M; ++k) w[k] = cosine * w[k] - sine * other[k];
      rotated = rotated || turns;
    }
    rotated = __ballot_sync(kWarp, rotated) != 0u;
  }
  double length = 0.0;
#pragma unroll
  for (int k = 0; k < M; ++k) length += w[k] * w[k];
  length = sqrt(length);
  const double value = used ? length - 1.0 : 0.0;
  const bool kept = value > kSmallestEigenvalue * group_max<kLanes>(fabs(value));
  double weight = 0.0;
#pragma unroll
  for (int k = 0; k < M; ++k) weight += w[k] * __shfl_sync(kWarp, column.right, k, kLanes);
  weight = kept ? weight / (length * length) / value * factor : 0.0;
  double answer = 0.0;
#pragma unroll
  for (int k = 0; k < M; ++k) {
    const double entry = group_sum<kLanes>(w[k] * weight);
    if (lane == k) answer = entry;
  }
  return answer;
}

// The lane's entry of gamma; the sums come in the unit 2^unit. Every system is scaled by its own power of two.
template <int M>
__device__ inline float solve(Column<M> column, int lane, const AndersonSolve& op, int unit) {
  constexpr int kLanes = Layout<M>::kLanes;
  double largest = fabs(column.right);
#pragma unroll
  for (int k = 0; k < M; ++k) largest = fmax(largest, fabs(column.matrix[k]));
  const bool used = largest > 0.0;  // ages that do not exist yet leave columns of zeros
  const int exponent = exponent_of(group_max<kLanes>(largest));
  const double factor = ldexp(1.0, -exponent);
  double diagonal = 0.0;
#pragma unroll
  for (int k = 0; k < M; ++k) {
    column.matrix[k] *= factor;
    if (k == lane) diagonal = column.matrix[k];
  }
  column.right *= factor;
  const double trace = group_sum<kLanes>(diagonal);
  const double diagonals = group_sum<kLanes>(diagonal != 0.0 ? 1.0 : 0.0);
  double shift = op.ridge * trace / (diagonals > 0.0 ? diagonals : 1.0) + ldexp(op.ridge_absolute, -exponent - unit);
  const bool solvable = finite(shift);
  if (!solvable) shift = 0.0;
  largest = group_max<kLanes>(used ? diagonal + shift : 0.0);
#pragma unroll
  for (int k = 0; k < M; ++k)
    if (k == lane) column.matrix[k] = used ? column.matrix[k] + shift : largest;
  double answer;
  const bool good = eliminate(column, lane, largest, answer);
  if (__ballot_sync(kWarp, !good) != 0u) {
    const double other = minimum_norm(column, lane, used);
    if (!good) answer = other;
  }
  return solvable && fabs(answer) <= FLT_MAX ? static_cast<float>(answer) : 0.0f;
}

// Blocks b, b + B, ... do sample b. A sum of S terms in the unit 2^unit, 2^unit >= S, cannot overflow.
template <int M>
__global__ void __launch_bounds__(kThreads, 2) anderson_solve_kernel(AndersonSolve op, int unit) {
  using Shape = Layout<M>;
  constexpr int kLanes = Shape::kLanes, kGroups = Shape::kGroups, kEntries = Shape::kEntries;
  __shared__ double rows[kGroups][kEntries];
  __shared__ double base[kEntries];
  const int thread = threadIdx.x, lane = thread % kLanes, group = thread / kLanes;
  const int64_t b = blockIdx.x % op.B, start = blockIdx.x / op.B * kGroups;
  const int64_t begin = within(op.window[2 * b], op.S), end = within(op.window[2 * b + 1], op.S);
  const int64_t first = op.implicit ? begin : begin + 1;  // the first step that mixes
  const int64_t length = end > begin ? end - begin : 0;
  const bool joint = op.scope == Scope::joint;
  const double factor = op.scope == Scope::row ? 1.0 : ldexp(1.0, -unit);
  unit = op.scope == Scope::row ? 0 : unit;
  const auto row_of = [&](int64_t place) { return (begin + place) * op.B + b; };

  const int64_t stop = joint ? op.S : start + kGroups;  // with the scope `joint` one block does the sample
  for (int64_t i = start + group; i < stop; i += kGroups)
    if (lane < op.m && i < op.S && (i < first || i >= end)) op.gamma[(i * op.B + b) * op.m + lane] = 0.0f;
  if (start >= length) return;

  Column<M> column;
  if (op.scope != Scope::row) {
    const int64_t before = joint ? length : start;
    Column<M> sum = {};
    for (int64_t place = 0; place < before; place += Shape::kAhead * kGroups) {
      Column<M> next[Shape::kAhead];
#pragma unroll
      for (int j = 0; j < Shape::kAhead; ++j) {
        const int64_t mine = place + j * kGroups + group;
        load(op, row_of(mine < before ? mine : 0), lane, mine < before, next[j]);
      }
#pragma unroll
      for (int j = 0; j < Shape::kAhead; ++j) {
        leave_out_if_not_finite(next[j], factor);
#pragma unroll
        for (int k = 0; k < M; ++k) sum.matrix[k] += next[j].matrix[k];
        sum.right += next[j].right;
      }
    }
    put(rows[group], lane, sum);
    __syncthreads();
    for (int entry = thread; entry < kEntries; entry += kThreads) {
      double total = 0.0;
#pragma unroll 8
      for (int g = 0; g < kGroups; ++g) total += rows[g][entry];
      base[entry] = total;
    }
    __syncthreads();
  }
  const int64_t place = start + group;
  if (joint) {
    get(base, lane, column);
  } else {
    load(op, row_of(place < length ? place : 0), lane, place < length, column);
    leave_out_if_not_finite(column, factor);
  }
  if (op.scope == Scope::causal) {
    put(rows[group], lane, column);
    __syncthreads();
    for (int entry = thread; entry < kEntries; entry += kThreads) {
      double total = base[entry];
#pragma unroll 8
      for (int g = 0; g < kGroups; ++g) {
        total += rows[g][entry];
        rows[g][entry] = total;
      }
    }
    __syncthreads();
    get(rows[group], lane, column);
  }
  const float gamma = solve(column, lane, op, unit);
  for (int64_t at = place; at < (joint ? length : start + kGroups); at += kGroups) {
    const int64_t row = row_of(at);
    if (lane < op.m && at < length && row >= first * op.B) op.gamma[row * op.m + lane] = gamma;
  }
}

// Run<M>::run(arguments...) with the smallest M that holds m, 1 <= m <= 16.
template <template <int> class Run, class... Arguments>
void with_size(int m, Arguments... arguments) {
  switch (m) {
    case 1: return Run<1>::run(arguments...);
    case 2: return Run<2>::run(arguments...);
    case 3: return Run<3>::run(arguments...);
    case 4: return Run<4>::run(arguments...);
    case 5: return Run<5>::run(arguments...);
    case 6: return Run<6>::run(arguments...);
    case 7: return Run<7>::run(arguments...);
    case 8: return Run<8>::run(arguments...);
    default: return m <= 12 ? Run<12>::run(arguments...) : Run<16>::run(arguments...);
  }
}

template <int M>
int64_t blocks(const AndersonSolve& op) {
  constexpr int kGroups = Layout<M>::kGroups;
  return op.scope == Scope::joint ? op.B : op.B * ((op.S + kGroups - 1) / kGroups);
}

inline int unit_of(int64_t S) {
  int unit = 0;
  while ((int64_t{1} << unit) < S) ++unit;
  return unit;
}

}  // namespace cuda
}  // namespace deqkern
