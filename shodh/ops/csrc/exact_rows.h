// The arithmetic of the exact decode on rows: edge integrals and fluxes as integers, or measured before rounding.
#pragma once

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

}  // namespace
}  // namespace shodh
