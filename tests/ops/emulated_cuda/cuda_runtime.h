// Runs the CUDA kernels on the CPU, one fibre a thread and one block after the other, so that their indexing and
// arithmetic are tested on machines without a device. Stands in for CUDA's header of this name; registers the
// operators as shodh_emulated on the CPU.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

using std::frexp;
using std::ldexp;

struct Index {
  unsigned x = 0;
};
inline Index blockIdx, threadIdx, gridDim;

inline long blocks_launched = 0;
// How many blocks were launched since the last call.
extern "C" __attribute__((visibility("default"), used)) inline long emulated_blocks() {
  return std::exchange(blocks_launched, 0);
}

class Fibres {
 public:
  static void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
    Fibres fibres(threads, kernel);
    gridDim.x = blocks;
    blocks_launched += blocks;
    for (unsigned block = 0; block < blocks; ++block) fibres.run(block);
  }
  static void synchronise() {
    const unsigned thread = threadIdx.x;
    swapcontext(&current->contexts_[thread], &current->scheduler_);
  }

 private:
  Fibres(unsigned threads, const std::function<void()>& kernel)
      : kernel_(kernel), contexts_(threads), done_(threads) {
    stacks_.resize(threads * kStack);
  }

  void run(unsigned block) {
    current = this;
    blockIdx.x = block;
    for (unsigned t = 0; t < contexts_.size(); ++t) {
      getcontext(&contexts_[t]);
      contexts_[t].uc_stack.ss_sp = stacks_.data() + t * kStack;
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
  static inline std::vector<char> stacks_;
};

inline void __syncthreads() { Fibres::synchronise(); }
// All threads of the block must take part, as in a barrier.
template <class Value>
Value __shfl_down_sync(unsigned, Value value, unsigned distance) {
  static Value values[1024];
  const unsigned thread = threadIdx.x, from = thread % 32 + distance < 32 ? thread + distance : thread;
  values[thread] = value;
  __syncthreads();
  const Value found = values[from];
  __syncthreads();
  return found;
}
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
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
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
