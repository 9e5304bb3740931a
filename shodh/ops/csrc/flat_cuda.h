// What the CUDA passes share. A thread owns V neighbouring cells of a row, and a block consecutive cells of one sample.
// Every neighbour is loaded again: the L1 and L2 caches see to it that memory is read once.
#pragma once

#include "grid.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#ifndef SHODH_LAUNCH  // the tests run the kernels on the CPU by defining it
#define SHODH_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace shodh {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// The box as an argument of a kernel. A component that is zero throughout reads channel 0 and is `absent`, or writes
// none (-1).
struct Box {
  int64_t cells[3], stride[3], volume;
  unsigned blocks;  // of a sample
  int in_channels, out_channels;
  int in[3], out[3];
  bool absent[3], wall[3];
};

inline Box make_box(const Grid& grid, bool mirror, int width) {
  Box box{};
  const int64_t cells_of_block = int64_t{width} * kThreads;
  box.volume = grid.volume();
  const int64_t blocks = (box.volume + cells_of_block - 1) / cells_of_block;
  STD_TORCH_CHECK(grid.batch * blocks <= std::numeric_limits<int32_t>::max(), "the field is too large for one launch");
  box.blocks = static_cast<unsigned>(blocks);
  box.in_channels = static_cast<int>(mirror ? grid.components() : grid.potentials());
  box.out_channels = static_cast<int>(mirror ? grid.potentials() : grid.components());
  for (int a = 0; a < 3; ++a) {
    box.cells[a] = grid.cells[a];
    box.stride[a] = a == 2 ? 1 : a == 1 ? grid.cells[2] : grid.cells[1] * grid.cells[2];
    box.wall[a] = grid.wall[a];
    const int velocity = !grid.plane ? a : a == 1 ? -1 : a / 2, potential = !grid.plane ? a : a == 1 ? 0 : -1;
    const int in = mirror ? velocity : potential;
    box.in[a] = std::max(in, 0);
    box.absent[a] = in < 0;
    box.out[a] = mirror ? potential : velocity;
  }
  return box;
}

// The harmonic part [B, columns] of each component, zero where there is none.
struct Constants : HarmonicColumns {
  explicit Constants(const Grid& grid) : HarmonicColumns(harmonic_columns(grid)) {}

  template <class T>
  __device__ T of(const T* harmonic, unsigned sample, int c) const {
    return harmonic && column[c] >= 0 ? harmonic[sample * count + column[c]] : T(0);
  }
};

// What differences are multiplied by. The one component of a plane potential is minus the stream function.
template <class Value>
struct Inverse {
  Value along[3];

  explicit Inverse(const Grid& grid) {
    for (int a = 0; a < 3; ++a) along[a] = static_cast<Value>(grid.plane ? -grid.inverse(a) : grid.inverse(a));
  }
};

template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  T value[V];
};

// In one access: the compiler joins the loads of a struct, but not its stores.
template <class T, int V>
__device__ void store(Pack<T, V>* to, const Pack<T, V>& pack) {
#ifdef __CUDA_ARCH__
  unsigned words[(sizeof pack + 3) / 4] = {};
  memcpy(words, &pack, sizeof pack);
  if constexpr (sizeof pack == 16)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
  else if constexpr (sizeof pack == 8)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(words[0]), "r"(words[1]) : "memory");
  else if constexpr (sizeof pack == 4)
    *reinterpret_cast<unsigned*>(to) = words[0];
  else
#endif
    *to = pack;
}

template <class Value>
struct Differences {
  Value first, second;
};

// V cells, and the ends of their differences: [axis][component].
template <class T, int V>
struct Stencil {
  Pack<T, V> own[3], high[3][3], low[3][3];

  // The two differences that make component c of the curl of what `convert` returns.
  template <class Convert>
  __device__ auto differences(int c, int v, const Convert& convert) const {
    const int j = (c + 1) % 3, k = (c + 2) % 3;
    return Differences{convert(k, high[j][k].value[v]) - convert(k, low[j][k].value[v]),
                       convert(j, high[k][j].value[v]) - convert(j, low[k][j].value[v])};
  }

  template <class Value>
  __device__ Value curl(int c, int v, const Inverse<Value>& inverse) const {
    const auto d = differences(c, v, [](int, T raw) { return Value(raw); });
    return d.first * inverse.along[(c + 1) % 3] - d.second * inverse.along[(c + 2) % 3];
  }
};

// Where a thread is.
template <class T, Pass pass, int V>
class Site {
 public:
  unsigned sample;

  __device__ Site(const Box& box, unsigned block) : sample(block / box.blocks), box_(box) {
    here_ = (int64_t{block - sample * box.blocks} * kThreads + threadIdx.x) * V;
    const uint64_t row = uint64_t(here_) / uint64_t(box.cells[2]), plane = row / uint64_t(box.cells[1]);
    const int64_t at[3] = {int64_t(plane), int64_t(row) - int64_t(plane) * box.cells[1],
                           here_ - int64_t(row) * box.cells[2]};
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      first_[a] = at[a] == 0;
      last_[a] = at[a] + (a == 2 ? V : 1) == box.cells[a];
    }
  }

  __device__ bool inside() const { return here_ < box_.volume; }

  // Loads first and without a branch, so that all are under way at once; zeros of walls come after.
  __device__ Stencil<T, V> read(const T* fields) const {
    Stencil<T, V> s;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const T* field = fields + (int64_t{sample} * box_.in_channels + box_.in[c]) * box_.volume + here_;
      s.own[c] = load(field);
#pragma unroll
      for (int a = 0; a < 3; ++a) {
        if (a == c) continue;
        if (kHigh<pass>) s.high[a][c] = fetch(field, a, 1);
        if (kLow<pass>) s.low[a][c] = fetch(field, a, -1);
      }
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      clear(s.own[c], is_zero(c, 0, 0), pass == Pass::kForward && ends_pinned(c));
#pragma unroll
      for (int a = 0; a < 3; ++a) {
        if (a == c) continue;
        complete(s.high[a][c], s.own[c], c, a, kHigh<pass>);
        complete(s.low[a][c], s.own[c], c, a, kLow<pass>);
      }
    }
    return s;
  }

  __device__ void write(T* fields, int c, Pack<T, V> pack) const {
    if (box_.out[c] < 0) return;
    if (pass == Pass::kMirror) clear(pack, (c != 0 & at_wall(0, 1)) | (c != 1 & at_wall(1, 1)), ends_pinned(c));
    T* to = fields + (int64_t{sample} * box_.out_channels + box_.out[c]) * box_.volume + here_;
    store(reinterpret_cast<Pack<T, V>*>(to), pack);
  }

 private:
  __device__ static Pack<T, V> load(const T* from) { return *reinterpret_cast<const Pack<T, V>*>(from); }

  // Neighbours along x or y; along z only the one beyond this thread's cells.
  __device__ Pack<T, V> fetch(const T* field, int axis, int step) const {
    if (axis < 2) return load(field + offset(axis, step));
    Pack<T, V> pack{};
    const int end = step > 0 ? V - 1 : 0;
    pack.value[end] = field[end + offset(axis, step)];
    return pack;
  }

  // What was fetched, with the neighbours along z that are own cells, and zeros.
  __device__ void complete(Pack<T, V>& pack, const Pack<T, V>& own, int c, int axis, int step) const {
    if (step == 0) {
      pack = own;
    } else if (axis < 2) {
      clear(pack, is_zero(c, axis, step), pass == Pass::kForward && ends_pinned(c));
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const bool beyond = v + step < 0 || v + step == V;
        pack.value[v] = !beyond ? own.value[(v + step + V) % V] : is_zero(c, axis, step) ? T(0) : pack.value[v];
      }
    }
  }

  __device__ bool at_wall(int axis, int step) const {
    return pass != Pass::kCentral & box_.wall[axis] & (step < 0 ? first_[axis] : last_[axis]);
  }

  // To the neighbour along an axis; from an end, round to the other one.
  __device__ int64_t offset(int axis, int step) const {
    const int64_t round = step < 0 ? box_.cells[axis] - 1 : 1 - box_.cells[axis];
    return ((step < 0 ? first_[axis] : last_[axis]) ? round : step) * box_.stride[axis];
  }

  // Whether component c is zero in the row `step` away along an axis: beyond a wall, or pinned on another one.
  __device__ bool is_zero(int c, int axis, int step) const {
    bool zero = box_.absent[c] | (step != 0 & at_wall(axis, step));
#pragma unroll
    for (int a = 0; a < 2; ++a)
      if (pass == Pass::kForward && a != c && (a != axis || step == 0)) zero |= at_wall(a, 1);
    return zero;
  }

  // Whether the last of the cells is one of component c pinned on a wall across z.
  __device__ bool ends_pinned(int c) const { return c != 2 & at_wall(2, 1); }

  __device__ static void clear(Pack<T, V>& pack, bool all, bool last) {
#pragma unroll
    for (int v = 0; v < V; ++v) pack.value[v] = all | (v == V - 1 & last) ? T(0) : pack.value[v];
  }

  const Box& box_;
  int64_t here_;
  bool first_[3], last_[3];  // of the cells along each axis
};

// Combines values over the threads of a block in a fixed order; the result is in thread 0.
template <class Value, int N, class Combine>
__device__ void combine_block(Value (&values)[N], const Combine& combine) {
  __shared__ Value warps[N][kThreads / kWarp];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      values[n] = combine(values[n], __shfl_down_sync(~0u, values[n], distance));
    if (threadIdx.x % kWarp == 0) warps[n][threadIdx.x / kWarp] = values[n];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int n = 0; n < N; ++n)
    for (int w = 1; w < kThreads / kWarp; ++w) values[n] = combine(values[n], warps[n][w]);
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls `launch(pass, width, blocks, box)` with as many cells a thread as divide a row and fill at most 16 bytes.
template <class T, Pass staggered, class Launch, int V = 16 / sizeof(T)>
void launch_flat(const Grid& grid, const T* input, const T* output, const Launch& launch) {
  const auto address = reinterpret_cast<uintptr_t>(input) | reinterpret_cast<uintptr_t>(output);
  if (grid.cells[2] % V != 0 || address % (V * sizeof(T)) != 0) {
    if constexpr (V > 1) launch_flat<T, staggered, Launch, V / 2>(grid, input, output, launch);
    return;
  }
  const Box box = make_box(grid, staggered == Pass::kMirror, V);
  const auto blocks = static_cast<unsigned>(grid.batch * box.blocks);
  const std::integral_constant<int, V> width;
  if (grid.central) launch(std::integral_constant<Pass, Pass::kCentral>(), width, blocks, box);
  else launch(std::integral_constant<Pass, staggered>(), width, blocks, box);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace shodh
