// Implements AdamW of train/optim/adamw.py with bf16 moments, in one pass over memory, and the sum of squares for the
// norm. For CPUs with AVX-512 or AVX2. Python calls the functions with ctypes.
//
// The arithmetic is that of torch's kernel, in fp32, so moments are rounded to the same bf16. It is the same for every
// element, so it does not depend on the boundaries of shards.

#include <vector>

#include "tiles.h"

namespace {

using namespace tiles;

constexpr i64 PIECE = 4096;  // number of elements that a thread processes at a time

struct Settings {
  float factor;  // factor of the gradient
  float lerp, keep_square, add_square;  // mean += lerp (g - mean), square = keep_square square + add_square g^2
  float decay, step, root, eps;
};

// Updates the elements that `which` selects: a complete vector, or its first elements.
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

// Returns the sum of squares of at most PIECE elements, computed in fp32.
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

// Returns the sum of squares. The sums of the pieces are added in fp64, in the order of the pieces, so the result does
// not depend on the number of threads.
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
