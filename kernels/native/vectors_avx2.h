// Vector primitives for AVX2, FMA and F16C; contracts in vectors_scalar.h.

namespace silvershard::SILVERSHARD_ISA {

struct Scores16 {
  __m256 low, high;
};
struct Positions16 {
  __m256i low, high;
};
// Lane numbers of the set bits of every byte, first to last: what a compression permutes by.
struct CompressTable {
  alignas(64) uint64_t lanes[256];
  constexpr CompressTable() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int lane = 0; lane < 8; ++lane)
        if (mask >> lane & 1) lanes[mask] |= static_cast<uint64_t>(lane) << (8 * count++);
    }
  }
};
constexpr CompressTable kCompress;

inline __m256i compress8(__m256i values, uint32_t mask) {
  const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(kCompress.lanes[mask]));
  return _mm256_permutevar8x32_epi32(values, _mm256_cvtepu8_epi32(bytes));
}

inline void store8(uint32_t* to, __m256i values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), values);
}

inline __m256i load8(const uint32_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

inline Positions16 consecutive16(uint32_t first) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)), lanes);
  return {low, _mm256_add_epi32(low, _mm256_set1_epi32(8))};
}

inline Positions16 load_positions16(const uint32_t* from) { return {load8(from), load8(from + 8)}; }

struct QueryRow {
  alignas(64) int8_t codes[1024 + 64];
  alignas(64) uint8_t magnitudes[1024 + 64];
  float scale;
};

inline void prepare_query(const int8_t* codes, int64_t dim, float scale, QueryRow* row) {
  std::memset(row->codes, 0, sizeof row->codes);
  std::memset(row->magnitudes, 0, sizeof row->magnitudes);
  std::memcpy(row->codes, codes, dim);
  for (int64_t d = 0; d < dim; ++d)
    row->magnitudes[d] = static_cast<uint8_t>(codes[d] < 0 ? -codes[d] : codes[d]);
  row->scale = scale;
}

// One product of 32 codes: |q| times x with the sign of q. Exact because no code is -128: two
// neighbouring products sum to at most 2 * 127 * 127, which 16 bits hold.
inline __m256i dot32(__m256i x, __m256i query, __m256i magnitude) {
  const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, query));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// The sums of the lanes of two vectors each: a0+a1, a2+a3, b0+b1, b2+b3 in both halves.
inline __m256i add_pairs(__m256i a, __m256i b) { return _mm256_hadd_epi32(a, b); }

// kVectors: how many vectors of 32 codes a row has, or 0 to decide at run time.
template <int kVectors>
inline __m256i dot_row(const __m256i* query, const __m256i* magnitude, const int8_t* codes,
                       int64_t vectors) {
  const __m256i* row = reinterpret_cast<const __m256i*>(codes);
  __m256i sum = dot32(_mm256_loadu_si256(row), query[0], magnitude[0]);
  const int64_t count = kVectors > 0 ? kVectors : vectors;
#pragma GCC unroll 4
  for (int64_t v = 1; v < count; ++v)
    sum = _mm256_add_epi32(sum, dot32(_mm256_loadu_si256(row + v), query[v], magnitude[v]));
  return sum;
}

template <int kVectors, class RowAt>
inline void whole_dot_rows(const QueryRow& row_of_query, const RowAt& row, int64_t count,
                           int64_t dim, const int8_t* next, int32_t* out) {
  constexpr int kHeld = kVectors > 0 ? kVectors : 1;
  const int64_t vectors = (dim + 31) / 32;
  const __m256i* query = reinterpret_cast<const __m256i*>(row_of_query.codes);
  const __m256i* magnitude = reinterpret_cast<const __m256i*>(row_of_query.magnitudes);
  __m256i held_query[kHeld], held_magnitude[kHeld];
  if (kVectors > 0) {
    for (int v = 0; v < kHeld; ++v) {
      held_query[v] = query[v];
      held_magnitude[v] = magnitude[v];
    }
    query = held_query;
    magnitude = held_magnitude;
  }
  for (int64_t i = 0; i < count; i += 8) {
    if (next != nullptr)
      for (int64_t byte = 0; byte < 8 * dim; byte += 64)
        __builtin_prefetch(next + i * dim + byte);
    const auto dot = [&](int64_t j) {
      return dot_row<kVectors>(query, magnitude, row(i + j), vectors);
    };
    const __m256i low = add_pairs(add_pairs(dot(0), dot(1)), add_pairs(dot(2), dot(3)));
    const __m256i high = add_pairs(add_pairs(dot(4), dot(5)), add_pairs(dot(6), dot(7)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                                         _mm256_permute2x128_si256(low, high, 0x31)));
  }
}

template <class RowAt>
inline void dot_rows(const QueryRow& query, const RowAt& row, int64_t count, int64_t dim,
                     const int8_t* end, const int8_t* next, int32_t* out) {
  const int64_t padded = (dim + 31) / 32 * 32;
  if (padded != dim) {
    // What lies behind a row is multiplied by zero, but must not lie behind the tensor.
    bool inside = true;
    for (int64_t i = 0; i < count; ++i) inside &= row(i) + padded <= end;
    if (!inside) {
      for (int64_t i = 0; i < count; ++i) {
        const int8_t* codes = row(i);
        out[i] = 0;
        for (int64_t d = 0; d < dim; ++d) out[i] += query.codes[d] * codes[d];
      }
      return;
    }
  }
  switch (padded / 32) {
    case 1: return whole_dot_rows<1>(query, row, count, dim, next, out);
    case 2: return whole_dot_rows<2>(query, row, count, dim, next, out);
    case 3: return whole_dot_rows<3>(query, row, count, dim, next, out);
    case 4: return whole_dot_rows<4>(query, row, count, dim, next, out);
    default: return whole_dot_rows<0>(query, row, count, dim, next, out);
  }
}

inline __m256 scores8(const int32_t* dots, const float* scales, float query_scale) {
  const __m256i sums = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(dots));
  const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_loadu_ps(scales));
  return _mm256_add_ps(_mm256_mul_ps(scaled, _mm256_set1_ps(query_scale)), _mm256_setzero_ps());
}

inline Scores16 scores16(const int32_t* dots, const float* scales, float query_scale) {
  return {scores8(dots, scales, query_scale), scores8(dots + 8, scales + 8, query_scale)};
}

inline Scores16 load_scores16(const float* from) {
  return {_mm256_add_ps(_mm256_loadu_ps(from), _mm256_setzero_ps()),
          _mm256_add_ps(_mm256_loadu_ps(from + 8), _mm256_setzero_ps())};
}

inline __m256i order_keys8(__m256 scores) {
  const __m256i bits = _mm256_castps_si256(scores);
  const __m256i top = _mm256_set1_epi32(std::numeric_limits<int32_t>::min());
  const __m256i keys = _mm256_xor_si256(bits, _mm256_or_si256(_mm256_srai_epi32(bits, 31), top));
  const __m256 nan = _mm256_cmp_ps(scores, scores, _CMP_UNORD_Q);
  return _mm256_or_si256(keys, _mm256_castps_si256(nan));
}

inline uint32_t passing16(const Scores16& scores, float threshold) {
  const __m256 bound = _mm256_set1_ps(threshold);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(scores.low, bound, _CMP_NLT_UQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(scores.high, bound, _CMP_NLT_UQ));
  return static_cast<uint32_t>(low | high << 8);
}

inline int64_t compress16(const Scores16& scores, uint32_t mask, float threshold,
                          const Positions16& positions, uint32_t* keys, uint32_t* out) {
  const uint32_t passed = mask & passing16(scores, threshold);
  if (passed == 0) return 0;
  const uint32_t low = passed & 255;
  const uint32_t high = passed >> 8;
  const int64_t first = __builtin_popcount(low);
  store8(keys, compress8(order_keys8(scores.low), low));
  store8(out, compress8(positions.low, low));
  store8(keys + first, compress8(order_keys8(scores.high), high));
  store8(out + first, compress8(positions.high, high));
  return first + __builtin_popcount(high);
}

inline void key_bounds(const uint32_t* keys, int64_t count, uint32_t* least, uint32_t* greatest) {
  uint32_t low = keys[0], high = keys[0];
  for (int64_t i = 1; i < count; ++i) {
    low = std::min(low, keys[i]);
    high = std::max(high, keys[i]);
  }
  *least = low;
  *greatest = high;
}

inline uint32_t least_key(const uint32_t* keys, int64_t count) {
  uint32_t low = keys[0];
  for (int64_t i = 1; i < count; ++i) low = std::min(low, keys[i]);
  return low;
}

// Lanes whose value is at most `bound`, unsigned.
inline uint32_t at_most8(__m256i values, __m256i bound) {
  const __m256i truth = _mm256_cmpeq_epi32(_mm256_min_epu32(values, bound), values);
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(truth)));
}

inline void partition16(uint32_t* keys, uint32_t* positions, int64_t count, uint32_t greatest,
                        uint64_t from, uint64_t to, uint32_t* middle_keys,
                        uint32_t* middle_positions, uint32_t* last_keys,
                        uint32_t* last_positions) {
  const __m256i top = _mm256_set1_epi32(static_cast<int>(greatest));
  const __m256i near = _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(from - 1)));
  const __m256i far = _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(to - 1)));
  int64_t front = 0, middle = 0, last = 0;
  for (int64_t i = 0; i < count; i += 8) {
    const uint32_t valid = count - i >= 8 ? 255u : (1u << (count - i)) - 1;
    const __m256i key = load8(keys + i);
    const __m256i position = load8(positions + i);
    const __m256i distance = _mm256_sub_epi32(top, key);
    const uint32_t below = at_most8(distance, far) & valid;
    const uint32_t in_front = from == 0 ? 0 : at_most8(distance, near) & valid;
    store8(keys + front, compress8(key, in_front));
    store8(positions + front, compress8(position, in_front));
    front += __builtin_popcount(in_front);
    const uint32_t between = below & ~in_front;
    if (between != 0) {
      store8(middle_keys + middle, compress8(key, between));
      store8(middle_positions + middle, compress8(position, between));
      middle += __builtin_popcount(between);
    }
    if (last_keys != nullptr) {
      const uint32_t beyond = valid & ~below;
      store8(last_keys + last, compress8(key, beyond));
      store8(last_positions + last, compress8(position, beyond));
      last += __builtin_popcount(beyond);
    }
  }
}

inline bool contains(const int64_t* values, int64_t count, int64_t key) {
  const __m256i wanted = _mm256_set1_epi64x(key);
  __m256i found = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
    found = _mm256_or_si256(found, _mm256_cmpeq_epi64(four, wanted));
  }
  bool any = _mm256_testz_si256(found, found) == 0;
  for (; i < count; ++i) any |= values[i] == key;
  return any;
}

struct WordOrder {
  uint64_t less, equal, null;
};

inline WordOrder order_word(const int64_t* keys, int64_t bound) {
  const __m256i limit = _mm256_set1_epi64x(bound);
  const __m256i nothing = _mm256_set1_epi64x(kNullKey);
  const auto bits = [](__m256i truth) {
    return static_cast<uint64_t>(_mm256_movemask_pd(_mm256_castsi256_pd(truth)));
  };
  WordOrder result{0, 0, 0};
  for (int i = 0; i < kWordSlots; i += 4) {
    const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    result.less |= bits(_mm256_cmpgt_epi64(limit, key)) << i;
    result.equal |= bits(_mm256_cmpeq_epi64(limit, key)) << i;
    result.null |= bits(_mm256_cmpeq_epi64(nothing, key)) << i;
  }
  return result;
}

inline void halves_to_floats(const uint16_t* halves, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(
        out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
  for (; i < count; ++i) out[i] = _cvtsh_ss(halves[i]);
}

template <int kVectors>
inline void linear_outputs(const float* x, int64_t dim, const float* weight, int64_t num_outputs,
                           const float* bias, float* out) {
  __m256 sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = _mm256_loadu_ps(bias + 8 * v);
  for (int64_t d = 0; d < dim; ++d) {
    const __m256 factor = _mm256_set1_ps(x[d]);
    const float* row = weight + d * num_outputs;
    for (int v = 0; v < kVectors; ++v)
      sums[v] = _mm256_fmadd_ps(factor, _mm256_loadu_ps(row + 8 * v), sums[v]);
  }
  for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(out + 8 * v, sums[v]);
}

inline void linear_row(const float* x, int64_t dim, const float* weight, int64_t num_outputs,
                       const float* bias, float* out) {
  int64_t o = 0;
  for (; o + 64 <= num_outputs; o += 64)
    linear_outputs<8>(x, dim, weight + o, num_outputs, bias + o, out + o);
  for (; o + 8 <= num_outputs; o += 8)
    linear_outputs<1>(x, dim, weight + o, num_outputs, bias + o, out + o);
  for (; o < num_outputs; ++o) {
    float sum = bias[o];
    for (int64_t d = 0; d < dim; ++d) sum = std::fma(x[d], weight[d * num_outputs + o], sum);
    out[o] = sum;
  }
}

}  // namespace silvershard::SILVERSHARD_ISA
