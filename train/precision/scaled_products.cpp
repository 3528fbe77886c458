// Products of bf16 values with fp32 scales, on CPUs with AVX512-BF16. Called by ctypes.
//
// Every 128 of the contraction are summed in registers, then multiplied with the scales of their row and of their column
// and added to an fp32 sum, as kernels on Hopper do (paper 3.3.2). A job is a block of one product's output. Its thread
// packs DEPTH of the contraction of both operands into panels that stay in the second-level cache, goes through the block
// tile by tile, and takes the next DEPTH. The order of an element's sum depends on neither the block nor the threads.

#include <memory>
#include <vector>

#include "../native/tiles.h"

namespace {

using namespace tiles;

constexpr i64 TILE = 128;                 // of the contraction: one pair of scales
constexpr i64 DEPTH = 256;                // packed at once, a multiple of a tile
constexpr i64 HEIGHT = 256, WIDTH = 512;  // of a block, at most; multiples of a panel

// Matrices (outer, contraction). A scale is that of outer >> shift and of a tile; none: all are one.
struct Operand {
  const u16* data;
  i64 matrix, outer, inner;  // strides; outer or inner is one
  const float* scale;
  i64 scale_matrix, scale_outer, scale_tile, shift;  // strides, and log2 of what shares a scale along outer

  // Panels of outer [first, first + count) over contraction [begin, end).
  void pack(i64 of, i64 first, i64 count, i64 begin, i64 end, u32* panels) const {
    const u16* from = data + of * matrix + first * outer + begin * inner;
    if (inner == 1) pack_transposed(from, outer, count, end - begin, panels);
    else tiles::pack(from, inner, end - begin, count, panels);
  }

  void scales(i64 of, i64 first, i64 count, i64 tile, float* to) const {
    if (!scale) { std::fill_n(to, count, 1.f); return; }
    const float* from = scale + of * scale_matrix + tile * scale_tile;
    for (i64 j = 0; j < count; ++j) to[j] = from[((first + j) >> shift) * scale_outer];
  }
};

// One product: rows [first, first + rows) of the left operand, all rows of one matrix on the right, contraction [begin, end),
// where begin is the first of a tile.
struct Part {
  i64 first, rows, right, begin, end;
  i64 out;  // offset of the first element
};

// Some rows and columns of a part's output.
struct Block {
  const Part* part;
  i64 row, rows, column, columns;
};

// M rows of one panel: the sums over the pairs, times the scales of row and column, added to c or in its place.
template <int M>
void tile(const u32* a, const u32* b, i64 pairs, float* c, i64 ldc, const float* left, const float* right, bool add) {
  __m512 sum[M][2];
  for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
  for (i64 k = 0; k < pairs; ++k, a += PANEL, b += PANEL) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 16);
    for (int m = 0; m < M; ++m) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(a[m]));
      sum[m][0] = _mm512_dpbf16_ps(sum[m][0], pair, b0);
      sum[m][1] = _mm512_dpbf16_ps(sum[m][1], pair, b1);
    }
  }
  const __m512 right0 = _mm512_loadu_ps(right), right1 = _mm512_loadu_ps(right + 16);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m, c += ldc) {
    const __m512 factor = _mm512_set1_ps(left[m]);
    const __m512 c0 = add ? _mm512_loadu_ps(c) : _mm512_setzero_ps(), c1 = add ? _mm512_loadu_ps(c + 16) : _mm512_setzero_ps();
    _mm512_storeu_ps(c, _mm512_fmadd_ps(sum[m][0], _mm512_mul_ps(factor, right0), c0));
    _mm512_storeu_ps(c + 16, _mm512_fmadd_ps(sum[m][1], _mm512_mul_ps(factor, right1), c1));
  }
}

void tile(i64 rows, const u32* a, const u32* b, i64 pairs, float* c, i64 ldc, const float* left, const float* right, bool add) {
  switch (rows) {
    case 8: return tile<8>(a, b, pairs, c, ldc, left, right, add);
    case 7: return tile<7>(a, b, pairs, c, ldc, left, right, add);
    case 6: return tile<6>(a, b, pairs, c, ldc, left, right, add);
    case 5: return tile<5>(a, b, pairs, c, ldc, left, right, add);
    case 4: return tile<4>(a, b, pairs, c, ldc, left, right, add);
    case 3: return tile<3>(a, b, pairs, c, ldc, left, right, add);
    case 2: return tile<2>(a, b, pairs, c, ldc, left, right, add);
    case 1: return tile<1>(a, b, pairs, c, ldc, left, right, add);
  }
}

// Sides of the blocks, multiples of a panel.
struct Sides {
  i64 height, width;
};

// What one thread works in: 0.9 MB at most.
struct Room {
  std::unique_ptr<u32[]> left, right;
  std::unique_ptr<float[]> left_scales, right_scales, sums;
  Room(Sides sides, i64 depth)
      : left(new u32[sides.height * depth / 2]), right(new u32[sides.width * depth / 2]),
        left_scales(new float[sides.height]()), right_scales(new float[sides.width]()), sums(new float[sides.height * sides.width]) {}
};

struct Problem {
  Operand left, right;
  void* out;
  i64 columns, out_stride, fp32;  // else bf16

  // Over [begin, end) of the contraction, which is packed.
  void add(Room& room, const Block& block, i64 width, i64 begin, i64 end) const {
    const Part& part = *block.part;
    const i64 pairs = (end - begin + 1) / 2;
    for (i64 k = begin; k < end; k += TILE) {
      left.scales(0, part.first + block.row, block.rows, k / TILE, room.left_scales.get());
      right.scales(part.right, block.column, block.columns, k / TILE, room.right_scales.get());
      const i64 skip = (k - begin) / 2, count = (std::min(TILE, end - k) + 1) / 2;
      for (i64 n = 0; n < block.columns; n += PANEL)
        for (i64 m = 0; m < block.rows; m += ROWS) {
          const u32* a = room.left.get() + m / PANEL * PANEL * pairs + skip * PANEL + m % PANEL;
          const u32* b = room.right.get() + n * pairs + skip * PANEL;
          tile(std::min(ROWS, block.rows - m), a, b, count, room.sums.get() + m * width + n, width,
               room.left_scales.get() + m, room.right_scales.get() + n, k > part.begin);
        }
    }
  }

  void run(Room& room, const Block& block) const {
    const Part& part = *block.part;
    const i64 width = up(block.columns, PANEL);
    for (i64 begin = part.begin; begin < part.end; begin += DEPTH) {
      const i64 end = std::min(begin + DEPTH, part.end);
      left.pack(0, part.first + block.row, block.rows, begin, end, room.left.get());
      right.pack(part.right, block.column, block.columns, begin, end, room.right.get());
      add(room, block, width, begin, end);
    }
    if (part.begin >= part.end) std::fill_n(room.sums.get(), block.rows * width, 0.f);
    for (i64 m = 0; m < block.rows; ++m) {
      const float* from = room.sums.get() + m * width;
      const i64 to = part.out + (block.row + m) * out_stride + block.column;
      if (fp32) std::memcpy((float*)out + to, from, block.columns * 4);
      else narrow(from, (u16*)out + to, block.columns);
    }
  }

  std::vector<Block> blocks(const Part* parts, i64 count, Sides sides) const {
    std::vector<Block> all;
    for (const Part* part = parts; part < parts + count; ++part)
      for (i64 n = 0; n < columns; n += sides.width)
        for (i64 m = 0; m < part->rows; m += sides.height)
          all.push_back({part, m, std::min(sides.height, part->rows - m), n, std::min(sides.width, columns - n)});
    return all;
  }
};

// The side of the fewest equal pieces, none larger than `most`.
i64 even(i64 size, i64 most) {
  const i64 pieces = std::max<i64>(1, (size + most - 1) / most);
  return up((size + pieces - 1) / pieces, PANEL);
}

}  // namespace

extern "C" {

void scaled_products(const Problem* problem, const Part* parts, i64 count, i64 threads) {
  i64 rows = 0, longest = 0;
  for (i64 i = 0; i < count; ++i) {
    rows = std::max(rows, parts[i].rows);
    longest = std::max(longest, parts[i].end - parts[i].begin);
  }
  const i64 depth = std::min(up(longest, 2), DEPTH);
  Sides sides{even(rows, HEIGHT), even(problem->columns, WIDTH)};
  std::vector<Block> blocks = problem->blocks(parts, count, sides);
  while (i64(blocks.size()) < 4 * threads && threads > 1 && sides.width > 2 * PANEL) {  // for all threads to have some
    sides = {even(rows, std::max(sides.height / 2, PANEL)), even(problem->columns, up(sides.width / 2, PANEL))};
    blocks = problem->blocks(parts, count, sides);
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Room room(sides, depth);
#pragma omp for schedule(dynamic)
    for (i64 job = 0; job < i64(blocks.size()); ++job) problem->run(room, blocks[job]);
  }
}

}
