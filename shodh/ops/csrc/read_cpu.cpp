// A snapshot of plain float32 from the page cache to its place in a batch, in one pass over memory: read into a slab
// that stays in the L2 cache, checked, scaled and split into components in blocks so small that their arithmetic runs
// while the former ones are on their way to memory, past the caches. Python's side of it is shodh/ops/reading.py.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <memory>

#include "rows.h"

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace shodh {
namespace {

constexpr int64_t kSlabValues = int64_t{1} << 16;
constexpr int64_t kBlock = 128;
// Smaller snapshots stay in the cache, where their reader finds them.
constexpr int64_t kLargeValues = int64_t{1} << 18;

// What a caller learns; errors of the system are -errno.
enum Outcome : int { kFine = 0, kNotFinite = 1, kEndOfFile = 2 };

// Whole pages, and no load of a vector across two lines.
struct alignas(4096) Slab {
  float values[kSlabValues];
};

inline bool not_finite(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7f800000u) == 0x7f800000u;
}

// A power of two, and so is its inverse: multiplying by that gives the bits of dividing.
bool is_power_of_two(float scale) {
  int exponent = 0;
  return std::frexp(scale, &exponent) == 0.5f && std::abs(exponent) < 120;
}

// Copy a block; past the caches where that is possible, since a store through them first fetches its line.
inline void put(const float* SHODH_RESTRICT block, float* SHODH_RESTRICT out, int64_t count, bool stream) {
#if defined(__SSE__)
  if (stream && count == kBlock && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    for (int64_t i = 0; i < kBlock; i += 4) _mm_stream_ps(out + i, _mm_load_ps(block + i));
    return;
  }
#endif
  std::memcpy(out, block, count * sizeof(float));
}

// Cells of C interleaved components, scaled, into C places `stride` values apart; whether some value is not finite.
// With `multiply`, `factor` is the inverse of the scale, else the scale.
template <int C, bool multiply>
inline bool place(const float* SHODH_RESTRICT in, float* SHODH_RESTRICT out, int64_t cells, int64_t stride, float shift,
                  float factor, bool stream) {
  alignas(64) float block[C * kBlock];
  uint32_t bad = 0;
  // The first block ends where a line of the cache does, so that the others fill whole lines.
  int64_t count = std::min(cells, kBlock - static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % 64 / sizeof(float)));
  for (int64_t first = 0; first < cells; first += count, count = std::min(kBlock, cells - first)) {
    const float* SHODH_RESTRICT from = in + C * first;
    for (int64_t i = 0; i < count; ++i)
      for (int c = 0; c < C; ++c) {
        const float value = from[C * i + c], shifted = value - shift;
        bad |= not_finite(value);
        block[c * kBlock + i] = multiply ? shifted * factor : shifted / factor;
      }
    for (int c = 0; c < C; ++c) put(block + c * kBlock, out + c * stride + first, count, stream);
  }
  return bad != 0;
}

using Place = bool (*)(const float*, float*, int64_t, int64_t, float, float, bool);

#define SHODH_PLACE(name, C, multiply)                                                                              \
  SHODH_VECTORISED bool name(const float* in, float* out, int64_t cells, int64_t stride, float shift, float factor, \
                             bool stream) {                                                                         \
    return place<C, multiply>(in, out, cells, stride, shift, factor, stream);                                       \
  }
SHODH_PLACE(divide_1, 1, false)
SHODH_PLACE(divide_2, 2, false)
SHODH_PLACE(divide_3, 3, false)
SHODH_PLACE(multiply_1, 1, true)
SHODH_PLACE(multiply_2, 2, true)
SHODH_PLACE(multiply_3, 3, true)
#undef SHODH_PLACE

int read_fully(int descriptor, void* to, int64_t bytes, int64_t offset) {
  char* at = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t done = pread(descriptor, at, bytes, offset);
    if (done < 0 && errno != EINTR) return -errno;
    if (done == 0) return kEndOfFile;
    if (done > 0) at += done, offset += done, bytes -= done;
  }
  return kFine;
}

}  // namespace
}  // namespace shodh

// Read `cells` cells of `components` (1 to 3) interleaved float32 components at `offset` of an open file, and write
// (x - shift) / scale to `out`, one component every `stride` values.
extern "C" __attribute__((visibility("default"))) int shodh_read_snapshot(int descriptor, int64_t offset, float* out,
                                                                          int64_t components, int64_t cells,
                                                                          int64_t stride, float shift, float scale,
                                                                          int check) {
  using namespace shodh;
  constexpr Place divide[] = {divide_1, divide_2, divide_3}, multiply[] = {multiply_1, multiply_2, multiply_3};
  if (components < 1 || components > 3) return -EINVAL;
  const bool exact = is_power_of_two(scale);
  const Place place = (exact ? multiply : divide)[components - 1];
  const float factor = exact ? 1.0f / scale : scale;

  thread_local const std::unique_ptr<Slab> slab(new Slab);
  const int64_t per_slab = kSlabValues / components / kBlock * kBlock;
  const int64_t cell = components * int64_t{sizeof(float)};
  const bool stream = components * cells >= kLargeValues;
  int outcome = kFine;
  for (int64_t first = 0; first < cells && outcome == kFine; first += per_slab) {
    const int64_t count = std::min(per_slab, cells - first);
    outcome = read_fully(descriptor, slab->values, count * cell, offset + first * cell);
    if (outcome != kFine) break;
    if (place(slab->values, out + first, count, stride, shift, factor, stream) && check) outcome = kNotFinite;
  }
#if defined(__SSE__)
  if (stream) _mm_sfence();
#endif
  return outcome;
}
