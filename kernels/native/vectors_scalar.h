// Vector primitives in plain C++: the definition of what the other instruction sets compute.

namespace silvershard::SILVERSHARD_ISA {

struct Scores16 {
  float lanes[16];
};
struct Positions16 {
  uint32_t lanes[16];
};
inline Positions16 consecutive16(uint32_t first) {
  Positions16 result;
  for (int i = 0; i < 16; ++i) result.lanes[i] = first + i;
  return result;
}

inline Positions16 load_positions16(const uint32_t* from) {
  Positions16 result;
  std::memcpy(result.lanes, from, sizeof result.lanes);
  return result;
}

// A query row prepared for repeated products; `codes` may be read up to the next 64 bytes.
struct QueryRow {
  alignas(64) int8_t codes[1024 + 64];
  float scale;
};

inline void prepare_query(const int8_t* codes, int64_t dim, float scale, QueryRow* row) {
  std::memset(row->codes, 0, sizeof row->codes);
  std::memcpy(row->codes, codes, dim);
  row->scale = scale;
}

// Inner products with `count` rows, a multiple of 16. `row(i)` is the first byte of row i; nothing is
// read at or behind `end`. While row i is computed, the bytes that lie `i * dim` behind `next` are
// fetched into the cache if that is not null.
template <class RowAt>
inline void dot_rows(const QueryRow& query, const RowAt& row, int64_t count, int64_t dim,
                     const int8_t* end, const int8_t* next, int32_t* out) {
  (void)end;
  (void)next;
  for (int64_t i = 0; i < count; ++i) {
    const int8_t* codes = row(i);
    int32_t sum = 0;
    for (int64_t d = 0; d < dim; ++d) sum += query.codes[d] * codes[d];
    out[i] = sum;
  }
}

// (float(dot) * item scale) * query scale; -0.0 becomes 0.0.
inline Scores16 scores16(const int32_t* dots, const float* scales, float query_scale) {
  Scores16 result;
  for (int i = 0; i < 16; ++i)
    result.lanes[i] = static_cast<float>(dots[i]) * scales[i] * query_scale + 0.0f;
  return result;
}

inline Scores16 load_scores16(const float* from) {
  Scores16 result;
  for (int i = 0; i < 16; ++i) result.lanes[i] = from[i] + 0.0f;
  return result;
}

// Lanes whose score is not below the threshold, NaN included.
inline uint32_t passing16(const Scores16& scores, float threshold) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i)
    mask |= static_cast<uint32_t>(!(scores.lanes[i] < threshold)) << i;
  return mask;
}

// Writes the order keys and positions of the lanes whose bit is set and whose score is not below
// the threshold, NaN included; up to 16 elements are written. Returns how many count.
inline int64_t compress16(const Scores16& scores, uint32_t mask, float threshold,
                          const Positions16& positions, uint32_t* keys, uint32_t* out) {
  int64_t count = 0;
  for (int i = 0; i < 16; ++i) {
    if (!(mask >> i & 1) || scores.lanes[i] < threshold) continue;
    keys[count] = order_key(scores.lanes[i]);
    out[count] = positions.lanes[i];
    ++count;
  }
  return count;
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

// Parts candidates by their distance d = greatest - key: d < from stays in front, in place; d < to
// goes to `middle`, the rest to `last` if that is not null. Up to 16 elements more are written.
inline void partition16(uint32_t* keys, uint32_t* positions, int64_t count, uint32_t greatest,
                        uint64_t from, uint64_t to, uint32_t* middle_keys,
                        uint32_t* middle_positions, uint32_t* last_keys,
                        uint32_t* last_positions) {
  int64_t front = 0, middle = 0, last = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = keys[i], position = positions[i];
    const uint64_t distance = greatest - key;
    if (distance < from) {
      keys[front] = key;
      positions[front++] = position;
    } else if (distance < to) {
      middle_keys[middle] = key;
      middle_positions[middle++] = position;
    } else if (last_keys != nullptr) {
      last_keys[last] = key;
      last_positions[last++] = position;
    }
  }
}

// Whether one of the values is the key.
inline bool contains(const int64_t* values, int64_t count, int64_t key) {
  bool found = false;
  for (int64_t i = 0; i < count; ++i) found |= values[i] == key;
  return found;
}

// Truth of `key < bound` and `key == bound` for the 64 keys of a word, and of `key == NULL`.
struct WordOrder {
  uint64_t less, equal, null;
};

inline WordOrder order_word(const int64_t* keys, int64_t bound) {
  WordOrder result{0, 0, 0};
  for (int i = 0; i < kWordSlots; ++i) {
    result.less |= static_cast<uint64_t>(keys[i] < bound) << i;
    result.equal |= static_cast<uint64_t>(keys[i] == bound) << i;
    result.null |= static_cast<uint64_t>(keys[i] == kNullKey) << i;
  }
  return result;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31;
  const uint32_t mantissa = half & 0x3FF;
  uint32_t bits;
  if (exponent == 31) {
    // A signalling NaN becomes quiet, as the instruction makes it.
    bits = sign | 0x7F800000u | mantissa << 13 | (mantissa != 0 ? 0x400000u : 0u);
  } else if (exponent != 0) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void halves_to_floats(const uint16_t* halves, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(halves[i]);
}

// out[o] = bias[o] + sum of x[d] * weight[d][o], d ascending, every step rounded once.
inline void linear_row(const float* x, int64_t dim, const float* weight, int64_t num_outputs,
                       const float* bias, float* out) {
  for (int64_t o = 0; o < num_outputs; ++o) {
    float sum = bias[o];
    for (int64_t d = 0; d < dim; ++d) sum = std::fma(x[d], weight[d * num_outputs + o], sum);
    out[o] = sum;
  }
}

}  // namespace silvershard::SILVERSHARD_ISA
