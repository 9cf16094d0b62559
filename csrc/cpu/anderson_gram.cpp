// One pass over count + 1 corrections; a task is a segment of one row. The differences are formed in registers, the
// products summed in float lanes over a block and in double over blocks and segments, in order.
#include "../anderson_gram.h"

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {
namespace {

constexpr int64_t kSegment = 4096;
constexpr int64_t kBlock = 1024;  // floats that are summed before going to double
constexpr int64_t kAhead = 512;   // floats
constexpr int kGroup = 5;         // ages taken together: 2 * 5 sums and 4 operands fit in 16 registers

// totals[j] += <dG_0, dG_j>, totals[count + j] += <dG_j, g> for the kAges ages from `ages` on.
template <int kAges, bool kWhole>
DEQKERN_INLINE void multiply(const float* const* newest, const float* const* ages, int64_t d, int lanes, vec* sums) {
  const vec g = load_lanes<kWhole>(newest[0] + d, lanes);
  const vec first = g - load_lanes<kWhole>(newest[1] + d, lanes);
  prefetch<false>(ages[0] + d + kAhead);
  vec newer = load_lanes<kWhole>(ages[0] + d, lanes);
#pragma GCC unroll 8
  for (int j = 0; j < kAges; ++j) {
    prefetch<false>(ages[j + 1] + d + kAhead);
    const vec older = load_lanes<kWhole>(ages[j + 1] + d, lanes);
    const vec difference = newer - older;
    sums[j] += first * difference;
    sums[kAges + j] += g * difference;
    newer = older;
  }
}

template <int kAges>
void add_products(const float* const* newest, const float* const* ages, int64_t begin, int64_t end, double* row,
                  double* right) {
  vec sums[2 * kAges] = {};
  int64_t d = begin;
  for (; d + kLanes <= end; d += kLanes) multiply<kAges, true>(newest, ages, d, 0, sums);
  if (d < end) multiply<kAges, false>(newest, ages, d, static_cast<int>(end - d), sums);
  for (int j = 0; j < kAges; ++j) {
    row[j] += lane_sum(sums[j]);
    right[j] += lane_sum(sums[kAges + j]);
  }
}

// partial[j] = <dG_0, dG_j>, partial[count + j] = <dG_j, g> over one segment.
void segment_products(const float* const* ages, int count, int64_t length, double* partial) {
  for (int j = 0; j < 2 * count; ++j) partial[j] = 0.0;
  const int64_t block = count > kGroup ? kBlock / 2 : kBlock;  // several groups read a block again: it stays cached
  for (int64_t begin = 0; begin < length; begin += block) {
    const int64_t end = smaller(begin + block, length);
    for (int j = 0; j < count; j += kGroup) {
      double *row = partial + j, *right = partial + count + j;
      switch (smaller(count - j, kGroup)) {
        case 1: add_products<1>(ages, ages + j, begin, end, row, right); break;
        case 2: add_products<2>(ages, ages + j, begin, end, row, right); break;
        case 3: add_products<3>(ages, ages + j, begin, end, row, right); break;
        case 4: add_products<4>(ages, ages + j, begin, end, row, right); break;
        default: add_products<kGroup>(ages, ages + j, begin, end, row, right);
      }
    }
  }
}

void update_row(const AndersonGram& op, int64_t row, bool active, const double* partial, int64_t segments) {
  const int m = op.m, count = op.count;
  double *gram = op.gram + row * m * m, *rhs = op.rhs + row * m;
  double sums[2 * kMaxHistory] = {};
  if (active)
    for (int64_t segment = 0; segment < segments; ++segment)
      for (int j = 0; j < 2 * count; ++j) sums[j] += partial[segment * 2 * count + j];
  for (int p = m - 1; p > 0; --p)
    for (int q = m - 1; q > 0; --q)
      gram[p * m + q] = active && p < count && q < count ? gram[(p - 1) * m + q - 1] : 0.0;
  for (int j = 0; j < m; ++j) {
    gram[j] = gram[j * m] = j < count ? sums[j] : 0.0;
    rhs[j] = j < count ? sums[count + j] : 0.0;
  }
}

}  // namespace

void anderson_gram(const AndersonGram& op) {
  const int64_t rows = op.S * op.B, segments = ceil_div(op.D, kSegment), tasks = rows * segments;
  const int size = op.m + 1, count = op.count;
  double* partial = static_cast<double*>(scratch(static_cast<size_t>(tasks * 2 * count) * sizeof(double)));
  const int team = team_size(op.threads, tasks, (count + 1) * rows * op.D);
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t row = task / segments, begin = task % segments * kSegment, i = row / op.B;
      const Window window = window_of(op.window, row % op.B, op.S);
      if (i < window.begin || i >= window.end) continue;
      const float* ages[kMaxHistory + 1];
      for (int j = 0; j <= count; ++j) ages[j] = op.g_ring + ((op.head - j + size) % size * rows + row) * op.D + begin;
      segment_products(ages, count, smaller(kSegment, op.D - begin), partial + task * 2 * count);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t i = row / op.B;
      const Window window = window_of(op.window, row % op.B, op.S);
      update_row(op, row, i >= window.begin && i < window.end, partial + row * segments * 2 * count, segments);
    }
  }
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
