// SPDX-License-Identifier: Apache-2.0
//
// Implicit im2win: a matrix product whose rows are output pixels (or, in weight gradients, input
// channels and window positions), whose columns are output features, and whose reduction walks the
// window in im2win's order (x, y, z, channel) without the tensor that im2win would build. Tiles of
// both operands come into shared memory by asynchronous copies, some stages ahead; what lies on
// padding or behind a tail is written as zero by the copy itself.
//
// JAXWIN_MMA 0: one chain of fused multiply-adds per result, the canonical order (README.md, "What
// the numbers promise"). JAXWIN_MMA 1: tensor cores, another order and, for float32, tf32 operands.
//
// Specialised by definitions: JAXWIN_BM, _BN, _BK (tile), _TM, _TN (of a thread, or of a warp for
// tensor cores), _STAGES, _THREADS, _A, _B (how operands lie, below), _CHUNKED, _PARTIAL,
// _IMAGES_FIRST, _DIMS, _TYPE, _EPILOGUE, _Y_VECTOR, _Y_STAGED, _BLOCKS, _UNROLL.

namespace jaxwin {
namespace cuda {

constexpr int kBm = JAXWIN_BM, kBn = JAXWIN_BN, kBk = JAXWIN_BK;
constexpr int kTm = JAXWIN_TM, kTn = JAXWIN_TN;
constexpr int kStages = JAXWIN_STAGES, kThreads = JAXWIN_THREADS;
constexpr int kUnroll = JAXWIN_UNROLL;

// A in shared memory. JAXWIN_A 0: [row][k], 16 bytes along k (channels are neighbours in memory);
// 1: [k][row], 16 bytes along rows (images are neighbours); 2: [k][row], element by element.
constexpr bool kRowMajorA = JAXWIN_A == 0;
constexpr int kPadA = kRowMajorA ? kLanes16 : JAXWIN_MMA ? 8 : 0;  // against bank conflicts
constexpr int kLdA = (kRowMajorA ? kBk : kBm) + kPadA;
constexpr int kSizeA = (kRowMajorA ? kBm : kBk) * kLdA;
// B: [k][column]; JAXWIN_B 0: 16 bytes along features; 1: element by element.
constexpr int kLdB = kBn + (JAXWIN_MMA ? 8 : 0);
constexpr int kSizeB = kBk * kLdB;

JAXWIN_DEVICE constexpr int max_of(int a, int b) { return a > b ? a : b; }

// A tile of so many rows and columns (of vectors) over the threads: thread t copies columns
// t % kColumns (+ r * kThreads) and rows t / kColumns + s * kRowStep.
template <int kRows, int kColumns>
struct Spread {
  static constexpr int kColumnsEach = max_of(1, kColumns / kThreads);
  static constexpr int kRowStep = max_of(1, kThreads / kColumns);
  static constexpr int kRowsEach = (kRows + kRowStep - 1) / kRowStep;
  static_assert(kColumns % kThreads == 0 || kThreads % kColumns == 0, "tile and threads");
};
using SpreadA0 = Spread<kBm, kBk / kLanes16>;
using SpreadA1 = Spread<kBk, kBm / kLanes16>;
using SpreadA2 = Spread<kBk, kBm>;
using SpreadB0 = Spread<kBk, kBn / kLanes16>;
using SpreadB1 = Spread<kBk, kBn>;

// Where a row's window begins in the input.
struct Row {
  int first;
  int at[3];
};
#if JAXWIN_A == 0
constexpr int kRowRecords = SpreadA0::kRowsEach;
#elif JAXWIN_A == 1
constexpr int kRowRecords = 1;
#else
constexpr int kRowRecords = SpreadA2::kColumnsEach;
#endif

// One step of the reduction, the same for all rows: made once per stage by the first threads.
struct Step {
  int x, w;   // offsets; w: -1 behind the end
  int at[3];  // displacement in the input
};

struct Digits {
  int c, z, y, x;
};
// The order of the reduction: channels fastest, then z, y, x; where chunked x fastest, y, z,
// channel.
JAXWIN_DEVICE Digits digits_of(int k, int channels, const Part& p) {
  Digits d;
#if JAXWIN_CHUNKED
  d.x = k % p.win[2];
  k /= p.win[2];
  d.y = k % p.win[1];
  k /= p.win[1];
  d.z = k % p.win[0];
  d.c = k / p.win[0];
#else
  d.c = k % channels;
  k /= channels;
  d.z = k % p.win[0];
  k /= p.win[0];
  d.y = k % p.win[1];
  d.x = k / p.win[1];
#endif
  static_cast<void>(channels);
  return d;
}
// The beginning of shared memory. Steps of two stages; where the threads below kBk are.
struct Walk {
  Step steps[2 * kBk];
  Digits at[kBk], by;
  int k[kBk];
};
JAXWIN_DEVICE void carry(int& digit, int& next, int size) {
  if (digit >= size) {
    digit -= size;
    ++next;
  }
}
JAXWIN_DEVICE void advance(Digits& d, const Digits& by, int channels, const Part& p) {
  d.x += by.x;
  d.y += by.y;
  d.z += by.z;
  d.c += by.c;
#if JAXWIN_CHUNKED
  carry(d.x, d.y, p.win[2]);
  carry(d.y, d.z, p.win[1]);
  carry(d.z, d.c, p.win[0]);
#else
  carry(d.c, d.z, channels);
  carry(d.z, d.y, p.win[0]);
  carry(d.y, d.x, p.win[1]);
#endif
  static_cast<void>(channels);
}

JAXWIN_DEVICE Step make_step(const ConvArgs& a, const Part& p, const Digits& d, bool real) {
  Step s;
  s.x = d.c * a.x_c;
  s.w = p.w_first + d.c * a.w_c;
  const int tap[3] = {d.z, d.y, d.x};
#pragma unroll
  for (int i = kFirstDim; i < 3; ++i) {
    s.at[i] = tap[i] * p.dilation[i];
    s.x += s.at[i] * a.x_sp[i];
    s.w += tap[i] * p.w_sp[i];
  }
  if (!real) {
    s.w = -1;
    s.at[2] = kNowhere;
    s.x = 0;
  }
  return s;
}

JAXWIN_DEVICE Row make_row(const ConvArgs& a, const Part& p, int row) {
  Row r;
  r.at[0] = r.at[1] = r.at[2] = 0;
  r.first = 0;
  if (row >= p.rows) {
    r.at[2] = kNowhere;
    return r;
  }
  int o[3];
  const int image = row_position(a, p, row, o);
  r.first = image * a.x_n;
#pragma unroll
  for (int d = kFirstDim; d < 3; ++d) {
    r.at[d] = o[d] * p.stride[d] - p.pad[d];
    r.first += r.at[d] * a.x_sp[d];
  }
  return r;
}

JAXWIN_DEVICE bool inside(const ConvArgs& a, const Row& r, const Step& s) {
  bool ok = true;
#pragma unroll
  for (int d = kFirstDim; d < 3; ++d) {
    ok = ok && static_cast<unsigned>(r.at[d] + s.at[d]) < static_cast<unsigned>(a.in[d]);
  }
  return ok;
}

JAXWIN_DEVICE void copy_element(Element* to, const Element* from, bool real) {
#if JAXWIN_TYPE == 0
  copy_async<4>(to, from, real);
#else
  *to = real ? *from : static_cast<Element>(0);
#endif
}

JAXWIN_DEVICE void load_a(const ConvArgs& a, const Element* x, Element* to, const Step* steps,
                          const Row (&rows)[kRowRecords], int thread) {
#if JAXWIN_A == 0
  constexpr int kColumns = kBk / kLanes16;
  const int k = thread % kColumns * kLanes16;
  const Step step = steps[k];
#pragma unroll
  for (int s = 0; s < SpreadA0::kRowsEach; ++s) {
    const int row = thread / kColumns + s * SpreadA0::kRowStep;
    if (kBm % SpreadA0::kRowStep != 0 && row >= kBm) break;
    const bool ok = inside(a, rows[s], step);
    copy_async<16>(to + row * kLdA + k, x + (ok ? rows[s].first + step.x : 0), ok);
  }
#elif JAXWIN_A == 1
  constexpr int kColumns = kBm / kLanes16;
  const int row = thread % kColumns * kLanes16;
#pragma unroll
  for (int s = 0; s < SpreadA1::kRowsEach; ++s) {
    const int k = thread / kColumns + s * SpreadA1::kRowStep;
    if (kBk % SpreadA1::kRowStep != 0 && k >= kBk) break;
    const Step step = steps[k];
    const bool ok = inside(a, rows[0], step);
    copy_async<16>(to + k * kLdA + row, x + (ok ? rows[0].first + step.x : 0), ok);
  }
#else
#pragma unroll
  for (int s = 0; s < SpreadA2::kRowsEach; ++s) {
    const int k = thread / kBm + s * SpreadA2::kRowStep;
    if (kBk % SpreadA2::kRowStep != 0 && k >= kBk) break;
    const Step step = steps[k];
#pragma unroll
    for (int r = 0; r < SpreadA2::kColumnsEach; ++r) {
      const int row = thread % kBm + r * kThreads;
      const bool ok = inside(a, rows[r], step);
      copy_element(to + k * kLdA + row, x + (ok ? rows[r].first + step.x : 0), ok);
    }
  }
#endif
}

// The row whose record `r` this thread keeps.
JAXWIN_DEVICE int row_of_record(int r, int thread) {
#if JAXWIN_A == 0
  return thread / (kBk / kLanes16) + r * SpreadA0::kRowStep;
#elif JAXWIN_A == 1
  static_cast<void>(r);
  return thread % (kBm / kLanes16) * kLanes16;
#else
  return thread % kBm + r * kThreads;
#endif
}

JAXWIN_DEVICE void load_b(const ConvArgs& a, const Element* w, Element* to, const Step* steps,
                          int first_column, int thread) {
#if JAXWIN_B == 0
  constexpr int kColumns = kBn / kLanes16;
  const int column = thread % kColumns * kLanes16;
#pragma unroll
  for (int s = 0; s < SpreadB0::kRowsEach; ++s) {
    const int k = thread / kColumns + s * SpreadB0::kRowStep;
    if (kBk % SpreadB0::kRowStep != 0 && k >= kBk) break;
    const int from = steps[k].w;
    const bool ok = from >= 0 && first_column + column < a.k;
    copy_async<16>(to + k * kLdB + column, w + (ok ? from + first_column + column : 0), ok);
  }
#else
#pragma unroll
  for (int s = 0; s < SpreadB1::kRowsEach; ++s) {
    const int k = thread / kBn + s * SpreadB1::kRowStep;
    if (kBk % SpreadB1::kRowStep != 0 && k >= kBk) break;
    const int from = steps[k].w;
#pragma unroll
    for (int r = 0; r < SpreadB1::kColumnsEach; ++r) {
      const int column = thread % kBn + r * kThreads;
      const bool ok = from >= 0 && first_column + column < a.k;
      copy_element(to + k * kLdB + column, w + (ok ? from + (first_column + column) * a.w_k : 0),
                   ok);
    }
  }
#endif
}

// --- one tile in registers ----------------------------------------------------------------------

#if JAXWIN_MMA == 0
struct alignas(16) Four {
  float v[4];
};
struct alignas(8) Two {
  float v[2];
};

// Warps of up to 8 x 4 threads, so that operands are shared by as many lanes as can be.
constexpr int kAcross = kBn / kTn, kDown = kBm / kTm;
constexpr int kWarpAcross = kAcross < 8 ? kAcross : 8, kWarpDown = 32 / kWarpAcross;
static_assert(kAcross * kDown == kThreads, "threads");
static_assert(kAcross % kWarpAcross == 0 && kDown % kWarpDown == 0, "warps");

struct Tile {
  float sum[kTm][kTn];
  int across, down;

  JAXWIN_DEVICE void begin(int thread) {
    const int warp = thread / 32, lane = thread % 32;
    across = warp % (kAcross / kWarpAcross) * kWarpAcross + lane % kWarpAcross;
    down = warp / (kAcross / kWarpAcross) * kWarpDown + lane / kWarpAcross;
#pragma unroll
    for (int i = 0; i < kTm; ++i) {
#pragma unroll
      for (int j = 0; j < kTn; ++j) sum[i][j] = 0.0F;
    }
  }
  JAXWIN_DEVICE int row(int i) const {
    return kRowMajorA ? i * kDown + down : i / 4 * (kDown * 4) + down * 4 + i % 4;
  }
  // Columns come in groups of four neighbours.
  JAXWIN_DEVICE int column(int j) const { return j / 4 * (kAcross * 4) + across * 4 + j % 4; }

  JAXWIN_DEVICE void multiply(const float* a, const float* b) {
#pragma unroll kUnroll
    for (int k = 0; k < kBk; k += 2) {
      Two left[kTm];
      if (kRowMajorA) {
#pragma unroll
        for (int i = 0; i < kTm; ++i) {
          left[i] = *reinterpret_cast<const Two*>(a + row(i) * kLdA + k);
        }
      }
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        Four right[kTn / 4], rows[kTm / 4];
#pragma unroll
        for (int j = 0; j < kTn / 4; ++j) {
          right[j] = *reinterpret_cast<const Four*>(b + (k + q) * kLdB + column(j * 4));
        }
        if (!kRowMajorA) {
#pragma unroll
          for (int i = 0; i < kTm / 4; ++i) {
            rows[i] = *reinterpret_cast<const Four*>(a + (k + q) * kLdA + row(i * 4));
          }
        }
#pragma unroll
        for (int i = 0; i < kTm; ++i) {
          const float l = kRowMajorA ? left[i].v[q] : rows[i / 4].v[i % 4];
#pragma unroll
          for (int j = 0; j < kTn; ++j) sum[i][j] = fma(l, right[j / 4].v[j % 4], sum[i][j]);
        }
      }
    }
  }
  static constexpr int kGroup = 4;  // neighbouring columns
};
#else
// A warp computes kTm x kTn by 16 x 8 pieces.
constexpr int kWarpsAcross = kBn / kTn, kWarpsDown = kBm / kTm;
constexpr int kPieceK = JAXWIN_TYPE == 0 ? 8 : 16;
static_assert(kWarpsAcross * kWarpsDown * 32 == kThreads, "threads");
static_assert(kTm % 16 == 0 && kTn % 16 == 0 && kBk % kPieceK == 0, "pieces");

struct Tile {
  float sum[kTm / 16 * 2][kTn / 8 * 2];  // [row of a lane][column of a lane]
  int lane, first_row, first_column;

  JAXWIN_DEVICE void begin(int thread) {
    const int warp = thread / 32;
    lane = thread % 32;
    first_row = warp / kWarpsAcross * kTm;
    first_column = warp % kWarpsAcross * kTn;
#pragma unroll
    for (int i = 0; i < kTm / 8; ++i) {
#pragma unroll
      for (int j = 0; j < kTn / 4; ++j) sum[i][j] = 0.0F;
    }
  }
  // A lane of a 16 x 8 piece holds rows lane / 4 (+ 8), columns lane % 4 * 2 (+ 1).
  JAXWIN_DEVICE int row(int i) const { return first_row + i * 8 + lane / 4; }
  JAXWIN_DEVICE int column(int j) const { return first_column + j / 2 * 8 + lane % 4 * 2 + j % 2; }

  JAXWIN_DEVICE void multiply(const Element* a, const Element* b) {
#pragma unroll
    for (int k = 0; k < kBk; k += kPieceK) {
      unsigned left[kTm / 16][4], right[kTn / 8][2];
#if JAXWIN_TYPE == 0
#pragma unroll
      for (int i = 0; i < kTm / 16; ++i) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int row = first_row + i * 16 + q % 2 * 8 + lane / 4;
          const int at = k + q / 2 * 4 + lane % 4;
          left[i][q] = to_tf32(kRowMajorA ? a[row * kLdA + at] : a[at * kLdA + row]);
        }
      }
#pragma unroll
      for (int j = 0; j < kTn / 8; ++j) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          right[j][q] = to_tf32(b[(k + q * 4 + lane % 4) * kLdB + first_column + j * 8 + lane / 4]);
        }
      }
#else
      const int eighth = lane / 8, within = lane % 8;
#pragma unroll
      for (int i = 0; i < kTm / 16; ++i) {
        const int row = first_row + i * 16;
        if (kRowMajorA) {
          load_matrices(left[i], a + (row + eighth % 2 * 8 + within) * kLdA + k + eighth / 2 * 8);
        } else {
          load_matrices_transposed(left[i],
                                   a + (k + eighth / 2 * 8 + within) * kLdA + row + eighth % 2 * 8);
        }
      }
#pragma unroll
      for (int j = 0; j < kTn / 16; ++j) {
        unsigned four[4];
        load_matrices_transposed(four, b + (k + eighth % 2 * 8 + within) * kLdB + first_column +
                                           j * 16 + eighth / 2 * 8);
        right[2 * j][0] = four[0];
        right[2 * j][1] = four[1];
        right[2 * j + 1][0] = four[2];
        right[2 * j + 1][1] = four[3];
      }
#endif
#pragma unroll
      for (int i = 0; i < kTm / 16; ++i) {
#pragma unroll
        for (int j = 0; j < kTn / 8; ++j) {
          float d[4] = {sum[2 * i][2 * j], sum[2 * i][2 * j + 1], sum[2 * i + 1][2 * j],
                        sum[2 * i + 1][2 * j + 1]};
#if JAXWIN_TYPE == 0
          mma_tf32(d, left[i], right[j]);
#elif JAXWIN_TYPE == 1
          mma_bf16(d, left[i], right[j]);
#else
          mma_f16(d, left[i], right[j]);
#endif
          sum[2 * i][2 * j] = d[0];
          sum[2 * i][2 * j + 1] = d[1];
          sum[2 * i + 1][2 * j] = d[2];
          sum[2 * i + 1][2 * j + 1] = d[3];
        }
      }
    }
  }
  static constexpr int kGroup = 2;
};
#endif
constexpr int kTileRows = JAXWIN_MMA ? kTm / 8 : kTm;
constexpr int kTileColumns = JAXWIN_MMA ? kTn / 4 : kTn;

template <typename T>
struct alignas(sizeof(T) * Tile::kGroup) Group {
  T v[Tile::kGroup];
};

// --- the kernel ---------------------------------------------------------------------------------

JAXWIN_KERNEL(JAXWIN_THREADS, JAXWIN_BLOCKS) jaxwin_gemm(JAXWIN_ARGS ConvArgs a) {
  JAXWIN_DYNAMIC_SHARED(shared);
  // Where the threads that make steps are in the reduction is kept in shared memory: registers are
  // the scarce thing here.
  Walk* const walk = reinterpret_cast<Walk*>(shared);
  Step* const steps = walk->steps;
  Element* const tiles =
      reinterpret_cast<Element*>(shared + (static_cast<int>(sizeof(Walk)) + 127) / 128 * 128);
  const int thread = static_cast<int>(threadIdx.x);

  const int columns_at = static_cast<int>(blockIdx.x) % a.column_blocks;
  int rest = static_cast<int>(blockIdx.x) / a.column_blocks;
  const int row_block = rest % a.row_blocks;
  rest /= a.row_blocks;
  const int g = rest % a.g;
  const int chunk = rest / a.g;  // of this launch
  const Part& p = a.part[part_of_block(a, row_block)];
  const int first_row = (row_block - p.first_block) * kBm;
  const int first_column = columns_at * kBn;
  const Element* const x = static_cast<const Element*>(a.x) + g * a.x_g;
  const Element* const w = static_cast<const Element*>(a.w) + g * a.w_g;

  const int total = a.c * p.taps;
  int begin = 0;
  int end = total;
#if JAXWIN_PARTIAL
  begin = (a.first_chunk + chunk) * a.chunk_length;
  end = begin + a.chunk_length < total ? begin + a.chunk_length : total;
#endif
  const int stages = (end - begin + kBk - 1) / kBk;

  Row rows[kRowRecords];
#pragma unroll
  for (int r = 0; r < kRowRecords; ++r)
    rows[r] = make_row(a, p, first_row + row_of_record(r, thread));

  if (thread < kBk) {
    walk->at[thread] = digits_of(begin + thread, a.c, p);
    walk->k[thread] = begin + thread;
    if (thread == 0) walk->by = digits_of(kBk, a.c, p);
  }
  __syncthreads();
  const auto next_steps = [&](int slot) {
    if (thread < kBk) {
      Digits digits = walk->at[thread];
      const int k = walk->k[thread];
      steps[slot * kBk + thread] = make_step(a, p, digits, k < end);
      advance(digits, walk->by, a.c, p);
      walk->at[thread] = digits;
      walk->k[thread] = k + kBk;
    }
  };
  const auto load = [&](int stage, int slot) {
    if (stage < stages) {
      Element* const to = tiles + stage % kStages * (kSizeA + kSizeB);
      load_a(a, x, to, steps + slot * kBk, rows, thread);
      load_b(a, w, to + kSizeA, steps + slot * kBk, first_column, thread);
    }
    commit_group();
  };

  // Steps are one stage ahead of the copies, in two slots; copies kStages - 1 ahead of the product.
  next_steps(0);
  for (int s = 0; s < kStages - 1; ++s) {
    __syncthreads();
    load(s, s % 2);
    next_steps((s + 1) % 2);
  }
  Tile tile;
  tile.begin(thread);
  for (int s = 0; s < stages; ++s) {
    wait_groups<kStages - 2>();
    __syncthreads();
    const int next = s + kStages - 1;
    load(next, next % 2);
    next_steps((next + 1) % 2);
    const Element* const from = tiles + s % kStages * (kSizeA + kSizeB);
    tile.multiply(from, from + kSizeA);
  }
  wait_groups<0>();

#if JAXWIN_Y_STAGED
  // Rows are neighbours in memory, columns are not: some columns at a time go through shared
  // memory, so that neighbouring threads store neighbouring results.
  constexpr int kSlice = kBn < 32 ? kBn : 32, kLdSlice = kBm + 1;
  constexpr int kRowsEach = max_of(1, kBm / kThreads), kColumnStep = max_of(1, kThreads / kBm);
  float* const slice = reinterpret_cast<float*>(tiles);
  Result* const y = static_cast<Result*>(a.y);
  int places[kRowsEach];  // of a row's first result; negative behind the last row
#pragma unroll
  for (int r = 0; r < kRowsEach; ++r) {
    const int row = first_row + thread % kBm + r * kThreads;
    places[r] = -1;
    if (row < p.rows) {
      int o[3];
      const int image = row_position(a, p, row, o);
      places[r] = p.y_first + g * a.y_g + image * a.y_n;
#pragma unroll
      for (int d = kFirstDim; d < 3; ++d) places[r] += o[d] * p.y_sp[d];
    }
  }
  for (int first = 0; first < kBn; first += kSlice) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kTileColumns; ++j) {
      const int column = tile.column(j) - first;
      if (column < 0 || column >= kSlice) continue;
#pragma unroll
      for (int i = 0; i < kTileRows; ++i) slice[column * kLdSlice + tile.row(i)] = tile.sum[i][j];
    }
    __syncthreads();
    for (int c = thread / kBm; c < kSlice; c += kColumnStep) {
      const int column = first_column + first + c;
      if (column >= a.k) break;
#pragma unroll
      for (int r = 0; r < kRowsEach; ++r) {
        if (places[r] < 0) continue;
        const int there = places[r] + column * a.y_k;
        const float value = slice[c * kLdSlice + thread % kBm + r * kThreads];
        y[there] = round_result(finish(a, value, g * a.k + column, there));
      }
    }
  }
#else
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
    const int row = first_row + tile.row(i);
    if (row >= p.rows) continue;
#if JAXWIN_PARTIAL
    float* const y = static_cast<float*>(a.y) +
                     (static_cast<long long>(chunk * a.g + g) * p.rows + row) * a.k_pitch;
#else
    int o[3];
    const int image = row_position(a, p, row, o);
    int at = p.y_first + g * a.y_g + image * a.y_n;
#pragma unroll
    for (int d = kFirstDim; d < 3; ++d) at += o[d] * p.y_sp[d];
    Result* const y = static_cast<Result*>(a.y);
#endif
#pragma unroll
    for (int j = 0; j < kTileColumns; j += Tile::kGroup) {
      const int column = first_column + tile.column(j);
      if (column >= a.k) continue;
#if JAXWIN_PARTIAL
        // Neighbours up to k_pitch belong to this row.
#pragma unroll
      for (int q = 0; q < Tile::kGroup; ++q) {
        if (column + q < a.k) y[column + q] = tile.sum[i][j + q];
      }
#elif JAXWIN_Y_VECTOR
      Group<Result> group;
#pragma unroll
      for (int q = 0; q < Tile::kGroup; ++q) {
        group.v[q] =
            round_result(finish(a, tile.sum[i][j + q], g * a.k + column + q, at + column + q));
      }
      *reinterpret_cast<Group<Result>*>(y + at + column) = group;
#else
#pragma unroll
      for (int q = 0; q < Tile::kGroup; ++q) {
        if (column + q >= a.k) break;
        const int there = at + (column + q) * a.y_k;
        y[there] = round_result(finish(a, tile.sum[i][j + q], g * a.k + column + q, there));
      }
#endif
    }
  }
#endif
}

}  // namespace cuda
}  // namespace jaxwin
