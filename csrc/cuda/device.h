// The CUDA devices that this process can use.
#pragma once

namespace deqkern {
namespace cuda {

int device_count();  // throws std::runtime_error with CUDA's own words when there is no driver or no device

}  // namespace cuda
}  // namespace deqkern
