// Runs csrc/cuda/anderson_solve.cuh without a GPU. Every lane of a block is a thread of execution of its own; it runs
// until it waits for the other lanes of its warp or block. That all of them wait at the same kind of place is checked.
#include <setjmp.h>
#include <ucontext.h>

#include <functional>
#include <memory>

namespace {

struct Index {
  unsigned x;
};
Index threadIdx, blockIdx;

double __shfl_sync(unsigned mask, double value, int source, int width);
double __shfl_xor_sync(unsigned mask, double value, int step, int width);
unsigned __ballot_sync(unsigned mask, bool holds);
void __syncthreads();

}  // namespace

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#include "cuda/anderson_solve.cuh"

namespace {

using deqkern::cuda::kThreads;

enum class Wait { never, shuffle, exchange, ballot, block, done };

struct Lane {
  std::unique_ptr<char[]> stack;
  ucontext_t entry;
  jmp_buf resume;
  bool started = false;
  Wait wait = Wait::never;
  unsigned calls = 0;
  double given[2];  // by turns: a lane may call again before the others have read
};

Lane lanes[kThreads];
jmp_buf scheduler;
std::function<void()> kernel;

void pause(Wait wait) {
  Lane& lane = lanes[threadIdx.x];
  lane.wait = wait;
  if (_setjmp(lane.resume) == 0) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    kernel();
    pause(Wait::done);
  }
}

// Until lane `index` waits.
void advance(int index) {
  Lane& lane = lanes[index];
  threadIdx.x = index;
  if (_setjmp(scheduler) != 0) return;
  if (lane.started) _longjmp(lane.resume, 1);
  constexpr size_t kStack = 128 << 10;
  if (!lane.stack) lane.stack = std::make_unique<char[]>(kStack);
  getcontext(&lane.entry);
  lane.entry.uc_stack.ss_sp = lane.stack.get();
  lane.entry.uc_stack.ss_size = kStack;
  lane.entry.uc_link = nullptr;
  makecontext(&lane.entry, live, 0);
  lane.started = true;
  setcontext(&lane.entry);
}

// False when lanes that must meet wait at different places.
bool run_block(bool backward) {
  const auto turn = [&](int j, int count) { return backward ? count - 1 - j : j; };
  Wait wait = Wait::never;
  while (wait != Wait::done) {
    for (int j = 0; j < kThreads / 32; ++j) {
      const int warp = turn(j, kThreads / 32) * 32;
      do {
        for (int k = 0; k < 32; ++k) advance(warp + turn(k, 32));
        for (int k = 1; k < 32; ++k)
          if (lanes[warp + k].wait != lanes[warp].wait) return false;
      } while (lanes[warp].wait != Wait::block && lanes[warp].wait != Wait::done);
      if (j > 0 && lanes[warp].wait != wait) return false;
      wait = lanes[warp].wait;
    }
  }
  return true;
}

// Gives a value to the warp and waits for it; the place where the others' values then are.
int meet(unsigned mask, double value, Wait wait) {
  Lane& lane = lanes[threadIdx.x];
  const int place = lane.calls++ % 2;
  lane.given[place] = mask == 0xffffffffu ? value : 0.0 / 0.0;
  pause(wait);
  return place;
}

double __shfl_sync(unsigned mask, double value, int source, int width) {
  const int place = meet(mask, value, Wait::shuffle);
  return lanes[threadIdx.x / width * width + source % width].given[place];
}

double __shfl_xor_sync(unsigned mask, double value, int step, int width) {
  const int place = meet(mask, value, Wait::exchange);
  const unsigned source = threadIdx.x ^ step;
  return lanes[source / width == threadIdx.x / width ? source : threadIdx.x].given[place];
}

unsigned __ballot_sync(unsigned mask, bool holds) {
  const int place = meet(mask, holds, Wait::ballot);
  unsigned votes = 0;
  for (unsigned k = 0; k < 32; ++k)
    if (lanes[threadIdx.x / 32 * 32 + k].given[place] == 1.0) votes |= 1u << k;
  return votes;
}

void __syncthreads() { pause(Wait::block); }

template <int M>
struct Emulate {
  static void run(const deqkern::AndersonSolve* op, bool backward, bool* good) {
    const int64_t count = deqkern::cuda::blocks<M>(*op);
    const int unit = deqkern::cuda::unit_of(op->S);
    kernel = [=] { deqkern::cuda::anderson_solve_kernel<M>(*op, unit); };
    for (int64_t j = 0; j < count && *good; ++j) {
      blockIdx.x = static_cast<unsigned>(backward ? count - 1 - j : j);
      *good = run_block(backward);
    }
  }
};

}  // namespace

// 0 when lanes that must meet waited at different places. Lanes, warps and blocks run backward if asked for.
extern "C" int anderson_solve(const double* gram, const double* rhs, const int64_t* window, float* gamma, int64_t S,
                              int64_t B, int m, int scope, double ridge, double ridge_absolute, int implicit,
                              int backward) {
  const deqkern::AndersonSolve op{
      gram, rhs, window, gamma, S, B, m, static_cast<deqkern::Scope>(scope), ridge, ridge_absolute, implicit != 0, 0};
  bool good = true;
  deqkern::cuda::with_size<Emulate>(m, &op, backward != 0, &good);
  if (!good)
    for (Lane& lane : lanes) lane.started = false;
  return good;
}
