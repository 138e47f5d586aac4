// The C interface of the native operators: plain structs of pointers and 64-bit integers.
//
// Every tensor is contiguous and row-major. Letters as in the Python contracts: Q query rows, P
// probes, C clusters, X pages a cluster may own, N pages, G slots per page, W = G / 64 mask words,
// D dimension, J planes, V columns, F term slots, L program length, E exclusions, R results,
// B requests, H heads, U candidates.
//
// A function returns STATUS_OK, or another status and no result; the caller then finds out which
// clause of the contract failed. No function throws, allocates for the caller or keeps a pointer.
#pragma once

#include <cstdint>

#define SILVERSHARD_EXPORT __attribute__((visibility("default")))

extern "C" {

enum Status : int32_t {
  STATUS_OK = 0,
  STATUS_BAD_VALUE = 1,  // an index, a program, a float or a score outside the contract
  STATUS_OUT_OF_MEMORY = 2,
};

enum Isa : int32_t { ISA_SCALAR = 0, ISA_AVX2 = 1, ISA_AVX512 = 2 };

// The tensors that filter programs read.
struct FilterPool {
  const int64_t* planes;   // (J, N, W)
  const int64_t* columns;  // (V, N, G)
  const int64_t* terms;    // (N, G, F)
  int64_t num_planes;      // J
  int64_t num_pages;       // N
  int64_t num_words;       // W
  int64_t num_columns;     // V
  int64_t num_terms;       // F
};

struct IvfScanArgs {
  FilterPool pool;
  const int8_t* query_codes;   // (Q, D)
  const float* query_scales;   // (Q)
  const int32_t* clusters;     // (Q, P)
  const int32_t* page_table;   // (C, X)
  const int8_t* codes;         // (N, G, D)
  const float* scales;         // (N, G)
  const int64_t* item_ids;     // (N, G)
  const int64_t* programs;     // (Q, L, 4)
  const int64_t* verify;       // (Q, Lv, 4)
  const int64_t* excluded;     // (Q, E)
  float* out_scores;           // (Q, R)
  int64_t* out_ids;            // (Q, R)
  int64_t* out_slots;          // (Q, R)
  int64_t* out_probed;         // (Q)
  int64_t* out_eligible;       // (Q)
  int64_t num_queries, dim, num_probes, num_clusters, table_width;
  int64_t program_length, verify_length, num_excluded, num_results, threads;
};

struct EligibilityArgs {
  FilterPool pool;
  const int64_t* programs;  // (Q, L, 4)
  const int32_t* pages;     // (Q, M)
  const int64_t* excluded;  // (Q, E)
  int64_t* out_words;       // (Q, M, W)
  int64_t* out_counts;      // (Q): if this is given, the whole pool is counted and nothing else
  int64_t num_queries, pages_per_query, program_length, num_excluded, threads;
};

struct CoarseProbeArgs {
  const float* query;             // (Q, D)
  const int8_t* query_codes;      // (Q, D)
  const float* query_scales;      // (Q)
  const float* centroids;         // (C, D)
  const int8_t* centroid_codes;   // (C, D)
  const float* centroid_scales;   // (C)
  int32_t* out_clusters;          // (Q, P)
  int64_t num_queries, dim, num_clusters, probes, shortlist, threads;
};

// Coding, probing and scanning in one call. The codes, scales and clusters of `scan` are not read.
struct IvfSearchArgs {
  IvfScanArgs scan;
  const float* query;            // (Q, D)
  const float* centroids;        // (C, D)
  const int8_t* centroid_codes;  // (C, D)
  const float* centroid_scales;  // (C)
  int64_t shortlist;             // clusters that are scored exactly
};

struct SelectTopkArgs {
  const float* scores;      // (S, Q, M)
  const int64_t* item_ids;  // (S, Q, M)
  float* out_scores;        // (Q, k)
  int64_t* out_ids;         // (Q, k)
  int64_t* out_positions;   // (Q, k): list * M + rank
  int64_t num_lists, num_queries, length, k, threads;
};

struct RefineArgs {
  const float* query;      // (B, H, D)
  const uint16_t* cache;   // (N, G, D) float16
  const int64_t* slots;    // (B, U)
  float* out_scores;       // (B, U, H)
  int64_t num_requests, num_heads, dim, num_candidates, num_slots, threads;
};

struct GatherLinearArgs {
  const uint16_t* cache;  // (N, G, D) float16
  const int64_t* slots;   // (B, U)
  const float* weight;    // (B, D, O)
  const float* bias;      // (B, O)
  float* out;             // (B, U, O)
  int64_t num_requests, num_candidates, dim, num_outputs, num_slots, threads;
};

struct QuantizeRowsArgs {
  const float* x;    // (n, D)
  int8_t* codes;     // (n, D)
  float* scales;     // (n)
  int64_t num_rows, dim, threads;
};

enum FixedFunction : int64_t { FIXED_EXP = 0, FIXED_LOG = 1, FIXED_SIGMOID = 2, FIXED_SQRT = 3 };

struct FixedMapArgs {
  const float* x;  // (n)
  float* out;      // (n)
  int64_t count, function, threads;
};

struct ValueProgramArgs {
  const float* columns;      // (n, V)
  const int64_t* request;    // (n)
  const int32_t* programs;   // (B, L, 2)
  const float* constants;    // (B, L)
  float* out;                // (n)
  int64_t num_rows, num_columns, num_requests, length, threads;
};

struct BloomBuildArgs {
  int64_t* planes;       // (J, N, W), changed in place
  const int64_t* slots;  // (n)
  const int64_t* terms;  // (n, F)
  const uint64_t* salts; // (num_hashes)
  int64_t num_words, num_slots, num_terms, first_plane, num_planes, num_hashes, threads;
};

// Bumped when a struct changes, so that a stale library is noticed instead of misread.
SILVERSHARD_EXPORT int32_t silvershard_abi_version();
// The best instruction set of this machine that the library was built for.
SILVERSHARD_EXPORT int32_t silvershard_best_isa();

SILVERSHARD_EXPORT int32_t silvershard_ivf_scan(int32_t isa, const IvfScanArgs* args);
SILVERSHARD_EXPORT int32_t silvershard_ivf_search(int32_t isa, const IvfSearchArgs* args);
SILVERSHARD_EXPORT int32_t silvershard_eligibility(int32_t isa, const EligibilityArgs* args);
SILVERSHARD_EXPORT int32_t silvershard_coarse_probe(int32_t isa, const CoarseProbeArgs* args);
SILVERSHARD_EXPORT int32_t silvershard_select_topk(int32_t isa, const SelectTopkArgs* args);
SILVERSHARD_EXPORT int32_t silvershard_refine(int32_t isa, const RefineArgs* args);
SILVERSHARD_EXPORT int32_t silvershard_gather_linear(int32_t isa, const GatherLinearArgs* args);
SILVERSHARD_EXPORT int32_t silvershard_quantize_rows(int32_t isa, const QuantizeRowsArgs* args);
SILVERSHARD_EXPORT int32_t silvershard_fixed_map(int32_t isa, const FixedMapArgs* args);
SILVERSHARD_EXPORT int32_t silvershard_value_program(int32_t isa, const ValueProgramArgs* args);
SILVERSHARD_EXPORT int32_t silvershard_bloom_build(int32_t isa, const BloomBuildArgs* args);

}  // extern "C"
