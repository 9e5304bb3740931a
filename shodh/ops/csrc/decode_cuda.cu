// The plain decode on a CUDA device.
#include "flat_cuda.h"

namespace shodh {
namespace {

template <class T, Pass pass, int V>
__global__ void __launch_bounds__(kThreads)
    decode_kernel(const T* __restrict__ potential, T* __restrict__ velocity, const T* __restrict__ harmonic,
                  const __grid_constant__ Box box, Inverse<arithmetic_t<T>> inverse, Constants columns) {
  const Site<T, pass, V> site(box, blockIdx.x);
  if (!site.inside()) return;
  arithmetic_t<T> constants[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) constants[c] = columns.of(harmonic, site.sample, c);
  const Stencil<T, V> stencil = site.read(potential);
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.value[v] = T(stencil.curl(c, v, inverse) + constants[c]);
    site.write(velocity, c, pack);
  }
}

Tensor decode_op(const Tensor& potential, const std::optional<Tensor>& harmonic, const std::vector<double>& spacing,
                 const std::vector<bool>& walls, bool central) {
  const Grid grid = make_grid(potential, true, spacing, walls, central);
  const torch::stable::accelerator::DeviceGuard guard(potential.get_device_index());
  const std::optional<Tensor> constants = packed_harmonic(harmonic, potential, grid);
  const Tensor packed = torch::stable::contiguous(potential);
  Tensor velocity = torch::stable::new_empty(packed, field_shape(grid, grid.components()));
  if (grid.batch == 0) return velocity;
  const cudaStream_t stream = current_stream(potential.get_device_index());
  with_type(potential.scalar_type(), [&]<class T>(T) {
    const T* a = static_cast<const T*>(packed.const_data_ptr());
    T* u = static_cast<T*>(velocity.mutable_data_ptr());
    launch_flat<T, Pass::kForward>(grid, a, u, [&](auto pass, auto width, unsigned blocks, const Box& box) {
      SHODH_LAUNCH((decode_kernel<T, decltype(pass)::value, decltype(width)::value>), blocks, kThreads, stream, a, u,
                   data_or_null<T>(constants), box, Inverse<arithmetic_t<T>>(grid), Constants(grid));
    });
  });
  return velocity;
}

}  // namespace
}  // namespace shodh

STABLE_TORCH_LIBRARY_IMPL(shodh, CUDA, m) { m.impl("decode", TORCH_BOX(&shodh::decode_op)); }
