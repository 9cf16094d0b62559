#include "check.h"
#include "device.h"

namespace deqkern {
namespace cuda {

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count));
  return count;
}

}  // namespace cuda
}  // namespace deqkern
