// One pass over three arrays; a task is a segment of one row and sums each band that it meets, in order.
#include "../band_moments.h"

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {
namespace {

constexpr int64_t kSegment = 16384;
constexpr int64_t kAhead = 512;   // floats
constexpr int64_t kBlock = 1024;  // floats that are summed before going to double

struct Sums {
  vec product{}, square{};
};

template <bool kWhole>
DEQKERN_INLINE void multiply(const float* dx, const float* e, const float* e_prev, int64_t d, int lanes, Sums& sums) {
  prefetch<false>(dx + d + kAhead);
  prefetch<false>(e + d + kAhead);
  prefetch<false>(e_prev + d + kAhead);
  const vec change = load_lanes<kWhole>(dx + d, lanes);
  const vec slope = load_lanes<kWhole>(e + d, lanes) - load_lanes<kWhole>(e_prev + d, lanes);
  sums.product += change * slope;
  sums.square += change * change;
}

void add_band(const float* dx, const float* e, const float* e_prev, int64_t begin, int64_t end, double* moments) {
  for (int64_t d = begin; d < end;) {
    const int64_t stop = smaller(d + kBlock, end);
    Sums sums;
    for (; d + kLanes <= stop; d += kLanes) multiply<true>(dx, e, e_prev, d, 0, sums);
    if (d < stop) multiply<false>(dx, e, e_prev, d, static_cast<int>(stop - d), sums);
    d = stop;
    moments[moment::cross] += lane_sum(sums.product);
    moments[moment::square] += lane_sum(sums.square);
  }
}

}  // namespace

void band_moments(const BandMoments& op) {
  const int64_t rows = op.S * op.B, segments = ceil_div(op.D, kSegment), tasks = rows * segments;
  const int64_t width = moment::count * op.K;
  double* partial = op.moments;  // (rows, segments, K, 2); with one segment it is the answer itself
  if (segments > 1) partial = static_cast<double*>(scratch(static_cast<size_t>(tasks * width) * sizeof(double)));
  const int team = team_size(op.threads, tasks, 3 * rows * op.D);
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      double* moments = partial + task * width;
      for (int64_t j = 0; j < width; ++j) moments[j] = 0.0;
      const int64_t row = task / segments, i = row / op.B;
      const Window window = window_of(op.window, row % op.B, op.S);
      if (i < window.begin || i >= window.end) continue;
      const int64_t from = task % segments * kSegment, to = smaller(from + kSegment, op.D), offset = row * op.D;
      for (int64_t k = 0; k < op.K; ++k)
        add_band(op.dx + offset, op.e + offset, op.e_prev + offset, larger(op.bands[k], from),
                 smaller(op.bands[k + 1], to), moments + moment::count * k);
    }
    if (segments > 1) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = 0; j < width; ++j) {
          double sum = 0.0;
          for (int64_t segment = 0; segment < segments; ++segment)
            sum += partial[(row * segments + segment) * width + j];
          op.moments[row * width + j] = sum;
        }
    }
  }
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
