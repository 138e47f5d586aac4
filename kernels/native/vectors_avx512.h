// Vector primitives for AVX-512 (F, BW, VL, VNNI) with FMA and F16C; contracts in vectors_scalar.h.

namespace silvershard::SILVERSHARD_ISA {

struct Scores16 {
  __m512 lanes;
};
struct Positions16 {
  __m512i lanes;
};
inline __m512i load16(const uint32_t* from) {
  return _mm512_loadu_si512(reinterpret_cast<const void*>(from));
}

inline void store16(uint32_t* to, __m512i values) {
  _mm512_storeu_si512(reinterpret_cast<void*>(to), values);
}

inline Positions16 consecutive16(uint32_t first) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), lanes)};
}

inline Positions16 load_positions16(const uint32_t* from) { return {load16(from)}; }

struct QueryRow {
  alignas(64) int8_t codes[1024 + 64];
  float scale;
  int32_t bias;
};

inline void prepare_query(const int8_t* codes, int64_t dim, float scale, QueryRow* row) {
  std::memset(row->codes, 0, sizeof row->codes);
  std::memcpy(row->codes, codes, dim);
  int32_t sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += codes[d];
  row->scale = scale;
  row->bias = -128 * sum;
}

// Sums of the 16 lanes of each of 16 vectors.
inline __m512i sum_lanes16(const __m512i (&sums)[16]) {
  __m512i quads[4];
  for (int i = 0; i < 4; ++i) {
    const __m512i* four = sums + 4 * i;
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(four[0], four[1]),
                                        _mm512_unpackhi_epi32(four[0], four[1]));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(four[2], four[3]),
                                        _mm512_unpackhi_epi32(four[2], four[3]));
    quads[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }
  const __m512i left = _mm512_add_epi32(_mm512_shuffle_i32x4(quads[0], quads[1], 0x88),
                                        _mm512_shuffle_i32x4(quads[0], quads[1], 0xDD));
  const __m512i right = _mm512_add_epi32(_mm512_shuffle_i32x4(quads[2], quads[3], 0x88),
                                         _mm512_shuffle_i32x4(quads[2], quads[3], 0xDD));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(left, right, 0x88),
                          _mm512_shuffle_i32x4(left, right, 0xDD));
}

// kVectors: how many vectors of 64 codes a row has, none of them partial, or 0 to decide at run time.
// Codes are read as unsigned x + 128, which the bias takes back. Bytes behind a row are not read.
template <int kVectors>
inline __m512i dot_row(const __m512i* query, const int8_t* codes, int64_t whole, __mmask64 tail) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i sum = _mm512_setzero_si512();
  const int64_t count = kVectors > 0 ? kVectors : whole;
#pragma GCC unroll 4
  for (int64_t v = 0; v < count; ++v) {
    const __m512i x = _mm512_loadu_si512(reinterpret_cast<const void*>(codes + 64 * v));
    sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(x, flip), query[v]);
  }
  if (kVectors == 0 && tail != 0) {
    const __m512i x = _mm512_maskz_loadu_epi8(tail, codes + 64 * whole);
    sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(x, flip), query[whole]);
  }
  return sum;
}

template <int kVectors, class RowAt>
inline void whole_dot_rows(const QueryRow& row_of_query, const RowAt& row, int64_t count,
                           int64_t dim, const int8_t* next, int32_t* out) {
  const __m512i* query = reinterpret_cast<const __m512i*>(row_of_query.codes);
  const __mmask64 tail = (uint64_t{1} << (dim % 64)) - 1;
  const __m512i bias = _mm512_set1_epi32(row_of_query.bias);
  for (int64_t i = 0; i < count; i += 16) {
    if (next != nullptr)
      for (int64_t byte = 0; byte < 16 * dim; byte += 64)
        __builtin_prefetch(next + i * dim + byte);
    __m512i sums[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) sums[j] = dot_row<kVectors>(query, row(i + j), dim / 64, tail);
    _mm512_storeu_si512(reinterpret_cast<void*>(out + i),
                        _mm512_add_epi32(sum_lanes16(sums), bias));
  }
}

template <class RowAt>
inline void dot_rows(const QueryRow& query, const RowAt& row, int64_t count, int64_t dim,
                     const int8_t* end, const int8_t* next, int32_t* out) {
  (void)end;
  switch (dim) {
    case 64: return whole_dot_rows<1>(query, row, count, dim, next, out);
    case 128: return whole_dot_rows<2>(query, row, count, dim, next, out);
    default: return whole_dot_rows<0>(query, row, count, dim, next, out);
  }
}

inline Scores16 scores16(const int32_t* dots, const float* scales, float query_scale) {
  const __m512i sums = _mm512_loadu_si512(reinterpret_cast<const void*>(dots));
  const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_loadu_ps(scales));
  return {_mm512_add_ps(_mm512_mul_ps(scaled, _mm512_set1_ps(query_scale)), _mm512_setzero_ps())};
}

inline Scores16 load_scores16(const float* from) {
  return {_mm512_add_ps(_mm512_loadu_ps(from), _mm512_setzero_ps())};
}

inline uint32_t passing16(const Scores16& scores, float threshold) {
  return _mm512_cmp_ps_mask(scores.lanes, _mm512_set1_ps(threshold), _CMP_NLT_UQ);
}

// Compression goes to a register first: the form that writes to memory is slow on some CPUs.
inline int64_t compress16(const Scores16& scores, uint32_t mask, float threshold,
                          const Positions16& positions, uint32_t* keys, uint32_t* out) {
  const __mmask16 passed = static_cast<__mmask16>(mask & passing16(scores, threshold));
  if (passed == 0) return 0;
  const __m512i bits = _mm512_castps_si512(scores.lanes);
  const __m512i top = _mm512_set1_epi32(std::numeric_limits<int32_t>::min());
  const __m512i ordered =
      _mm512_xor_si512(bits, _mm512_or_si512(_mm512_srai_epi32(bits, 31), top));
  const __mmask16 nan = _mm512_cmp_ps_mask(scores.lanes, scores.lanes, _CMP_UNORD_Q);
  const __m512i key = _mm512_mask_blend_epi32(nan, ordered, _mm512_set1_epi32(-1));
  store16(keys, _mm512_maskz_compress_epi32(passed, key));
  store16(out, _mm512_maskz_compress_epi32(passed, positions.lanes));
  return __builtin_popcount(passed);
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

inline void partition16(uint32_t* keys, uint32_t* positions, int64_t count, uint32_t greatest,
                        uint64_t from, uint64_t to, uint32_t* middle_keys,
                        uint32_t* middle_positions, uint32_t* last_keys,
                        uint32_t* last_positions) {
  const __m512i top = _mm512_set1_epi32(static_cast<int>(greatest));
  const __m512i near = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(from - 1)));
  const __m512i far = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(to - 1)));
  int64_t front = 0, middle = 0, last = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 valid =
        static_cast<__mmask16>(count - i >= 16 ? 0xFFFFu : (1u << (count - i)) - 1);
    const __m512i key = load16(keys + i);
    const __m512i position = load16(positions + i);
    const __m512i distance = _mm512_sub_epi32(top, key);
    const __mmask16 below = _mm512_mask_cmple_epu32_mask(valid, distance, far);
    const __mmask16 in_front =
        from == 0 ? __mmask16{0} : _mm512_mask_cmple_epu32_mask(valid, distance, near);
    store16(keys + front, _mm512_maskz_compress_epi32(in_front, key));
    store16(positions + front, _mm512_maskz_compress_epi32(in_front, position));
    front += __builtin_popcount(in_front);
    const __mmask16 between = static_cast<__mmask16>(below & ~in_front);
    if (between != 0) {
      store16(middle_keys + middle, _mm512_maskz_compress_epi32(between, key));
      store16(middle_positions + middle, _mm512_maskz_compress_epi32(between, position));
      middle += __builtin_popcount(between);
    }
    if (last_keys != nullptr) {
      const __mmask16 beyond = static_cast<__mmask16>(valid & ~below);
      store16(last_keys + last, _mm512_maskz_compress_epi32(beyond, key));
      store16(last_positions + last, _mm512_maskz_compress_epi32(beyond, position));
      last += __builtin_popcount(beyond);
    }
  }
}

inline bool contains(const int64_t* values, int64_t count, int64_t key) {
  const __m512i wanted = _mm512_set1_epi64(key);
  uint32_t found = 0;
  for (int64_t i = 0; i < count; i += 8) {
    const uint32_t valid = count - i >= 8 ? 255u : (1u << (count - i)) - 1;
    const __m512i eight = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(valid), values + i);
    found |= valid & _mm512_cmpeq_epi64_mask(eight, wanted);
  }
  return found != 0;
}

struct WordOrder {
  uint64_t less, equal, null;
};

inline WordOrder order_word(const int64_t* keys, int64_t bound) {
  const __m512i limit = _mm512_set1_epi64(bound);
  const __m512i nothing = _mm512_set1_epi64(kNullKey);
  WordOrder result{0, 0, 0};
  for (int i = 0; i < kWordSlots; i += 8) {
    const __m512i key = _mm512_loadu_si512(reinterpret_cast<const void*>(keys + i));
    result.less |= static_cast<uint64_t>(_mm512_cmplt_epi64_mask(key, limit)) << i;
    result.equal |= static_cast<uint64_t>(_mm512_cmpeq_epi64_mask(key, limit)) << i;
    result.null |= static_cast<uint64_t>(_mm512_cmpeq_epi64_mask(key, nothing)) << i;
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
  __m512 sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = _mm512_loadu_ps(bias + 16 * v);
  for (int64_t d = 0; d < dim; ++d) {
    const __m512 factor = _mm512_set1_ps(x[d]);
    const float* row = weight + d * num_outputs;
    for (int v = 0; v < kVectors; ++v)
      sums[v] = _mm512_fmadd_ps(factor, _mm512_loadu_ps(row + 16 * v), sums[v]);
  }
  for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + 16 * v, sums[v]);
}

inline void linear_row(const float* x, int64_t dim, const float* weight, int64_t num_outputs,
                       const float* bias, float* out) {
  int64_t o = 0;
  for (; o + 64 <= num_outputs; o += 64)
    linear_outputs<4>(x, dim, weight + o, num_outputs, bias + o, out + o);
  for (; o + 16 <= num_outputs; o += 16)
    linear_outputs<1>(x, dim, weight + o, num_outputs, bias + o, out + o);
  for (; o < num_outputs; ++o) {
    float sum = bias[o];
    for (int64_t d = 0; d < dim; ++d) sum = std::fma(x[d], weight[d * num_outputs + o], sum);
    out[o] = sum;
  }
}

}  // namespace silvershard::SILVERSHARD_ISA
