// CPU kernels work on rows along z: where a row of the potential lies, and how rows are shared between threads.
#pragma once

#include "grid.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
// One body, compiled for three instruction sets, chosen when the library is loaded.
#define SHODH_VECTORISED __attribute__((target_clones("avx512f", "avx2", "default"), flatten))
#else
#define SHODH_VECTORISED
#endif
#define SHODH_RESTRICT __restrict__

namespace shodh {

// Rows of one sample of a contiguous field [C, X, Y, Z].
template <class T, Pass pass>
struct Rows {
  const T* base;
  const T* zeros;
  const Grid* grid;

  const T* operator()(int channel, int component, int64_t i, int64_t j) const {
    const int64_t nx = grid->cells[0], ny = grid->cells[1], nz = grid->cells[2];
    if (outside(0, component, i, nx) || outside(1, component, j, ny)) return zeros;
    i = i < 0 ? i + nx : (i >= nx ? i - nx : i);
    j = j < 0 ? j + ny : (j >= ny ? j - ny : j);
    return base + ((channel * nx + i) * ny + j) * nz;
  }

  // Value at k of a row of a component that is tangential to walls across z.
  T tangential(const T* row, int64_t k) const {
    const int64_t nz = grid->cells[2];
    if (outside(2, 0, k, nz)) return T(0);
    return row[k < 0 ? k + nz : (k >= nz ? k - nz : k)];
  }

 private:
  bool outside(int a, int component, int64_t index, int64_t n) const {
    if (!grid->wall[a]) return false;
    return index < 0 || index >= n || (pass == Pass::kForward && component != a && index == n - 1);
  }
};

// A new large tensor is fresh memory, and the page faults of its first touch cost as much as the decode itself; where
// the system hands out huge pages on request, ask for them. A hint: failure changes nothing.
inline Tensor advise_huge_pages(Tensor tensor, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const auto start = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t begin = (start + page - 1) & ~(page - 1), end = (start + bytes) & ~(page - 1);
  if (end >= begin + 4 * page) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return tensor;
}

// A new tensor for a field of the given number of channels.
template <class T>
Tensor new_field(const Tensor& like, const Grid& grid, int64_t channels) {
  return advise_huge_pages(torch::stable::new_empty(like, field_shape(grid, channels)),
                           grid.batch * channels * grid.volume() * sizeof(T));
}

// Calls `body(sample, i)` for every plane across x, in parallel.
template <class Body>
void for_planes(const Grid& grid, const Body& body) {
  const int64_t plane = grid.cells[1] * grid.cells[2];
  const int64_t grain = std::max<int64_t>(1, 16384 / plane);
  torch::stable::parallel_for(0, grid.batch * grid.cells[0], grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) body(p / grid.cells[0], p % grid.cells[0]);
  });
}

}  // namespace shodh
