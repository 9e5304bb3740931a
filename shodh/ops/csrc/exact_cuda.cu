// The exact decode on a CUDA device: one pass measures the largest flux, one writes. No synchronisation with the host.
#include "flat_cuda.h"

namespace shodh {
namespace {

using Bits = unsigned long long;

// Bits of a magnitude: infinity and NaN are larger than all numbers.
__device__ Bits magnitude_bits(double value) {
  return static_cast<Bits>(__double_as_longlong(value)) & 0x7fffffffffffffffull;
}

struct Largest {
  __device__ Bits operator()(Bits a, Bits b) const { return a > b ? a : b; }
};

// From potential to flux, as in reference.py; the one component of a plane potential is minus the stream function.
struct Fluxes {
  double edge[3], area[3];
  Constants columns;

  explicit Fluxes(const Grid& grid) : columns(grid) {
    const LatticeScales scales = lattice_scales(grid);
    for (int a = 0; a < 3; ++a) {
      edge[a] = grid.plane ? -scales.edge[a] : scales.edge[a];
      area[a] = scales.area[a];
    }
  }

  template <class T>
  __device__ double harmonic(const T* harmonic, unsigned sample, int c) const {
    return double(columns.of(harmonic, sample, c)) * area[c];
  }
};

// `peaks` [B], zero at first, takes the largest flux, or potential times its headroom, of each sample.
template <class T, Pass pass, int V>
__global__ void __launch_bounds__(kThreads)
    measure_kernel(const T* __restrict__ potential, const T* __restrict__ harmonic, Bits* peaks,
                   const __grid_constant__ Box box, const __grid_constant__ Fluxes fluxes) {
  const Site<T, pass, V> site(box, blockIdx.x);
  const Largest largest;
  Bits peak[1] = {};
  if (site.inside()) {
    double constants[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) constants[c] = fluxes.harmonic(harmonic, site.sample, c);
    const Stencil<T, V> stencil = site.read(potential);
    const auto edge = [&](int c, T raw) { return double(raw) * fluxes.edge[c]; };
#pragma unroll
    for (int c = 0; c < 3; ++c) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const auto d = stencil.differences(c, v, edge);
        const double own = edge(c, stencil.own[c].value[v]) * Lattice<T>::headroom;
        peak[0] = largest(peak[0], largest(magnitude_bits(own), magnitude_bits((d.first - d.second) + constants[c])));
      }
    }
  }
  combine_block(peak, largest);
  if (threadIdx.x == 0) atomicMax(peaks + site.sample, peak[0]);  // a maximum does not depend on the order
}

// Lattice step for the largest magnitude, NaN where that is not finite: lattice_step in reference.py.
template <class T>
__device__ double lattice_step(Bits peak) {
  const double stored = double(T(__longlong_as_double(static_cast<long long>(peak))));
  if (!(stored - stored == 0.0)) return __longlong_as_double(0x7ff8000000000000ll);
  int exponent = 0;
  frexp(stored * kDecodeGuard, &exponent);
  exponent -= Lattice<T>::bits;
  return ldexp(1.0, exponent < Lattice<T>::floor ? Lattice<T>::floor : exponent);
}

template <class T, Pass pass, int V>
__global__ void __launch_bounds__(kThreads)
    exact_kernel(const T* __restrict__ potential, const T* __restrict__ harmonic, const Bits* __restrict__ peaks,
                 T* __restrict__ velocity, double* __restrict__ step, const __grid_constant__ Box box,
                 const __grid_constant__ Fluxes fluxes) {
  // Backwards: what was measured last is still in the L2 cache.
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const Site<T, pass, V> site(box, block);
  Stencil<T, V> stencil;
  if (site.inside()) stencil = site.read(potential);
  __shared__ double edges[3], speeds[3], constants[3];  // in lattice steps
  if (threadIdx.x < 3) {
    const int c = threadIdx.x;
    const double quantum = lattice_step<T>(peaks[site.sample]);  // NaN spreads to every value
    edges[c] = fluxes.edge[c] / quantum;
    speeds[c] = quantum / fluxes.area[c];
    constants[c] = (fluxes.harmonic(harmonic, site.sample, c) / quantum + kRounder) - kRounder;
    if (c == 0 && block == site.sample * box.blocks) step[site.sample] = quantum;
  }
  __syncthreads();
  if (!site.inside()) return;
  // An integer plus kRounder, which the differences take out again.
  const auto edge = [&](int c, T raw) { return double(raw) * edges[c] + kRounder; };
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const auto d = stencil.differences(c, v, edge);
      pack.value[v] = T(((d.first - d.second) + constants[c]) * speeds[c]);
    }
    site.write(velocity, c, pack);
  }
}

std::tuple<Tensor, Tensor> exact_op(const Tensor& potential, const std::optional<Tensor>& harmonic,
                                    const std::vector<double>& spacing, const std::vector<bool>& walls, bool central) {
  const Grid grid = make_grid(potential, true, spacing, walls, central);
  const torch::stable::accelerator::DeviceGuard guard(potential.get_device_index());
  const std::optional<Tensor> constants = packed_harmonic(harmonic, potential, grid);
  const Tensor packed = torch::stable::contiguous(potential);
  Tensor velocity = torch::stable::new_empty(packed, field_shape(grid, grid.components()));
  Tensor step = torch::stable::new_empty(packed, {grid.batch}, ScalarType::Double);
  Tensor peaks = torch::stable::new_zeros(packed, {grid.batch}, ScalarType::Double);
  if (grid.batch == 0) return {velocity, step};
  const cudaStream_t stream = current_stream(potential.get_device_index());
  with_wide_type(potential.scalar_type(), [&]<class T>(T) {
    const T *a = static_cast<const T*>(packed.const_data_ptr()), *h = data_or_null<T>(constants);
    T* u = static_cast<T*>(velocity.mutable_data_ptr());
    auto* p = static_cast<Bits*>(peaks.mutable_data_ptr());
    auto* s = static_cast<double*>(step.mutable_data_ptr());
    const Fluxes fluxes(grid);
    launch_flat<T, Pass::kForward>(grid, a, u, [&](auto pass, auto width, unsigned blocks, const Box& box) {
      SHODH_LAUNCH((measure_kernel<T, decltype(pass)::value, decltype(width)::value>), blocks, kThreads, stream, a, h,
                   p, box, fluxes);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      SHODH_LAUNCH((exact_kernel<T, decltype(pass)::value, decltype(width)::value>), blocks, kThreads, stream, a, h, p,
                   u, s, box, fluxes);
    });
  });
  return {velocity, step};
}

}  // namespace
}  // namespace shodh

STABLE_TORCH_LIBRARY_IMPL(shodh, CUDA, m) { m.impl("decode_exact", TORCH_BOX(&shodh::exact_op)); }
