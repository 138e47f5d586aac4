// Exact best slots of the probed clusters. Included once per instruction set.
//
// Few queries are scanned one after the other, best cluster first, so that thresholds rise early.
// Many queries are scanned cluster by cluster instead: a page that several of them probe is read
// from memory once. Both orders give the same results, because selection is exact.
//
// Source: Kwon et al., Efficient Memory Management (...) with PagedAttention, SOSP 2023, section 4.
// Source: SilverTorch, arXiv 2511.14881, SIGIR 2026, section 4.3 (probe, then filter).

namespace silvershard::SILVERSHARD_ISA {

// From this many queries on pages are shared, by those queries that at least every eighth of their
// probed documents passes; the few slots of others are better fetched one by one.
constexpr int64_t kSharedQueries = 8;
constexpr int64_t kSharedFraction = 8;
// Rows ahead of the current one that are fetched into the cache while scanning listed slots.
constexpr int64_t kRowsAhead = 64;
// Candidates that are at least kept before any of them is verified.
constexpr int64_t kUnverified = 1 << 15;
// A word with at least this many slots is scanned as a block, not slot by slot.
constexpr int kDenseSlots = 24;

// A lower bound of the score of every result, shared by the threads that work on one query: the R
// best of one of them bound the R best of all.
class SharedThreshold {
 public:
  float get() const { return from_order_key(key_.load(std::memory_order_relaxed)); }
  void raise(float threshold) {
    const uint32_t key = order_key(threshold);
    uint32_t known = key_.load(std::memory_order_relaxed);
    while (known < key && !key_.compare_exchange_weak(known, key, std::memory_order_relaxed)) {
    }
  }

 private:
  std::atomic<uint32_t> key_{order_key(-std::numeric_limits<float>::infinity())};
};

// What one query asks for.
struct ScanQuery {
  QueryRow row;
  Program program;
  Program verify;
  bool excludes;
};

// The words of the pages that a query probes, each once.
struct ProbedWords {
  uint32_t* numbers;
  uint64_t* eligible;  // bits of the slots that pass program and exclusions
  int64_t count;
  int32_t* starts;  // (P): where the words of each probe begin
};

// The rows of a pool of pages.
struct Rows {
  const int8_t* codes;
  const float* scales;
  int64_t dim;
  int64_t num_slots;
  const int8_t* end() const { return codes + num_slots * dim; }
  const int8_t* at(int64_t slot) const { return codes + slot * dim; }
};

inline void prefetch_bytes(const void* from, int64_t bytes) {
  const char* address = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(address + i);
}

// Offers the rows of one word whose bit is set, all computed as a block; `next` is the first row of
// the word that will be asked for next, or null.
inline void scan_word(const QueryRow& query, const Rows& rows, int64_t word, uint64_t mask,
                      const int8_t* next, Collector* collector) {
  alignas(64) int32_t dots[kWordSlots];
  // Words are filled from the front, so the last page of a cluster has an empty end.
  const int begin = __builtin_ctzll(mask) / 16 * 16;
  const int end = (64 - __builtin_clzll(mask) + 15) / 16 * 16;
  const int64_t first = word * kWordSlots + begin;
  const int8_t* base = rows.at(first);
  dot_rows(query, [&](int64_t i) { return base + i * rows.dim; }, end - begin, rows.dim, rows.end(),
           next, dots);
  if (next != nullptr) prefetch_bytes(rows.scales + (next - rows.codes) / rows.dim, 256);
  for (int i = 0; i < end - begin; i += 16)
    collector->append16(scores16(dots + i, rows.scales + first + i, query.scale),
                        mask >> (begin + i) & 0xFFFF,
                        consecutive16(static_cast<uint32_t>(first + i)));
}

// Offers the listed rows; the list has room for 16 elements more than `count`.
template <class MakeRoom>
inline void scan_listed(const QueryRow& query, const Rows& rows, uint32_t* slots, int64_t count,
                        const MakeRoom& make_room, Collector* collector) {
  alignas(64) int32_t dots[kWordSlots];
  alignas(64) float scales[kWordSlots];
  for (int64_t i = count; i < count + 16 && count > 0; ++i) slots[i] = slots[count - 1];
  for (int64_t i = 0; i < std::min(count, kRowsAhead); ++i) {
    prefetch_bytes(rows.at(slots[i]), rows.dim);
    __builtin_prefetch(rows.scales + slots[i]);
  }
  for (int64_t start = 0; start < count; start += kWordSlots) {
    const int64_t size = std::min<int64_t>(kWordSlots, count - start);
    const int64_t padded = (size + 15) / 16 * 16;
    for (int64_t i = start + kRowsAhead; i < std::min(count, start + size + kRowsAhead); ++i) {
      prefetch_bytes(rows.at(slots[i]), rows.dim);
      __builtin_prefetch(rows.scales + slots[i]);
    }
    const uint32_t* block = slots + start;
    for (int64_t i = 0; i < padded; ++i) scales[i] = rows.scales[block[i]];
    dot_rows(query, [&](int64_t i) { return rows.at(block[i]); }, padded, rows.dim, rows.end(),
             nullptr, dots);
    make_room();
    for (int64_t i = 0; i < size; i += 16)
      collector->append16(scores16(dots + i, scales + i, query.scale),
                          size - i >= 16 ? 0xFFFFu : (1u << (size - i)) - 1,
                          load_positions16(block + i));
  }
}

// Offers the slots of some words: nearly full words as blocks, the others gathered in a list.
// `make_room` is called before anything is offered and leaves room for kWordSlots candidates.
template <class MakeRoom>
inline void scan_words(const QueryRow& query, const Rows& rows, const uint32_t* numbers,
                       const uint64_t* words, int64_t count, const MakeRoom& make_room,
                       Collector* collector) {
  static thread_local Scratch<uint32_t> listed_scratch;
  constexpr int64_t kListed = 2048;
  uint32_t* listed = listed_scratch.get(kListed + kWordSlots + 16);
  int64_t num_listed = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t word = words[i];
    if (__builtin_popcountll(word) >= kDenseSlots) {
      const bool more = i + 1 < count && words[i + 1] != 0;
      make_room();
      scan_word(query, rows, numbers[i], word,
                more ? rows.at(static_cast<int64_t>(numbers[i + 1]) * kWordSlots) : nullptr,
                collector);
      continue;
    }
    const int64_t first = static_cast<int64_t>(numbers[i]) * kWordSlots;
    for (uint64_t left = word; left != 0; left &= left - 1)
      listed[num_listed++] = static_cast<uint32_t>(first + __builtin_ctzll(left));
    if (num_listed >= kListed) {
      scan_listed(query, rows, listed, num_listed, make_room, collector);
      num_listed = 0;
    }
  }
  scan_listed(query, rows, listed, num_listed, make_room, collector);
}

// One call of ivf_scan.
class IvfScan {
 public:
  explicit IvfScan(const IvfScanArgs& args)
      : args_(args),
        pool_(args.pool),
        rows_{args.codes, args.scales, args.dim,
              args.pool.num_pages * args.pool.num_words * kWordSlots} {}

  int32_t run() {
    static thread_local Scratch<ScanQuery> queries_scratch;
    static thread_local Scratch<Instruction> instructions_scratch;
    queries_ = queries_scratch.get(args_.num_queries);
    const int64_t per_query = args_.program_length + args_.verify_length + 2;
    Instruction* instructions = instructions_scratch.get(args_.num_queries * per_query);
    for (int64_t q = 0; q < args_.num_queries; ++q)
      if (!prepare(q, instructions + q * per_query)) return STATUS_BAD_VALUE;
    if (args_.num_queries >= kSharedQueries && queries_share_clusters()) return scan_shared();
    if (args_.num_queries >= args_.threads)
      return for_each_task(args_.num_queries, args_.threads,
                           [&](int64_t q) { return scan_alone(q, 1); });
    for (int64_t q = 0; q < args_.num_queries; ++q) {
      const int32_t status = scan_alone(q, args_.threads);
      if (status != STATUS_OK) return status;
    }
    return STATUS_OK;
  }

 private:
  bool prepare(int64_t q, Instruction* instructions) {
    ScanQuery& query = queries_[q];
    const float scale = args_.query_scales[q];
    if (!std::isfinite(scale)) return false;
    const int64_t* excluded = args_.excluded + q * args_.num_excluded;
    if (!excluded_in_range(excluded, args_.num_excluded, pool_)) return false;
    if (!parse_program(args_.programs + q * args_.program_length * 4, args_.program_length, pool_,
                       instructions, &query.program))
      return false;
    if (!parse_program(args_.verify + q * args_.verify_length * 4, args_.verify_length, pool_,
                       instructions + args_.program_length + 1, &query.verify))
      return false;
    query.excludes = false;
    for (int64_t i = 0; i < args_.num_excluded; ++i) query.excludes |= excluded[i] >= 0;
    prepare_query(args_.query_codes + q * args_.dim, args_.dim, scale, &query.row);
    return true;
  }

  static bool all_empty(const int32_t* eight) {
    int32_t bits = -1;
    for (int i = 0; i < 8; ++i) bits &= eight[i];
    return bits == -1;
  }

  int64_t most_words() const {
    return std::min(args_.num_probes * args_.table_width, pool_.num_pages) * pool_.num_words;
  }

  // Finds the pages of a query in the order of its clusters; false if an entry of the tables is out
  // of range. `seen` has a bit for every page, zero before, and set after where the page is one.
  bool find_words(int64_t q, uint64_t* seen, ProbedWords* found) const {
    int64_t count = 0;
    bool valid = true;
    const int32_t* clusters = args_.clusters + q * args_.num_probes;
    for (int64_t p = 0; p < args_.num_probes && valid; ++p) {
      found->starts[p] = static_cast<int32_t>(count);
      const int64_t cluster = clusters[p];
      if (cluster < -1 || cluster >= args_.num_clusters) valid = false;
      if (!valid || cluster < 0) continue;
      const int32_t* table = args_.page_table + cluster * args_.table_width;
      for (int64_t x = 0; x < args_.table_width; ++x) {
        // Most of a row is empty, because it has room for the largest cluster.
        while (x + 8 <= args_.table_width && all_empty(table + x)) x += 8;
        if (x == args_.table_width) break;
        const int64_t page = table[x];
        if (page < -1 || page >= pool_.num_pages) valid = false;
        if (page < 0 || !valid) continue;
        const uint64_t bit = uint64_t{1} << (page % 64);
        if (seen[page / 64] & bit) continue;
        seen[page / 64] |= bit;
        for (int64_t w = 0; w < pool_.num_words; ++w)
          found->numbers[count++] = static_cast<uint32_t>(page * pool_.num_words + w);
      }
    }
    found->count = count;
    return valid;
  }

  // Finds the eligible slots of the probed pages of a query, and its two counts.
  int32_t find_eligible(int64_t q, ProbedWords* found) const {
    static thread_local Scratch<uint64_t> seen_scratch;
    const int64_t num_seen = (pool_.num_pages + 63) / 64;
    uint64_t* seen = seen_scratch.get(num_seen + 1);
    std::fill_n(seen, num_seen, uint64_t{0});
    if (!find_words(q, seen, found)) return STATUS_BAD_VALUE;
    const uint64_t* live = reinterpret_cast<const uint64_t*>(pool_.planes);
    int64_t probed = 0;
    for (int64_t i = 0; i < found->count; ++i)
      probed += __builtin_popcountll(live[found->numbers[i]]);
    const ScanQuery& query = queries_[q];
    evaluate_all_words(pool_, query.program, found->numbers, found->count, found->eligible);
    if (query.excludes) exclude(q, found->numbers, found->count, seen, found->eligible);
    int64_t eligible = 0;
    for (int64_t i = 0; i < found->count; ++i)
      eligible += __builtin_popcountll(found->eligible[i]);
    args_.out_probed[q] = probed;
    args_.out_eligible[q] = eligible;
    return STATUS_OK;
  }

  void exclude(int64_t q, const uint32_t* numbers, int64_t count, const uint64_t* seen,
               uint64_t* words) const {
    static thread_local Scratch<int64_t> hits_scratch;
    const int64_t* excluded = args_.excluded + q * args_.num_excluded;
    const int64_t page_size = pool_.num_words * kWordSlots;
    int64_t* hits = hits_scratch.get(args_.num_excluded + 1);
    int64_t num_hits = 0;
    for (int64_t i = 0; i < args_.num_excluded; ++i) {
      const int64_t page = excluded[i] / page_size;
      if (excluded[i] >= 0 && (seen[page / 64] >> (page % 64) & 1)) hits[num_hits++] = excluded[i];
    }
    if (num_hits == 0) return;
    std::sort(hits, hits + num_hits);
    for (int64_t i = 0; i < count; i += pool_.num_words)
      clear_excluded(hits, num_hits, numbers[i] / pool_.num_words, pool_.num_words, words + i);
  }

  // Moves the candidates that pass the exact program to the front and returns their number.
  int64_t verified(const Program& program, uint32_t* keys, uint32_t* slots, int64_t count) const {
    int64_t passed = 0;
    constexpr int64_t kAhead = 24;
    const auto fetch = [&](int64_t i) {
      prefetch_bytes(pool_.terms + slots[i] * pool_.num_terms,
                     pool_.num_terms * static_cast<int64_t>(sizeof(int64_t)));
    };
    for (int64_t i = 0; i < std::min(count, kAhead); ++i) fetch(i);
    for (int64_t i = 0; i < count; ++i) {
      if (i + kAhead < count) fetch(i + kAhead);
      if (!accepts_slot(pool_, program, slots[i])) continue;
      keys[passed] = keys[i];
      slots[passed] = slots[i];
      ++passed;
    }
    return passed;
  }

  void settle(const ScanQuery& query, Collector* collector) const {
    if (query.verify.empty()) {
      collector->settle();
      return;
    }
    collector->settle([&](uint32_t* keys, uint32_t* slots, int64_t count) {
      return verified(query.verify, keys, slots, count);
    });
  }

  int32_t write(int64_t q, const Collector& collector) const {
    const int64_t at = q * args_.num_results;
    const bool finite =
        collector.write(args_.out_scores + at, args_.out_ids + at, args_.out_slots + at);
    return finite ? STATUS_OK : STATUS_BAD_VALUE;
  }

  // Writes the best of several settled collectors.
  int32_t write_merged(int64_t q, const Collector* collectors, int64_t count) const {
    static thread_local Scratch<uint32_t> memory_scratch;
    if (count == 1) return write(q, collectors[0]);
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += collectors[i].count();
    uint32_t* memory = memory_scratch.get(2 * (total + kSlack));
    Collector merged;
    merged.start({memory, memory + total + kSlack}, total, args_.num_results, args_.item_ids);
    for (int64_t i = 0; i < count; ++i) merged.append(collectors[i]);
    merged.settle();
    return write(q, merged);
  }

  // Candidates that a collector of a query has room for.
  int64_t capacity_of(int64_t q) const {
    // Verifying costs far more than keeping, so candidates to verify are kept as long as they fit.
    const int64_t kept = queries_[q].verify.empty() ? 0 : kUnverified;
    return Collector::capacity_for(std::max(args_.num_results, kept),
                                   args_.out_eligible[q] + kWordSlots);
  }

  int32_t scan_alone(int64_t q, int64_t threads) const {
    static thread_local Scratch<uint32_t> numbers;
    static thread_local Scratch<uint64_t> eligible;
    static thread_local Scratch<int32_t> starts;
    ProbedWords found{numbers.get(most_words() + 1), eligible.get(most_words() + 1), 0,
                      starts.get(args_.num_probes + 1)};
    const int32_t status = find_eligible(q, &found);
    return status != STATUS_OK ? status : scan_found(q, found, threads);
  }

  // Scans the words of one query; with several threads each of them takes some.
  int32_t scan_found(int64_t q, const ProbedWords& found, int64_t threads) const {
    static thread_local Scratch<uint32_t> memory_scratch;
    static thread_local std::vector<Collector> collectors;
    constexpr int64_t kWordsPerTask = 64;
    const int64_t tasks = (found.count + kWordsPerTask - 1) / kWordsPerTask;
    const int64_t team = std::max<int64_t>(1, std::min(threads, tasks));
    const int64_t capacity = capacity_of(q);
    const int64_t stride = capacity + kSlack;
    uint32_t* memory = memory_scratch.get(2 * stride * team);
    if (static_cast<int64_t>(collectors.size()) < team) collectors.resize(team);
    Collector* const members = collectors.data();
    for (int64_t i = 0; i < team; ++i) {
      uint32_t* keys = memory + 2 * stride * i;
      members[i].start({keys, keys + stride}, capacity, args_.num_results, args_.item_ids);
    }
    const ScanQuery& query = queries_[q];
    const int64_t step = team == 1 ? std::max<int64_t>(found.count, 1) : kWordsPerTask;
    std::atomic<int64_t> next{0};
    SharedThreshold threshold;
    const int32_t scanned = for_each_task(team, team, [&](int64_t member) -> int32_t {
      Collector& mine = members[member];
      const auto make_room = [&] {
        if (mine.has_room(kWordSlots)) return;
        settle(query, &mine);
        threshold.raise(mine.threshold());
      };
      for (int64_t first = next.fetch_add(step); first < found.count;
           first = next.fetch_add(step)) {
        mine.raise_threshold(threshold.get());
        scan_words(query.row, rows_, found.numbers + first, found.eligible + first,
                   std::min(step, found.count - first), make_room, &mine);
      }
      settle(query, &mine);
      return STATUS_OK;
    });
    return scanned != STATUS_OK ? scanned : write_merged(q, members, team);
  }

  // Whether a cluster is probed by 1.25 queries on average, so that sharing its pages pays.
  bool queries_share_clusters() const {
    static thread_local Scratch<uint8_t> probed_scratch;
    uint8_t* probed = probed_scratch.get(args_.num_clusters + 1);
    std::fill_n(probed, args_.num_clusters, uint8_t{0});
    int64_t pairs = 0, distinct = 0;
    for (int64_t i = 0; i < args_.num_queries * args_.num_probes; ++i) {
      const int64_t cluster = args_.clusters[i];
      if (cluster < 0 || cluster >= args_.num_clusters) continue;
      ++pairs;
      distinct += probed[cluster] == 0;
      probed[cluster] = 1;
    }
    return 4 * pairs >= 5 * distinct && distinct > 0;
  }

  // One query of a group that probes a cluster.
  struct Pair {
    int32_t query;
    int32_t probe;
  };

  // The queries of every cluster, clusters in the order of their best rank among the probes.
  struct Sharing {
    const int32_t* clusters;  // (touched)
    int64_t touched;
    const int64_t* first;  // (C + 1): where the pairs of a cluster start
    const Pair* pairs;
  };

  // Groups queries [start, start + size) by cluster, those for which `dense` is set.
  Sharing group_by_cluster(int64_t start, int64_t size, const uint8_t* dense) const {
    static thread_local Scratch<int64_t> first_scratch;
    static thread_local Scratch<int32_t> clusters_scratch;
    static thread_local Scratch<Pair> pairs_scratch;
    const int64_t num_clusters = args_.num_clusters;
    int64_t* first = first_scratch.get(num_clusters + 2);
    int32_t* last_query = clusters_scratch.get(2 * num_clusters + 1);
    int32_t* touched = last_query + num_clusters;
    Pair* pairs = pairs_scratch.get(size * args_.num_probes + 1);
    std::fill_n(first, num_clusters + 2, int64_t{0});
    std::fill_n(last_query, num_clusters, -1);
    const int32_t* probes = args_.clusters + start * args_.num_probes;
    int64_t num_touched = 0;
    // Rank by rank, so that clusters come out best first; first[c + 2] counts the pairs of c.
    for (int64_t p = 0; p < args_.num_probes; ++p) {
      for (int64_t i = 0; i < size; ++i) {
        const int64_t cluster = probes[i * args_.num_probes + p];
        if (dense[i] && cluster >= 0 && first[cluster + 2]++ == 0)
          touched[num_touched++] = static_cast<int32_t>(cluster);
      }
    }
    for (int64_t c = 0; c < num_clusters; ++c) first[c + 2] += first[c + 1];
    // Query by query, so that a repeated cluster of one query is seen as such.
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t p = 0; p < args_.num_probes; ++p) {
        const int64_t cluster = probes[i * args_.num_probes + p];
        if (!dense[i] || cluster < 0) continue;
        const bool repeated = last_query[cluster] == i;
        last_query[cluster] = static_cast<int32_t>(i);
        pairs[first[cluster + 1]++] = {repeated ? -1 : static_cast<int32_t>(i),
                                       static_cast<int32_t>(p)};
      }
    }
    return {touched, num_touched, first, pairs};
  }

  // All queries, in groups that bound the memory of words and collectors.
  int32_t scan_shared() const {
    constexpr int64_t kMostMemory = int64_t{1} << 28;
    const int64_t threads = std::max<int64_t>(1, args_.threads);
    const int64_t capacity = Collector::capacity_for(std::max(args_.num_results, kUnverified),
                                                     rows_.num_slots + kWordSlots);
    const int64_t bytes = threads * 8 * (capacity + kSlack) + 12 * most_words();
    const int64_t group = std::max<int64_t>(kSharedQueries, kMostMemory / bytes);
    for (int64_t start = 0; start < args_.num_queries; start += group) {
      const int32_t status = scan_group(start, std::min(group, args_.num_queries - start), threads);
      if (status != STATUS_OK) return status;
    }
    return STATUS_OK;
  }

  int32_t scan_group(int64_t start, int64_t size, int64_t threads) const {
    static thread_local Scratch<uint32_t> numbers_scratch;
    static thread_local Scratch<uint64_t> eligible_scratch;
    static thread_local Scratch<int32_t> starts_scratch;
    static thread_local Scratch<uint32_t> memory_scratch;
    const int64_t most = most_words() + 1;
    uint32_t* numbers = numbers_scratch.get(size * most);
    uint64_t* eligible = eligible_scratch.get(size * most);
    int32_t* starts = starts_scratch.get(size * args_.num_probes + 1);
    std::vector<ProbedWords> words(size);
    std::vector<uint8_t> dense(size);
    const int32_t found = for_each_task(size, threads, [&](int64_t i) -> int32_t {
      const int64_t q = start + i;
      words[i] = {numbers + i * most, eligible + i * most, 0, starts + i * args_.num_probes};
      const int32_t status = find_eligible(q, &words[i]);
      if (status != STATUS_OK) return status;
      dense[i] = kSharedFraction * args_.out_eligible[q] >= args_.out_probed[q];
      return dense[i] ? STATUS_OK : scan_found(q, words[i], 1);
    });
    if (found != STATUS_OK) return found;
    const Sharing sharing = group_by_cluster(start, size, dense.data());
    if (sharing.touched == 0) return write_empty(start, size, dense.data());
    const int64_t team = std::min(threads, sharing.touched);
    std::vector<Collector> collectors(team * size);  // (size, team)
    int64_t total = 0;
    for (int64_t i = 0; i < size; ++i)
      if (dense[i]) total += 2 * team * (capacity_of(start + i) + kSlack);
    uint32_t* memory = memory_scratch.get(total);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t capacity = capacity_of(start + i);
      for (int64_t member = 0; dense[i] && member < team; ++member) {
        uint32_t* positions = memory + capacity + kSlack;
        collectors[i * team + member].start({memory, positions}, capacity, args_.num_results,
                                            args_.item_ids);
        memory = positions + capacity + kSlack;
      }
    }
    const int32_t status = scan_clusters(start, size, sharing, words.data(), team,
                                         collectors.data());
    if (status != STATUS_OK) return status;
    return for_each_task(size, threads, [&](int64_t i) {
      return dense[i] ? write_merged(start + i, collectors.data() + i * team, team) : STATUS_OK;
    });
  }

  // Writes the answers of queries that probe no cluster.
  int32_t write_empty(int64_t start, int64_t size, const uint8_t* dense) const {
    Collector nothing;
    nothing.start({}, 0, args_.num_results, args_.item_ids);
    for (int64_t i = 0; i < size; ++i)
      if (dense[i]) write(start + i, nothing);
    return STATUS_OK;
  }

  // Scans the clusters of a group; collectors are (size, team).
  int32_t scan_clusters(int64_t start, int64_t size, const Sharing& sharing,
                        const ProbedWords* words, int64_t team, Collector* collectors) const {
    std::vector<SharedThreshold> thresholds(size);
    std::atomic<int64_t> next{0};
    return for_each_task(team, team, [&](int64_t member) -> int32_t {
      for (int64_t at = next.fetch_add(1); at < sharing.touched; at = next.fetch_add(1)) {
        const int64_t cluster = sharing.clusters[at];
        const Pair* first = sharing.pairs + sharing.first[cluster];
        const Pair* last = sharing.pairs + sharing.first[cluster + 1];
        const int32_t* table = args_.page_table + cluster * args_.table_width;
        int64_t behind = 0;  // words of the cluster that were scanned
        for (int64_t x = 0; x < args_.table_width; ++x) {
          if (table[x] < 0) continue;
          const bool more = x + 1 < args_.table_width && table[x + 1] >= 0;
          for (int64_t w = 0; w < pool_.num_words; ++w, ++behind) {
            const int64_t word = table[x] * pool_.num_words + w;
            // The first query that scans a word fetches the one behind it.
            const int64_t following = w + 1 < pool_.num_words ? word + 1
                                      : more ? table[x + 1] * pool_.num_words
                                             : -1;
            const int8_t* ahead = following < 0 ? nullptr : rows_.at(following * kWordSlots);
            for (const Pair* pair = first; pair < last; ++pair) {
              if (pair->query < 0) continue;
              const ProbedWords& mine = words[pair->query];
              const int64_t place = mine.starts[pair->probe] + behind;
              // Clusters that share a page would lead to the words of another one.
              if (place >= mine.count || mine.numbers[place] != word) return STATUS_BAD_VALUE;
              if (mine.eligible[place] == 0) continue;
              offer_word(queries_[start + pair->query], word, mine.eligible[place], ahead,
                         &thresholds[pair->query], &collectors[pair->query * team + member]);
              ahead = nullptr;
            }
          }
        }
      }
      for (int64_t i = 0; i < size; ++i) {
        Collector& mine = collectors[i * team + member];
        if (mine.count() > 0) settle(queries_[start + i], &mine);
      }
      return STATUS_OK;
    });
  }

  // Offers the eligible slots of one word to a query.
  void offer_word(const ScanQuery& query, int64_t word, uint64_t eligible, const int8_t* ahead,
                  SharedThreshold* threshold, Collector* collector) const {
    if (!collector->has_room(kWordSlots)) {
      settle(query, collector);
      threshold->raise(collector->threshold());
    }
    collector->raise_threshold(threshold->get());
    scan_word(query.row, rows_, word, eligible, ahead, collector);
  }

  const IvfScanArgs& args_;
  const FilterPool& pool_;
  const Rows rows_;
  ScanQuery* queries_ = nullptr;
};

inline int32_t ivf_scan(const IvfScanArgs& args) { return IvfScan(args).run(); }

}  // namespace silvershard::SILVERSHARD_ISA
