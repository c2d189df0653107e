// SPDX-License-Identifier: Apache-2.0
// The layer of low_rank.h for AVX-512, over one number type. Included by low_rank_bf16.cpp and low_rank_f32.cpp, each of
// which defines TARGET and the struct Number first; all here is in the including file's own namespace.
//
// One product serves all: sums (tokens, lanes) += left (tokens, units) panel (units, lanes). A unit is 4 bytes along the
// sum: one float, or two bfloat16 that vdpbf16ps adds at once; a panel row is one unit of 16 to 64 outputs. What stands in
// a panel (rows of W decoded from 4 bits, A, B, x, dy) is packed there once and read by many tokens from the L2 cache.
// Every sum has one owner and one order, so that results do not depend on the number of threads.

// tile ----------------------------------------------------------------------------------------

template <int Tokens, int Vectors>
TARGET inline void tile(const char* left, int64_t stride, const uint32_t* panel, int64_t width, int64_t units, float* sums,
                        int64_t step) {
  __m512 sum[Tokens][Vectors];
#pragma GCC unroll 12
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[t][v] = _mm512_setzero_ps();
  for (int64_t i = 0; i < units; ++i) {
    __m512i w[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) w[v] = _mm512_loadu_si512(panel + i * width + 16 * v);
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t) {
      int32_t unit;
      std::memcpy(&unit, left + t * stride + 4 * i, 4);
      const __m512i one = _mm512_set1_epi32(unit);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[t][v] = Number::dot(sum[t][v], one, w[v]);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      float* to = sums + t * step + 16 * v;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[t][v]));
    }
}

template <int Vectors, int Tokens>
TARGET inline void tile_of(int64_t tokens, const char* left, int64_t stride, const uint32_t* panel, int64_t width,
                           int64_t units, float* sums, int64_t step) {
  if (tokens == Tokens) return tile<Tokens, Vectors>(left, stride, panel, width, units, sums, step);
  if constexpr (Tokens > 1) tile_of<Vectors, Tokens - 1>(tokens, left, stride, panel, width, units, sums, step);
}

// All tokens, in tiles of nearly equal height: 24 sums in registers at most.
template <int Vectors>
TARGET void tiles_of(const char* left, int64_t stride, int64_t tokens, const uint32_t* panel, int64_t width, int64_t units,
                     float* sums, int64_t step) {
  constexpr int kMost = Vectors == 4 ? 6 : Vectors == 3 ? 8 : 12;
  for (int64_t t = 0; t < tokens;) {
    const int64_t rest = tokens - t, blocks = (rest + kMost - 1) / kMost, here = (rest + blocks - 1) / blocks;
    tile_of<Vectors, kMost>(here, left + t * stride, stride, panel, width, units, sums + t * step, step);
    t += here;
  }
}

TARGET void tiles(const char* left, int64_t stride, int64_t tokens, const uint32_t* panel, int64_t width, int64_t units,
                  float* sums, int64_t step) {
  for (int64_t lane = 0; lane < width; lane += 64) switch (std::min<int64_t>(64, width - lane) / 16) {
      case 1: tiles_of<1>(left, stride, tokens, panel + lane, width, units, sums + lane, step); break;
      case 2: tiles_of<2>(left, stride, tokens, panel + lane, width, units, sums + lane, step); break;
      case 3: tiles_of<3>(left, stride, tokens, panel + lane, width, units, sums + lane, step); break;
      default: tiles_of<4>(left, stride, tokens, panel + lane, width, units, sums + lane, step);
    }
}

// For a product that is cheap next to that with W: sums of an eighth of `length` at most, which lose fewer digits.
TARGET void fine_tiles(const char* left, int64_t stride, int64_t tokens, const uint32_t* panel, int64_t width, int64_t units,
                       int64_t length, float* sums, int64_t step) {
  const int64_t part = Number::kPer == 2 ? units : std::max<int64_t>(4, length / 8);
  for (int64_t i = 0; i < units; i += part)
    tiles(left + 4 * i, stride, tokens, panel + i * width, width, std::min(part, units - i), sums, step);
}

// panels --------------------------------------------------------------------------------------

constexpr int64_t kPer = Number::kPer, kSize = 4 / kPer;  // elements of a unit, bytes of an element
constexpr int64_t kWide = 64, kTokens = 512;              // outputs and tokens whose sums are kept
constexpr int64_t kDeep = Number::kUnits;                 // units of a panel
constexpr int64_t kSlice = std::min<int64_t>(256, kDeep);   // units of a masked x that stay in the L1 cache

inline int64_t up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
// Outputs to take together from `column` on: none of two blocks of 64, which a 4-bit weight scales by two numbers.
inline int64_t width_from(int64_t column, int64_t end) { return std::min(kWide - column % kWide, end - column); }
inline int64_t units_of(int64_t elements) { return (elements + kPer - 1) / kPer; }

// Rows of floats, times a scale: A and B.
struct Floats {
  const float* data;
  int64_t rows, columns;
  float scale;
  TARGET __m512i table(int64_t, int64_t) const { return _mm512_setzero_si512(); }
  TARGET __m512i along(__m512i, int64_t row, int64_t column, int64_t left) const {
    return Number::units(data + row * columns + column, left, scale);
  }
  // Rows `row` and, where two stand in a unit, the next; 16 columns as they come.
  TARGET __m512i across(int64_t row, int64_t column) const {
    const __mmask16 here = mask16(columns - column);
    const float* from = data + row * columns + column;
    const __m512 first = _mm512_mul_ps(_mm512_maskz_loadu_ps(here, from), _mm512_set1_ps(scale));
    if constexpr (kPer == 1) return _mm512_castps_si512(first);
    const __m512 second =
        row + 1 < rows ? _mm512_mul_ps(_mm512_maskz_loadu_ps(here, from + columns), _mm512_set1_ps(scale)) : _mm512_setzero_ps();
    return Number::both(first, second);
  }
  TARGET void across(int64_t row, int64_t column, int64_t width, __m512i* out) const {
    for (int64_t c = 0; c < width; c += 32) {
      const __m512i low = across(row, column + c), high = across(row, column + c + 16);
      Number::arrange(low, high, out + c / 16);
    }
  }
};

// Rows of numbers of the kernel's own type: a dense W, x, dy.
struct Numbers {
  const char* data;
  int64_t rows, columns, stride;  // stride in bytes
  TARGET __m512i table(int64_t, int64_t) const { return _mm512_setzero_si512(); }
  TARGET __m512i along(__m512i, int64_t row, int64_t column, int64_t left) const {
    return Number::load(data + row * stride + column * kSize, left);
  }
  TARGET void across(int64_t row, int64_t column, int64_t width, __m512i* out) const {
    const char* from = data + row * stride + column * kSize;
    for (int64_t c = 0; c < width; c += 32)
      Number::pair(from + c * kSize, row + 1 < rows ? from + c * kSize + stride : nullptr, columns - column - c, out + c / 16);
  }
};

struct Packed {
  const Nf4& w;
  int64_t rows, columns;
  int block_shift, nested_shift;
  Packed(const Nf4& nf4, int64_t n, int64_t k)
      : w(nf4), rows(n), columns(k), block_shift(__builtin_ctzll(nf4.blocksize)),
        nested_shift(nf4.absmax ? 0 : __builtin_ctzll(nf4.nested_blocksize)) {}
  TARGET __m512i table(int64_t row, int64_t column) const { return Number::table(values(row, column)); }
  TARGET __m512i along(__m512i table, int64_t row, int64_t column, int64_t) const {
    return Number::pick(table, w.packed + (row * columns + column) / 2);
  }
  TARGET void across(int64_t row, int64_t column, int64_t width, __m512i* out) const {
    const uint8_t* from = w.packed + (row * columns + column) / 2;
    const bool two = row + 1 < rows;
    Number::pick_pair(values(row, column), two ? values(row + 1, column) : _mm512_setzero_ps(), from,
                      two ? from + columns / 2 : from, width, out);
  }

 private:
  TARGET __m512 values(int64_t row, int64_t column) const {
    const int64_t block = (row * columns + column) >> block_shift;
    float scale;
    if (w.absmax) {
      scale = w.absmax[block];
    } else {
      const float product = w.nested_code[w.absmax_code[block]] * w.nested_absmax[block >> nested_shift];
      scale = product + w.offset;
    }
    const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(w.code), _mm512_set1_ps(scale));
    return w.round == w.out ? v : rounded(v, w.round);
  }
};

struct Int8 {
  const int8_t* data;
  const float* row_scale;
  int64_t rows, columns;
  TARGET __m512i table(int64_t row, int64_t) const { return _mm512_castps_si512(_mm512_set1_ps(row_scale[row] / 127)); }
  TARGET __m512i along(__m512i table, int64_t row, int64_t column, int64_t left) const {
    float values[16 * kPer] = {};
    widen(row, column, left, 16 * kPer, values);
    return Number::units(values, 16 * kPer, _mm512_cvtss_f32(_mm512_castsi512_ps(table)));
  }
  TARGET void across(int64_t row, int64_t column, int64_t width, __m512i* out) const {
    float values[2][kWide] = {};
    float scale[2] = {row_scale[row] / 127, 0};
    widen(row, column, columns - column, width, values[0]);
    if (kPer == 2 && row + 1 < rows) {
      widen(row + 1, column, columns - column, width, values[1]);
      scale[1] = row_scale[row + 1] / 127;
    }
    for (int64_t c = 0; c < width; c += 32) {
      __m512i half[2];
      for (int i = 0; i < 2; ++i) {
        const __m512 first = _mm512_mul_ps(_mm512_loadu_ps(values[0] + c + 16 * i), _mm512_set1_ps(scale[0]));
        const __m512 second = _mm512_mul_ps(_mm512_loadu_ps(values[1] + c + 16 * i), _mm512_set1_ps(scale[1]));
        half[i] = kPer == 1 ? _mm512_castps_si512(first) : Number::both(first, second);
      }
      Number::arrange(half[0], half[1], out + c / 16);
    }
  }

 private:
  TARGET void widen(int64_t row, int64_t column, int64_t left, int64_t count, float* out) const {
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 here = mask16(left - i);
      const __m128i bytes = _mm_maskz_loadu_epi8(here, data + row * columns + column + i);
      _mm512_storeu_ps(out + i, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
    }
  }
};

// panel (units, width): outputs are rows, the sum is along them. Outputs stand in the order of Number::lane, or as they come.
template <bool Natural, class Source>
TARGET void pack_along(const Source& s, int64_t first, int64_t width, int64_t column, int64_t count, uint32_t* panel) {
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t v = 0; v < width / 16; ++v) {
    int64_t row[16];
    for (int l = 0; l < 16; ++l) row[l] = first + (Natural ? 16 * v + l : Number::lane(v, l));
    const bool whole = first + up(16 * (v + 1), 32) <= s.rows;
    for (int64_t c = 0; c < count; c += 64) {
      __m512i table[16];
      for (int l = 0; l < 16; ++l) table[l] = row[l] < s.rows ? s.table(row[l], column + c) : zero;
      for (int64_t d = c; d < std::min(count, c + 64); d += 16 * kPer) {
        __m512i t[16];
        const int64_t left = count - d, units = std::min<int64_t>(16, units_of(left));
        if (whole) {
#pragma GCC unroll 16
          for (int l = 0; l < 16; ++l) t[l] = s.along(table[l], row[l], column + d, left);
        } else {
          for (int l = 0; l < 16; ++l) t[l] = row[l] < s.rows ? s.along(table[l], row[l], column + d, left) : zero;
        }
        transpose(t);
        uint32_t* to = panel + d / kPer * width + 16 * v;
        if (units == 16) {
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * width, t[i]);
        } else {
          for (int64_t i = 0; i < units; ++i) _mm512_storeu_si512(to + i * width, t[i]);
        }
      }
    }
  }
}

// panel (units, width): outputs are columns, the sum is across the rows.
template <class Source>
TARGET void pack_across(const Source& s, int64_t column, int64_t width, int64_t first, int64_t count, uint32_t* panel) {
  for (int64_t i = 0; i < count; i += kPer) {
    __m512i out[kWide / 16];
    s.across(first + i, column, width, out);
    for (int64_t v = 0; v < width / 16; ++v) _mm512_storeu_si512(panel + i / kPer * width + 16 * v, out[v]);
  }
}

template <class Source>
TARGET void pack(const Source& s, bool along, int64_t output, int64_t width, int64_t from, int64_t count, uint32_t* panel) {
  if (along) return pack_along<false>(s, output, width, from, count, panel);
  pack_across(s, output, width, from, count, panel);
}

// W for y = x W^T (`outputs` are rows of W), or for dx = g W.
TARGET void pack_weight(const Weight& w, bool forward, int64_t output, int64_t width, int64_t from, int64_t count,
                        uint32_t* panel) {
  const bool along = forward != w.transposed;
  if (w.kind == Weight::kNf4) return pack(Packed(w.nf4, w.rows, w.columns), along, output, width, from, count, panel);
  if (w.kind == Weight::kInt8)
    return pack(Int8{w.int8, w.row_scale, w.rows, w.columns}, along, output, width, from, count, panel);
  const Numbers dense{static_cast<const char*>(w.dense), w.rows, w.columns, w.stride * kSize};
  pack(dense, along, output, width, from, count, panel);
}

// A or B (rows, columns) with the outputs r in lanes as they come, the sum along its rows or across them.
TARGET void pack_rank(const Floats& s, bool along, int64_t lanes, int64_t from, int64_t count, uint32_t* panel) {
  if (along) return pack_along<true>(s, 0, lanes, from, count, panel);
  for (int64_t i = 0; i < count; i += kPer)
    for (int64_t l = 0; l < lanes; l += 16) _mm512_storeu_si512(panel + i / kPer * lanes + l, s.across(from + i, l));
}

// a matrix on the left ------------------------------------------------------------------------

struct Left {
  const char* data;
  int64_t stride;
};

// Rows in whole units: an odd number of halves is copied and padded with a zero.
inline Left whole_units(const void* data, int64_t rows, int64_t columns, Slot slot) {
  if (columns % kPer == 0) return {static_cast<const char*>(data), columns * kSize};
  const int64_t stride = units_of(columns) * 4;
  char* to = static_cast<char*>(scratch(slot, rows * stride + 64));
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(to + i * stride, static_cast<const char*>(data) + i * columns * kSize, columns * kSize);
    std::memset(to + i * stride + columns * kSize, 0, stride - columns * kSize);
  }
  return {to, stride};
}

// The transpose of (m, r) numbers, two tokens a unit where a unit holds two: (r, units of m).
inline Left turned(const char* data, int64_t stride, int64_t m, int64_t r, Slot slot) {
  const int64_t units = units_of(m);
  char* to = static_cast<char*>(scratch(slot, r * units * 4 + 64));
  for (int64_t t = 0; t < units * kPer; ++t)
    for (int64_t j = 0; j < r; ++j) {
      char* unit = to + (j * units + t / kPer) * 4 + t % kPer * kSize;
      if (t < m) {
        std::memcpy(unit, data + t * stride + j * kSize, kSize);
      } else {
        std::memset(unit, 0, kSize);
      }
    }
  return {to, units * 4};
}

// How a sum over `length` for m tokens is cut: many tokens by tokens, few by the sum itself (a part each, added in order).
struct Cut {
  int64_t tokens, token_blocks, length, parts;
  Cut(int64_t m, int64_t sum) {
    tokens = m < 128 ? up(std::max<int64_t>(m, 1), 2) : std::max<int64_t>(m < 256 ? 64 : 128, up((m + 15) / 16, 2));
    token_blocks = (m + tokens - 1) / tokens;
    length = token_blocks > 1 ? sum : up((sum + 17) / 18, 64);
    parts = std::max<int64_t>(1, (sum + length - 1) / length);
  }
  int64_t units() const { return parts * token_blocks; }
};

// Threads are worth starting from about 20 us of work each.
inline int64_t grain_of(int64_t cycles) { return std::max<int64_t>(1, 60000 / std::max<int64_t>(cycles, 1)); }

// u and du ------------------------------------------------------------------------------------

// sums[t] += left[t, from: to] P over r lanes, tokens begin to end; x is masked where dropout is on.
TARGET void narrow(const char* left, int64_t stride, const Floats& p, bool along, const Dropout16& drop, int64_t row_length,
                   int64_t from, int64_t to, int64_t begin, int64_t end, int64_t lanes, float* sums) {
  uint32_t* panel = static_cast<uint32_t*>(scratch(kPanel, kSlice * lanes * 4));
  for (int64_t c = from; c < to; c += kSlice * kPer) {
    const int64_t count = std::min(kSlice * kPer, to - c), units = units_of(count);
    pack_rank(p, along, lanes, c, count, panel);
    if (!drop.on) {
      fine_tiles(left + begin * stride + c * kSize, stride, end - begin, panel, lanes, units, row_length, sums, lanes);
      continue;
    }
    constexpr int64_t kRows = 12;
    char* masked = static_cast<char*>(scratch(kMasked, kRows * (kSlice * 4 + 256)));
    const int64_t step = kSlice * 4;
    for (int64_t t = begin; t < end; t += kRows) {
      const int64_t rows = std::min(kRows, end - t);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < count; j += 64) {
          const uint64_t keep = keep64(drop.seed, (t + i) * row_length + c + j, drop.threshold);
          Number::mask64(left + (t + i) * stride + (c + j) * kSize, keep, std::min<int64_t>(64, count - j),
                         masked + i * step + j * kSize);
        }
      fine_tiles(masked, step, rows, panel, lanes, units, row_length, sums + (t - begin) * lanes, lanes);
    }
  }
}

// (m, r) numbers out of the parts' sums, times a scale; padded to whole units.
TARGET Left narrowed(const float* parts, int64_t count, int64_t m, int64_t r, int64_t lanes, float scale, void* out,
                     Slot slot) {
  const bool odd = r % kPer != 0;
  const int64_t stride = units_of(r) * 4;
  char* to = out && !odd ? static_cast<char*>(out) : static_cast<char*>(scratch(slot, m * stride + 64));
  for (int64_t t = 0; t < m; ++t)
    for (int64_t l = 0; l < r; l += 16) {
      __m512 sum = _mm512_loadu_ps(parts + t * lanes + l);
      for (int64_t i = 1; i < count; ++i) sum = _mm512_add_ps(sum, _mm512_loadu_ps(parts + (i * m + t) * lanes + l));
      sum = _mm512_mul_ps(sum, _mm512_set1_ps(scale));
      Number::store16(sum, mask16(r - l), to + t * stride + l * kSize);
      if (odd) std::memset(to + t * stride + r * kSize, 0, stride - r * kSize);
    }
  if (out && odd)
    for (int64_t t = 0; t < m; ++t) std::memcpy(static_cast<char*>(out) + t * r * kSize, to + t * stride, r * kSize);
  return {to, stride};
}

// forward -------------------------------------------------------------------------------------

struct Columns {  // outputs [begin, end) in blocks of 32, tokens [first, last)
  int64_t begin, end, first, last;
};

// sums (tokens, width) += left W
TARGET void add_weight(const Weight& w, bool forward, const Left& left, int64_t length, int64_t output, int64_t width,
                       int64_t first, int64_t tokens, uint32_t* panel, float* sums) {
  for (int64_t c = 0; c < length; c += kDeep * kPer) {
    const int64_t count = std::min(kDeep * kPer, length - c);
    pack_weight(w, forward, output, width, c, count, panel);
    tiles(left.data + first * left.stride + c * kSize, left.stride, tokens, panel, width, units_of(count), sums, width);
  }
}

// out[t, column ..] = sums + bias (+ out)
TARGET void write(const float* sums, int64_t width, int64_t tokens, const float* bias, bool add, void* out, int64_t row_length,
                  int64_t column, int64_t first) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < width && column + c < row_length; c += 32) {
      const int64_t left = row_length - column - c;
      __m512 v[2] = {_mm512_loadu_ps(sums + t * width + c), _mm512_loadu_ps(sums + t * width + c + 16)};
      Number::natural(v);
      if (bias)
        for (int i = 0; i < 2; ++i)
          v[i] = _mm512_add_ps(v[i], _mm512_maskz_loadu_ps(mask16(left - 16 * i), bias + column + c + 16 * i));
      char* to = static_cast<char*>(out) + ((first + t) * row_length + column + c) * kSize;
      Number::store32(v, left, add, to);
    }
}

TARGET void forward_columns(const Forward& f, const Left& x, const Left& u, const Columns& at) {
  uint32_t* panel = static_cast<uint32_t*>(scratch(kPanel, kDeep * kWide * 4));
  float* sums = static_cast<float*>(scratch(kSums, kTokens * kWide * 4));
  uint32_t* extra = static_cast<uint32_t*>(scratch(kExtra, up(units_of(f.r), 16) * kWide * 4));
  const Floats b{f.b, f.n, f.r, f.scale};
  for (int64_t c = at.begin, width; c < at.end; c += width) {
    width = width_from(c, at.end);
    if (f.r) pack_along<false>(b, c, width, 0, f.r, extra);
    for (int64_t t = at.first; t < at.last; t += kTokens) {
      const int64_t tokens = std::min(kTokens, at.last - t);
      std::memset(sums, 0, tokens * width * 4);
      if (f.w.kind != Weight::kNone) add_weight(f.w, true, x, f.k, c, width, t, tokens, panel, sums);
      // last, since sums that start from a large low-rank part would round at its size
      if (f.r) tiles(u.data + t * u.stride, u.stride, tokens, extra, width, units_of(f.r), sums, width);
      write(sums, width, tokens, f.bias, f.add, f.y, f.n, c, t);
    }
  }
}

// Blocks of 32 outputs, and of tokens where there are too few outputs for the threads.
struct Grid {
  int64_t columns, tokens, blocks, token_blocks;
  Grid(int64_t m, int64_t outputs, bool cut_tokens) {
    columns = outputs;
    blocks = (outputs + 31) / 32;
    const int64_t wanted = 2 * static_cast<int64_t>(torch::stable::get_num_threads());
    token_blocks = 1;
    if (cut_tokens && blocks < wanted) token_blocks = std::max<int64_t>(1, std::min((wanted + blocks - 1) / blocks, m / 96));
    tokens = (m + token_blocks - 1) / token_blocks;
  }
  int64_t units() const { return blocks * token_blocks; }
  template <class Run>
  void run(int64_t m, int64_t begin, int64_t end, Run run) const {
    while (begin < end) {
      const int64_t row = begin / blocks, from = begin % blocks, to = std::min(blocks, from + end - begin);
      run(Columns{from * 32, to * 32, row * tokens, std::min(m, (row + 1) * tokens)});
      begin += to - from;
    }
  }
};

void forward(const Forward& f) {
  const Left x = whole_units(f.x, f.m, f.k, kShared);
  const int64_t lanes = up(f.r, 16);
  Left u{nullptr, 0};
  if (f.r) {
    const Cut cut(f.m, f.k);
    const size_t bytes = cut.parts * f.m * lanes * 4;
    float* parts = static_cast<float*>(scratch(kShared2, bytes));
    std::memset(parts, 0, bytes);
    const Floats a{f.a, f.r, f.k, 1};
    const int64_t grain = grain_of(cut.tokens * cut.length * lanes / 32 * (f.drop.on ? 3 : 1));
    torch::stable::parallel_for(0, cut.units(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i % cut.parts, first = i / cut.parts * cut.tokens;
        narrow(x.data, x.stride, a, true, f.drop, f.k, part * cut.length, std::min(f.k, (part + 1) * cut.length), first,
               std::min(f.m, first + cut.tokens), lanes, parts + (part * f.m + first) * lanes);
      }
    });
    u = narrowed(parts, cut.parts, f.m, f.r, lanes, f.drop.scale, f.u, kShared3);
  }
  const Grid grid(f.m, f.n, true);
  torch::stable::parallel_for(0, grid.units(), grain_of(f.k * (grid.tokens + 12)), [&](int64_t begin, int64_t end) {
    grid.run(f.m, begin, end, [&](const Columns& at) { forward_columns(f, x, u, at); });
  });
}

// backward ------------------------------------------------------------------------------------

// dbT (r, n) += u^T g for the columns [from, to) and the tokens [begin, end).
TARGET void outer(const Numbers& right, const Left& turned, int64_t rows, int64_t from, int64_t to, int64_t begin, int64_t end,
                  float* out, int64_t step) {
  uint32_t* panel = static_cast<uint32_t*>(scratch(kPanel, kSlice * kWide * 4));
  for (int64_t c = from; c < to; c += kWide) {
    const int64_t width = up(std::min(kWide, to - c), 32);
    for (int64_t t = begin; t < end; t += kSlice * kPer) {
      const int64_t count = std::min(kSlice * kPer, end - t);
      pack_across(right, c, width, t, count, panel);
      fine_tiles(turned.data + t / kPer * 4, turned.stride, rows, panel, width, units_of(count), right.rows, out + c, step);
    }
  }
}

// What stands masked in a panel: two tokens' rows of x, the dropped elements zero.
struct MaskedRows {
  Numbers x;
  const uint64_t* keep;  // a word a token, for the 64 columns from `column`
  int64_t first;
  TARGET void across(int64_t row, int64_t column, int64_t width, __m512i* out) const {
    const uint64_t* at = keep + (row - first);
    const char* from = x.data + row * x.stride + column * kSize;
    const bool two = row + 1 < x.rows;
    for (int64_t c = 0; c < width; c += 32)
      Number::pair_masked(from + c * kSize, two ? from + c * kSize + x.stride : nullptr, x.columns - column - c,
                          static_cast<uint32_t>(at[0] >> c), two ? static_cast<uint32_t>(at[1] >> c) : 0, out + c / 16);
  }
};

// sums (tokens, width) += scale * mask * (du A)
TARGET void add_masked(const Left& du, int64_t first, int64_t tokens, const uint32_t* panel, int64_t width, int64_t units,
                       const uint64_t* keep, float scale, float* sums) {
  constexpr int64_t kRows = 24;
  alignas(64) float low[kRows * kWide];
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t t = 0; t < tokens; t += kRows) {
    const int64_t rows = std::min(kRows, tokens - t);
    std::memset(low, 0, rows * width * 4);
    tiles(du.data + (first + t) * du.stride, du.stride, rows, panel, width, units, low, width);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < width; c += 32) {
        __mmask16 here[2];
        Number::lanes_of(static_cast<uint32_t>(keep[t + i] >> c), here);
        for (int h = 0; h < 2; ++h) {
          float* at = sums + (t + i) * width + c + 16 * h;
          const __m512 part = _mm512_mul_ps(_mm512_loadu_ps(low + i * width + c + 16 * h), factor);
          const __m512 sum = _mm512_loadu_ps(at);
          _mm512_storeu_ps(at, _mm512_mask_add_ps(sum, here[h], sum, part));
        }
      }
  }
}

TARGET void backward_columns(const Backward& f, const Left& g, const Left& du, const Left& du_turned, int64_t begin,
                             int64_t end) {
  uint32_t* panel = static_cast<uint32_t*>(scratch(kPanel, std::max(kDeep, kSlice) * kWide * 4));
  float* sums = static_cast<float*>(scratch(kSums, (kTokens + f.r) * kWide * 4));
  float* da = sums + kTokens * kWide;
  uint64_t* keep = static_cast<uint64_t*>(scratch(kMasked, (kTokens + 2) * 8));
  uint32_t* extra = static_cast<uint32_t*>(scratch(kExtra, up(units_of(f.r), 16) * kWide * 4));
  const Floats a{f.a, f.r, f.k, 1};
  const Numbers x{static_cast<const char*>(f.x), f.m, f.k, f.k * kSize};
  for (int64_t c = begin, width; c < end; c += width) {
    width = width_from(c, end);
    if (f.dx && f.r) pack_across(a, c, width, 0, f.r, extra);
    if (f.da) std::memset(da, 0, f.r * width * 4);
    for (int64_t t = 0; t < f.m; t += kTokens) {
      const int64_t tokens = std::min(kTokens, f.m - t);
      if (f.drop.on)
        for (int64_t i = 0; i < tokens; ++i) keep[i] = keep64(f.drop.seed, (t + i) * f.k + c, f.drop.threshold);
      if (f.dx) {
        std::memset(sums, 0, tokens * width * 4);
        if (f.w.kind != Weight::kNone) add_weight(f.w, false, g, f.n, c, width, t, tokens, panel, sums);
        if (f.r && !f.drop.on) tiles(du.data + t * du.stride, du.stride, tokens, extra, width, units_of(f.r), sums, width);
        if (f.r && f.drop.on) add_masked(du, t, tokens, extra, width, units_of(f.r), keep, f.drop.scale, sums);
        write(sums, width, tokens, nullptr, f.add, f.dx, f.k, c, t);
      }
      if (!f.da) continue;
      for (int64_t s = t; s < t + tokens; s += kSlice * kPer) {
        const int64_t count = std::min(kSlice * kPer, t + tokens - s);
        if (f.drop.on) {
          pack_across(MaskedRows{x, keep, t}, c, width, s, count, panel);
        } else {
          pack_across(x, c, width, s, count, panel);
        }
        fine_tiles(du_turned.data + s / kPer * 4, du_turned.stride, f.r, panel, width, units_of(count), f.m, da, width);
      }
    }
    if (f.da)
      for (int64_t j = 0; j < f.r; ++j)
        for (int64_t i = 0; i < width && c + i < f.k; i += 32) {
          __m512 v[2] = {_mm512_loadu_ps(da + j * width + i), _mm512_loadu_ps(da + j * width + i + 16)};
          Number::natural(v);
          for (int h = 0; h < 2; ++h)
            _mm512_mask_storeu_ps(f.da + j * f.k + c + i + 16 * h, mask16(f.k - c - i - 16 * h),
                                  _mm512_mul_ps(v[h], _mm512_set1_ps(f.drop.scale)));
        }
  }
}

// db (n, r) = s sum of the parts' (r, columns), whose columns stand in the order of Number::lane.
TARGET void write_db(const Backward& f, const float* parts, int64_t count, int64_t step, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += 16)
    for (int64_t j = 0; j < f.r; ++j) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < count; ++i) sum = _mm512_add_ps(sum, _mm512_loadu_ps(parts + (i * f.r + j) * step + c));
      alignas(64) float v[16];
      _mm512_store_ps(v, _mm512_mul_ps(sum, _mm512_set1_ps(f.scale)));
      for (int l = 0; l < 16; ++l) {
        const int64_t row = c / 32 * 32 + Number::lane(c / 16 % 2, l);
        if (row < f.n) f.db[row * f.r + j] = v[l];
      }
    }
}

void backward(const Backward& f) {
  const Left g = whole_units(f.g, f.m, f.n, kShared);
  const int64_t lanes = up(f.r, 16), padded = up(f.n, 64);
  const bool need_du = f.r && (f.dx || f.da), need_db = f.r && f.db;
  const Cut cut(f.m, f.n);
  float *du_parts = nullptr, *db_parts = nullptr;
  Left du{nullptr, 0}, du_turned{nullptr, 0};
  if (need_du || need_db) {
    const size_t du_bytes = need_du ? cut.parts * f.m * lanes * 4 : 0;
    const size_t db_bytes = need_db ? cut.token_blocks * f.r * padded * 4 : 0;
    du_parts = static_cast<float*>(scratch(kShared2, du_bytes));
    db_parts = static_cast<float*>(scratch(kShared3, db_bytes));
    std::memset(du_parts, 0, du_bytes);
    std::memset(db_parts, 0, db_bytes);
    Left u{nullptr, 0};
    if (need_db) u = turned(static_cast<const char*>(f.u), f.r * kSize, f.m, f.r, kShared4);
    const Floats b{f.b, f.n, f.r, f.scale};
    const Numbers right{static_cast<const char*>(f.g), f.m, f.n, f.n * kSize};
    const int64_t grain = grain_of(cut.tokens * cut.length * lanes / 16);
    torch::stable::parallel_for(0, cut.units(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i % cut.parts, block = i / cut.parts, first = block * cut.tokens;
        const int64_t last = std::min(f.m, first + cut.tokens);
        const int64_t from = part * cut.length, to = std::min(f.n, from + cut.length);
        if (need_du)
          narrow(g.data, g.stride, b, false, Dropout16{}, f.n, from, to, first, last, lanes, du_parts + (part * f.m + first) * lanes);
        if (need_db) outer(right, u, f.r, from, to, first, last, db_parts + block * f.r * padded, padded);
      }
    });
    if (need_du) {
      du = narrowed(du_parts, cut.parts, f.m, f.r, lanes, 1, nullptr, kShared4);
      if (f.da) du_turned = turned(du.data, du.stride, f.m, f.r, kShared5);
    }
  }
  const int64_t blocks = f.dx || f.da ? (f.k + 31) / 32 : 0, db_blocks = need_db ? padded / 16 : 0;
  const int64_t units = std::max<int64_t>(blocks, need_db ? 1 : 0);
  torch::stable::parallel_for(0, units, grain_of(f.n * (f.m + 12)), [&](int64_t begin, int64_t end) {
    if (blocks) backward_columns(f, g, du, du_turned, begin * 32, std::min(end, blocks) * 32);
    if (need_db)
      write_db(f, db_parts, cut.token_blocks, padded, db_blocks * begin / units * 16, db_blocks * end / units * 16);
  });
}
