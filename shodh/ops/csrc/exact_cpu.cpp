// The exact decode on the CPU: edge integrals and fluxes as integers held in doubles.
//
// The lattice needs the largest face flux before the first velocity can be written. To spare a second read of the
// potential, a few planes give a guess; the decode runs with it and measures the true maximum on its way, and only
// samples whose guess fell below a power of two are decoded again. The result does not depend on the guess.
#include "rows.h"

#include <cstring>

namespace shodh {
namespace {

struct ExactFactors {
  double edge[3];      // potential -> edge integral, in lattice steps
  double velocity[3];  // flux in lattice steps -> velocity
  double harmonic[3];  // in lattice steps
};

// The rows that one row of fluxes reads, and where the velocity goes (null: only the largest magnitude is wanted).
template <class T>
struct ExactRow {
  const T *x_high, *x_low, *y_high, *y_low;  // components x and y at the neighbours along z
  const T *xh_y, *xl_y, *xh_z, *xl_z, *yh_x, *yl_x, *yh_z, *yl_z;
  T *ux, *uy, *uz;
};

inline double round_to_lattice(double value) { return (value + kRounder) - kRounder; }

// Bits of |value| compare like the magnitude, with infinity and NaN above all numbers.
inline int64_t magnitude_bits(double value) {
  value = std::fabs(value);
  int64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double from_bits(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Decodes `n` cells and returns the bits of the largest of |flux| and |edge integral| * headroom, before rounding.
template <class T, bool write>
inline int64_t exact_cells(const ExactRow<T>& r, const ExactFactors& f, int64_t n) {
  constexpr double headroom = Lattice<T>::headroom;
  const double ex = f.edge[0], ey = f.edge[1], ez = f.edge[2];
  const double hx = f.harmonic[0], hy = f.harmonic[1], hz = f.harmonic[2];
  const double rx = round_to_lattice(hx), ry = round_to_lattice(hy), rz = round_to_lattice(hz);
  const double vx = f.velocity[0], vy = f.velocity[1], vz = f.velocity[2];
  T* SHODH_RESTRICT ux = r.ux;
  T* SHODH_RESTRICT uy = r.uy;
  T* SHODH_RESTRICT uz = r.uz;
  int64_t peak = 0;
#pragma GCC ivdep
  for (int64_t k = 0; k < n; ++k) {
    const double zh_x = r.x_high[k] * ex, zl_x = r.x_low[k] * ex, yh_x = r.yh_x[k] * ex, yl_x = r.yl_x[k] * ex;
    const double zh_y = r.y_high[k] * ey, zl_y = r.y_low[k] * ey, xh_y = r.xh_y[k] * ey, xl_y = r.xl_y[k] * ey;
    const double xh_z = r.xh_z[k] * ez, xl_z = r.xl_z[k] * ez, yh_z = r.yh_z[k] * ez, yl_z = r.yl_z[k] * ez;
    const int64_t bits[6] = {
        magnitude_bits((yh_z - yl_z) - (zh_y - zl_y) + hx), magnitude_bits((zh_x - zl_x) - (xh_z - xl_z) + hy),
        magnitude_bits((xh_y - xl_y) - (yh_x - yl_x) + hz), magnitude_bits(yh_x * headroom),
        magnitude_bits(xh_y * headroom),                    magnitude_bits(xh_z * headroom)};
    for (const int64_t b : bits) peak = b > peak ? b : peak;
    if constexpr (write) {
      const auto q = round_to_lattice;
      ux[k] = T((((q(yh_z) - q(yl_z)) - (q(zh_y) - q(zl_y))) + rx) * vx);
      uy[k] = T((((q(zh_x) - q(zl_x)) - (q(xh_z) - q(xl_z))) + ry) * vy);
      uz[k] = T((((q(xh_y) - q(xl_y)) - (q(yh_x) - q(yl_x))) + rz) * vz);
    }
  }
  return peak;
}

// Two dimensions: the stream function takes component z of the axes (x, y), here stored as x and z.
template <class T, bool write>
inline int64_t exact_stream_cells(const ExactRow<T>& r, const ExactFactors& f, int64_t n) {
  constexpr double headroom = Lattice<T>::headroom;
  const double e = f.edge[1];
  int64_t peak = 0;
  for (int64_t k = 0; k < n; ++k) {
    const double high = r.y_high[k] * e, low = r.y_low[k] * e, xh = r.xh_y[k] * e, xl = r.xl_y[k] * e;
    const int64_t bits[3] = {magnitude_bits((high - low) + f.harmonic[0]), magnitude_bits((xl - xh) + f.harmonic[2]),
                             magnitude_bits(xh * headroom)};
    for (const int64_t b : bits) peak = b > peak ? b : peak;
    if constexpr (write) {
      const auto q = round_to_lattice;
      r.ux[k] = T(((q(high) - q(low)) + q(f.harmonic[0])) * f.velocity[0]);
      r.uz[k] = T(((q(xl) - q(xh)) + q(f.harmonic[2])) * f.velocity[2]);
    }
  }
  return peak;
}

#define SHODH_EXACT_ROW(T, write)                                                                                     \
  SHODH_VECTORISED int64_t exact_row(const ExactRow<T>& r, const ExactFactors& f, int64_t n, bool plane,              \
                                     std::bool_constant<write>) {                                                     \
    return plane ? exact_stream_cells<T, write>(r, f, n) : exact_cells<T, write>(r, f, n);                            \
  }
SHODH_EXACT_ROW(float, true)
SHODH_EXACT_ROW(float, false)
SHODH_EXACT_ROW(double, true)
SHODH_EXACT_ROW(double, false)
#undef SHODH_EXACT_ROW

// One plane across x of one sample; `velocity` may be null. Returns the peak in lattice steps.
template <class T, Pass pass, bool write>
double exact_plane(const Grid& grid, const Rows<T, pass>& rows, T* velocity, const ExactFactors& f, int64_t i) {
  constexpr int hi = kHigh<pass>, lo = kLow<pass>;
  const int64_t ny = grid.cells[1], nz = grid.cells[2], volume = grid.volume();
  const std::bool_constant<write> tag{};
  int64_t peak = 0;
  for (int64_t j = 0; j < ny; ++j) {
    ExactRow<T> r{};
    const int only = grid.plane ? 0 : 1;  // channel of component y
    const T* y = rows(only, 1, i, j);
    r.xh_y = rows(only, 1, i + hi, j), r.xl_y = rows(only, 1, i + lo, j);
    const T* x = rows.zeros;
    if (!grid.plane) {
      x = rows(0, 0, i, j);
      r.xh_z = rows(2, 2, i + hi, j), r.xl_z = rows(2, 2, i + lo, j);
      r.yh_x = rows(0, 0, i, j + hi), r.yl_x = rows(0, 0, i, j + lo);
      r.yh_z = rows(2, 2, i, j + hi), r.yl_z = rows(2, 2, i, j + lo);
    }
    if (write) {
      r.ux = velocity + (i * ny + j) * nz;
      r.uz = r.ux + (grid.plane ? 1 : 2) * volume;
      r.uy = r.ux + volume;
    }
    const auto shifted = [&](int64_t k) {
      ExactRow<T> s = r;
      for (const T** p : {&s.xh_y, &s.xl_y, &s.xh_z, &s.xl_z, &s.yh_x, &s.yl_x, &s.yh_z, &s.yl_z})
        if (*p) *p += k;
      for (T** p : {&s.ux, &s.uy, &s.uz})
        if (*p) *p += k;
      return s;
    };
    for (int64_t k = 0; k < nz; k += std::max<int64_t>(nz - 1, 1)) {  // the ends wrap or meet a wall
      ExactRow<T> s = shifted(k);
      if (grid.wall[2] && k == nz - 1) s.xh_y = s.xl_y = s.yh_x = s.yl_x = rows.zeros;
      const T ends[4] = {rows.tangential(x, k + hi), rows.tangential(x, k + lo), rows.tangential(y, k + hi),
                         rows.tangential(y, k + lo)};
      s.x_high = ends, s.x_low = ends + 1, s.y_high = ends + 2, s.y_low = ends + 3;
      peak = std::max(peak, exact_row(s, f, 1, grid.plane, tag));
    }
    if (nz > 2) {
      ExactRow<T> s = shifted(1);
      s.x_high = x + 1 + hi, s.x_low = x + 1 + lo, s.y_high = y + 1 + hi, s.y_low = y + 1 + lo;
      peak = std::max(peak, exact_row(s, f, nz - 2, grid.plane, tag));
    }
  }
  return from_bits(peak);
}

struct Step {
  int exponent;
  bool finite;
};

// The lattice for the largest magnitude, rounded to the storage type first: see lattice_step in reference.py.
template <class T>
Step lattice_step(double peak) {
  const double stored = static_cast<double>(static_cast<T>(peak));
  if (!std::isfinite(stored)) return {0, false};
  int exponent = 0;
  std::frexp(stored * kDecodeGuard, &exponent);
  return {std::max(exponent - Lattice<T>::bits, Lattice<T>::floor), true};
}

template <class T>
class ExactDecode {
 public:
  ExactDecode(const Grid& grid, const T* potential, const T* harmonic, T* velocity, double* step)
      : grid_(grid), scales_(lattice_scales(grid)), columns_(harmonic_columns(grid)), potential_(potential),
        harmonic_(harmonic), velocity_(velocity), step_(step), zeros_(grid.cells[2], T(0)),
        steps_(grid.batch, Step{0, true}), pending_(grid.batch, true), peaks_(grid.batch * grid.cells[0], 0.0) {}

  template <Pass pass>
  void run() {
    // float64 measures the whole potential: a guess too small would leave the range of the rounding.
    const int64_t stride = std::is_same_v<T, double> ? 1 : std::min<int64_t>(8, grid_.cells[0]);
    sweep<pass, false>(stride);
    for (int64_t s = 0; s < grid_.batch; ++s) steps_[s] = lattice_step<T>(peak(s));
    for (int round = 0; round < 2; ++round) {
      sweep<pass, true>(1);
      for (int64_t s = 0; s < grid_.batch; ++s) {
        if (!pending_[s]) continue;
        const Step measured = steps_[s].finite ? lattice_step<T>(std::ldexp(peak(s), steps_[s].exponent)) : steps_[s];
        pending_[s] = measured.finite && measured.exponent != steps_[s].exponent;
        steps_[s] = measured;
      }
    }
    for (int64_t s = 0; s < grid_.batch; ++s) {
      constexpr double nan = std::numeric_limits<double>::quiet_NaN();
      step_[s] = steps_[s].finite ? std::ldexp(1.0, steps_[s].exponent) : nan;
      const int64_t size = grid_.components() * grid_.volume();
      if (!steps_[s].finite) std::fill_n(velocity_ + s * size, size, static_cast<T>(nan));
    }
  }

 private:
  ExactFactors factors(int64_t sample, bool in_steps) const {
    ExactFactors f{};
    const int exponent = in_steps ? steps_[sample].exponent : 0;
    for (int a = 0; a < 3; ++a) {
      f.edge[a] = std::ldexp(scales_.edge[a], -exponent);
      f.velocity[a] = std::ldexp(1.0, exponent) / scales_.area[a];
    }
    for (int c = 0; harmonic_ && c < grid_.components(); ++c) {
      if (columns_.column[c] < 0) continue;
      const double constant = harmonic_[sample * columns_.count + columns_.column[c]];
      f.harmonic[grid_.axis(c)] = std::ldexp(constant * scales_.area[grid_.axis(c)], -exponent);
    }
    return f;
  }

  // Visits every `stride`-th plane of the samples that are pending; with `write` it decodes them.
  template <Pass pass, bool write>
  void sweep(int64_t stride) {
    for_planes(grid_, [&](int64_t s, int64_t i) {
      double& peak = peaks_[s * grid_.cells[0] + i];
      if (!pending_[s] || (write && !steps_[s].finite)) return;
      peak = 0.0;
      if (i % stride != 0) return;
      const Rows<T, pass> rows{potential_ + s * grid_.potentials() * grid_.volume(), zeros_.data(), &grid_};
      T* out = velocity_ + s * grid_.components() * grid_.volume();
      peak = exact_plane<T, pass, write>(grid_, rows, out, factors(s, write), i);
    });
  }

  double peak(int64_t sample) const {
    double largest = 0.0;
    for (int64_t i = 0; i < grid_.cells[0]; ++i) {
      const double p = peaks_[sample * grid_.cells[0] + i];
      if (!(p <= largest)) largest = p;
      if (!std::isfinite(largest)) break;
    }
    return largest;
  }

  const Grid& grid_;
  const LatticeScales scales_;
  const HarmonicColumns columns_;
  const T* potential_;
  const T* harmonic_;
  T* velocity_;
  double* step_;
  const std::vector<T> zeros_;
  std::vector<Step> steps_;
  std::vector<char> pending_;
  std::vector<double> peaks_;  // largest magnitude of each plane
};

template <class T>
std::tuple<Tensor, Tensor> exact_typed(const Grid& grid, const Tensor& potential, const std::optional<Tensor>& harmonic) {
  Tensor velocity = torch::stable::new_empty(potential, field_shape(grid, grid.components()));
  Tensor step = torch::stable::new_empty(potential, {grid.batch}, ScalarType::Double);
  std::optional<Tensor> constants;
  if (harmonic.has_value()) constants = torch::stable::contiguous(*harmonic);
  ExactDecode<T> decode(grid, static_cast<const T*>(potential.const_data_ptr()),
                        constants ? static_cast<const T*>(constants->const_data_ptr()) : nullptr,
                        static_cast<T*>(velocity.mutable_data_ptr()), static_cast<double*>(step.mutable_data_ptr()));
  if (grid.central) decode.template run<Pass::kCentral>();
  else decode.template run<Pass::kForward>();
  return {velocity, step};
}

std::tuple<Tensor, Tensor> exact_op(const Tensor& potential, const std::optional<Tensor>& harmonic,
                                    const std::vector<double>& spacing, const std::vector<bool>& walls, bool central) {
  const Grid grid = make_grid(potential, true, spacing, walls, central);
  check_harmonic(harmonic, potential, grid);
  const Tensor packed = torch::stable::contiguous(potential);
  switch (potential.scalar_type()) {
    case ScalarType::Float: return exact_typed<float>(grid, packed, harmonic);
    case ScalarType::Double: return exact_typed<double>(grid, packed, harmonic);
    default: STD_TORCH_CHECK(false, "the exact decode stores float32 or float64");
  }
}

}  // namespace
}  // namespace shodh

STABLE_TORCH_LIBRARY_IMPL(shodh, CPU, m) { m.impl("decode_exact", TORCH_BOX(&shodh::exact_op)); }
