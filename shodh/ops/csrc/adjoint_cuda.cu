// The adjoint of the decode on a CUDA device: the mirrored stencil, and sums of the gradient in two fixed stages.
#include "flat_cuda.h"

namespace shodh {
namespace {

struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};

// `partial` takes the sums of each block, [B, 3, blocks of a sample]; null where no axis is periodic.
template <class T, Pass pass, int V>
__global__ void __launch_bounds__(kThreads)
    adjoint_kernel(const T* __restrict__ gradient, T* __restrict__ potential, double* __restrict__ partial,
                   const __grid_constant__ Box box, Inverse<arithmetic_t<T>> inverse) {
  using Value = arithmetic_t<T>;
  const Site<T, pass, V> site(box, blockIdx.x);
  double sums[3] = {};
  if (site.inside()) {
    const Stencil<T, V> stencil = site.read(gradient);
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      Pack<T, V> pack;
      Value sum(0);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        pack.value[v] = T(stencil.curl(c, v, inverse));
        sum += Value(stencil.own[c].value[v]);
      }
      site.write(potential, c, pack);
      sums[c] = sum;
    }
  }
  if (!partial) return;
  combine_block(sums, Sum());
  if (threadIdx.x != 0) return;
  const unsigned block = blockIdx.x - site.sample * box.blocks;
  for (int c = 0; c < 3; ++c) partial[(int64_t{site.sample} * 3 + c) * box.blocks + block] = sums[c];
}

// One block a sample and axis: the sum over its blocks.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const double* __restrict__ partial, T* harmonic, unsigned blocks,
                  const __grid_constant__ HarmonicColumns columns) {
  const int64_t sample = blockIdx.x / 3, column = columns.column[blockIdx.x % 3];
  if (column < 0) return;
  double sum[1] = {};
  for (unsigned b = threadIdx.x; b < blocks; b += kThreads) sum[0] += partial[int64_t{blockIdx.x} * blocks + b];
  combine_block(sum, Sum());
  if (threadIdx.x == 0) harmonic[sample * columns.count + column] = T(sum[0]);
}

std::tuple<Tensor, Tensor> adjoint_op(const Tensor& gradient, const std::vector<double>& spacing,
                                      const std::vector<bool>& walls, bool central) {
  const Grid grid = make_grid(gradient, false, spacing, walls, central);
  const torch::stable::accelerator::DeviceGuard guard(gradient.get_device_index());
  const HarmonicColumns columns = harmonic_columns(grid);
  const Tensor packed = torch::stable::contiguous(gradient);
  Tensor potential = torch::stable::new_empty(packed, field_shape(grid, grid.potentials()));
  Tensor harmonic = torch::stable::new_empty(packed, {grid.batch, columns.count});
  if (grid.batch == 0) return {potential, harmonic};
  const cudaStream_t stream = current_stream(gradient.get_device_index());
  with_type(gradient.scalar_type(), [&]<class T>(T) {
    const T* g = static_cast<const T*>(packed.const_data_ptr());
    T *a = static_cast<T*>(potential.mutable_data_ptr()), *h = static_cast<T*>(harmonic.mutable_data_ptr());
    launch_flat<T, Pass::kMirror>(grid, g, a, [&](auto pass, auto width, unsigned blocks, const Box& box) {
      Tensor partial = torch::stable::new_empty(packed, {columns.count ? 3 * int64_t{blocks} : 0}, ScalarType::Double);
      double* p = columns.count ? static_cast<double*>(partial.mutable_data_ptr()) : nullptr;
      SHODH_LAUNCH((adjoint_kernel<T, decltype(pass)::value, decltype(width)::value>), blocks, kThreads, stream, g, a, p,
                   box, Inverse<arithmetic_t<T>>(grid));
      if (p) {
        const auto sums = static_cast<unsigned>(3 * grid.batch);
        SHODH_LAUNCH((finish_kernel<T>), sums, kThreads, stream, p, h, box.blocks, columns);
      }
    });
  });
  return {potential, harmonic};
}

}  // namespace
}  // namespace shodh

STABLE_TORCH_LIBRARY_IMPL(shodh, CUDA, m) { m.impl("decode_adjoint", TORCH_BOX(&shodh::adjoint_op)); }
