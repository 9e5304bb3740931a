// Runs the CUDA kernels on the CPU, one fibre a thread and one block after the other, so that their indexing and
// arithmetic are tested on machines without a device. Stands in for CUDA's header of this name; registers the
// operators as shodh_emulated on the CPU.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using std::frexp;
using std::ldexp;

struct Index {
  unsigned x = 0;
};
inline Index blockIdx, threadIdx;

class Fibres {
 public:
  static void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
    Fibres fibres(threads, kernel);
    for (unsigned block = 0; block < blocks; ++block) fibres.run(block);
  }
  static void synchronise() {
    const unsigned thread = threadIdx.x;
    swapcontext(&current->contexts_[thread], &current->scheduler_);
  }

 private:
  Fibres(unsigned threads, const std::function<void()>& kernel)
      : kernel_(kernel), contexts_(threads), done_(threads), stacks_(new char[threads * kStack]) {}

  void run(unsigned block) {
    current = this;
    blockIdx.x = block;
    for (unsigned t = 0; t < contexts_.size(); ++t) {
      getcontext(&contexts_[t]);
      contexts_[t].uc_stack.ss_sp = stacks_.get() + t * kStack;
      contexts_[t].uc_stack.ss_size = kStack;
      contexts_[t].uc_link = &scheduler_;
      makecontext(&contexts_[t], &Fibres::body, 0);
      done_[t] = false;
    }
    for (bool busy = true; busy;) {
      busy = false;
      for (unsigned t = 0; t < contexts_.size(); ++t) {
        if (done_[t]) continue;
        threadIdx.x = t;
        swapcontext(&scheduler_, &contexts_[t]);
        busy = busy || !done_[t];
      }
    }
  }
  static void body() {
    current->kernel_();
    current->done_[threadIdx.x] = true;
  }

  static constexpr size_t kStack = 32 * 1024;
  static inline Fibres* current = nullptr;
  const std::function<void()>& kernel_;
  ucontext_t scheduler_;
  std::vector<ucontext_t> contexts_;
  std::vector<char> done_;
  std::unique_ptr<char[]> stacks_;
};

inline void __syncthreads() { Fibres::synchronise(); }
inline long long __double_as_longlong(double value) {
  long long bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void atomicMax(unsigned long long* address, unsigned long long value) {
  if (value > *address) *address = value;
}

#define SHODH_UNPACK(...) __VA_ARGS__
#define SHODH_LAUNCH(kernel, blocks, threads, stream, ...) \
  (void)(stream), Fibres::launch(blocks, threads, [&] { SHODH_UNPACK kernel(__VA_ARGS__); })

using cudaStream_t = void*;
enum cudaDeviceAttribute { cudaDevAttrMultiProcessorCount };
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttribute, int) { return *value = 1, 0; }
#undef STD_CUDA_CHECK
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_CHECK(call) (void)(call)
#define STD_CUDA_KERNEL_LAUNCH_CHECK() (void)0
#define aoti_torch_get_current_cuda_stream(device, stream) (*(stream) = nullptr, TORCH_SUCCESS)

namespace torch::stable::accelerator {
struct EmulatedGuard {
  explicit EmulatedGuard(int) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard EmulatedGuard

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(shodh_emulated, CPU, m, C10_UID)
