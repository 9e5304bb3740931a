// The exact decode on the CPU: edge integrals and fluxes as integers held in doubles.
//
// The lattice needs the largest face flux before the first velocity can be written. To spare a second read of the
// potential, a few planes give a guess; the decode runs with it and bounds the true maximum on its way. Only samples
// whose guess fell below a power of two, or whose bounds enclose one, are measured in full and decoded again where
// the guess was wrong. The result never depends on the guess.
//
// Where the edge integrals are the potential times a power of two, and no more than 2^28 steps, 32-bit integers hold
// them, which is twice as fast; the result is the same.
#include "exact_rows.h"

namespace shodh {
namespace {

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
    for (int a = 0; harmonic_ && a < 3; ++a) {
      if (columns_.column[a] < 0) continue;
      const double constant = harmonic_[sample * columns_.count + columns_.column[a]];
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

std::tuple<Tensor, Tensor> exact_op(const Tensor& potential, const std::optional<Tensor>& harmonic,
                                    const std::vector<double>& spacing, const std::vector<bool>& walls, bool central) {
  const Grid grid = make_grid(potential, true, spacing, walls, central);
  const std::optional<Tensor> constants = packed_harmonic(harmonic, potential, grid);
  const Tensor packed = torch::stable::contiguous(potential);
  return with_wide_type(potential.scalar_type(), [&]<class T>(T) {
    Tensor velocity = new_field<T>(packed, grid, grid.components());
    Tensor step = torch::stable::new_empty(packed, {grid.batch}, ScalarType::Double);
    ExactDecode<T> decode(grid, static_cast<const T*>(packed.const_data_ptr()), data_or_null<T>(constants),
                          static_cast<T*>(velocity.mutable_data_ptr()), static_cast<double*>(step.mutable_data_ptr()));
    if (grid.central) decode.template run<Pass::kCentral>();
    else decode.template run<Pass::kForward>();
    return std::tuple(velocity, step);
  });
}

}  // namespace
}  // namespace shodh

STABLE_TORCH_LIBRARY_IMPL(shodh, CPU, m) { m.impl("decode_exact", TORCH_BOX(&shodh::exact_op)); }
