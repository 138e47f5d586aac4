// Operators on rows and ranked lists: coarse probe, selection, refine, the gathered linear layer
// and int8 coding. Included once per instruction set.

namespace silvershard::SILVERSHARD_ISA {

inline bool all_finite(const float* values, int64_t count) {
  // The greatest exponent field found; all ones is NaN or infinity.
  uint32_t greatest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    greatest = std::max(greatest, bits & 0x7F800000u);
  }
  return greatest != 0x7F800000u;
}

// Inner product in the order of fixed_dot: products padded with zeros to a power of two and folded
// in halves. `products` has room for that many.
inline float fixed_dot(const float* a, const float* b, int64_t dim, float* products) {
  int64_t width = 1;
  while (width < dim) width *= 2;
  for (int64_t i = 0; i < dim; ++i) products[i] = a[i] * b[i];
  for (int64_t i = dim; i < width; ++i) products[i] = 0.0f;
  while (width > 1) {
    width /= 2;
    for (int64_t i = 0; i < width; ++i) products[i] += products[i + width];
  }
  return products[0];
}

// The same for a power of two that the compiler knows, so that sums stay in registers.
template <int kDim>
inline float fixed_dot_of(const float* a, const float* b) {
  alignas(64) float sums[kDim];
  for (int i = 0; i < kDim; ++i) sums[i] = a[i] * b[i];
#pragma GCC unroll 16
  for (int width = kDim / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

inline float fixed_dot_any(const float* a, const float* b, int64_t dim, float* products) {
  switch (dim) {
    case 32: return fixed_dot_of<32>(a, b);
    case 64: return fixed_dot_of<64>(a, b);
    case 128: return fixed_dot_of<128>(a, b);
    default: return fixed_dot(a, b, dim, products);
  }
}

inline int64_t power_of_two(int64_t size) {
  int64_t width = 1;
  while (width < size) width *= 2;
  return width;
}

inline int32_t coarse_probe(const CoarseProbeArgs& args) {
  if (!all_finite(args.query, args.num_queries * args.dim) ||
      !all_finite(args.query_scales, args.num_queries) ||
      !all_finite(args.centroid_scales, args.num_clusters))
    return STATUS_BAD_VALUE;
  constexpr int64_t kQueriesPerTask = 4;
  const int64_t tasks = (args.num_queries + kQueriesPerTask - 1) / kQueriesPerTask;
  return for_each_task(tasks, args.threads, [&](int64_t task) -> int32_t {
    static thread_local Scratch<uint32_t> memory_scratch;
    static thread_local Scratch<float> products_scratch;
    static thread_local Scratch<float> scores_scratch;
    static thread_local Scratch<int64_t> ids_scratch;
    static thread_local QueryRow row;
    const int64_t dim = args.dim;
    const int64_t num_clusters = args.num_clusters;
    float* products = products_scratch.get(power_of_two(dim));
    float* scores = scores_scratch.get(args.probes);
    int64_t* ids = ids_scratch.get(2 * args.probes);
    const int64_t capacity = Collector::capacity_for(args.shortlist, num_clusters + kWordSlots);
    const int64_t stride = capacity + kSlack;
    uint32_t* memory = memory_scratch.get(4 * stride);
    const int64_t last = std::min(args.num_queries, (task + 1) * kQueriesPerTask);
    for (int64_t q = task * kQueriesPerTask; q < last; ++q) {
      const float* query = args.query + q * dim;
      Collector exact;
      exact.start({memory + 2 * stride, memory + 3 * stride}, args.shortlist, args.probes, nullptr);
      if (args.shortlist == num_clusters) {
        for (int64_t c = 0; c < num_clusters; ++c)
          exact.append(fixed_dot_any(query, args.centroids + c * dim, dim, products) + 0.0f, c);
      } else {
        prepare_query(args.query_codes + q * dim, dim, args.query_scales[q], &row);
        Collector likely;
        likely.start({memory, memory + stride}, capacity, args.shortlist, nullptr);
        // Scores of -inf are padding.
        likely.raise_threshold(std::numeric_limits<float>::lowest());
        const int8_t* codes = args.centroid_codes;
        for (int64_t c = 0; c < num_clusters; c += kWordSlots) {
          if (!likely.has_room(kWordSlots)) likely.settle();
          const int64_t count = std::min<int64_t>(kWordSlots, num_clusters - c);
          alignas(64) int32_t dots[kWordSlots];
          alignas(64) float scales[kWordSlots] = {};
          std::copy_n(args.centroid_scales + c, count, scales);
          dot_rows(row, [&](int64_t i) { return codes + (c + std::min(i, count - 1)) * dim; },
                   (count + 15) / 16 * 16, dim, codes + num_clusters * dim, nullptr, dots);
          for (int64_t i = 0; i < count; i += 16)
            likely.append16(scores16(dots + i, scales + i, row.scale),
                            count - i >= 16 ? 0xFFFFu : (1u << (count - i)) - 1,
                            consecutive16(static_cast<uint32_t>(c + i)));
        }
        likely.settle();
        for (int64_t i = 0; i < likely.count(); ++i) {
          const int64_t c = likely.position(i);
          exact.append(fixed_dot_any(query, args.centroids + c * dim, dim, products) + 0.0f, c);
        }
      }
      exact.settle();
      if (!exact.write(scores, ids, ids + args.probes)) return STATUS_BAD_VALUE;
      for (int64_t p = 0; p < args.probes; ++p) {
        if (ids[p] < 0) return STATUS_BAD_VALUE;
        args.out_clusters[q * args.probes + p] = static_cast<int32_t>(ids[p]);
      }
    }
    return STATUS_OK;
  });
}

inline int32_t select_topk(const SelectTopkArgs& args) {
  return for_each_task(args.num_queries, args.threads, [&](int64_t q) -> int32_t {
    static thread_local Scratch<uint32_t> memory_scratch;
    static thread_local Scratch<int64_t> ids_scratch;
    const int64_t total = args.num_lists * args.length;
    const int64_t* ids = args.item_ids + q * args.length;
    if (args.num_lists > 1) {
      int64_t* gathered = ids_scratch.get(total);
      for (int64_t s = 0; s < args.num_lists; ++s)
        std::copy_n(args.item_ids + (s * args.num_queries + q) * args.length, args.length,
                    gathered + s * args.length);
      ids = gathered;
    }
    const int64_t capacity = Collector::capacity_for(args.k, total + 16);
    uint32_t* memory = memory_scratch.get(2 * (capacity + kSlack));
    Collector best;
    best.start({memory, memory + capacity + kSlack}, capacity, args.k, ids);
    // Scores of -inf are padding, as negative ids are.
    best.raise_threshold(std::numeric_limits<float>::lowest());
    for (int64_t s = 0; s < args.num_lists; ++s) {
      const float* scores = args.scores + (s * args.num_queries + q) * args.length;
      for (int64_t i = 0; i < args.length; i += 16) {
        const int64_t count = std::min<int64_t>(16, args.length - i);
        alignas(64) float tail[16] = {};
        if (count < 16) std::copy_n(scores + i, count, tail);
        const Scores16 block = load_scores16(count < 16 ? tail : scores + i);
        const int64_t position = s * args.length + i;
        uint32_t mask = passing16(block, best.threshold()) & ((1u << count) - 1);
        for (uint32_t left = mask; left != 0; left &= left - 1) {
          const int lane = __builtin_ctz(left);
          if (ids[position + lane] < 0) mask &= ~(1u << lane);
          if (scores[i + lane] != scores[i + lane]) return STATUS_BAD_VALUE;
        }
        if (mask == 0) continue;
        if (!best.has_room(16)) best.settle();
        best.append16(block, mask, consecutive16(static_cast<uint32_t>(position)));
      }
    }
    best.settle();
    best.write(args.out_scores + q * args.k, args.out_ids + q * args.k,
               args.out_positions + q * args.k);
    return STATUS_OK;
  });
}

inline int32_t refine(const RefineArgs& args) {
  if (!all_finite(args.query, args.num_requests * args.num_heads * args.dim))
    return STATUS_BAD_VALUE;
  constexpr int64_t kRowsPerTask = 256;
  const int64_t blocks = (args.num_candidates + kRowsPerTask - 1) / kRowsPerTask;
  return for_each_task(args.num_requests * blocks, args.threads, [&](int64_t task) -> int32_t {
    static thread_local Scratch<float> row_scratch;
    static thread_local Scratch<float> products_scratch;
    float* row = row_scratch.get(args.dim);
    float* products = products_scratch.get(power_of_two(args.dim));
    const int64_t request = task / blocks;
    const int64_t first = task % blocks * kRowsPerTask;
    const int64_t last = std::min(args.num_candidates, first + kRowsPerTask);
    const int64_t* slots = args.slots + request * args.num_candidates;
    const float* query = args.query + request * args.num_heads * args.dim;
    bool finite = true;
    for (int64_t u = first; u < last; ++u) {
      float* out = args.out_scores + (request * args.num_candidates + u) * args.num_heads;
      if (slots[u] < -1 || slots[u] >= args.num_slots) return STATUS_BAD_VALUE;
      if (slots[u] < 0) {
        std::fill_n(out, args.num_heads, -std::numeric_limits<float>::infinity());
        continue;
      }
      if (u + 8 < last && slots[u + 8] >= 0 && slots[u + 8] < args.num_slots)
        __builtin_prefetch(args.cache + slots[u + 8] * args.dim);
      halves_to_floats(args.cache + slots[u] * args.dim, args.dim, row);
      for (int64_t h = 0; h < args.num_heads; ++h) {
        out[h] = fixed_dot_any(query + h * args.dim, row, args.dim, products);
        finite &= std::isfinite(out[h]);
      }
    }
    return finite ? STATUS_OK : STATUS_BAD_VALUE;
  });
}

inline int32_t gather_linear(const GatherLinearArgs& args) {
  constexpr int64_t kRowsPerTask = 128;
  const int64_t blocks = (args.num_candidates + kRowsPerTask - 1) / kRowsPerTask;
  return for_each_task(args.num_requests * blocks, args.threads, [&](int64_t task) -> int32_t {
    static thread_local Scratch<float> row_scratch;
    float* row = row_scratch.get(args.dim);
    const int64_t request = task / blocks;
    const int64_t first = task % blocks * kRowsPerTask;
    const int64_t last = std::min(args.num_candidates, first + kRowsPerTask);
    const int64_t* slots = args.slots + request * args.num_candidates;
    for (int64_t u = first; u < last; ++u) {
      float* out = args.out + (request * args.num_candidates + u) * args.num_outputs;
      if (slots[u] < -1 || slots[u] >= args.num_slots) return STATUS_BAD_VALUE;
      if (slots[u] < 0) {
        std::fill_n(out, args.num_outputs, 0.0f);
        continue;
      }
      if (u + 8 < last && slots[u + 8] >= 0 && slots[u + 8] < args.num_slots)
        prefetch_bytes(args.cache + slots[u + 8] * args.dim, 2 * args.dim);
      halves_to_floats(args.cache + slots[u] * args.dim, args.dim, row);
      linear_row(row, args.dim, args.weight + request * args.dim * args.num_outputs,
                 args.num_outputs, args.bias + request * args.num_outputs, out);
    }
    return STATUS_OK;
  });
}

inline int32_t quantize_rows(const QuantizeRowsArgs& args) {
  constexpr int64_t kRowsPerTask = 1024;
  const int64_t tasks = (args.num_rows + kRowsPerTask - 1) / kRowsPerTask;
  return for_each_task(tasks, args.threads, [&](int64_t task) -> int32_t {
    const int64_t last = std::min(args.num_rows, (task + 1) * kRowsPerTask);
    for (int64_t r = task * kRowsPerTask; r < last; ++r) {
      const float* x = args.x + r * args.dim;
      int8_t* codes = args.codes + r * args.dim;
      uint32_t greatest = 0;
      for (int64_t d = 0; d < args.dim; ++d) {
        uint32_t bits;
        std::memcpy(&bits, x + d, sizeof bits);
        greatest = std::max(greatest, bits & 0x7FFFFFFFu);
      }
      if (greatest >= 0x7F800000u) return STATUS_BAD_VALUE;
      float magnitude;
      std::memcpy(&magnitude, &greatest, sizeof magnitude);
      const float scale = magnitude / 127.0f;
      args.scales[r] = scale;
      if (scale == 0.0f) {
        std::fill_n(codes, args.dim, int8_t{0});
        continue;
      }
      for (int64_t d = 0; d < args.dim; ++d) {
        const float rounded = std::nearbyint(x[d] / scale);
        codes[d] = static_cast<int8_t>(std::min(std::max(rounded, -127.0f), 127.0f));
      }
    }
    return STATUS_OK;
  });
}

}  // namespace silvershard::SILVERSHARD_ISA
