// The exact decode on a CUDA device: one pass measures the largest flux, one writes. No synchronisation with the host.
#include "march.cuh"

namespace shodh {
namespace {

using Bits = unsigned long long;

// The factors of one sample; `step` is 1 while fluxes are measured.
struct FluxFactors {
  double edge[3], area[3];
  int columns, column[3];
};

template <class T>
__device__ void harmonic_fluxes(const FluxFactors& f, const T* harmonic, int64_t sample, double (&flux)[3]) {
#pragma unroll
  for (int c = 0; c < 3; ++c)
    flux[c] = harmonic && f.column[c] >= 0 ? double(harmonic[sample * f.columns + f.column[c]]) * f.area[c] : 0.0;
}

// Bits of a magnitude: infinity and NaN are larger than all numbers.
__device__ Bits magnitude_bits(double value) {
  return static_cast<Bits>(__double_as_longlong(value)) & 0x7fffffffffffffffull;
}

template <class T>
struct MeasurePolicy {
  using Value = double;
  static constexpr bool kWrites = false;

  FluxFactors factors;
  const T* harmonic;
  Bits* peaks;  // [B], zero at first
  int64_t sample;
  double constant[3];
  Bits peak;

  __device__ void begin(int64_t s) {
    sample = s, peak = 0;
    harmonic_fluxes(factors, harmonic, s, constant);
  }
  __device__ Value value(int c, T raw) const { return double(raw) * factors.edge[c]; }
  __device__ void keep(double magnitude) {
    const Bits bits = magnitude_bits(magnitude);
    if (bits > peak) peak = bits;
  }
  __device__ void own(Value x, Value y, Value z) {
    constexpr double headroom = Lattice<T>::headroom;
    keep(x * headroom), keep(y * headroom), keep(z * headroom);
  }
  __device__ Value result(int c, Value first, Value second) {
    keep((first - second) + constant[c]);
    return 0.0;
  }
  __device__ void end() const {  // a maximum does not depend on the order
    __shared__ Bits lanes[kThreads];
    lanes[threadIdx.x] = peak;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (static_cast<int>(threadIdx.x) < half && lanes[threadIdx.x + half] > lanes[threadIdx.x])
        lanes[threadIdx.x] = lanes[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) atomicMax(peaks + sample, lanes[0]);
  }
};

// The lattice step of each sample, NaN where it is not finite: lattice_step in reference.py.
template <class T>
__global__ void step_kernel(const Bits* peaks, double* step, int64_t batch) {
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (sample >= batch) return;
  const double stored = double(T(__longlong_as_double(static_cast<long long>(peaks[sample]))));
  int exponent = 0;
  frexp(stored * kDecodeGuard, &exponent);
  exponent -= Lattice<T>::bits;
  if (exponent < Lattice<T>::floor) exponent = Lattice<T>::floor;
  const bool finite = stored - stored == 0.0;
  step[sample] = finite ? ldexp(1.0, exponent) : __longlong_as_double(0x7ff8000000000000ll);
}

template <class T>
struct ExactPolicy {
  using Value = double;  // an integer plus kRounder, which the differences take out again
  static constexpr bool kWrites = true;

  FluxFactors factors;
  const T* harmonic;
  const double* step;  // [B]
  double edge[3], velocity[3], constant[3];

  __device__ void begin(int64_t sample) {
    const double quantum = step[sample];  // NaN spreads to every value
    harmonic_fluxes(factors, harmonic, sample, constant);
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      edge[c] = factors.edge[c] / quantum;
      velocity[c] = quantum / factors.area[c];
      constant[c] = (constant[c] / quantum + kRounder) - kRounder;
    }
  }
  __device__ Value value(int c, T raw) const { return double(raw) * edge[c] + kRounder; }
  __device__ void own(Value, Value, Value) const {}
  __device__ Value result(int c, Value first, Value second) const {
    return ((first - second) + constant[c]) * velocity[c];
  }
  __device__ void end() const {}
};

template <class T, Pass pass>
void exact_passes(const Grid& grid, const T* potential, const T* harmonic, T* velocity, Bits* peaks, double* step,
                  int device) {
  FluxFactors factors{};
  const LatticeScales scales = lattice_scales(grid);
  const HarmonicColumns columns = harmonic_columns(grid);
  factors.columns = static_cast<int>(columns.count);
  for (int a = 0; a < 3; ++a) {
    factors.edge[a] = scales.edge[a];
    factors.area[a] = scales.area[a];
    factors.column[a] = -1;
  }
  for (int c = 0; c < grid.components(); ++c) factors.column[grid.axis(c)] = static_cast<int>(columns.column[c]);

  const int vector = vector_width<T>(grid, potential, velocity);
  const March m = make_march(grid, false, vector, processor_count(device));
  const cudaStream_t stream = current_stream(device);
  MeasurePolicy<T> measure{};
  measure.factors = factors, measure.harmonic = harmonic, measure.peaks = peaks;
  launch_march<T, pass>(grid, potential, velocity, m, vector, measure, stream);
  const auto blocks = static_cast<unsigned>((grid.batch + kThreads - 1) / kThreads);
  SHODH_LAUNCH((step_kernel<T>), blocks, kThreads, stream, peaks, step, grid.batch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  ExactPolicy<T> exact{};
  exact.factors = factors, exact.harmonic = harmonic, exact.step = step;
  launch_march<T, pass>(grid, potential, velocity, m, vector, exact, stream);
}

template <class T>
std::tuple<Tensor, Tensor> exact_typed(const Grid& grid, const Tensor& potential, const std::optional<Tensor>& harmonic) {
  Tensor velocity = torch::stable::new_empty(potential, field_shape(grid, grid.components()));
  Tensor step = torch::stable::new_empty(potential, {grid.batch}, ScalarType::Double);
  if (grid.batch == 0) return {velocity, step};
  Tensor peaks = torch::stable::new_zeros(potential, {grid.batch}, ScalarType::Double);
  std::optional<Tensor> constants;
  if (harmonic.has_value()) constants = torch::stable::contiguous(*harmonic);
  const T* a = static_cast<const T*>(potential.const_data_ptr());
  const T* h = constants ? static_cast<const T*>(constants->const_data_ptr()) : nullptr;
  T* u = static_cast<T*>(velocity.mutable_data_ptr());
  auto* p = static_cast<Bits*>(peaks.mutable_data_ptr());
  auto* s = static_cast<double*>(step.mutable_data_ptr());
  const int device = potential.get_device_index();
  if (grid.central) exact_passes<T, Pass::kCentral>(grid, a, h, u, p, s, device);
  else exact_passes<T, Pass::kForward>(grid, a, h, u, p, s, device);
  return {velocity, step};
}

std::tuple<Tensor, Tensor> exact_op(const Tensor& potential, const std::optional<Tensor>& harmonic,
                                    const std::vector<double>& spacing, const std::vector<bool>& walls, bool central) {
  const Grid grid = make_grid(potential, true, spacing, walls, central);
  check_harmonic(harmonic, potential, grid);
  const torch::stable::accelerator::DeviceGuard guard(potential.get_device_index());
  const Tensor packed = torch::stable::contiguous(potential);
  switch (potential.scalar_type()) {
    case ScalarType::Float: return exact_typed<float>(grid, packed, harmonic);
    case ScalarType::Double: return exact_typed<double>(grid, packed, harmonic);
    default: STD_TORCH_CHECK(false, "the exact decode stores float32 or float64");
  }
}

}  // namespace
}  // namespace shodh

STABLE_TORCH_LIBRARY_IMPL(shodh, CUDA, m) { m.impl("decode_exact", TORCH_BOX(&shodh::exact_op)); }
