// The exact decode on the CPU: edge integrals and fluxes as integers held in doubles.
//
// The lattice needs the largest face flux before the first velocity can be written. To spare a second read of the
// potential, a few planes give a guess; the decode runs with it and bounds the true maximum on its way. Only samples
// whose guess fell below a power of two, or whose bounds enclose one, are measured in full and decoded again where
// the guess was wrong. The result never depends on the guess.
//
// Where the edge integrals are the potential times a power of two, and no more than 2^28 steps, 32-bit integers hold
// them, which is twice as fast; the result is the same.
#include "rows.h"

#include <cstring>

namespace shodh {
namespace {

enum class Mode { kMeasure, kDecode, kDecodeWhole };

constexpr double kWholeLimit = 0x1p28;

struct ExactFactors {
  double edge[3];      // potential -> edge integral, in lattice steps
  double velocity[3];  // flux in lattice steps -> velocity
  double harmonic[3];  // in lattice steps
  double rounded[3];   // the same, whole steps
};

// The rows that one row of fluxes reads, and where the velocity goes (null: only the largest magnitude is wanted).
template <class T>
struct ExactRow {
  const T *x_high, *x_low, *y_high, *y_low;  // components x and y at the neighbours along z
  const T *xh_y, *xl_y, *xh_z, *xl_z, *yh_x, *yl_x, *yh_z, *yl_z;
  T *ux, *uy, *uz;

  ExactRow shifted(int64_t k) const {
    ExactRow s = *this;
    for (const T** p : {&s.xh_y, &s.xl_y, &s.xh_z, &s.xl_z, &s.yh_x, &s.yl_x, &s.yh_z, &s.yl_z}) *p += k;
    for (T** p : {&s.ux, &s.uy, &s.uz}) *p += k;
    return s;
  }
};

// A plane box reads component y alone; the others point at zeros and are not used.
template <class T, Pass pass>
ExactRow<T> exact_row(const Grid& grid, const Rows<T, pass>& rows, T* velocity, int64_t i, int64_t j) {
  constexpr int hi = kHigh<pass>, lo = kLow<pass>;
  ExactRow<T> r{};
  const int channel = grid.plane ? 0 : 1;
  r.xh_y = rows(channel, 1, i + hi, j), r.xl_y = rows(channel, 1, i + lo, j);
  r.xh_z = r.xl_z = r.yh_x = r.yl_x = r.yh_z = r.yl_z = rows.zeros;
  if (!grid.plane) {
    r.xh_z = rows(2, 2, i + hi, j), r.xl_z = rows(2, 2, i + lo, j);
    r.yh_x = rows(0, 0, i, j + hi), r.yl_x = rows(0, 0, i, j + lo);
    r.yh_z = rows(2, 2, i, j + hi), r.yl_z = rows(2, 2, i, j + lo);
  }
  r.ux = velocity + (i * grid.cells[1] + j) * grid.cells[2];
  r.uy = r.ux + grid.volume();
  r.uz = r.ux + (grid.components() - 1) * grid.volume();
  return r;
}

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

// Sums of differences, before rounding or of integers. In the forward pass the higher neighbour is the node itself.
template <Pass pass, class T, class Edge>
inline void flux_cell(const ExactRow<T>& r, const Edge& ex, const Edge& ey, const Edge& ez, int64_t k, double& fx,
                      double& fy, double& fz) {
  constexpr bool own = pass == Pass::kForward;
  const double zh_x = ex(r.x_high[k]), zl_x = ex(r.x_low[k]), yh_x = own ? zh_x : ex(r.yh_x[k]), yl_x = ex(r.yl_x[k]);
  const double zh_y = ey(r.y_high[k]), zl_y = ey(r.y_low[k]), xh_y = own ? zh_y : ey(r.xh_y[k]), xl_y = ey(r.xl_y[k]);
  const double xh_z = ez(r.xh_z[k]), xl_z = ez(r.xl_z[k]), yh_z = own ? xh_z : ez(r.yh_z[k]), yl_z = ez(r.yl_z[k]);
  fx = (yh_z - yl_z) - (zh_y - zl_y);
  fy = (zh_x - zl_x) - (xh_z - xl_z);
  fz = (xh_y - xl_y) - (yh_x - yl_x);
}

struct Scaled {
  double factor;
  double operator()(double value) const { return value * factor; }
};

// Rounded to an integer plus kRounder, which the differences take out again.
struct Rounded {
  double factor;
  double operator()(double value) const { return value * factor + kRounder; }
};

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Bits of the largest |flux| before rounding.
template <class T, Pass pass>
inline int64_t measure_cells(const ExactRow<T>& r, const ExactFactors& f, int64_t n) {
  const Scaled ex{f.edge[0]}, ey{f.edge[1]}, ez{f.edge[2]};
  int64_t peak = 0;
  for (int64_t k = 0; k < n; ++k) {
    double fx, fy, fz;
    flux_cell<pass>(r, ex, ey, ez, k, fx, fy, fz);
    peak = larger(peak, magnitude_bits(fx + f.harmonic[0]));
    peak = larger(peak, magnitude_bits(fy + f.harmonic[1]));
    peak = larger(peak, magnitude_bits(fz + f.harmonic[2]));
  }
  return peak;
}

// Decodes, and returns the bits of the largest |flux| after rounding.
template <class T, Pass pass>
inline int64_t decode_cells(const ExactRow<T>& r, const ExactFactors& f, int64_t n) {
  const Rounded ex{f.edge[0]}, ey{f.edge[1]}, ez{f.edge[2]};
  const double hx = f.rounded[0], hy = f.rounded[1], hz = f.rounded[2];
  const double vx = f.velocity[0], vy = f.velocity[1], vz = f.velocity[2];
  T* SHODH_RESTRICT ux = r.ux;
  T* SHODH_RESTRICT uy = r.uy;
  T* SHODH_RESTRICT uz = r.uz;
  const ExactRow<T> in = r;
  int64_t peak = 0;
#pragma GCC ivdep
  for (int64_t k = 0; k < n; ++k) {
    double fx, fy, fz;
    flux_cell<pass>(in, ex, ey, ez, k, fx, fy, fz);
    fx += hx, fy += hy, fz += hz;
    peak = larger(peak, larger(magnitude_bits(fx), larger(magnitude_bits(fy), magnitude_bits(fz))));
    ux[k] = T(fx * vx);
    uy[k] = T(fy * vy);
    uz[k] = T(fz * vz);
  }
  return peak;
}

// The same with 32-bit integers: edge integrals below kWholeLimit steps cannot make the sums wrap round.
template <class T, Pass pass>
inline int32_t whole_cells(const ExactRow<T>& r, const ExactFactors& f, int64_t n) {
  constexpr bool own = pass == Pass::kForward;
  const float ex = float(f.edge[0]), ey = float(f.edge[1]), ez = float(f.edge[2]);
  const int32_t hx = int32_t(f.rounded[0]), hy = int32_t(f.rounded[1]), hz = int32_t(f.rounded[2]);
  const float vx = float(f.velocity[0]), vy = float(f.velocity[1]), vz = float(f.velocity[2]);
#ifdef __clang__
  const auto whole = [](float value, float factor) { return static_cast<int32_t>(__builtin_rintf(value * factor)); };
#else
  const auto whole = [](float value, float factor) { return __builtin_irintf(value * factor); };
#endif
  T* SHODH_RESTRICT ux = r.ux;
  T* SHODH_RESTRICT uy = r.uy;
  T* SHODH_RESTRICT uz = r.uz;
  const ExactRow<T> in = r;
  int32_t peak = 0;
#pragma GCC ivdep
  for (int64_t k = 0; k < n; ++k) {
    const int32_t zh_x = whole(in.x_high[k], ex), zl_x = whole(in.x_low[k], ex), yl_x = whole(in.yl_x[k], ex);
    const int32_t zh_y = whole(in.y_high[k], ey), zl_y = whole(in.y_low[k], ey), xl_y = whole(in.xl_y[k], ey);
    const int32_t xh_z = whole(in.xh_z[k], ez), xl_z = whole(in.xl_z[k], ez), yl_z = whole(in.yl_z[k], ez);
    const int32_t yh_x = own ? zh_x : whole(in.yh_x[k], ex), xh_y = own ? zh_y : whole(in.xh_y[k], ey);
    const int32_t yh_z = own ? xh_z : whole(in.yh_z[k], ez);
    const int32_t fx = (yh_z - yl_z) - (zh_y - zl_y) + hx;
    const int32_t fy = (zh_x - zl_x) - (xh_z - xl_z) + hy;
    const int32_t fz = (xh_y - xl_y) - (yh_x - yl_x) + hz;
    peak = std::max(peak, std::max(std::abs(fx), std::max(std::abs(fy), std::abs(fz))));
    ux[k] = T(float(fx) * vx);
    uy[k] = T(float(fy) * vy);
    uz[k] = T(float(fz) * vz);
  }
  return peak;
}

// Two dimensions: the fluxes are D_z psi and -D_x psi.
template <class T, Mode mode>
inline int64_t stream_cells(const ExactRow<T>& r, const ExactFactors& f, int64_t n) {
  constexpr bool write = mode != Mode::kMeasure;
  int64_t peak = 0;
  const auto cells = [&](const auto& edge, const double (&harmonic)[3]) {
    for (int64_t k = 0; k < n; ++k) {
      const double fx = (edge(r.y_high[k]) - edge(r.y_low[k])) + harmonic[0];
      const double fz = (edge(r.xl_y[k]) - edge(r.xh_y[k])) + harmonic[2];
      peak = larger(peak, larger(magnitude_bits(fx), magnitude_bits(fz)));
      if constexpr (write) {
        r.ux[k] = T(fx * f.velocity[0]);
        r.uz[k] = T(fz * f.velocity[2]);
      }
    }
  };
  if constexpr (write) cells(Rounded{f.edge[1]}, f.rounded);
  else cells(Scaled{f.edge[1]}, f.harmonic);
  return peak;
}

// Bits of the largest |flux|.
template <class T, Pass pass, Mode mode>
inline int64_t flux_row_body(const ExactRow<T>& r, const ExactFactors& f, int64_t n, bool plane) {
  if (plane) return stream_cells<T, mode>(r, f, n);
  if constexpr (mode == Mode::kMeasure) return measure_cells<T, pass>(r, f, n);
  if constexpr (mode == Mode::kDecodeWhole) return magnitude_bits(whole_cells<T, pass>(r, f, n));
  return decode_cells<T, pass>(r, f, n);
}

#define SHODH_FLUX_ROW(T, pass, mode)                                                                                 \
  SHODH_VECTORISED int64_t flux_row(const ExactRow<T>& r, const ExactFactors& f, int64_t n, bool plane,               \
                                    std::integral_constant<Pass, Pass::pass>, std::integral_constant<Mode, Mode::mode>) { \
    return flux_row_body<T, Pass::pass, Mode::mode>(r, f, n, plane);                                                  \
  }
SHODH_FLUX_ROW(float, kForward, kMeasure)
SHODH_FLUX_ROW(float, kForward, kDecode)
SHODH_FLUX_ROW(float, kForward, kDecodeWhole)
SHODH_FLUX_ROW(float, kCentral, kMeasure)
SHODH_FLUX_ROW(float, kCentral, kDecode)
SHODH_FLUX_ROW(float, kCentral, kDecodeWhole)
SHODH_FLUX_ROW(double, kForward, kMeasure)
SHODH_FLUX_ROW(double, kForward, kDecode)
SHODH_FLUX_ROW(double, kCentral, kMeasure)
SHODH_FLUX_ROW(double, kCentral, kDecode)
#undef SHODH_FLUX_ROW

SHODH_VECTORISED double row_magnitude(const float* row, int64_t n) {
  int32_t peak = 0;
  for (int64_t k = 0; k < n; ++k) {
    int32_t bits;
    std::memcpy(&bits, row + k, sizeof bits);
    bits &= 0x7fffffff;
    peak = bits > peak ? bits : peak;
  }
  float value;
  std::memcpy(&value, &peak, sizeof value);
  return value;
}

SHODH_VECTORISED double row_magnitude(const double* row, int64_t n) {
  int64_t peak = 0;
  for (int64_t k = 0; k < n; ++k) peak = larger(peak, magnitude_bits(row[k]));
  return from_bits(peak);
}

// The larger of two magnitudes; infinity and NaN win.
inline double larger_magnitude(double a, double b) { return from_bits(larger(magnitude_bits(a), magnitude_bits(b))); }

struct Peak {
  double flux = 0.0;  // largest |face flux|
  double edge = 0.0;  // largest |edge integral| * headroom
};

// One plane across x of one sample, in lattice steps; `velocity` is not touched by kMeasure.
template <class T, Pass pass, Mode mode>
Peak exact_plane(const Grid& grid, const Rows<T, pass>& rows, T* velocity, const ExactFactors& f, int64_t i) {
  constexpr int hi = kHigh<pass>, lo = kLow<pass>;
  const int64_t ny = grid.cells[1], nz = grid.cells[2];
  const std::integral_constant<Pass, pass> stencil{};
  const std::integral_constant<Mode, mode> tag{};
  int64_t flux = 0;
  Peak peak;
  for (int64_t j = 0; j < ny; ++j) {
    const T *x = grid.plane ? rows.zeros : rows(0, 0, i, j), *y = rows(grid.plane ? 0 : 1, 1, i, j);
    const T* z = grid.plane ? rows.zeros : rows(2, 2, i, j);
    const ExactRow<T> row = exact_row(grid, rows, velocity, i, j);
    for (int64_t k = 0; k < nz; k += std::max<int64_t>(nz - 1, 1)) {  // the ends wrap or meet a wall
      ExactRow<T> end = row.shifted(k);
      if (grid.wall[2] && k == nz - 1) end.xh_y = end.xl_y = end.yh_x = end.yl_x = rows.zeros;
      const T ends[4] = {rows.tangential(x, k + hi), rows.tangential(x, k + lo), rows.tangential(y, k + hi),
                         rows.tangential(y, k + lo)};
      end.x_high = ends, end.x_low = ends + 1, end.y_high = ends + 2, end.y_low = ends + 3;
      flux = larger(flux, flux_row(end, f, 1, grid.plane, stencil, tag));
    }
    if (nz > 2) {
      ExactRow<T> inner = row.shifted(1);
      inner.x_high = x + 1 + hi, inner.x_low = x + 1 + lo, inner.y_high = y + 1 + hi, inner.y_low = y + 1 + lo;
      flux = larger(flux, flux_row(inner, f, nz - 2, grid.plane, stencil, tag));
    }
    const int64_t free = grid.wall[2] ? nz - 1 : nz;  // entries that are not pinned
    const T* own[3] = {x, y, z};
    for (int c = 0; c < 3; ++c)
      peak.edge = larger_magnitude(peak.edge, row_magnitude(own[c], c < 2 ? free : nz) * f.edge[c]);
  }
  peak.edge *= Lattice<T>::headroom;
  peak.flux = from_bits(flux);
  return peak;
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
        steps_(grid.batch, Step{0, true}), pending_(grid.batch, 1), peaks_(grid.batch * grid.cells[0]) {}

  template <Pass pass>
  void run() {
    // float64 measures the whole potential: a guess too small would leave the range of the rounding.
    const bool guess = std::is_same_v<T, float>;
    sweep<pass, Mode::kMeasure>(guess ? 16 : 1);
    each_pending([&](int64_t s) { steps_[s] = lattice_step<T>(peak(s, 0.0) * (guess ? 1.05 : 1.0)); });
    const bool whole = guess && fits_whole();
    if constexpr (std::is_same_v<T, float>) {
      if (whole) sweep<pass, Mode::kDecodeWhole>(1);
    }
    if (!whole) sweep<pass, Mode::kDecode>(1);
    const std::vector<Step> guesses = steps_;
    each_pending([&](int64_t s) { pending_[s] = guess && steps_[s].finite && !confirmed(s, whole); });
    sweep<pass, Mode::kMeasure>(1);
    each_pending([&](int64_t s) {
      steps_[s] = lattice_step<T>(peak(s, 0.0));
      pending_[s] = steps_[s].finite && (whole || steps_[s].exponent != guesses[s].exponent);
    });
    sweep<pass, Mode::kDecode>(1);
    for (int64_t s = 0; s < grid_.batch; ++s) {
      constexpr double nan = std::numeric_limits<double>::quiet_NaN();
      step_[s] = steps_[s].finite ? std::ldexp(1.0, steps_[s].exponent) : nan;
      const int64_t size = grid_.components() * grid_.volume();
      if (!steps_[s].finite) std::fill_n(velocity_ + s * size, size, static_cast<T>(nan));
    }
  }

 private:
  template <class Body>
  void each_pending(const Body& body) {
    for (int64_t s = 0; s < grid_.batch; ++s)
      if (pending_[s]) body(s);
  }

  ExactFactors factors(int64_t sample, bool in_steps) const {
    ExactFactors f{};
    const int exponent = in_steps ? steps_[sample].exponent : 0;
    for (int a = 0; a < 3; ++a) {
      f.edge[a] = std::ldexp(scales_.edge[a], -exponent);
      f.velocity[a] = std::ldexp(1.0, exponent) / scales_.area[a];
    }
    for (int c = 0; harmonic_ && c < grid_.components(); ++c) {
      const int a = grid_.axis(c);
      if (columns_.column[c] < 0) continue;
      const double constant = harmonic_[sample * columns_.count + columns_.column[c]];
      f.harmonic[a] = std::ldexp(constant * scales_.area[a], -exponent);
      f.rounded[a] = (f.harmonic[a] + kRounder) - kRounder;
    }
    return f;
  }

  // Visits every `stride`-th plane of the pending samples: decodes them, or measures in units of velocity.
  template <Pass pass, Mode mode>
  void sweep(int64_t stride) {
    constexpr bool write = mode != Mode::kMeasure;
    if (std::none_of(pending_.begin(), pending_.end(), [](char p) { return p != 0; })) return;
    for_planes(grid_, [&](int64_t s, int64_t i) {
      if (!pending_[s] || (write && !steps_[s].finite)) return;
      Peak& peak = peaks_[s * grid_.cells[0] + i];
      peak = Peak{};
      if (i % stride != 0) return;
      const Rows<T, pass> rows{potential_ + s * grid_.potentials() * grid_.volume(), zeros_.data(), &grid_};
      T* out = velocity_ + s * grid_.components() * grid_.volume();
      peak = exact_plane<T, pass, mode>(grid_, rows, out, factors(s, write), i);
    });
  }

  // Largest magnitude of a sample, its fluxes changed by `shift`.
  double peak(int64_t sample, double shift) const {
    double largest = 0.0;
    for (int64_t i = 0; i < grid_.cells[0]; ++i) {
      const Peak& plane = peaks_[sample * grid_.cells[0] + i];
      largest = larger_magnitude(largest, larger_magnitude(plane.edge, std::max(plane.flux + shift, 0.0)));
    }
    return largest;
  }

  double largest_edge(int64_t sample) const {
    double largest = 0.0;
    for (int64_t i = 0; i < grid_.cells[0]; ++i)
      largest = larger_magnitude(largest, peaks_[sample * grid_.cells[0] + i].edge);
    return largest / Lattice<T>::headroom;
  }

  // Whether 32-bit integers may do for all samples, judged by the planes that were measured.
  bool fits_whole() const {
    if (grid_.plane) return false;
    int exponent = 0;
    for (const double scale : scales_.edge)
      if (std::frexp(scale, &exponent) != 0.5) return false;
    for (int64_t s = 0; s < grid_.batch; ++s) {
      if (!steps_[s].finite) return false;
      if (std::ldexp(largest_edge(s), -steps_[s].exponent) >= 0.5 * kWholeLimit) return false;
      for (const double constant : factors(s, true).rounded)
        if (std::fabs(constant) >= kWholeLimit) return false;
    }
    return true;
  }

  // Whether the decode just done proves its own lattice: rounding moves a flux by at most 2.5 steps.
  bool confirmed(int64_t sample, bool whole) const {
    const Step& step = steps_[sample];
    if (whole && !(largest_edge(sample) < kWholeLimit)) return false;
    for (const double shift : {-2.5, 2.5}) {
      const Step bound = lattice_step<T>(std::ldexp(peak(sample, shift), step.exponent));
      if (!bound.finite || bound.exponent != step.exponent) return false;
    }
    return true;
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
  std::vector<Peak> peaks_;  // of each plane
};

template <class T>
std::tuple<Tensor, Tensor> exact_typed(const Grid& grid, const Tensor& potential, const std::optional<Tensor>& harmonic) {
  Tensor velocity = new_field<T>(potential, grid, grid.components());
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
