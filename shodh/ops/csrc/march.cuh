// The pattern all CUDA passes share: a thread owns V neighbouring cells along z and marches along x, so that it reads
// two components of its x neighbour once and keeps them. Neighbours along y and z come from the L1 and L2 caches.
//
// A Policy says what a loaded value becomes, what is done with the six differences of a cell, and what a block does
// when it ends; decode, adjoint and exact decode differ in nothing else.
#pragma once

#include "grid.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#ifndef SHODH_LAUNCH  // the tests run the kernels on the CPU by defining it
#define SHODH_LAUNCH(kernel, blocks, threads, stream, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace shodh {

enum class Pass { kForward, kMirror, kCentral };  // as in rows.h

constexpr int kThreads = 256;
constexpr int kLongestMarch = 16;

// Kernel arguments: sizes, walls, where the blocks lie, and which channel holds which component (-1: none, zero).
struct March {
  int64_t cells[3];
  int64_t tiles, chunks;  // blocks across (y, z), and along x
  int length;             // cells marched along x
  int in_channels, out_channels;
  int in[3], out[3];
  bool wall[3];
  bool negate_in, negate_out;  // a stream function is minus component y

  __device__ int64_t volume() const { return cells[0] * cells[1] * cells[2]; }
};

template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  T value[V];
};

// One thread's view of a sample.
template <class T, class Policy, Pass pass, int V>
struct Walker {
  using Value = typename Policy::Value;
  static constexpr int kHigh = pass == Pass::kForward ? 0 : 1;
  static constexpr int kLow = pass == Pass::kMirror ? 0 : -1;
  struct Values {
    Value v[V];
  };

  const T* input;
  T* output;
  const March& m;
  Policy& policy;
  int64_t j, k;

  __device__ bool outside(int axis, int component, int64_t index) const {
    if (!m.wall[axis]) return false;
    return index < 0 || index >= m.cells[axis] ||
           (pass == Pass::kForward && component != axis && index == m.cells[axis] - 1);
  }

  __device__ int64_t wrapped(int axis, int64_t index) const {
    return index < 0 ? index + m.cells[axis] : (index >= m.cells[axis] ? index - m.cells[axis] : index);
  }

  __device__ int64_t row(int channel, int64_t i, int64_t jj) const {
    return ((channel * m.cells[0] + wrapped(0, i)) * m.cells[1] + wrapped(1, jj)) * m.cells[2];
  }

  __device__ Value convert(int component, T raw) const {
    return policy.value(component, m.negate_in ? T(-arithmetic_t<T>(raw)) : raw);
  }

  // This thread's cells of a component, at (i, jj).
  __device__ Values load(int component, int64_t i, int64_t jj) const {
    Pack<T, V> raw{};
    const bool absent = m.in[component] < 0 || outside(0, component, i) || outside(1, component, jj);
    if (!absent) raw = *reinterpret_cast<const Pack<T, V>*>(input + row(m.in[component], i, jj) + k);
    Values values;
#pragma unroll
    for (int v = 0; v < V; ++v)
      values.v[v] = convert(component, outside(2, component, k + v) ? T(0) : raw.value[v]);
    return values;
  }

  // One cell beyond this thread's along z.
  __device__ Value load_beyond(int component, int64_t i, int64_t kk) const {
    const bool absent =
        m.in[component] < 0 || outside(0, component, i) || outside(1, component, j) || outside(2, component, kk);
    return convert(component, absent ? T(0) : input[row(m.in[component], i, j) + wrapped(2, kk)]);
  }

  __device__ void store(int component, int64_t i, const T (&values)[V]) const {
    if (m.out[component] < 0) return;
    const bool pinned_row = pass == Pass::kMirror && ((m.wall[0] && component != 0 && i == m.cells[0] - 1) ||
                                                      (m.wall[1] && component != 1 && j == m.cells[1] - 1));
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool pinned = pass == Pass::kMirror && m.wall[2] && component != 2 && k + v == m.cells[2] - 1;
      const T value = m.negate_out ? T(-arithmetic_t<T>(values[v])) : values[v];
      pack.value[v] = pinned_row || pinned ? T(0) : value;
    }
    *reinterpret_cast<Pack<T, V>*>(output + row(m.out[component], i, j) + k) = pack;
  }

  // The neighbours along z of this thread's cells.
  __device__ void along_z(int component, int64_t i, const Values& own, Values& high, Values& low) const {
    high = low = own;
    if constexpr (kHigh == 1) {
#pragma unroll
      for (int v = 0; v < V - 1; ++v) high.v[v] = own.v[v + 1];
      high.v[V - 1] = load_beyond(component, i, k + V);
    }
    if constexpr (kLow == -1) {
#pragma unroll
      for (int v = 1; v < V; ++v) low.v[v] = own.v[v - 1];
      low.v[0] = load_beyond(component, i, k - 1);
    }
  }

  __device__ void walk(int64_t begin, int64_t end) {
    Values y_below, z_below;
    Values y = load(1, begin, j), z = load(2, begin, j);
    if constexpr (kLow == -1) y_below = load(1, begin - 1, j), z_below = load(2, begin - 1, j);
    for (int64_t i = begin; i < end; ++i) {
      Values y_above = y, z_above = z;
      if (kHigh == 1 || i + 1 < end) y_above = load(1, i + 1, j), z_above = load(2, i + 1, j);
      const Values x = load(0, i, j);
      Values yh_x = x, yl_x = x, yh_z = z, yl_z = z, zh_x, zl_x, zh_y, zl_y;
      if constexpr (kHigh == 1) yh_x = load(0, i, j + 1), yh_z = load(2, i, j + 1);
      if constexpr (kLow == -1) yl_x = load(0, i, j - 1), yl_z = load(2, i, j - 1);
      along_z(0, i, x, zh_x, zl_x);
      along_z(1, i, y, zh_y, zl_y);
      const Values &xh_y = kHigh == 1 ? y_above : y, &xl_y = kLow == -1 ? y_below : y;
      const Values &xh_z = kHigh == 1 ? z_above : z, &xl_z = kLow == -1 ? z_below : z;
      T out[3][V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        policy.own(x.v[v], y.v[v], z.v[v]);
        out[0][v] = T(policy.result(0, yh_z.v[v] - yl_z.v[v], zh_y.v[v] - zl_y.v[v]));
        out[1][v] = T(policy.result(1, zh_x.v[v] - zl_x.v[v], xh_z.v[v] - xl_z.v[v]));
        out[2][v] = T(policy.result(2, xh_y.v[v] - xl_y.v[v], yh_x.v[v] - yl_x.v[v]));
      }
      if constexpr (Policy::kWrites)
        for (int c = 0; c < 3; ++c) store(c, i, out[c]);
      y_below = y, z_below = z;
      y = y_above, z = z_above;
    }
  }
};

template <class T, class Policy, Pass pass, int V>
__global__ void __launch_bounds__(kThreads) march_kernel(const T* __restrict__ input, T* __restrict__ output, March m,
                                                         Policy policy) {
  const int64_t tile = blockIdx.x % m.tiles;
  const int64_t block = blockIdx.x / m.tiles;  // of all chunks
  const int64_t sample = block / m.chunks, begin = (block % m.chunks) * m.length;
  const int64_t vectors = m.cells[2] / V, lane = tile * kThreads + threadIdx.x;
  policy.begin(sample);
  if (lane < m.cells[1] * vectors) {
    const int64_t end = begin + m.length < m.cells[0] ? begin + m.length : m.cells[0];
    Walker<T, Policy, pass, V> walker{input + sample * m.in_channels * m.volume(),
                                      output + sample * m.out_channels * m.volume(), m, policy, lane / vectors,
                                      (lane % vectors) * V};
    walker.walk(begin, end);
  }
  policy.end();
}

inline March make_march(const Grid& grid, bool mirror, int vector, int processors) {
  March m{};
  for (int a = 0; a < 3; ++a) {
    m.cells[a] = grid.cells[a];
    m.wall[a] = grid.wall[a];
    const int velocity = grid.plane ? a / 2 : a, potential = grid.plane ? 0 : a;
    const bool has_velocity = !grid.plane || a != 1, has_potential = !grid.plane || a == 1;
    m.in[a] = mirror ? (has_velocity ? velocity : -1) : (has_potential ? potential : -1);
    m.out[a] = mirror ? (has_potential ? potential : -1) : (has_velocity ? velocity : -1);
  }
  m.in_channels = static_cast<int>(mirror ? grid.components() : grid.potentials());
  m.out_channels = static_cast<int>(mirror ? grid.potentials() : grid.components());
  m.negate_in = grid.plane && !mirror;
  m.negate_out = grid.plane && mirror;
  m.tiles = (grid.cells[1] * (grid.cells[2] / vector) + kThreads - 1) / kThreads;
  m.length = kLongestMarch;
  // Short marches where there would be too few blocks to fill the device several times over.
  const auto blocks = [&] { return grid.batch * m.tiles * ((grid.cells[0] + m.length - 1) / m.length); };
  while (m.length > 1 && blocks() < 32 * processors) m.length /= 2;
  m.chunks = (grid.cells[0] + m.length - 1) / m.length;
  return m;
}

inline int64_t march_blocks(const Grid& grid, const March& m) { return grid.batch * m.tiles * m.chunks; }

inline int processor_count(int device) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Cells that a thread loads at once: 16 bytes, or one where rows are not aligned.
template <class T>
int vector_width(const Grid& grid, const void* input, const void* output) {
  constexpr int widest = sizeof(T) == 8 ? 2 : 4;
  const auto address = reinterpret_cast<uintptr_t>(input) | reinterpret_cast<uintptr_t>(output);
  return grid.cells[2] % widest == 0 && address % (widest * sizeof(T)) == 0 ? widest : 1;
}

template <class T, Pass pass, class Policy>
void launch_march(const Grid& grid, const T* input, T* output, const March& m, int vector, const Policy& policy,
                  cudaStream_t stream) {
  const int64_t blocks = march_blocks(grid, m);
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "the field is too large for one launch");
  constexpr int widest = sizeof(T) == 8 ? 2 : 4;
  const auto count = static_cast<unsigned>(blocks);
  if (vector == widest) {
    SHODH_LAUNCH((march_kernel<T, Policy, pass, widest>), count, kThreads, stream, input, output, m, policy);
  } else {
    SHODH_LAUNCH((march_kernel<T, Policy, pass, 1>), count, kThreads, stream, input, output, m, policy);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace shodh
