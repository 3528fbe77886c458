// Matmuls of bf16 matrices, and of bf16 values with fp32 scales, for CPUs with AVX-512 or AVX2. Python calls the
// functions with ctypes.
//
// A job is a block of the output of one matmul. Its thread repeats these steps for every DEPTH elements of the
// contraction. It packs these elements of the left operand for all rows of the block; they fit the L2 cache. Then it
// packs these elements of the right operand, one panel after another. A panel fits the L1 cache while it is multiplied
// by all rows. With scales, the thread sums 128 elements of the contraction in registers, multiplies the sum by the
// scales of its row and column, and adds the product to an fp32 sum, like kernels on Hopper (paper 3.3.2). The order in
// which the terms of an element are summed depends neither on the block nor on the threads.

#include <chrono>
#include <memory>
#include <vector>

#include "tiles.h"

namespace {

using namespace tiles;

constexpr i64 TILE = 128;                 // number of elements of the contraction that share a pair of scales
constexpr i64 DEPTH = 256;                // number of elements of the contraction that are packed at a time, a multiple of TILE
constexpr i64 HEIGHT = 516, WIDTH = 512;  // maximum height and width of a block

// Matrices (outer, contraction). One scale applies to 1 << shift rows of the outer axis and to one tile of the
// contraction. scale null: all scales are 1.
struct Operand {
  const u16* data;
  i64 matrix, outer, inner;  // strides; either outer or inner is 1
  const float* scale;
  i64 scale_matrix, scale_outer, scale_tile, shift;  // strides, and log2 of the number of outer rows that share a scale

  // Packs the outer rows [first, first + count) and the contraction [begin, end) of one matrix into panels.
  template <i64 WIDTH>
  void pack(i64 of, i64 first, i64 count, i64 begin, i64 end, float* panels) const {
    const u16* from = data + of * matrix + first * outer + begin * inner;
    if (inner == 1) pack_transposed<WIDTH>(from, outer, count, end - begin, panels);
    else tiles::pack<WIDTH>(from, inner, end - begin, count, panels);
  }

  void scales(i64 of, i64 first, i64 count, i64 tile, float* to) const {
    if (!scale) { std::fill_n(to, count, 1.f); return; }
    const float* from = scale + of * scale_matrix + tile * scale_tile;
    for (i64 j = 0; j < count; ++j) to[j] = from[((first + j) >> shift) * scale_outer];
  }
};

// One matmul. Its left operand is the rows [first, first + rows), its right operand is the complete matrix with index
// `right`, and its contraction is [begin, end). With scales, `begin` must be the start of a tile.
struct Part {
  i64 first, rows, right, begin, end;
  i64 out;  // offset of the first element in the output
};

// A rectangle of the output of one matmul.
struct Block {
  const Part* part;
  i64 row, rows, column, columns;
};

// Computes what `tile` computes, but multiplies each sum by the scales of its row and its column.
template <class To>
void scaled_tile(i64 rows, Left a, const float* panel, i64 count, const float* left, const float* right, const float* from, i64 from_row, To to, i64 to_row) {
  of_rows(rows, [=](auto constant) {
    constexpr int M = constant;
    Vector sum[M][2];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = Vector{};
    multiply<M, true>(a, panel, count, sum);
    const Vector columns[2] = {load(right, All{}), load(right + LANES, All{})};
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < 2; ++n) {
        const Vector before = from ? load(from + m * from_row + LANES * n, All{}) : Vector{};
        const Vector scale = all(left[m]) * columns[n];
        store(to + m * to_row + LANES * n, fmadd(sum[m][n], scale, before), All{});
      }
  });
}

// Height and width of the blocks. They are multiples of a tile's height and width.
struct Sides {
  i64 height, width;
};

// Buffers of one thread. They need at most 1.6 MB.
struct Room {
  std::unique_ptr<float[]> left, panel, scales, sums;
  Room(Sides sides, i64 depth)
      : left(new float[panel_values<ROWS>(depth, sides.height)]), panel(new float[panel_values<PANEL>(depth, PANEL)]),
        scales(new float[DEPTH / TILE * sides.height]), sums(new float[sides.height * sides.width]) {}
};

struct Problem {
  Operand left, right;
  void* out;
  i64 fp32;  // whether the output is fp32; else it is bf16
  i64 columns, out_stride;
  i64 into;  // whether to add the result to `out`, which must then be fp32

  // Returns the offset in `out` of the first element of row m of the block.
  i64 place(const Block& block, i64 m) const { return block.part->out + (block.row + m) * out_stride + block.column; }

  // Computes one block of the output. To: type of the output's elements.
  template <class To>
  void run(Room& room, const Block& block) const {
    const Part& part = *block.part;
    if (into && part.begin >= part.end) return;
    const i64 width = up(block.columns, PANEL), whole = part.begin < part.end ? block.columns / PANEL * PANEL : 0;
    for (i64 m = 0; m < block.rows && into && whole < block.columns; ++m) {
      const float* from = (const float*)out + place(block, m) + whole;
      float* to = room.sums.get() + m * width + whole;
      along(block.columns - whole, [=](i64 j, auto which) { store(to + j, load(from + j, which), All{}); });
    }
    for (i64 begin = part.begin; begin < part.end; begin += DEPTH) {
      const i64 end = std::min(begin + DEPTH, part.end);
      left.pack<ROWS>(0, part.first + block.row, block.rows, begin, end, room.left.get());
      for (i64 k = begin; scaled() && k < end; k += TILE)
        left.scales(0, part.first + block.row, block.rows, k / TILE, room.scales.get() + (k - begin) / TILE * block.rows);
      for (i64 n = 0; n < block.columns; n += PANEL) {
        right.pack<PANEL>(part.right, block.column + n, std::min(PANEL, block.columns - n), begin, end, room.panel.get());
        add<To>(room, block, n, begin, end);
      }
    }
    if (part.begin >= part.end) std::fill_n(room.sums.get(), block.rows * width, 0.f);
    for (i64 m = 0; m < block.rows && whole < block.columns; ++m) {
      const float* from = room.sums.get() + m * width + whole;
      To* to = (To*)out + place(block, m) + whole;
      along(block.columns - whole, [=](i64 j, auto which) { store(to + j, load(from + j, which), which); });
    }
  }

  bool scaled() const { return left.scale || right.scale; }

  // Computes the panel of the block that begins with column n, over the contraction [begin, end). Both operands must be
  // packed.
  template <class To>
  void add(Room& room, const Block& block, i64 n, i64 begin, i64 end) const {
    const Part& part = *block.part;
    // Store complete cache lines past the caches if the output is fp32. Such an output is a weight gradient, which no
    // code reads before the end of the step.
    const bool lines = fp32 && uintptr_t(out) % 64 == 0 && part.out % 16 == 0 && out_stride % 16 == 0;
    const bool scaled = this->scaled();
    const i64 packed = end - begin, step = scaled ? TILE : packed, width = up(block.columns, PANEL);
    float right_scales[PANEL] = {};
    for (i64 k = begin; k < end; k += step) {
      const i64 count = std::min(step, end - k);
      if (scaled) right.scales(part.right, block.column + n, std::min(PANEL, block.columns - n), k / TILE, right_scales);
      for (i64 m = 0; m < block.rows; m += ROWS) {
        const i64 rows = std::min(ROWS, block.rows - m);
        const Left a{room.left.get() + m * packed + (k - begin) * ROWS, 1, ROWS};
        const float* panel = room.panel.get() + (k - begin) * PANEL;
        const float *left_scales = room.scales.get() + (k - begin) / TILE * block.rows + m, *columns = right_scales;
        float* sums = room.sums.get() + m * width + n;
        const bool first = k == part.begin, ragged = n + PANEL > block.columns;
        To* to = (To*)out + place(block, m) + n;
        const float* before = first && !into ? nullptr : first && !ragged ? (const float*)to : sums;
        const i64 before_row = first && into && !ragged ? out_stride : width;
        // Capture by value. With captures by reference, the innermost loop would load the variables from memory in each
        // iteration.
        const auto write = [=](auto to, i64 to_row) {
          if (scaled) scaled_tile(rows, a, panel, count, left_scales, columns, before, before_row, to, to_row);
          else tile<true>(rows, a, panel, count, before, before_row, to, to_row);
        };
        // Write the final sums directly to the output, if the panel is complete.
        if (k + count < part.end || ragged) write(sums, width);
        else if (lines) write(Stream{(float*)to}, out_stride);
        else write(to, out_stride);
      }
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

// Splits `size` into as few equal pieces as possible, none larger than `most`. Returns the size of a piece, rounded up
// to `multiple`.
i64 even(i64 size, i64 most, i64 multiple) {
  const i64 pieces = std::max<i64>(1, (size + most - 1) / most);
  return up((size + pieces - 1) / pieces, multiple);
}

#ifdef __AVX512BF16__

// Returns the time, in seconds, of a fixed number of rounds. A round consists of ten independent operations on
// registers. The result is the minimum of several tries.
template <class Operation>
double seconds(const Operation& op) {
  using clock = std::chrono::steady_clock;
  double least = 1e9;
  for (int tries = 0; tries < 20; ++tries) {
    Vector a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, i{}, j{};
    const auto start = clock::now();
    for (int round = 0; round < 4096; ++round) {
      a = op(a), b = op(b), c = op(c), d = op(d), e = op(e), f = op(f), g = op(g), h = op(h), i = op(i), j = op(j);
      asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h), "+v"(i), "+v"(j));  // forces all results
    }
    least = std::min(least, std::chrono::duration<double>(clock::now() - start).count());
  }
  return least;
}

#endif

}  // namespace

extern "C" {

// Returns the rate of this CPU's dot products of bf16 pairs, relative to the rate of its fp32 FMA instructions; 0 if
// the CPU has no such dot products. The measurement takes a millisecond.
double bf16_rate() {
#ifdef __AVX512BF16__
  const Vector x = all(1);
  const double fma = seconds([=](Vector sum) { return fmadd(x, x, sum); });
  return 2 * fma / seconds([=](Vector sum) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)x); });
#else
  return 0;
#endif
}

void products(const Problem* problem, const Part* parts, i64 count, i64 threads) {
  i64 rows = 0, longest = 0, pairs = 0;
  for (i64 i = 0; i < count; ++i) {
    rows = std::max(rows, parts[i].rows);
    pairs += parts[i].rows * (parts[i].end - parts[i].begin);
    longest = std::max(longest, parts[i].end - parts[i].begin);
  }
  threads = threads_for(pairs * problem->columns / PANEL, threads);
  const auto sides_of = [=](i64 height, i64 width) { return Sides{even(rows, height, ROWS), even(problem->columns, width, PANEL)}; };
  Sides sides = sides_of(HEIGHT, WIDTH);
  std::vector<Block> blocks = problem->blocks(parts, count, sides);
  // With smaller blocks, operands are packed more often. So reduce the size of blocks only until all threads have equal
  // work.
  const auto uneven = [=](i64 jobs) { return jobs < 4 * threads && jobs % threads; };
  while (threads > 1 && uneven(blocks.size()) && std::max(sides.height, sides.width) > 2 * PANEL) {
    sides = sides.height > sides.width ? sides_of(sides.height / 2, sides.width) : sides_of(sides.height, sides.width / 2);
    blocks = problem->blocks(parts, count, sides);
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Room room(sides, std::min(longest, DEPTH));
#pragma omp for schedule(dynamic)
    for (i64 job = 0; job < i64(blocks.size()); ++job)
      problem->fp32 ? problem->run<float>(room, blocks[job]) : problem->run<u16>(room, blocks[job]);
  }
}

}
