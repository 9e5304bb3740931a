// The plain decode and its adjoint on the CPU: one read of the input, one write of the output.
#include "rows.h"

namespace shodh {
namespace {

// The rows that one row of curl reads: `xh_y` is component y at the higher x neighbour, and so on.
template <class T>
struct CurlInput {
  const T *x, *y;  // along z
  const T *xh_y, *xl_y, *xh_z, *xl_z, *yh_x, *yl_x, *yh_z, *yl_z;
};

template <class T>
struct CurlOutput {
  T *x, *y, *z;
};

template <class A>
struct CurlFactors {
  A inverse[3];
  A harmonic[3];
};

// One cell of the curl, given the differences' ends along z.
template <class T, class A>
inline void curl_cell(const CurlInput<T>& in, const CurlOutput<T>& out, const CurlFactors<A>& f, int64_t k, A xh, A xl,
                      A yh, A yl) {
  const A dy_z = A(in.yh_z[k]) - A(in.yl_z[k]), dz_y = yh - yl;
  const A dz_x = xh - xl, dx_z = A(in.xh_z[k]) - A(in.xl_z[k]);
  const A dx_y = A(in.xh_y[k]) - A(in.xl_y[k]), dy_x = A(in.yh_x[k]) - A(in.yl_x[k]);
  out.x[k] = T((dy_z * f.inverse[1] - dz_y * f.inverse[2]) + f.harmonic[0]);
  out.y[k] = T((dz_x * f.inverse[2] - dx_z * f.inverse[0]) + f.harmonic[1]);
  out.z[k] = T((dx_y * f.inverse[0] - dy_x * f.inverse[1]) + f.harmonic[2]);
}

template <class T, Pass pass>
inline void curl_inner(const CurlInput<T>& rows, const CurlOutput<T>& to, const CurlFactors<arithmetic_t<T>>& f,
                       int64_t nz) {
  using A = arithmetic_t<T>;
  constexpr int hi = kHigh<pass>, lo = kLow<pass>;
  const T* SHODH_RESTRICT ax = rows.x;
  const T* SHODH_RESTRICT ay = rows.y;
  const CurlInput<T> in = rows;
  T* SHODH_RESTRICT ox = to.x;
  T* SHODH_RESTRICT oy = to.y;
  T* SHODH_RESTRICT oz = to.z;
#pragma GCC ivdep
  for (int64_t k = 1; k < nz - 1; ++k)
    curl_cell<T, A>(in, {ox, oy, oz}, f, k, A(ax[k + hi]), A(ax[k + lo]), A(ay[k + hi]), A(ay[k + lo]));
}

// Vectorised instances; half types take the plain ones.
#define SHODH_CURL_INNER(T, pass)                                                                                 \
  SHODH_VECTORISED void curl_row(const CurlInput<T>& in, const CurlOutput<T>& out,                                \
                                 const CurlFactors<arithmetic_t<T>>& f, int64_t nz,                               \
                                 std::integral_constant<Pass, Pass::pass>) {                                      \
    curl_inner<T, Pass::pass>(in, out, f, nz);                                                                    \
  }
SHODH_CURL_INNER(float, kForward)
SHODH_CURL_INNER(float, kMirror)
SHODH_CURL_INNER(float, kCentral)
SHODH_CURL_INNER(double, kForward)
SHODH_CURL_INNER(double, kMirror)
SHODH_CURL_INNER(double, kCentral)
template <class T, Pass pass>
void curl_row(const CurlInput<T>& in, const CurlOutput<T>& out, const CurlFactors<float>& f, int64_t nz,
              std::integral_constant<Pass, pass>) {
  curl_inner<T, pass>(in, out, f, nz);
}
#undef SHODH_CURL_INNER

template <class T, Pass pass>
void curl_plane(const Grid& grid, const Rows<T, pass>& rows, T* out, const CurlFactors<arithmetic_t<T>>& factors,
                int64_t i) {
  using A = arithmetic_t<T>;
  constexpr int hi = kHigh<pass>, lo = kLow<pass>;
  const int64_t ny = grid.cells[1], nz = grid.cells[2], volume = grid.volume();
  for (int64_t j = 0; j < ny; ++j) {
    const CurlInput<T> in{rows(0, 0, i, j),      rows(1, 1, i, j),      rows(1, 1, i + hi, j), rows(1, 1, i + lo, j),
                          rows(2, 2, i + hi, j), rows(2, 2, i + lo, j), rows(0, 0, i, j + hi), rows(0, 0, i, j + lo),
                          rows(2, 2, i, j + hi), rows(2, 2, i, j + lo)};
    T* x = out + (i * ny + j) * nz;
    const CurlOutput<T> to{x, x + volume, x + 2 * volume};
    curl_row(in, to, factors, nz, std::integral_constant<Pass, pass>{});
    const bool pinned = pass == Pass::kForward && grid.wall[2];
    for (int64_t k = 0; k < nz; k += std::max<int64_t>(nz - 1, 1)) {
      CurlInput<T> edge = in;
      if (pinned && k == nz - 1)  // components x and y are zero on the wall
        edge.xh_y = edge.xl_y = edge.yh_x = edge.yl_x = rows.zeros;
      curl_cell<T, A>(edge, to, factors, k, A(rows.tangential(in.x, k + hi)), A(rows.tangential(in.x, k + lo)),
                      A(rows.tangential(in.y, k + hi)), A(rows.tangential(in.y, k + lo)));
    }
    if constexpr (pass == Pass::kMirror) {  // pinned entries of the potential have no gradient
      const bool x_wall = grid.wall[0] && i == grid.cells[0] - 1, y_wall = grid.wall[1] && j == ny - 1;
      const bool zero[3] = {y_wall, x_wall, x_wall || y_wall};
      for (int c = 0; c < 3; ++c) {
        if (zero[c]) std::fill_n(x + c * volume, nz, T(0));
        else if (c < 2 && grid.wall[2]) x[c * volume + nz - 1] = T(0);
      }
    }
  }
}

// Two dimensions: u_x = D_z psi, u_z = -D_x psi.
template <class T>
SHODH_VECTORISED void stream_rows(const T* SHODH_RESTRICT high, const T* SHODH_RESTRICT low,
                                  const T* SHODH_RESTRICT xh, const T* SHODH_RESTRICT xl, T* SHODH_RESTRICT ux,
                                  T* SHODH_RESTRICT uz, const CurlFactors<arithmetic_t<T>>& f, int64_t n) {
  using A = arithmetic_t<T>;
  for (int64_t k = 0; k < n; ++k) {
    ux[k] = T((A(high[k]) - A(low[k])) * f.inverse[2] + f.harmonic[0]);
    uz[k] = T(-((A(xh[k]) - A(xl[k])) * f.inverse[0]) + f.harmonic[2]);
  }
}

template <class T, Pass pass>
void stream_plane(const Grid& grid, const Rows<T, pass>& rows, T* out, const CurlFactors<arithmetic_t<T>>& f,
                  int64_t i) {
  constexpr int hi = kHigh<pass>, lo = kLow<pass>;
  const int64_t nz = grid.cells[2];
  // The potential is component y of a box one cell thick.
  const T *row = rows(0, 1, i, 0), *xh = rows(0, 1, i + hi, 0), *xl = rows(0, 1, i + lo, 0);
  T *ux = out + i * nz, *uz = ux + grid.volume();
  if (nz > 2) stream_rows<T>(row + 1 + hi, row + 1 + lo, xh + 1, xl + 1, ux + 1, uz + 1, f, nz - 2);
  for (int64_t k = 0; k < nz; k += std::max<int64_t>(nz - 1, 1)) {
    const T high = rows.tangential(row, k + hi), low = rows.tangential(row, k + lo);
    const bool pinned = pass == Pass::kForward && grid.wall[2] && k == nz - 1;
    stream_rows<T>(&high, &low, pinned ? rows.zeros : xh + k, pinned ? rows.zeros : xl + k, ux + k, uz + k, f, 1);
  }
}

// Adjoint of the above: D_x g_z - D_z g_x with the mirrored difference.
template <class T, Pass pass>
void stream_adjoint_plane(const Grid& grid, const Rows<T, pass>& rows, T* SHODH_RESTRICT out,
                          const CurlFactors<arithmetic_t<T>>& f, int64_t i) {
  using A = arithmetic_t<T>;
  constexpr int hi = kHigh<pass>, lo = kLow<pass>;
  const int64_t nz = grid.cells[2];
  const T *gx = rows(0, 0, i, 0), *high = rows(1, 2, i + hi, 0), *low = rows(1, 2, i + lo, 0);
  out += i * nz;
  const auto cell = [&](int64_t k, A above, A below) {
    return T((A(high[k]) - A(low[k])) * f.inverse[0] - (above - below) * f.inverse[2]);
  };
  for (int64_t k = 1; k < nz - 1; ++k) out[k] = cell(k, A(gx[k + hi]), A(gx[k + lo]));
  for (int64_t k = 0; k < nz; k += std::max<int64_t>(nz - 1, 1))
    out[k] = cell(k, A(rows.tangential(gx, k + hi)), A(rows.tangential(gx, k + lo)));
  if (grid.wall[0] && i == grid.cells[0] - 1) std::fill_n(out, nz, T(0));
  if (grid.wall[2]) out[nz - 1] = T(0);
}

template <class T>
CurlFactors<arithmetic_t<T>> curl_factors(const Grid& grid) {
  CurlFactors<arithmetic_t<T>> factors{};
  for (int a = 0; a < 3; ++a) factors.inverse[a] = static_cast<arithmetic_t<T>>(grid.inverse(a));
  return factors;
}

template <class T, Pass pass>
void decode(const Grid& grid, const T* potential, const T* harmonic, T* velocity) {
  const std::vector<T> zeros(grid.cells[2], T(0));
  const HarmonicColumns columns = harmonic_columns(grid);
  for_planes(grid, [&](int64_t sample, int64_t i) {
    auto factors = curl_factors<T>(grid);
    for (int a = 0; harmonic && a < 3; ++a)
      if (columns.column[a] >= 0)
        factors.harmonic[a] = static_cast<arithmetic_t<T>>(harmonic[sample * columns.count + columns.column[a]]);
    const Rows<T, pass> rows{potential + sample * grid.potentials() * grid.volume(), zeros.data(), &grid};
    T* out = velocity + sample * grid.components() * grid.volume();
    if (grid.plane) stream_plane<T, pass>(grid, rows, out, factors, i);
    else curl_plane<T, pass>(grid, rows, out, factors, i);
  });
}

// Sum in 16 fixed lanes: the order does not depend on threads or instruction set.
template <class T>
inline double row_sum_body(const T* row, int64_t n) {
  using A = arithmetic_t<T>;
  A lanes[16] = {};
  int64_t k = 0;
  for (; k + 16 <= n; k += 16)
    for (int l = 0; l < 16; ++l) lanes[l] += A(row[k + l]);
  double total = 0.0;
  for (; k < n; ++k) total += double(row[k]);
  for (int l = 0; l < 16; ++l) total += double(lanes[l]);
  return total;
}
SHODH_VECTORISED double row_sum(const float* row, int64_t n) { return row_sum_body(row, n); }
SHODH_VECTORISED double row_sum(const double* row, int64_t n) { return row_sum_body(row, n); }
template <class T> double row_sum(const T* row, int64_t n) { return row_sum_body(row, n); }

template <class T, Pass pass>
void adjoint(const Grid& grid, const T* gradient, T* potential, T* harmonic) {
  const std::vector<T> zeros(grid.cells[2], T(0));
  const auto factors = curl_factors<T>(grid);
  const HarmonicColumns columns = harmonic_columns(grid);
  const int64_t nx = grid.cells[0], ny = grid.cells[1], nz = grid.cells[2];
  std::vector<double> partial(grid.batch * nx * 3, 0.0);
  for_planes(grid, [&](int64_t sample, int64_t i) {
    const T* base = gradient + sample * grid.components() * grid.volume();
    const Rows<T, pass> rows{base, zeros.data(), &grid};
    T* out = potential + sample * grid.potentials() * grid.volume();
    if (grid.plane) stream_adjoint_plane<T, pass>(grid, rows, out, factors, i);
    else curl_plane<T, pass>(grid, rows, out, factors, i);
    for (int c = 0; c < grid.components(); ++c) {
      if (grid.wall[grid.axis(c)]) continue;
      double total = 0.0;
      for (int64_t j = 0; j < ny; ++j) total += row_sum(base + c * grid.volume() + (i * ny + j) * nz, nz);
      partial[(sample * nx + i) * 3 + c] = total;
    }
  });
  for (int64_t sample = 0; sample < grid.batch; ++sample)
    for (int c = 0; c < grid.components(); ++c) {
      const int64_t column = columns.column[grid.axis(c)];
      if (column < 0) continue;
      double total = 0.0;
      for (int64_t i = 0; i < nx; ++i) total += partial[(sample * nx + i) * 3 + c];
      harmonic[sample * columns.count + column] = T(total);
    }
}

Tensor decode_op(const Tensor& potential, const std::optional<Tensor>& harmonic, const std::vector<double>& spacing,
                 const std::vector<bool>& walls, bool central) {
  const Grid grid = make_grid(potential, true, spacing, walls, central);
  const std::optional<Tensor> constants = packed_harmonic(harmonic, potential, grid);
  const Tensor packed = torch::stable::contiguous(potential);
  return with_type(potential.scalar_type(), [&]<class T>(T) {
    Tensor velocity = new_field<T>(packed, grid, grid.components());
    const T* a = static_cast<const T*>(packed.const_data_ptr());
    T* u = static_cast<T*>(velocity.mutable_data_ptr());
    if (grid.central) decode<T, Pass::kCentral>(grid, a, data_or_null<T>(constants), u);
    else decode<T, Pass::kForward>(grid, a, data_or_null<T>(constants), u);
    return velocity;
  });
}

std::tuple<Tensor, Tensor> adjoint_op(const Tensor& gradient, const std::vector<double>& spacing,
                                      const std::vector<bool>& walls, bool central) {
  const Grid grid = make_grid(gradient, false, spacing, walls, central);
  const Tensor packed = torch::stable::contiguous(gradient);
  return with_type(gradient.scalar_type(), [&]<class T>(T) {
    Tensor potential = new_field<T>(packed, grid, grid.potentials());
    Tensor harmonic = torch::stable::new_empty(packed, {grid.batch, harmonic_columns(grid).count});
    const T* g = static_cast<const T*>(packed.const_data_ptr());
    T* a = static_cast<T*>(potential.mutable_data_ptr());
    T* h = static_cast<T*>(harmonic.mutable_data_ptr());
    if (grid.central) adjoint<T, Pass::kCentral>(grid, g, a, h);
    else adjoint<T, Pass::kMirror>(grid, g, a, h);
    return std::tuple(potential, harmonic);
  });
}

}  // namespace
}  // namespace shodh

STABLE_TORCH_LIBRARY_IMPL(shodh, CPU, m) {
  m.impl("decode", TORCH_BOX(&shodh::decode_op));
  m.impl("decode_adjoint", TORCH_BOX(&shodh::adjoint_op));
}
