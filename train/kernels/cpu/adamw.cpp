// AdamW of train/optim/adamw.py with bf16 moments, in one pass over memory, and the norm before it, for CPUs with
// AVX-512 or AVX2. Called by ctypes.
//
// Every element gets the same arithmetic for any shard borders: the arithmetic of torch's kernel, in fp32, so moments
// are rounded to the same bf16.

#include <vector>

#include "tiles.h"

namespace {

using namespace tiles;

constexpr i64 PIECE = 4096;  // elements per work item of a thread

struct Settings {
  float factor;  // of the gradient
  float lerp, keep_square, add_square;  // mean += lerp (g - mean), square = keep_square square + add_square g^2
  float decay, step, root, eps;
};

// A whole vector of elements, or fewer.
template <class Which>
inline void update(float* weight, const float* gradient, u16* mean, u16* square, const Settings& s, Which which) {
  const Vector g = load(gradient, which) * all(s.factor);
  Vector m = load(mean, which), v = load(square, which);
  m = fmadd(all(s.lerp), g - m, m);
  v = fmadd(all(s.add_square) * g, g, v * all(s.keep_square));
  const Vector scale = sqrt(v) / all(s.root) + all(s.eps);
  const Vector kept = load(weight, which) * all(s.decay);
  const Vector w = kept - m * all(s.step) / scale;
  store(weight, w, which);
  store(mean, m, which);
  store(square, v, which);
}

// Sum of squares of up to PIECE elements, in fp32.
float squares(const float* x, i64 n) {
  Vector sums[4] = {};
  i64 i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int j = 0; j < 4; ++j) {
      const Vector v = load(x + i + LANES * j, All{});
      sums[j] = fmadd(v, v, sums[j]);
    }
  along(n - i, [&](i64 j, auto which) {
    const Vector v = load(x + i + j, which);
    sums[0] = fmadd(v, v, sums[0]);
  });
  return sum_of(sums[0] + sums[1] + (sums[2] + sums[3]));
}

}  // namespace

extern "C" {

// Pieces are added in fp64 in their order, so the number of threads does not change the result.
double sum_of_squares(const float* x, i64 n, i64 threads) {
  const i64 pieces = (n + PIECE - 1) / PIECE;
  std::vector<float> sums(pieces);
  threads = threads_for(n, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 piece = 0; piece < pieces; ++piece) sums[piece] = squares(x + piece * PIECE, std::min(PIECE, n - piece * PIECE));
  double sum = 0;
  for (const float one : sums) sum += one;
  return sum;
}

void adamw(float* weight, const float* gradient, u16* mean, u16* square, i64 n, const Settings* settings, i64 threads) {
  threads = threads_for(2 * n, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 i = 0; i < n; i += PIECE)
    along(std::min(PIECE, n - i), [=](i64 j, auto which) {
      update(weight + i + j, gradient + i + j, mean + i + j, square + i + j, *settings, which);
    });
}

}
