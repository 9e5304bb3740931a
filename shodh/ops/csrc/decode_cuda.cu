// The plain decode on a CUDA device.
#include "march.cuh"

namespace shodh {
namespace {

template <class T>
struct DecodePolicy {
  using Value = arithmetic_t<T>;
  static constexpr bool kWrites = true;

  Value inverse[3];
  const T* harmonic;  // [B, periodic axes], or null
  int columns, column[3];
  Value constant[3];

  __device__ void begin(int64_t sample) {
#pragma unroll
    for (int c = 0; c < 3; ++c)
      constant[c] = harmonic && column[c] >= 0 ? Value(harmonic[sample * columns + column[c]]) : Value(0);
  }
  __device__ Value value(int, T raw) const { return Value(raw); }
  __device__ void own(Value, Value, Value) const {}
  // Component c from the differences along the next axis and the one after it.
  __device__ Value result(int c, Value first, Value second) const {
    return (first * inverse[(c + 1) % 3] - second * inverse[(c + 2) % 3]) + constant[c];
  }
  __device__ void end() const {}
};

template <class T>
Tensor decode_typed(const Grid& grid, const Tensor& potential, const std::optional<Tensor>& harmonic) {
  const int device = potential.get_device_index();
  Tensor velocity = torch::stable::new_empty(potential, field_shape(grid, grid.components()));
  std::optional<Tensor> constants;
  if (harmonic.has_value()) constants = torch::stable::contiguous(*harmonic);
  const T* input = static_cast<const T*>(potential.const_data_ptr());
  T* output = static_cast<T*>(velocity.mutable_data_ptr());

  DecodePolicy<T> policy{};
  const HarmonicColumns columns = harmonic_columns(grid);
  policy.columns = static_cast<int>(columns.count);
  policy.harmonic = constants ? static_cast<const T*>(constants->const_data_ptr()) : nullptr;
  for (int a = 0; a < 3; ++a) {
    policy.inverse[a] = static_cast<arithmetic_t<T>>(grid.inverse(a));
    policy.column[a] = -1;
  }
  for (int c = 0; c < grid.components(); ++c) policy.column[grid.axis(c)] = static_cast<int>(columns.column[c]);

  const int vector = vector_width<T>(grid, input, output);
  const March m = make_march(grid, false, vector, processor_count(device));
  const cudaStream_t stream = current_stream(device);
  if (grid.central) launch_march<T, Pass::kCentral>(grid, input, output, m, vector, policy, stream);
  else launch_march<T, Pass::kForward>(grid, input, output, m, vector, policy, stream);
  return velocity;
}

Tensor decode_op(const Tensor& potential, const std::optional<Tensor>& harmonic, const std::vector<double>& spacing,
                 const std::vector<bool>& walls, bool central) {
  const Grid grid = make_grid(potential, true, spacing, walls, central);
  check_harmonic(harmonic, potential, grid);
  const torch::stable::accelerator::DeviceGuard guard(potential.get_device_index());
  const Tensor packed = torch::stable::contiguous(potential);
  switch (potential.scalar_type()) {
    case ScalarType::Float: return decode_typed<float>(grid, packed, harmonic);
    case ScalarType::Double: return decode_typed<double>(grid, packed, harmonic);
    case ScalarType::BFloat16: return decode_typed<BFloat16>(grid, packed, harmonic);
    case ScalarType::Half: return decode_typed<Half>(grid, packed, harmonic);
    default: STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace
}  // namespace shodh

STABLE_TORCH_LIBRARY_IMPL(shodh, CUDA, m) { m.impl("decode", TORCH_BOX(&shodh::decode_op)); }
