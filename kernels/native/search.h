// Coding of queries, choice of clusters and scan in one call. Included once per instruction set.

namespace silvershard::SILVERSHARD_ISA {

inline int32_t ivf_search(const IvfSearchArgs& args) {
  static thread_local Scratch<int8_t> codes_scratch;
  static thread_local Scratch<float> scales_scratch;
  static thread_local Scratch<int32_t> clusters_scratch;
  IvfScanArgs scan = args.scan;
  const int64_t num_queries = scan.num_queries;
  int8_t* codes = codes_scratch.get(num_queries * scan.dim);
  float* scales = scales_scratch.get(num_queries);
  int32_t* clusters = clusters_scratch.get(num_queries * scan.num_probes);
  int32_t status =
      quantize_rows({args.query, codes, scales, num_queries, scan.dim, scan.threads});
  if (status != STATUS_OK) return status;
  if (scan.num_probes == scan.num_clusters) {
    for (int64_t q = 0; q < num_queries; ++q)
      for (int64_t c = 0; c < scan.num_clusters; ++c)
        clusters[q * scan.num_clusters + c] = static_cast<int32_t>(c);
  } else {
    status = coarse_probe({args.query, codes, scales, args.centroids, args.centroid_codes,
                           args.centroid_scales, clusters, num_queries, scan.dim,
                           scan.num_clusters, scan.num_probes, args.shortlist, scan.threads});
    if (status != STATUS_OK) return status;
  }
  scan.query_codes = codes;
  scan.query_scales = scales;
  scan.clusters = clusters;
  return ivf_scan(scan);
}

}  // namespace silvershard::SILVERSHARD_ISA
