// One pass: a task is one chunk of D of one sample, and walks all its steps with the correction, the old state and the
// factors kept in the first-level cache. Norms are summed per chunk in float lanes, over chunks in double, in order.
#include "../ddim_scan.h"

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {
namespace {

constexpr int64_t kLongestChunk = 1024;  // also the most floats that are summed before going to double
constexpr int64_t kShortestChunk = 256;

// It depends on D alone, so that neither threads nor the batch change a result.
DEQKERN_INLINE int64_t chunk_length(int64_t D) {
  const int64_t even = ceil_div(ceil_div(D, 16), 64) * 64;
  return smaller(larger(even, kShortestChunk), kLongestChunk);
}

struct Chunk {
  int64_t b, begin, length;
  int64_t band;  // the first band with elements in it
};

struct Buffers {
  alignas(64) float previous[kLongestChunk + kLanes];  // x[i], which f may have overwritten
  alignas(64) float correction[kLongestChunk + kLanes];
  alignas(64) float bent[kLongestChunk + kLanes];        // slope[i-1] g[i-1], of two-step chains
  alignas(64) float factor[kLongestChunk + 2 * kLanes];  // g[i+1] = factor g[i] + scale r[i+1]; two-step: the slope
  alignas(64) float scale[kLongestChunk + 2 * kLanes];   // read by implicit chains only; 1 in the others
};

struct Row {
  const float *e, *e_before, *z, *x;  // x is the next state
  float *f, *g;
  bool f_streams, g_streams;
  int64_t ahead;  // to the same place of the next row; it is prefetched, because rows of a chunk lie far apart
  vec a, b, c, n, beta;
};

struct Sums {
  vec residual{}, correction{}, state{};
};

// kPlain: the first step of an explicit chain. kImplicit: the others scale the residual. kTwoStep: there is a c.
template <bool kPlain, bool kImplicit, bool kTwoStep, bool kNoise, bool kWhole>
DEQKERN_INLINE void advance(const Row& row, Buffers& buffers, int64_t d, int count, Sums& sums) {
  prefetch<false>(row.x + row.ahead + d);
  prefetch<false>(row.e + row.ahead + d);
  if (kNoise) prefetch<false>(row.z + row.ahead + d);
  if (!row.f_streams) prefetch<true>(row.f + row.ahead + d);
  if (!row.g_streams) prefetch<true>(row.g + row.ahead + d);
  const vec state = load_lanes<kWhole>(row.x + d, count);
  vec plain = row.a * load(buffers.previous + d) + row.b * load_lanes<kWhole>(row.e + d, count);
  if (kTwoStep) plain += row.c * load_lanes<kWhole>(row.e_before + d, count);
  if (kNoise) plain += row.n * load_lanes<kWhole>(row.z + d, count);
  const vec residual = plain - state;
  vec correction = kImplicit ? load(buffers.scale + d) * residual : residual;
  if (!kPlain && !kTwoStep) correction += load(buffers.factor + d) * load(buffers.correction + d);
  if (!kPlain && kTwoStep) {
    const vec before = load(buffers.correction + d), bent = load(buffers.factor + d) * before;
    correction += row.a * before + row.b * bent + row.c * load(buffers.bent + d);
    store(buffers.bent + d, bent);
  }
  store(buffers.previous + d, state);
  store(buffers.correction + d, correction);
  put_lanes<kWhole>(row.g + d, correction, count, row.g_streams);
  put_lanes<kWhole>(row.f + d, kPlain ? plain : state + row.beta * correction, count, row.f_streams);
  sums.residual += residual * residual;
  sums.correction += correction * correction;
  sums.state += state * state;
}

template <bool kPlain, bool kImplicit, bool kTwoStep, bool kNoise>
void advance_row(const Row& row, Buffers& buffers, int64_t length, double* partial) {
  Sums sums;
  int64_t d = 0;
  for (; d + kLanes <= length; d += kLanes)
    advance<kPlain, kImplicit, kTwoStep, kNoise, true>(row, buffers, d, 0, sums);
  if (d < length)
    advance<kPlain, kImplicit, kTwoStep, kNoise, false>(row, buffers, d, static_cast<int>(length - d), sums);
  partial[0] = lane_sum(sums.residual);
  partial[1] = lane_sum(sums.correction);
  partial[2] = lane_sum(sums.state);
}

// The factors of step i, one value per band. Whole vectors are written; the next band overwrites what is too much.
template <bool kImplicit, bool kTwoStep>
void fill_factors(const DdimScan& op, const Chunk& chunk, int64_t i, Buffers& buffers) {
  const float* slope = op.slope + (i * op.B + chunk.b) * op.K;
  const int64_t end = chunk.begin + chunk.length;
  for (int64_t k = chunk.band; k < op.K && op.bands[k] < end; ++k) {
    const float bend = op.b[i] * slope[k], scale = 1.0f / (1.0f - bend);
    const vec factor = splat(kTwoStep ? slope[k] : kImplicit ? op.a[i] * scale : op.a[i] + bend);
    const int64_t to = smaller(op.bands[k + 1], end) - chunk.begin;
    for (int64_t d = larger(op.bands[k], chunk.begin) - chunk.begin; d < to; d += kLanes) {
      store(buffers.factor + d, factor);
      if (kImplicit) store(buffers.scale + d, splat(scale));
    }
  }
}

template <bool kImplicit, bool kTwoStep, bool kNoise>
void scan_chunk(const DdimScan& op, const Chunk& chunk, Window window, double* partial) {
  Buffers buffers = {};
  const int64_t stride = op.B * op.D, offset = chunk.b * op.D + chunk.begin;
  const float* x = op.x + window.begin * stride + offset;
  const bool in_place = op.f == op.x + stride;  // then f is in the cache already
  __builtin_memcpy(buffers.previous, x, static_cast<size_t>(chunk.length) * sizeof(float));
  for (int64_t i = window.begin; i < window.end; ++i) {
    const int64_t place = i * stride + offset;
    const Row row{op.e + place,
                  i > 0 ? op.e + place - stride : op.e + place,
                  kNoise ? op.z + place : nullptr,
                  op.x + place + stride,
                  op.f + place,
                  op.g + place,
                  !in_place && can_stream(op.f + place, op.S * stride),
                  can_stream(op.g + place, op.S * stride),
                  i + 1 < window.end ? stride : 0,
                  splat(op.a[i]),
                  splat(op.b[i]),
                  splat(kTwoStep && i > 0 ? op.c[i] : 0.0f),
                  splat(kNoise ? op.n[i] : 0.0f),
                  splat(op.beta)};
    if (!kImplicit && i == window.begin) {
      advance_row<true, false, kTwoStep, kNoise>(row, buffers, chunk.length, partial + norm::count * i);
    } else {
      fill_factors<kImplicit, kTwoStep>(op, chunk, i, buffers);
      advance_row<false, kImplicit, kTwoStep, kNoise>(row, buffers, chunk.length, partial + norm::count * i);
    }
  }
  finish_streams();
}

template <bool kNoise>
DEQKERN_INLINE auto scan_of(const DdimScan& op) {
  return op.implicit       ? scan_chunk<true, false, kNoise>
         : op.c != nullptr ? scan_chunk<false, true, kNoise>
                           : scan_chunk<false, false, kNoise>;
}

// norms[i, b] = sum over chunks of partial[chunk, i], zero outside the window.
void sum_norms(const DdimScan& op, int64_t b, Window window, const double* partial, int64_t chunks) {
  for (int64_t i = 0; i < op.S; ++i)
    for (int j = 0; j < norm::count; ++j) op.norms[(i * op.B + b) * norm::count + j] = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = window.begin; i < window.end; ++i)
      for (int j = 0; j < norm::count; ++j)
        op.norms[(i * op.B + b) * norm::count + j] += partial[(chunk * op.S + i) * norm::count + j];
}

}  // namespace

void ddim_scan(const DdimScan& op) {
  const int64_t length = chunk_length(op.D), chunks = ceil_div(op.D, length), tasks = op.B * chunks;
  double* partial = static_cast<double*>(scratch(static_cast<size_t>(tasks * op.S * norm::count) * sizeof(double)));
  const int team = team_size(op.threads, tasks, 4 * op.S * op.B * op.D);
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      Chunk chunk{task / chunks, task % chunks * length, 0, 0};
      chunk.length = smaller(length, op.D - chunk.begin);
      while (op.bands[chunk.band + 1] <= chunk.begin) ++chunk.band;
      const Window window = window_of(op.window, chunk.b, op.S);
      if (window.begin >= window.end) continue;
      (op.z != nullptr ? scan_of<true>(op) : scan_of<false>(op))(op, chunk, window,
                                                                 partial + task * op.S * norm::count);
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < op.B; ++b)
      sum_norms(op, b, window_of(op.window, b, op.S), partial + b * chunks * op.S * norm::count, chunks);
  }
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
