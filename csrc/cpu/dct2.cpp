// Two small matrix products per channel with a register-blocked kernel, all intermediates in the cache.
//
//   T = A M,   A (H, W) one channel,   M (W, W) = dct_w^T forward, dct_w inverse
//   Y = L T,   L (H, H) = dct_h forward, dct_h^T inverse
//
// Row k of a DCT-II d (n, n) is even or odd about its middle: d[k, n-1-p] = (-1)^k d[k, p]. Even rows need only the
// sums x[p] + x[n-1-p], odd rows only the differences, and that halves the products. Forward, a channel is folded into
// sums and differences first; the inverse unfolds it last. A matrix that is not so bit for bit is multiplied whole.
//
//   W  The sum and the difference of two columns lie side by side, and each goes to every second lane: M has W/2 rows,
//      and its even and odd columns stay where they are.
//   H  Rows p and H-1-p become their sum and difference. The even rows of d are a DCT-II of the sums, so these are
//      folded again, and again. L falls into blocks on its diagonal; strides leave the frequencies where they are.
//
// The right operands M and T are kept in panels of P columns, P one or two vectors, the last one padded with zeros:
// element (r, w) of a matrix with R rows lies at (w / P * R + r) * P + w % P.
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
constexpr int kMixed = 4;              // vectors of a channel that are mixed at a time
constexpr int64_t kSmallestBlock = 8;  // of the split left matrix

// out (rows, columns) = left (rows, depth) right (depth, columns); left is row-major, right lies in panels.
// With pairs, left is (rows, depth, 2): even columns are multiplied with the first of a pair, odd ones with the second.
struct Product {
  int64_t rows, depth, columns;
  const float* left;
  int64_t left_row;  // strides
  const float* right;
  int64_t right_row, right_panel;
  float* out;
  int64_t out_row, out_panel;
};

// A function of its own: inlined, it has too few registers for its strides.
template <int kHeight, int kVectors, bool kPairs>
__attribute__((noinline)) void multiply_block(const Product& product, const float* left, const float* right, float* out,
                                              int64_t columns) {
  const int64_t left_row = product.left_row, right_row = product.right_row, out_row = product.out_row;
  vec sums[kHeight][kVectors] = {};
  for (int64_t k = 0; k < product.depth; ++k) {
    vec row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) row[v] = load(right + k * right_row + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
      const float* factors = left + r * left_row;
      const vec factor = kPairs ? splat_pair(factors + 2 * k) : splat(factors[k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left_over = columns - v * kLanes;
      float* place = out + r * out_row + v * kLanes;
      if (left_over >= kLanes)
        store(place, sums[r][v]);
      else if (left_over > 0)
        store_part(place, sums[r][v], static_cast<int>(left_over));
    }
}

// The rows from r on.
template <int kHeight, int kVectors, bool kPairs>
void multiply_rows(const Product& product, int64_t r, const float* right, float* out, int64_t columns) {
  for (; r + kHeight <= product.rows; r += kHeight)
    multiply_block<kHeight, kVectors, kPairs>(product, product.left + r * product.left_row, right,
                                              out + r * product.out_row, columns);
  if constexpr (kHeight > 1) multiply_rows<kHeight / 2, kVectors, kPairs>(product, r, right, out, columns);
}

template <int kVectors, bool kPairs>
void multiply(const Product& product) {
  constexpr int64_t width = kVectors * kLanes;
  for (int64_t w = 0; w < product.columns; w += width)
    multiply_rows<kRows, kVectors, kPairs>(product, 0, product.right + w / width * product.right_panel,
                                           product.out + w / width * product.out_panel,
                                           smaller(width, product.columns - w));
}

// Whether rows 0, n/m, 2n/m, .. of a matrix (n, n) are even and odd in turn about the middle of their first m columns.
bool is_mirrored(const float* matrix, int64_t n, int64_t m) {
  if (m % 2 != 0) return false;
  for (int64_t j = 0; j < m; ++j) {
    const float* row = matrix + j * (n / m) * n;
    for (int64_t p = 0; p < m / 2; ++p)
      if (row[p] != (j % 2 == 0 ? row[m - 1 - p] : -row[m - 1 - p])) return false;
  }
  return true;
}

// Rows begin .. begin+size-1 of a folded channel, and the frequencies first + step * j, j < size, that belong to them.
struct Block {
  int64_t begin, size, first, step;
};

// Of a length n that was halved down to `smallest`: first what is left, then the differences of each halving.
template <typename Visit>
void for_blocks(int64_t n, int64_t smallest, Visit visit) {
  visit(Block{0, smallest, 0, n / smallest});
  for (int64_t m = smallest; m < n; m *= 2) visit(Block{m, m, n / m / 2, n / m});
}

// Coefficients from .. from+count-1, 1 <= count <= kLanes, which are neighbours in the spectrum too.
struct Run {
  int64_t from;
  int count;
};

// What all images share.
struct Plan {
  int64_t padded;    // W rounded up to panels
  int64_t smallest;  // the smallest block of the left matrix; H if it is whole
  bool pairs;        // whether the right matrix is split
  float* left;       // (H, H), its blocks on the diagonal
  float* right;      // (W, W) or (W / 2, W) in panels
  float* colour;     // (C, C), transposed for the inverse; null: no rotation
  Run* runs;         // (run_count,) in the order of the spectrum
  int64_t run_count;
};

// The memory of one thread.
struct Work {
  float* columns;       // T, (H, W) in panels
  float* plane;         // (H, padded), a folded channel; anything beyond W
  float* coefficients;  // (C, H, W)
};

void fill_plan(const Dct2& op, int64_t panel, Plan& plan) {
  const int64_t C = op.C, H = op.H, W = op.W, size = C * H * W;
  plan.smallest = H;
  while (plan.smallest / 2 >= kSmallestBlock && is_mirrored(op.dct_h, H, plan.smallest)) plan.smallest /= 2;
  for_blocks(H, plan.smallest, [&](const Block& block) {
    const float sign = block.first == 0 ? 1.0f : -1.0f;  // row H-1-p holds x[p] - x[H-1-p]
    for (int64_t j = 0; j < block.size; ++j)
      for (int64_t p = 0; p < block.size; ++p) {
        const int64_t row = block.begin + (op.inverse ? p : j), column = block.begin + (op.inverse ? j : p);
        plan.left[row * H + column] = sign * op.dct_h[(block.first + block.step * j) * H + block.begin + p];
      }
  });
  plan.pairs = is_mirrored(op.dct_w, W, W);
  const auto right_at = [&](int64_t p, int64_t w) {
    if (!op.inverse) return op.dct_w[w * W + p];
    return plan.pairs ? op.dct_w[(2 * p + w % 2) * W + w / 2] : op.dct_w[p * W + w];
  };
  float* place = plan.right;
  for (int64_t w = 0; w < plan.padded; w += panel)
    for (int64_t p = 0; p < (plan.pairs ? W / 2 : W); ++p)
      for (int64_t q = w; q < w + panel; ++q) *place++ = q < W ? right_at(p, q) : 0.0f;
  if (op.colour == nullptr) plan.colour = nullptr;
  for (int64_t p = 0; p < C && plan.colour != nullptr; ++p)
    for (int64_t q = 0; q < C; ++q) plan.colour[p * C + q] = op.inverse ? op.colour[q * C + p] : op.colour[p * C + q];
  plan.run_count = 0;
  for (int64_t begin = 0, end; begin < size; begin = end) {
    const int64_t from = op.order[begin], last = smaller(begin + kLanes, size);
    for (end = begin + 1; end < last && op.order[end] == from + end - begin;) ++end;
    plan.runs[plan.run_count++] = {from, static_cast<int>(end - begin)};
  }
}

// to (H, W) = sum_c weights[c] from[c]
void mix(const Dct2& op, const float* weights, const float* from, float* to) {
  const int64_t pixels = op.H * op.W;
  int64_t j = 0;
  for (; j + kMixed * kLanes <= pixels; j += kMixed * kLanes) {
    vec sums[kMixed] = {};
    for (int64_t c = 0; c < op.C; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < kMixed; ++v) sums[v] += weights[c] * load(from + c * pixels + j + v * kLanes);
#pragma GCC unroll 4
    for (int v = 0; v < kMixed; ++v) store(to + j + v * kLanes, sums[v]);
  }
  for (; j < pixels; ++j) {
    to[j] = 0.0f;
    for (int64_t c = 0; c < op.C; ++c) to[j] += weights[c] * from[c * pixels + j];
  }
}

// Rows p and rows-1-p become their sum and their difference.
void fold_rows(float* plane, int64_t rows, int64_t padded) {
  for (float *up = plane, *down = plane + (rows - 1) * padded; up < down; up += padded, down -= padded)
    for (int64_t w = 0; w < padded; w += kLanes) {
      const vec p = load(up + w), q = load(down + w);
      store(up + w, p + q);
      store(down + w, p - q);
    }
}

// Functions of their own, because the compiler heeds __restrict only in arguments.
__attribute__((noinline)) void fold_columns(const float* __restrict from, float* __restrict to, int64_t W) {
  for (int64_t p = 0; p < W / 2; ++p) {
    to[2 * p] = from[p] + from[W - 1 - p];
    to[2 * p + 1] = from[p] - from[W - 1 - p];
  }
}
__attribute__((noinline)) void unfold_columns(const float* __restrict from, float* __restrict first,
                                              float* __restrict last, int64_t W) {
  for (int64_t p = 0; p < W / 2; ++p) {
    first[p] = from[2 * p] + from[2 * p + 1];
    last[-p] = from[2 * p] - from[2 * p + 1];
  }
}

void fold(const Dct2& op, const Plan& plan, const float* channel, float* plane) {
  const int64_t H = op.H, W = op.W, padded = plan.padded;
  for (int64_t h = 0; h < H; ++h)
    if (plan.pairs)
      fold_columns(channel + h * W, plane + h * padded, W);
    else
      __builtin_memcpy(plane + h * padded, channel + h * W, W * sizeof(float));
  for (int64_t rows = H; rows > plan.smallest; rows /= 2) fold_rows(plane, rows, padded);
}

void unfold(const Dct2& op, const Plan& plan, float* plane, float* channel) {
  const int64_t H = op.H, W = op.W, padded = plan.padded;
  for (int64_t rows = 2 * plan.smallest; rows <= H; rows *= 2) fold_rows(plane, rows, padded);
  for (int64_t h = 0; h < H; ++h)
    if (plan.pairs)
      unfold_columns(plane + h * padded, channel + h * W, channel + h * W + W - 1, W);
    else
      __builtin_memcpy(channel + h * W, plane + h * padded, W * sizeof(float));
}

// to = L from M, where the folded channel is `from` forward and `to` in the inverse.
template <int kVectors>
void transform(const Dct2& op, const Plan& plan, const float* from, float* columns, float* to) {
  const int64_t H = op.H, W = op.W, padded = plan.padded, P = kVectors * kLanes, depth = plan.pairs ? W / 2 : W;
  const int64_t from_row = op.inverse ? W : padded, to_row = op.inverse ? padded : W;
  const Product across{H, depth, padded, from, from_row, plan.right, P, depth * P, columns, P, H * P};
  if (plan.pairs)
    multiply<kVectors, true>(across);
  else
    multiply<kVectors, false>(across);
  for_blocks(H, plan.smallest, [&](const Block& block) {
    const float* left = plan.left + block.begin * (H + 1);
    const int64_t n = block.size;
    if (op.inverse)
      multiply<kVectors, false>({n, n, to_row, left, H, columns + block.first * P, block.step * P, H * P,
                                 to + block.begin * to_row, to_row, P});
    else
      multiply<kVectors, false>({n, n, to_row, left, H, columns + block.begin * P, P, H * P, to + block.first * to_row,
                                 block.step * to_row, P});
  });
}

template <int kVectors>
void forward(const Dct2& op, const Plan& plan, const float* image, float* spectrum, const Work& work) {
  for (int64_t c = 0; c < op.C; ++c) {
    const float* channel = image + c * op.H * op.W;
    if (plan.colour != nullptr) {
      mix(op, plan.colour + c * op.C, image, work.columns);
      channel = work.columns;
    }
    fold(op, plan, channel, work.plane);
    transform<kVectors>(op, plan, work.plane, work.columns, work.coefficients + c * op.H * op.W);
  }
  for (const Run* run = plan.runs; run < plan.runs + plan.run_count; spectrum += run++->count)
    store_part(spectrum, load_part(work.coefficients + run->from, run->count), run->count);
}

template <int kVectors>
void backward(const Dct2& op, const Plan& plan, const float* spectrum, float* image, const Work& work) {
  for (const Run* run = plan.runs; run < plan.runs + plan.run_count; spectrum += run++->count)
    store_part(work.coefficients + run->from, load_part(spectrum, run->count), run->count);
  for (int64_t c = 0; c < op.C; ++c) {
    const float* channel = work.coefficients + c * op.H * op.W;
    if (plan.colour != nullptr) {
      mix(op, plan.colour + c * op.C, work.coefficients, work.plane);
      channel = work.plane;
    }
    transform<kVectors>(op, plan, channel, work.columns, work.plane);
    unfold(op, plan, work.plane, image + c * op.H * op.W);
  }
}

template <int kVectors>
void transform_images(const Dct2& op) {
  constexpr int64_t panel = kVectors * kLanes, line = 16;  // floats in a panel's row and in a cache line
  const int64_t size = op.C * op.H * op.W, padded = ceil_div(op.W, panel) * panel;
  const auto whole_lines = [](int64_t floats) { return ceil_div(floats, line) * line; };
  const int64_t left = whole_lines(op.H * op.H), right = whole_lines(op.W * padded), colour = whole_lines(op.C * op.C);
  const int64_t runs = whole_lines(size * static_cast<int64_t>(sizeof(Run) / sizeof(float)));
  const int64_t shared = left + right + colour + runs;
  const int64_t plane = whole_lines(op.H * padded), per_thread = 2 * plane + whole_lines(size);
  const int team = team_size(op.threads, op.N, 8 * op.N * size);
  float* memory = static_cast<float*>(scratch(static_cast<size_t>(shared + team * per_thread) * sizeof(float)));
  Plan plan{};
  plan.padded = padded;
  plan.left = memory;
  plan.right = plan.left + left;
  plan.colour = plan.right + right;
  plan.runs = reinterpret_cast<Run*>(plan.colour + colour);
  fill_plan(op, panel, plan);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    float* mine = memory + shared + thread * per_thread;
    const Work work{mine, mine + plane, mine + 2 * plane};
#pragma omp for schedule(static)
    for (int64_t n = 0; n < op.N; ++n) {
      float *image = op.image + n * size, *spectrum = op.spectrum + op.rows[n] * size;
      if (op.inverse)
        backward<kVectors>(op, plan, spectrum, image, work);
      else
        forward<kVectors>(op, plan, image, spectrum, work);
    }
  }
}

}  // namespace

void dct2(const Dct2& op) {
  if (op.W % (2 * kLanes) == 0 || op.W > 8 * kLanes)
    transform_images<2>(op);
  else
    transform_images<1>(op);
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
