// Two small matrix products per image with a register-blocked kernel, all intermediates in the cache.
//
//   columns:  T = A M,     A (C*H, W) row-major, M (W, W) = dct_w^T forward, dct_w inverse
//   rows:     Y_c = L T_c, L (H, H) = dct_h forward, dct_h^T inverse, for every channel c
//
// M, T and Y are kept in panels of P columns, P a whole number of vectors, padded with zeros: element (r, w) of a
// matrix with R rows lies at (w / P * R + r) * P + w % P. Forward, `order` and the panels are one gather.
#include "../dct2.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8;  // 8 x 2 sums in 32 registers
#else
constexpr int kRows = 4;  // 4 x 2 sums in 16 registers
#endif

// out (rows, P) = left (rows, depth) panel (depth, P), kVectors vectors wide; only `columns` of them are stored.
template <int kHeight, int kVectors>
void multiply_block(const float* left, int64_t left_stride, const float* panel, int64_t depth, float* out,
                    int64_t out_stride, int64_t columns) {
  vec sums[kHeight][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vec right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load(panel + (k * kVectors + v) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
      const vec factor = splat(left[r * left_stride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left_over = columns - v * kLanes;
      float* place = out + r * out_stride + v * kLanes;
      if (left_over >= kLanes)
        store(place, sums[r][v]);
      else if (left_over > 0)
        store_part(place, sums[r][v], static_cast<int>(left_over));
    }
}

struct Left {
  const float* data;
  int64_t stride, rows;
};

struct Panels {  // the right operand
  const float* data;
  int64_t stride;  // between panels
  int64_t depth;
};

struct Out {
  float* data;
  int64_t panel_stride, row_stride;
  int64_t columns;  // stored in all
};

template <int kVectors>
void multiply(const Left& left, const Panels& right, const Out& out) {
  constexpr int64_t width = kVectors * kLanes;
  for (int64_t w = 0; w < out.columns; w += width) {
    const float* panel = right.data + w / width * right.stride;
    float* place = out.data + w / width * out.panel_stride;
    const int64_t columns = smaller(width, out.columns - w);
    int64_t r = 0;
    for (; r + kRows <= left.rows; r += kRows)
      multiply_block<kRows, kVectors>(left.data + r * left.stride, left.stride, panel, right.depth,
                                      place + r * out.row_stride, out.row_stride, columns);
    for (; r < left.rows; ++r)
      multiply_block<1, kVectors>(left.data + r * left.stride, left.stride, panel, right.depth,
                                  place + r * out.row_stride, out.row_stride, columns);
  }
}

// What all images share, and the memory of each thread.
struct Plan {
  int64_t C, H, W, P, padded;  // padded: W rounded up to panels
  float* left;                 // (H, H)
  float* right;                // (W, W) in panels
  float* colour;               // (C, C), transposed for the inverse; null when it is the identity
  int32_t* place;              // (C*H*W,), where coefficient k lies in an image's coefficients
  float* work;                 // (threads, 2, C*H*padded)
};

DEQKERN_INLINE int64_t panel_place(const Plan& plan, int64_t rows, int64_t r, int64_t w) {
  return (w / plan.P * rows + r) * plan.P + w % plan.P;
}

DEQKERN_INLINE int64_t work_length(const Plan& plan) { return plan.C * plan.H * plan.padded; }

void fill_plan(const Dct2& op, Plan& plan) {
  const int64_t C = op.C, H = op.H, W = op.W;
  for (int64_t p = 0; p < H; ++p)
    for (int64_t q = 0; q < H; ++q) plan.left[p * H + q] = op.inverse ? op.dct_h[q * H + p] : op.dct_h[p * H + q];
  for (int64_t p = 0; p < W; ++p)
    for (int64_t q = 0; q < plan.padded; ++q)
      plan.right[panel_place(plan, W, p, q)] = q >= W ? 0.0f : op.inverse ? op.dct_w[p * W + q] : op.dct_w[q * W + p];
  bool identity = true;
  for (int64_t p = 0; p < C; ++p)
    for (int64_t q = 0; q < C; ++q) {
      plan.colour[p * C + q] = op.inverse ? op.colour[q * C + p] : op.colour[p * C + q];
      identity = identity && op.colour[p * C + q] == (p == q ? 1.0f : 0.0f);
    }
  if (identity) plan.colour = nullptr;
  for (int64_t k = 0; k < C * H * W; ++k) {
    const int64_t source = op.order[k], r = source / W, w = source % W;
    plan.place[k] = static_cast<int32_t>(op.inverse ? source : panel_place(plan, C * H, r, w));
  }
}

// out[c] = sum_d colour[c, d] in[d]. Channels are runs of `run` floats in each of `panels` pieces of C * run.
void mix_colours(const Plan& plan, const float* in, float* out, int64_t panels, int64_t run) {
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t c = 0; c < plan.C; ++c) {
      float* to = out + (panel * plan.C + c) * run;
      for (int64_t d = 0; d < plan.C; ++d) {
        const float* from = in + (panel * plan.C + d) * run;
        const float weight = plan.colour[c * plan.C + d];
        if (d == 0)
          for (int64_t j = 0; j < run; ++j) to[j] = weight * from[j];
        else
          for (int64_t j = 0; j < run; ++j) to[j] += weight * from[j];
      }
    }
}

template <int kVectors>
void forward(const Plan& plan, const float* image, float* spectrum, float* work) {
  const int64_t C = plan.C, H = plan.H, W = plan.W, P = plan.P, length = work_length(plan);
  float *first = work, *second = work + length;
  multiply<kVectors>({image, W, C * H}, {plan.right, W * P, W}, {first, C * H * P, P, plan.padded});
  for (int64_t c = 0; c < C; ++c)
    multiply<kVectors>({plan.left, H, H}, {first + c * H * P, C * H * P, H},
                       {second + c * H * P, C * H * P, P, plan.padded});
  const float* coefficients = second;
  if (plan.colour != nullptr) {
    mix_colours(plan, second, first, plan.padded / P, H * P);
    coefficients = first;
  }
  for (int64_t k = 0; k < C * H * W; ++k) spectrum[k] = coefficients[plan.place[k]];
}

template <int kVectors>
void backward(const Plan& plan, const float* spectrum, float* image, float* work) {
  const int64_t C = plan.C, H = plan.H, W = plan.W, P = plan.P, length = work_length(plan);
  float *first = work, *second = work + length;
  for (int64_t k = 0; k < C * H * W; ++k) first[plan.place[k]] = spectrum[k];
  if (plan.colour != nullptr) {
    mix_colours(plan, first, second, 1, H * W);
    float* other = first;
    first = second;
    second = other;
  }
  multiply<kVectors>({first, W, C * H}, {plan.right, W * P, W}, {second, C * H * P, P, plan.padded});
  for (int64_t c = 0; c < C; ++c)
    multiply<kVectors>({plan.left, H, H}, {second + c * H * P, C * H * P, H}, {image + c * H * W, P, W, W});
}

template <int kVectors>
void run(const Dct2& op, const Plan& plan, int team) {
  const int64_t size = op.C * op.H * op.W;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    float* work = plan.work + thread * 2 * work_length(plan);
#pragma omp for schedule(static)
    for (int64_t image = 0; image < op.N; ++image) {
      float *pixels = op.image + image * size, *spectrum = op.spectrum + op.rows[image] * size;
      if (op.inverse)
        backward<kVectors>(plan, spectrum, pixels, work);
      else
        forward<kVectors>(plan, pixels, spectrum, work);
    }
  }
}

}  // namespace

void dct2(const Dct2& op) {
  const int vectors = op.W % (2 * kLanes) == 0 || op.W > 8 * kLanes ? 2 : 1;
  Plan plan{};
  plan.C = op.C;
  plan.H = op.H;
  plan.W = op.W;
  plan.P = vectors * kLanes;
  plan.padded = ceil_div(op.W, plan.P) * plan.P;
  const int team = team_size(op.threads, op.N, op.N * op.C * op.H * op.W * 8);
  const int64_t align = 16;  // floats in a cache line
  const int64_t left = ceil_div(op.H * op.H, align) * align, right = op.W * plan.padded;
  const int64_t colour = ceil_div(op.C * op.C, align) * align, place = ceil_div(op.C * op.H * op.W, align) * align;
  const int64_t work = 2 * work_length(plan) * team;
  float* memory = static_cast<float*>(scratch(static_cast<size_t>(left + right + colour + place + work + 64) * 4));
  plan.left = memory;
  plan.right = plan.left + left;
  plan.colour = plan.right + ceil_div(right, align) * align;
  plan.place = reinterpret_cast<int32_t*>(plan.colour + colour);
  plan.work = plan.colour + colour + place;
  fill_plan(op, plan);
  if (vectors == 2)
    run<2>(op, plan, team);
  else
    run<1>(op, plan, team);
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
