// Bloom planes of some slots, in place. Included once per instruction set.
//
// Source: Goodwin et al., BitFunnel: Revisiting Signatures for Search, SIGIR 2017, section 4.

namespace silvershard::SILVERSHARD_ISA {

inline int64_t bloom_position(uint64_t key, uint64_t salt, int64_t num_planes) {
  uint64_t mixed = key ^ salt;
  mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9u;
  mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBu;
  mixed ^= mixed >> 31;
  return static_cast<int64_t>((mixed & 0x7FFFFFFFFFFFFFFFu) % static_cast<uint64_t>(num_planes));
}

inline int32_t bloom_build(const BloomBuildArgs& args) {
  static thread_local Scratch<int64_t> order_scratch;
  const int64_t num_slots = args.num_words * kWordSlots;
  int64_t* order = order_scratch.get(args.num_slots + 1);
  for (int64_t i = 0; i < args.num_slots; ++i) {
    order[i] = i;
    if (args.slots[i] < 0 || args.slots[i] >= num_slots) return STATUS_BAD_VALUE;
  }
  for (int64_t i = 0; i < args.num_slots * args.num_terms; ++i)
    if (args.terms[i] < 0) return STATUS_BAD_VALUE;
  std::sort(order, order + args.num_slots,
            [&](int64_t a, int64_t b) { return args.slots[a] < args.slots[b]; });
  for (int64_t i = 1; i < args.num_slots; ++i)
    if (args.slots[order[i]] == args.slots[order[i - 1]]) return STATUS_BAD_VALUE;
  // Every thread owns some of the planes: two slots may share a word, but never two planes.
  const int64_t teams = std::max<int64_t>(1, std::min(args.threads, args.num_planes));
  return for_each_task(teams, teams, [&](int64_t member) -> int32_t {
    static thread_local Scratch<uint64_t> fresh_scratch;
    const int64_t from = args.num_planes * member / teams;
    const int64_t to = args.num_planes * (member + 1) / teams;
    uint64_t* fresh = fresh_scratch.get(to - from);
    uint64_t* planes = reinterpret_cast<uint64_t*>(args.planes) +
                       (args.first_plane + from) * args.num_words;
    for (int64_t i = 0; i < args.num_slots;) {
      // All slots of one word are written at once.
      const int64_t word = args.slots[order[i]] / kWordSlots;
      uint64_t touched = 0;
      std::fill_n(fresh, to - from, uint64_t{0});
      for (; i < args.num_slots && args.slots[order[i]] / kWordSlots == word; ++i) {
        const uint64_t bit = uint64_t{1} << (args.slots[order[i]] % kWordSlots);
        touched |= bit;
        const int64_t* terms = args.terms + order[i] * args.num_terms;
        for (int64_t f = 0; f < args.num_terms; ++f) {
          if (terms[f] == kPadTerm) continue;
          for (int64_t h = 0; h < args.num_hashes; ++h) {
            const int64_t plane =
                bloom_position(static_cast<uint64_t>(terms[f]), args.salts[h], args.num_planes);
            if (plane >= from && plane < to) fresh[plane - from] |= bit;
          }
        }
      }
      for (int64_t p = 0; p < to - from; ++p) {
        uint64_t* target = planes + p * args.num_words + word;
        *target = (*target & ~touched) | fresh[p];
      }
    }
    return STATUS_OK;
  });
}

}  // namespace silvershard::SILVERSHARD_ISA
