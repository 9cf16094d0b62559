#include "device.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace deqkern {
namespace cuda {

int device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();  // it would be reported again by the next call
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
  }
  return count;
}

}  // namespace cuda
}  // namespace deqkern
