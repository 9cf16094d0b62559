// Threads and scratch memory, compiled once: nothing here is inline, so no instruction set leaks into another.
#pragma once
#include <cstddef>
#include <cstdint>

namespace deqkern {

// How many threads to use: no more than there are tasks, one when the work (in floats touched) is too little to share,
// and one in a forked child, where the threads of the parent's OpenMP pool no longer exist.
int team_size(int requested, int64_t tasks, int64_t work);

// Memory of the calling thread, 64-byte aligned, not cleared, kept until a larger piece is asked for.
void* scratch(size_t bytes);

}  // namespace deqkern
