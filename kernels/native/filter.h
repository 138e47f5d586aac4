// Filter programs on words of 64 slots and on single slots. Included once per instruction set.
//
// Source: SilverTorch, arXiv 2511.14881, SIGIR 2026, section 4.1 (operation array and stack).

namespace silvershard::SILVERSHARD_ISA {

// Numbers of the Python enumerations FilterOp and Relation.
enum FilterOp : int64_t { NOP, TRUTH, FALSITY, PLANE, COMPARE, AND, OR, NOT, TERM };
enum Relation : int64_t { LT, LE, EQ, NE, GE, GT };

// What a leaf does with the top of the stack; a leaf that AND or OR follows needs no push of its own.
enum class Combine { kPush, kAnd, kOr };

struct Instruction {
  int64_t op;
  int64_t a, b, c;
  Combine combine;
};

// A checked program; empty means that everything passes.
struct Program {
  const Instruction* instructions;
  int64_t length;
  bool empty() const { return length == 0; }
};

// Checks the L rows of a program and writes its instructions; returns false if it is malformed.
inline bool parse_program(const int64_t* rows, int64_t length, const FilterPool& pool,
                          Instruction* out, Program* program) {
  int64_t count = 0;
  int64_t depth = 0;
  for (int64_t i = 0; i < length; ++i) {
    const int64_t op = rows[4 * i], a = rows[4 * i + 1], b = rows[4 * i + 2], c = rows[4 * i + 3];
    if (op == NOP) continue;
    if (op == AND || op == OR) {
      if (depth < 2) return false;
      --depth;
      Instruction& last = out[count - 1];
      const bool leaf = last.op != AND && last.op != OR && last.op != NOT;
      if (leaf && last.combine == Combine::kPush) {
        last.combine = op == AND ? Combine::kAnd : Combine::kOr;
        continue;
      }
    } else if (op == NOT) {
      if (depth < 1) return false;
    } else {
      if (op == PLANE) {
        if (a < 0 || a >= pool.num_planes) return false;
      } else if (op == COMPARE) {
        if (a < 0 || a >= pool.num_columns || b < LT || b > GT) return false;
      } else if (op == TERM) {
        if (c < 0 || c == kPadTerm || pool.num_terms == 0) return false;
      } else if (op != TRUTH && op != FALSITY) {
        return false;
      }
      if (++depth > kMaxStack) return false;
    }
    out[count++] = {op, a, b, c, Combine::kPush};
  }
  if (count > 0 && depth != 1) return false;
  *program = {out, count};
  return true;
}

// Words of 64 slots, by their number page * W + w; consecutive ones are read as a stream.
struct Words {
  const uint32_t* numbers;
  int64_t count;
  bool consecutive;
};

constexpr int64_t kWordsPerPass = 1024;

struct WordStack {
  alignas(64) uint64_t words[kMaxStack + 1][kWordsPerPass];
};

// Planes that are read side by side, so that their cache misses overlap.
constexpr int64_t kPlanesAtOnce = 4;

// Combines the AND of `count` planes with the top of the stack.
template <Combine kCombine, int kPlanes>
inline void combine_planes(uint64_t* __restrict top, const uint64_t* const* planes,
                           const Words& words) {
  const int64_t first = words.consecutive ? words.numbers[0] : 0;
  const uint64_t* at[kPlanes];
  for (int p = 0; p < kPlanes; ++p) at[p] = planes[p] + first;
  const auto apply = [&](int64_t i, int64_t number) {
    uint64_t word = at[0][number];
    for (int p = 1; p < kPlanes; ++p) word &= at[p][number];
    if constexpr (kCombine == Combine::kPush) top[i] = word;
    if constexpr (kCombine == Combine::kAnd) top[i] &= word;
    if constexpr (kCombine == Combine::kOr) top[i] |= word;
  };
  const int64_t count = words.count;
  if (words.consecutive) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) apply(i, i);
  } else {
    const uint32_t* numbers = words.numbers;
    for (int64_t i = 0; i < count; ++i) apply(i, numbers[i]);
  }
}

template <Combine kCombine>
inline void combine_planes(uint64_t* top, const uint64_t* const* planes, int64_t count,
                           const Words& words) {
  switch (count) {
    case 1: return combine_planes<kCombine, 1>(top, planes, words);
    case 2: return combine_planes<kCombine, 2>(top, planes, words);
    case 3: return combine_planes<kCombine, 3>(top, planes, words);
    default: return combine_planes<kCombine, 4>(top, planes, words);
  }
}

inline void combine_planes(Combine combine, uint64_t* top, const uint64_t* const* planes,
                           int64_t count, const Words& words) {
  switch (combine) {
    case Combine::kPush: return combine_planes<Combine::kPush>(top, planes, count, words);
    case Combine::kAnd: return combine_planes<Combine::kAnd>(top, planes, count, words);
    case Combine::kOr: return combine_planes<Combine::kOr>(top, planes, count, words);
  }
}

// The planes that a step and the ANDs behind it read; returns how many steps that is.
inline int64_t gather_planes(const Program& program, int64_t at, const uint64_t* planes,
                             int64_t plane_size, const uint64_t** out) {
  int64_t count = 0;
  const Combine first = program.instructions[at].combine;
  do {
    out[count++] = planes + program.instructions[at++].a * plane_size;
  } while (first != Combine::kOr && count < kPlanesAtOnce && at < program.length &&
           program.instructions[at].op == PLANE &&
           program.instructions[at].combine == Combine::kAnd);
  return count;
}

// Fetches the words of all planes of a program that lie scattered.
inline void prefetch_planes(const Program& program, const uint64_t* planes, int64_t plane_size,
                            const Words& words) {
  if (words.consecutive) return;
  for (int64_t at = 0; at < program.length; ++at) {
    if (program.instructions[at].op != PLANE) continue;
    const uint64_t* plane = planes + program.instructions[at].a * plane_size;
    uint32_t last = ~uint32_t{0};
    for (int64_t i = 0; i < words.count; ++i) {
      // Eight words share a cache line.
      const uint32_t line = words.numbers[i] / 8;
      if (line != last) __builtin_prefetch(plane + words.numbers[i]);
      last = line;
    }
  }
}

inline bool compare_keys(int64_t key, int64_t relation, int64_t bound) {
  if (key == kNullKey) return false;
  switch (relation) {
    case LT: return key < bound;
    case LE: return key <= bound;
    case EQ: return key == bound;
    case NE: return key != bound;
    case GE: return key >= bound;
    default: return key > bound;
  }
}

inline uint64_t compare_word(const int64_t* keys, int64_t relation, int64_t bound) {
  const WordOrder order = order_word(keys, bound);
  uint64_t truth = 0;
  switch (relation) {
    case LT: truth = order.less; break;
    case LE: truth = order.less | order.equal; break;
    case EQ: truth = order.equal; break;
    case NE: truth = ~order.equal; break;
    case GE: truth = ~order.less; break;
    default: truth = ~(order.less | order.equal); break;
  }
  return truth & ~order.null;
}

// The truth of a COMPARE or TERM for the slots of one word whose bit in `asked` is set.
inline uint64_t leaf_word(const FilterPool& pool, const Instruction& leaf, int64_t word,
                          uint64_t asked) {
  if (asked == 0) return 0;
  const int64_t slot = word * kWordSlots;
  if (leaf.op == COMPARE) {
    const int64_t* keys =
        pool.columns + leaf.a * pool.num_pages * pool.num_words * kWordSlots + slot;
    if (__builtin_popcountll(asked) > 8) return compare_word(keys, leaf.b, leaf.c);
    uint64_t truth = 0;
    for (uint64_t left = asked; left != 0; left &= left - 1) {
      const int at = __builtin_ctzll(left);
      truth |= static_cast<uint64_t>(compare_keys(keys[at], leaf.b, leaf.c)) << at;
    }
    return truth;
  }
  uint64_t truth = 0;
  for (uint64_t left = asked; left != 0; left &= left - 1) {
    const int at = __builtin_ctzll(left);
    const int64_t* terms = pool.terms + (slot + at) * pool.num_terms;
    truth |= static_cast<uint64_t>(contains(terms, pool.num_terms, leaf.c)) << at;
  }
  return truth;
}

// Evaluates a program on at most kWordsPerPass words: bit j of out[i] tells whether slot j of word i
// is live and passes.
inline void evaluate_words(const FilterPool& pool, const Program& program, const Words& words,
                           WordStack* stack, uint64_t* out) {
  const uint64_t* planes = reinterpret_cast<const uint64_t*>(pool.planes);
  const int64_t plane_size = pool.num_pages * pool.num_words;
  combine_planes(Combine::kPush, out, &planes, 1, words);
  if (program.empty()) return;
  prefetch_planes(program, planes, plane_size, words);
  int64_t depth = 0;  // values on the stack
  for (int64_t at = 0; at < program.length; ++at) {
    const Instruction& step = program.instructions[at];
    if (step.op == AND || step.op == OR) {
      const uint64_t* right = stack->words[--depth];
      uint64_t* left = stack->words[depth - 1];
      if (step.op == AND) {
        for (int64_t i = 0; i < words.count; ++i) left[i] &= right[i];
      } else {
        for (int64_t i = 0; i < words.count; ++i) left[i] |= right[i];
      }
      continue;
    }
    if (step.op == NOT) {
      uint64_t* top = stack->words[depth - 1];
      for (int64_t i = 0; i < words.count; ++i) top[i] = ~top[i];
      continue;
    }
    if (step.combine == Combine::kPush) ++depth;
    uint64_t* top = stack->words[depth - 1];
    if (step.op == PLANE) {
      const uint64_t* together[kPlanesAtOnce];
      const int64_t count = gather_planes(program, at, planes, plane_size, together);
      combine_planes(step.combine, top, together, count, words);
      at += count - 1;
      continue;
    }
    const uint64_t constant = step.op == TRUTH ? ~uint64_t{0} : 0;
    const bool is_constant = step.op == TRUTH || step.op == FALSITY;
    for (int64_t i = 0; i < words.count; ++i) {
      // Dead slots and slots that are decided already need no look at columns or terms.
      const uint64_t asked = step.combine == Combine::kPush  ? out[i]
                             : step.combine == Combine::kAnd ? out[i] & top[i]
                                                             : out[i] & ~top[i];
      const uint64_t truth =
          is_constant ? constant : leaf_word(pool, step, words.numbers[i], asked);
      if (step.combine == Combine::kPush) top[i] = truth;
      if (step.combine == Combine::kAnd) top[i] &= truth;
      if (step.combine == Combine::kOr) top[i] |= truth;
    }
  }
  for (int64_t i = 0; i < words.count; ++i) out[i] &= stack->words[0][i];
}

// Evaluates a program on any number of words.
inline void evaluate_all_words(const FilterPool& pool, const Program& program,
                               const uint32_t* numbers, int64_t count, uint64_t* out) {
  static thread_local WordStack stack;
  for (int64_t start = 0; start < count; start += kWordsPerPass) {
    const int64_t size = std::min(kWordsPerPass, count - start);
    const bool consecutive = numbers[start + size - 1] - numbers[start] == size - 1;
    bool ascending = consecutive;
    for (int64_t i = 1; ascending && i < size; ++i)
      ascending = numbers[start + i] == numbers[start + i - 1] + 1;
    evaluate_words(pool, program, {numbers + start, size, ascending}, &stack, out + start);
  }
}

// Evaluates a program on one slot; the stack is the bits of one integer, its top the lowest.
inline bool accepts_slot(const FilterPool& pool, const Program& program, int64_t slot) {
  if (program.empty()) return true;
  const uint64_t* planes = reinterpret_cast<const uint64_t*>(pool.planes);
  const int64_t plane_size = pool.num_pages * pool.num_words;
  uint64_t stack = 0;
  for (int64_t at = 0; at < program.length; ++at) {
    const Instruction& step = program.instructions[at];
    if (step.op == AND || step.op == OR) {
      const uint64_t right = stack & 1;
      stack >>= 1;
      stack = step.op == AND ? stack & (right | ~uint64_t{1}) : stack | right;
      continue;
    }
    if (step.op == NOT) {
      stack ^= 1;
      continue;
    }
    uint64_t truth = step.op == TRUTH;
    if (step.op == PLANE) {
      truth = planes[step.a * plane_size + slot / kWordSlots] >> (slot % kWordSlots) & 1;
    } else if (step.op == COMPARE) {
      truth = compare_keys(pool.columns[step.a * plane_size * kWordSlots + slot], step.b, step.c);
    } else if (step.op == TERM) {
      truth = contains(pool.terms + slot * pool.num_terms, pool.num_terms, step.c);
    }
    if (step.combine == Combine::kPush) stack = stack << 1 | truth;
    if (step.combine == Combine::kAnd) stack &= truth | ~uint64_t{1};
    if (step.combine == Combine::kOr) stack |= truth;
  }
  return stack & 1;
}

// Clears the bits of the excluded slots of one page in its words; `excluded` is ascending.
inline void clear_excluded(const int64_t* excluded, int64_t count, int64_t page, int64_t num_words,
                           uint64_t* words) {
  const int64_t first_slot = page * num_words * kWordSlots;
  const int64_t* slot = std::lower_bound(excluded, excluded + count, first_slot);
  for (; slot < excluded + count && *slot < first_slot + num_words * kWordSlots; ++slot) {
    const int64_t offset = *slot - first_slot;
    words[offset / kWordSlots] &= ~(uint64_t{1} << (offset % kWordSlots));
  }
}

inline bool excluded_in_range(const int64_t* excluded, int64_t count, const FilterPool& pool) {
  const int64_t num_slots = pool.num_pages * pool.num_words * kWordSlots;
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside &= excluded[i] >= -1 && excluded[i] < num_slots;
  return inside;
}

inline int32_t eligibility(const EligibilityArgs& args) {
  const FilterPool& pool = args.pool;
  const int64_t all_words = pool.num_pages * pool.num_words;
  const bool counting = args.out_counts != nullptr;
  // Work is cut into blocks of pages of one query, so that one query can use all threads.
  constexpr int64_t kPagesPerTask = 1024;
  const int64_t num_pages = counting ? pool.num_pages : args.pages_per_query;
  const int64_t blocks = std::max<int64_t>(1, (num_pages + kPagesPerTask - 1) / kPagesPerTask);
  if (counting) std::fill_n(args.out_counts, args.num_queries, int64_t{0});
  return for_each_task(args.num_queries * blocks, args.threads, [&](int64_t task) -> int32_t {
    static thread_local Scratch<Instruction> instructions;
    static thread_local Scratch<uint32_t> numbers_scratch;
    static thread_local Scratch<uint64_t> words_scratch;
    const int64_t query = task / blocks;
    const int64_t first = task % blocks * kPagesPerTask;
    const int64_t count = std::min(kPagesPerTask, num_pages - first);
    Program program;
    if (!parse_program(args.programs + query * args.program_length * 4, args.program_length, pool,
                       instructions.get(args.program_length + 1), &program))
      return STATUS_BAD_VALUE;
    if (!excluded_in_range(args.excluded + query * args.num_excluded, args.num_excluded, pool))
      return STATUS_BAD_VALUE;
    if (count <= 0) return STATUS_OK;
    const int64_t num_words = count * pool.num_words;
    uint32_t* numbers = numbers_scratch.get(num_words);
    if (counting) {
      for (int64_t i = 0; i < num_words; ++i)
        numbers[i] = static_cast<uint32_t>(first * pool.num_words + i);
      uint64_t* words = words_scratch.get(num_words);
      evaluate_all_words(pool, program, numbers, num_words, words);
      int64_t total = 0;
      for (int64_t i = 0; i < num_words; ++i) total += __builtin_popcountll(words[i]);
      __atomic_fetch_add(args.out_counts + query, total, __ATOMIC_RELAXED);
      return STATUS_OK;
    }
    const int32_t* pages = args.pages + query * num_pages + first;
    for (int64_t i = 0; i < count; ++i) {
      if (pages[i] < -1 || pages[i] >= pool.num_pages) return STATUS_BAD_VALUE;
      for (int64_t w = 0; w < pool.num_words; ++w)
        numbers[i * pool.num_words + w] =
            static_cast<uint32_t>(std::max(pages[i], 0) * pool.num_words + w);
    }
    uint64_t* out = reinterpret_cast<uint64_t*>(args.out_words) +
                    (query * num_pages + first) * pool.num_words;
    if (all_words == 0) {
      std::fill_n(out, num_words, uint64_t{0});
      return STATUS_OK;
    }
    evaluate_all_words(pool, program, numbers, num_words, out);
    for (int64_t i = 0; i < count; ++i)
      if (pages[i] < 0) std::fill_n(out + i * pool.num_words, pool.num_words, uint64_t{0});
    if (args.num_excluded > 0) {
      static thread_local Scratch<int64_t> excluded_scratch;
      int64_t* excluded = excluded_scratch.get(args.num_excluded);
      std::copy_n(args.excluded + query * args.num_excluded, args.num_excluded, excluded);
      std::sort(excluded, excluded + args.num_excluded);
      for (int64_t i = 0; i < count; ++i)
        if (pages[i] >= 0)
          clear_excluded(excluded, args.num_excluded, pages[i], pool.num_words,
                         out + i * pool.num_words);
    }
    return STATUS_OK;
  });
}

}  // namespace silvershard::SILVERSHARD_ISA
