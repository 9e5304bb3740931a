// The box a kernel runs on, in the kernels' own terms. Host code shared by the CPU and CUDA back ends.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace shodh {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// kForward: f[i] - f[i-1], the potential pinned at walls. kMirror: its adjoint, f[i+1] - f[i], the result pinned.
// kCentral: f[i+1] - f[i-1], its own adjoint up to sign.
enum class Pass { kForward, kMirror, kCentral };

template <Pass pass> constexpr int kHigh = pass == Pass::kForward ? 0 : 1;
template <Pass pass> constexpr int kLow = pass == Pass::kMirror ? 0 : -1;

// Arithmetic type of a storage type.
template <class T> struct Arithmetic { using type = float; };
template <> struct Arithmetic<double> { using type = double; };
template <class T> using arithmetic_t = typename Arithmetic<T>::type;

// A plane box is a 3-D box of one cell along y with the potential (0, -psi, 0): its axes are x and z.
struct Grid {
  int64_t batch = 0;
  int64_t cells[3] = {1, 1, 1};
  double spacing[3] = {1.0, 1.0, 1.0};
  bool wall[3] = {false, false, false};
  bool central = false;
  bool plane = false;

  int64_t volume() const { return cells[0] * cells[1] * cells[2]; }
  int64_t components() const { return plane ? 2 : 3; }      // of the velocity
  int64_t potentials() const { return plane ? 1 : 3; }
  int axis(int component) const { return plane ? 2 * component : component; }
  double inverse(int a) const { return (central ? 0.5 : 1.0) / spacing[a]; }
};

// `field` is the potential [B, 3 or 1, *grid] or the velocity [B, 3 or 2, *grid].
inline Grid make_grid(const Tensor& field, bool is_potential, const std::vector<double>& spacing,
                      const std::vector<bool>& walls, bool central) {
  const int64_t ndim = field.dim() - 2;
  STD_TORCH_CHECK(ndim == 2 || ndim == 3, "expected a field [B, C, X, Y, Z] or [B, C, X, Y], given rank ", field.dim());
  STD_TORCH_CHECK(static_cast<int64_t>(spacing.size()) == ndim && static_cast<int64_t>(walls.size()) == ndim,
                  "expected ", ndim, " spacings and walls, given ", spacing.size(), " and ", walls.size());
  Grid grid;
  grid.batch = field.size(0);
  grid.central = central;
  grid.plane = ndim == 2;
  for (int64_t d = 0; d < ndim; ++d) {
    const int a = grid.axis(static_cast<int>(d));
    grid.cells[a] = field.size(d + 2);
    grid.spacing[a] = spacing[d];
    grid.wall[a] = walls[d];
    STD_TORCH_CHECK(grid.cells[a] > 0, "expected at least one cell along every axis");
    STD_TORCH_CHECK(spacing[d] > 0 && std::isfinite(spacing[d]), "expected positive finite spacing");
    STD_TORCH_CHECK(!(central && walls[d]), "the central stencil needs periodic axes");
  }
  const int64_t channels = is_potential ? grid.potentials() : grid.components();
  STD_TORCH_CHECK(field.size(1) == channels, "expected ", channels, " channels, given ", field.size(1));
  return grid;
}

inline std::vector<int64_t> field_shape(const Grid& grid, int64_t channels) {
  if (grid.plane) return {grid.batch, channels, grid.cells[0], grid.cells[2]};
  return {grid.batch, channels, grid.cells[0], grid.cells[1], grid.cells[2]};
}

// Column of `harmonic` for the velocity along each axis; -1 where there is none.
struct HarmonicColumns {
  int64_t column[3] = {-1, -1, -1};
  int64_t count = 0;
};

inline HarmonicColumns harmonic_columns(const Grid& grid) {
  HarmonicColumns columns;
  for (int c = 0; c < grid.components(); ++c)
    if (!grid.wall[grid.axis(c)]) columns.column[grid.axis(c)] = columns.count++;
  return columns;
}

// The harmonic part, checked and contiguous.
inline std::optional<Tensor> packed_harmonic(const std::optional<Tensor>& harmonic, const Tensor& potential,
                                             const Grid& grid) {
  if (!harmonic.has_value()) return harmonic;
  STD_TORCH_CHECK(harmonic->scalar_type() == potential.scalar_type(), "expected harmonic of the potential's dtype");
  STD_TORCH_CHECK(harmonic->is_cpu() == potential.is_cpu() &&
                      harmonic->get_device_index() == potential.get_device_index(),
                  "expected harmonic on the potential's device");
  STD_TORCH_CHECK(harmonic->dim() == 2 && harmonic->size(0) == grid.batch &&
                      harmonic->size(1) == harmonic_columns(grid).count,
                  "expected harmonic [B, number of periodic axes]");
  return torch::stable::contiguous(*harmonic);
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// Calls `body` with a value of the storage type.
template <class Body>
auto with_wide_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    default: STD_TORCH_CHECK(false, "the exact decode stores float32 or float64");
  }
}

template <class Body>
auto with_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    case ScalarType::BFloat16: return body(BFloat16());
    case ScalarType::Half: return body(Half());
    default: STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

// How the exact decode turns the potential into integers and back; see reference.py for the reasons.
struct LatticeScales {
  double edge[3];  // potential -> edge integral whose differences are face fluxes
  double area[3];  // relative face areas, never below 1
};

inline LatticeScales lattice_scales(const Grid& grid) {
  LatticeScales scales{};
  double reference = 0.0;
  for (int c = 0; c < grid.components(); ++c) reference = std::max(reference, grid.spacing[grid.axis(c)]);
  const double half = grid.central ? 0.5 : 1.0;
  for (int a = 0; a < 3; ++a) {
    scales.area[a] = reference / grid.spacing[a];
    // A cyclic pair, in the order that reference.py multiplies.
    const double pair = grid.plane ? grid.spacing[0] * grid.spacing[2]
                                   : grid.spacing[(a + 1) % 3] * grid.spacing[(a + 2) % 3];
    scales.edge[a] = half * reference / pair;
  }
  return scales;
}

constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52: adding and subtracting it rounds |x| < 2^51 to an integer
constexpr double kDecodeGuard = 1.0 + 0x1p-17;

template <class T> struct Lattice;
template <> struct Lattice<float> {
  static constexpr int bits = 23, floor = -100;
  static constexpr double headroom = 0x1p-27;
};
template <> struct Lattice<double> {
  static constexpr int bits = 50, floor = -990;
  static constexpr double headroom = 1.0;
};

}  // namespace shodh
