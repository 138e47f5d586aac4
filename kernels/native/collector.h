// Keeps the best R of a stream of scored positions, exactly: score descending, then item id, then
// position ascending. Included once per instruction set.
//
// Candidates that reach the threshold are appended; when the buffer is full a histogram over the
// order keys finds the R best and the threshold rises to the last of them. A candidate is dropped
// only when R others, verified where that is asked, are better; so nothing is lost.
//
// Source: Alabi et al., Fast k-Selection Algorithms for GPUs, JEA 17, 2012 (bucket selection).

namespace silvershard::SILVERSHARD_ISA {

// Candidates as parallel arrays, so that both can be compressed with vector instructions.
struct Candidates {
  uint32_t* keys;
  uint32_t* positions;
};

constexpr int kMaxBins = 2048;
constexpr int kMaxDigit = 12;
// Appending and compressing may write a whole vector beyond the last candidate.
constexpr int64_t kSlack = 16;

class Collector {
 public:
  static int64_t capacity_for(int64_t wanted, int64_t most) {
    return std::min(most, wanted + std::max<int64_t>(wanted, 512));
  }

  // `buffer` holds capacity + kSlack elements; `item_ids` may be null, then positions are ids.
  void start(Candidates buffer, int64_t capacity, int64_t wanted, const int64_t* item_ids) {
    buffer_ = buffer;
    capacity_ = capacity;
    wanted_ = wanted;
    item_ids_ = item_ids;
    count_ = 0;
    threshold_ = -std::numeric_limits<float>::infinity();
  }

  float threshold() const { return threshold_; }
  void raise_threshold(float threshold) { threshold_ = std::max(threshold_, threshold); }
  int64_t count() const { return count_; }
  bool has_room(int64_t extra) const { return count_ + extra <= capacity_; }

  // Appends those of 16 scores that reach the threshold (or are NaN) and whose bit is set.
  void append16(const Scores16& scores, uint32_t mask, const Positions16& positions) {
    count_ += compress16(scores, mask, threshold_, positions, buffer_.keys + count_,
                         buffer_.positions + count_);
  }

  uint32_t position(int64_t i) const { return buffer_.positions[i]; }

  // Appends one candidate whatever its score; -0.0 must have been made 0.0.
  void append(float score, int64_t position) {
    buffer_.keys[count_] = order_key(score);
    buffer_.positions[count_] = static_cast<uint32_t>(position);
    ++count_;
  }

  // Appends the candidates of another collector.
  void append(const Collector& other) {
    std::memcpy(buffer_.keys + count_, other.buffer_.keys, other.count_ * sizeof(uint32_t));
    std::memcpy(buffer_.positions + count_, other.buffer_.positions,
                other.count_ * sizeof(uint32_t));
    count_ += other.count_;
  }

  // Leaves at most R candidates, the best R of those that `verify` accepts.
  // `verify(keys, positions, count)` moves the accepted ones to the front and returns their number.
  template <class Verify>
  void settle(const Verify& verify) {
    // A few more than R, so that one round mostly suffices although some are rejected.
    const int64_t first = std::min(count_, wanted_ + wanted_ / 16 + 32);
    bring_to_front(first, true);
    int64_t passed = verify(buffer_.keys, buffer_.positions, first);
    if (passed < wanted_ && first < count_) {
      const int64_t rest = count_ - first;
      std::memmove(buffer_.keys + passed, buffer_.keys + first, rest * sizeof(uint32_t));
      std::memmove(buffer_.positions + passed, buffer_.positions + first, rest * sizeof(uint32_t));
      passed += verify(buffer_.keys + passed, buffer_.positions + passed, rest);
    }
    count_ = passed;
    settle();
  }

  // Leaves at most R candidates, the best R.
  void settle() {
    if (count_ > wanted_) {
      bring_to_front(wanted_, false);
      count_ = wanted_;
    }
    if (count_ == wanted_) raise_threshold(from_order_key(least_key(buffer_.keys, count_)));
  }

  // Writes the candidates as (R best) scores, ids and positions, padded; call settle() before.
  // Returns whether all scores are finite and no id is negative.
  bool write(float* scores, int64_t* ids, int64_t* positions) const;

 private:
  // Moves the best `wanted` candidates before all others, in no order; without `keep_rest` what
  // stands behind them is lost.
  void bring_to_front(int64_t wanted, bool keep_rest);

  bool better(uint32_t key_a, uint32_t at_a, uint32_t key_b, uint32_t at_b) const {
    if (key_a != key_b) return key_a > key_b;
    if (item_ids_ != nullptr && item_ids_[at_a] != item_ids_[at_b])
      return item_ids_[at_a] < item_ids_[at_b];
    return at_a < at_b;
  }

  Candidates buffer_{};
  int64_t capacity_ = 0;
  int64_t wanted_ = 0;
  int64_t count_ = 0;
  const int64_t* item_ids_ = nullptr;
  float threshold_ = 0.0f;
};

// Scratch of a thread for moving candidates and for sorting.
struct SelectScratch {
  Scratch<uint32_t> keys;
  Scratch<uint32_t> positions;
  Scratch<uint64_t> first;
  Scratch<uint64_t> second;
  Scratch<int64_t> ids;
};

inline SelectScratch& select_scratch() {
  static thread_local SelectScratch scratch;
  return scratch;
}

// Counts the candidates of every distance (greatest - key) >> shift.
inline void count_bins(const uint32_t* keys, int64_t count, uint32_t greatest, int shift,
                       uint32_t* bins) {
  constexpr int kBlock = 64;
  uint32_t places[kBlock];
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    for (int j = 0; j < kBlock; ++j) places[j] = (greatest - keys[i + j]) >> shift;
    for (int j = 0; j < kBlock; ++j) ++bins[places[j]];
  }
  for (; i < count; ++i) ++bins[(greatest - keys[i]) >> shift];
}

// Sorts keys, greatest first, in linear time; equal keys keep their order. Returns pairs of distance
// (greatest - key) and place in the input, the distance in the upper half.
inline const uint64_t* sort_keys(const uint32_t* keys, int64_t count, uint32_t least,
                                 uint32_t greatest) {
  uint64_t* from = select_scratch().first.get(count);
  uint64_t* to = select_scratch().second.get(count);
  for (int64_t i = 0; i < count; ++i)
    from[i] = static_cast<uint64_t>(greatest - keys[i]) << 32 | i;
  // Few candidates are not worth long tables of digits.
  const int most = count < 2048 ? 8 : kMaxDigit;
  const int width = bit_width(greatest - least);
  const int passes = (width + most - 1) / most;
  if (passes == 0) return from;
  const int digit = (width + passes - 1) / passes;
  const uint32_t mask = (1u << digit) - 1;
  uint32_t starts[32 / 8][1 << kMaxDigit];
  for (int pass = 0; pass < passes; ++pass)
    std::memset(starts[pass], 0, sizeof(uint32_t) << digit);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t distance = static_cast<uint32_t>(from[i] >> 32);
    for (int pass = 0; pass < passes; ++pass) ++starts[pass][distance >> (pass * digit) & mask];
  }
  for (int pass = 0; pass < passes; ++pass) {
    uint32_t sum = 0;
    for (uint32_t bin = 0; bin <= mask; ++bin) sum += std::exchange(starts[pass][bin], sum);
    const int shift = 32 + pass * digit;
    for (int64_t i = 0; i < count; ++i) to[starts[pass][from[i] >> shift & mask]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

inline void Collector::bring_to_front(int64_t wanted, bool keep_rest) {
  // [done, end) is what is still undecided; the `wanted - done` best of it belong to the front.
  int64_t done = 0;
  int64_t end = count_;
  uint32_t bins[kMaxBins];
  while (wanted > done && wanted < end) {
    uint32_t* keys = buffer_.keys + done;
    uint32_t* positions = buffer_.positions + done;
    const int64_t size = end - done;
    uint32_t least, greatest;
    key_bounds(keys, size, &least, &greatest);
    if (size <= 64 || least == greatest) {
      // Few are left, or their scores are all equal: order them by score, id and position.
      uint64_t* pairs = select_scratch().first.get(size);
      for (int64_t i = 0; i < size; ++i)
        pairs[i] = static_cast<uint64_t>(keys[i]) << 32 | positions[i];
      std::nth_element(pairs, pairs + (wanted - done), pairs + size,
                       [this](uint64_t a, uint64_t b) {
                         return better(a >> 32, static_cast<uint32_t>(a), b >> 32,
                                       static_cast<uint32_t>(b));
                       });
      for (int64_t i = 0; i < size; ++i) {
        keys[i] = static_cast<uint32_t>(pairs[i] >> 32);
        positions[i] = static_cast<uint32_t>(pairs[i]);
      }
      return;
    }
    const int bits = std::clamp(bit_width(size) - 2, 6, 11);
    const int shift = std::max(0, bit_width(greatest - least) - bits);
    const int num_bins = static_cast<int>((greatest - least) >> shift) + 1;
    std::memset(bins, 0, num_bins * sizeof(uint32_t));
    count_bins(keys, size, greatest, shift, bins);
    int64_t before = 0;
    int bin = 0;
    while (before + bins[bin] < wanted - done) before += bins[bin++];
    // Three parts: better bins to the front, the deciding bin next, worse bins last.
    const uint64_t from = static_cast<uint64_t>(bin) << shift;
    const uint64_t to = static_cast<uint64_t>(bin + 1) << shift;
    SelectScratch& scratch = select_scratch();
    const int64_t deciding = bins[bin];
    const int64_t worse = keep_rest ? size - before - deciding : 0;
    // Vectors are stored whole, so each part has room behind it.
    const Candidates middle{scratch.keys.get(size + 2 * kSlack),
                            scratch.positions.get(size + 2 * kSlack)};
    const Candidates last{middle.keys + deciding + kSlack, middle.positions + deciding + kSlack};
    uint32_t behind[2][kSlack];
    std::memcpy(behind[0], keys + size, sizeof behind[0]);
    std::memcpy(behind[1], positions + size, sizeof behind[1]);
    partition16(keys, positions, size, greatest, from, to, middle.keys, middle.positions,
                keep_rest ? last.keys : nullptr, last.positions);
    std::memcpy(keys + size, behind[0], sizeof behind[0]);
    std::memcpy(positions + size, behind[1], sizeof behind[1]);
    std::memcpy(keys + before, middle.keys, deciding * sizeof(uint32_t));
    std::memcpy(positions + before, middle.positions, deciding * sizeof(uint32_t));
    std::memcpy(keys + before + deciding, last.keys, worse * sizeof(uint32_t));
    std::memcpy(positions + before + deciding, last.positions, worse * sizeof(uint32_t));
    done += before;
    end = done + deciding;
  }
}

inline bool Collector::write(float* scores, int64_t* ids, int64_t* positions) const {
  if (count_ > 0) {
    uint32_t least, greatest;
    key_bounds(buffer_.keys, count_, &least, &greatest);
    // Ids are fetched before sorting, when candidates still lie in the order of the scan and
    // neighbours share cache lines.
    int64_t* fetched = select_scratch().ids.get(count_);
    for (int64_t i = 0; i < count_; ++i)
      fetched[i] = item_ids_ == nullptr ? buffer_.positions[i] : item_ids_[buffer_.positions[i]];
    const uint64_t* order = sort_keys(buffer_.keys, count_, least, greatest);
    for (int64_t i = 0; i < count_; ++i) {
      const uint32_t place = static_cast<uint32_t>(order[i]);
      positions[i] = buffer_.positions[place];
      ids[i] = fetched[place];
    }
    for (int64_t i = 0; i < count_; ++i)
      scores[i] = from_order_key(greatest - static_cast<uint32_t>(order[i] >> 32));
    bool tied = false;
    for (int64_t i = 1; i < count_; ++i) tied |= order[i] >> 32 == order[i - 1] >> 32;
    // Runs of equal scores go by id, then by position.
    for (int64_t i = 0; tied && i < count_;) {
      int64_t end = i + 1;
      while (end < count_ && order[end] >> 32 == order[i] >> 32) ++end;
      if (end - i > 1) {
        std::sort(positions + i, positions + end, [this](int64_t a, int64_t b) {
          return better(0, static_cast<uint32_t>(a), 0, static_cast<uint32_t>(b));
        });
        for (int64_t j = i; j < end; ++j)
          ids[j] = item_ids_ == nullptr ? positions[j] : item_ids_[positions[j]];
      }
      i = end;
    }
  }
  // NaN would be the first score, and infinities are the first or the last. No id is negative.
  bool valid = count_ == 0 || (std::isfinite(scores[0]) && std::isfinite(scores[count_ - 1]));
  for (int64_t i = 0; i < count_; ++i) valid &= ids[i] >= 0;
  for (int64_t i = count_; i < wanted_; ++i) {
    scores[i] = -std::numeric_limits<float>::infinity();
    ids[i] = -1;
    positions[i] = -1;
  }
  return valid;
}

}  // namespace silvershard::SILVERSHARD_ISA
