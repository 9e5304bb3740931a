// The adjoint of the decode on a CUDA device: the mirrored stencil, and sums of the gradient in two fixed stages.
#include "march.cuh"

namespace shodh {
namespace {

// Sum over the threads of a block, in a fixed order; the result is valid in thread 0.
__device__ double block_sum(double value) {
  __shared__ double lanes[kThreads];
  lanes[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
    __syncthreads();
  }
  const double total = lanes[0];
  __syncthreads();
  return total;
}

template <class T>
struct AdjointPolicy {
  using Value = arithmetic_t<T>;
  static constexpr bool kWrites = true;

  Value inverse[3];
  double* partial;  // [blocks, 3], or null where no axis is periodic
  Value sums[3];

  __device__ void begin(int64_t) { sums[0] = sums[1] = sums[2] = Value(0); }
  __device__ Value value(int, T raw) const { return Value(raw); }
  __device__ void own(Value x, Value y, Value z) { sums[0] += x, sums[1] += y, sums[2] += z; }
  __device__ Value result(int c, Value first, Value second) const {
    return first * inverse[(c + 1) % 3] - second * inverse[(c + 2) % 3];
  }
  __device__ void end() const {
    if (!partial) return;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const double total = block_sum(static_cast<double>(sums[c]));
      if (threadIdx.x == 0) partial[static_cast<int64_t>(blockIdx.x) * 3 + c] = total;
    }
  }
};

struct Columns {
  int component[3];  // of each column
};

// One block a sample and periodic axis: sums the partial sums of its blocks.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const double* partial, T* harmonic, int64_t blocks,
                                                          int columns, Columns of) {
  const int64_t sample = blockIdx.x / columns;
  const int column = blockIdx.x % columns;
  double sum = 0.0;
  for (int64_t b = threadIdx.x; b < blocks; b += kThreads)
    sum += partial[(sample * blocks + b) * 3 + of.component[column]];
  sum = block_sum(sum);
  if (threadIdx.x == 0) harmonic[sample * columns + column] = T(sum);
}

template <class T>
std::tuple<Tensor, Tensor> adjoint_typed(const Grid& grid, const Tensor& gradient) {
  const int device = gradient.get_device_index();
  const HarmonicColumns columns = harmonic_columns(grid);
  Tensor potential = torch::stable::new_empty(gradient, field_shape(grid, grid.potentials()));
  Tensor harmonic = torch::stable::new_empty(gradient, {grid.batch, columns.count});
  const T* input = static_cast<const T*>(gradient.const_data_ptr());
  T* output = static_cast<T*>(potential.mutable_data_ptr());
  const int vector = vector_width<T>(grid, input, output);
  const March m = make_march(grid, true, vector, processor_count(device));
  const int64_t blocks = march_blocks(grid, m);
  if (blocks == 0) return {potential, harmonic};
  Tensor partial = torch::stable::new_empty(gradient, {blocks, 3}, ScalarType::Double);

  AdjointPolicy<T> policy{};
  for (int a = 0; a < 3; ++a) policy.inverse[a] = static_cast<arithmetic_t<T>>(grid.inverse(a));
  policy.partial = columns.count ? static_cast<double*>(partial.mutable_data_ptr()) : nullptr;
  const cudaStream_t stream = current_stream(device);
  if (grid.central) launch_march<T, Pass::kCentral>(grid, input, output, m, vector, policy, stream);
  else launch_march<T, Pass::kMirror>(grid, input, output, m, vector, policy, stream);
  if (columns.count == 0) return {potential, harmonic};

  Columns of{};
  for (int c = 0; c < grid.components(); ++c)
    if (columns.column[c] >= 0) of.component[columns.column[c]] = grid.axis(c);
  const auto count = static_cast<unsigned>(grid.batch * columns.count);
  SHODH_LAUNCH((finish_kernel<T>), count, kThreads, stream, policy.partial,
               static_cast<T*>(harmonic.mutable_data_ptr()), blocks / grid.batch, static_cast<int>(columns.count), of);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {potential, harmonic};
}

std::tuple<Tensor, Tensor> adjoint_op(const Tensor& gradient, const std::vector<double>& spacing,
                                      const std::vector<bool>& walls, bool central) {
  const Grid grid = make_grid(gradient, false, spacing, walls, central);
  const torch::stable::accelerator::DeviceGuard guard(gradient.get_device_index());
  const Tensor packed = torch::stable::contiguous(gradient);
  switch (gradient.scalar_type()) {
    case ScalarType::Float: return adjoint_typed<float>(grid, packed);
    case ScalarType::Double: return adjoint_typed<double>(grid, packed);
    case ScalarType::BFloat16: return adjoint_typed<BFloat16>(grid, packed);
    case ScalarType::Half: return adjoint_typed<Half>(grid, packed);
    default: STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace
}  // namespace shodh

STABLE_TORCH_LIBRARY_IMPL(shodh, CUDA, m) { m.impl("decode_adjoint", TORCH_BOX(&shodh::adjoint_op)); }
