// What every launch needs: errors as exceptions, and the caller's device.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace deqkern {
namespace cuda {

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it would be reported again by the next call
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Makes a device the current one for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    if (device == before_) return;
    check(cudaSetDevice(device));
    moved_ = true;
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

}  // namespace cuda
}  // namespace deqkern
