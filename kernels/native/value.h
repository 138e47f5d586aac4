// Value programs over columns of candidates. Included once per instruction set.
//
// Every operation is one IEEE operation in float32, or a fixed sequence of them in float64, so all
// instruction sets give the same bits.

namespace silvershard::SILVERSHARD_ISA {

// Numbers of the Python enumeration ValueOp.
enum class ValueOp : int32_t {
  kNop, kColumn, kConst, kAdd, kSub, kMul, kDiv, kNeg, kMin, kMax, kWhere, kLt, kLe, kGt, kGe, kEq,
  kNe, kAnd, kOr, kNot, kLog, kExp, kAbs, kSqrt
};

constexpr int64_t kRowsPerPass = 256;

// exp and log as in fixed_math.py, operation for operation.
inline double exp_float64(double x) {
  static constexpr double kCoefficients[] = {
      1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
      1.0 / 24,      1.0 / 6,      1.0 / 2,     1.0,        1.0};
  const double clamped = x != x ? 0.0 : std::min(std::max(x, -104.0), 89.0);
  const double power = std::nearbyint(clamped * 1.4426950408889634);
  const double rest = clamped - power * 0.6931471805599453;
  double result = rest * kCoefficients[0] + kCoefficients[1];
  for (int i = 2; i < 11; ++i) result = result * rest + kCoefficients[i];
  // By way of 32 bits, because AVX2 has no conversion to 64.
  const int64_t bits = (static_cast<int64_t>(static_cast<int32_t>(power)) + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x != x ? x : result * scale;
}

inline float round_to_float32(double x) { return x < 0x1p-126 ? 0.0f : static_cast<float>(x); }

inline float fixed_exp(float x) { return round_to_float32(exp_float64(x)); }

inline float fixed_log(float x) {
  static constexpr double kCoefficients[] = {2.0 / 17, 2.0 / 15, 2.0 / 13, 2.0 / 11, 2.0 / 9,
                                             2.0 / 7,  2.0 / 5,  2.0 / 3,  2.0 / 1};
  if (x != x) return x;
  if (x < 0.0f) return std::numeric_limits<float>::quiet_NaN();
  if (x == 0.0f) return -std::numeric_limits<float>::infinity();
  if (std::isinf(x)) return x;
  const double wide = x;
  int64_t bits;
  std::memcpy(&bits, &wide, sizeof bits);
  int64_t exponent = (bits >> 52 & 0x7FF) - 1023;
  const int64_t fraction = (bits & 0xFFFFFFFFFFFFF) | int64_t{1023} << 52;
  double mantissa;
  std::memcpy(&mantissa, &fraction, sizeof mantissa);
  if (mantissa > 1.4142135623730951) {
    mantissa *= 0.5;
    ++exponent;
  }
  const double s = (mantissa - 1.0) / (mantissa + 1.0);
  const double square = s * s;
  double series = square * kCoefficients[0] + kCoefficients[1];
  for (int i = 2; i < 9; ++i) series = series * square + kCoefficients[i];
  return static_cast<float>(s * series + static_cast<double>(exponent) * 0.6931471805599453);
}

inline float fixed_sigmoid(float x) {
  const double tail = exp_float64(-std::fabs(static_cast<double>(x)));
  return round_to_float32((x < 0.0f ? tail : 1.0) / (tail + 1.0));
}

template <class Function>
inline void map_floats(const float* x, int64_t count, float* out, const Function& function) {
  for (int64_t i = 0; i < count; ++i) out[i] = function(x[i]);
}

inline int32_t fixed_map(const FixedMapArgs& args) {
  constexpr int64_t kPerTask = 1 << 14;
  const int64_t tasks = (args.count + kPerTask - 1) / kPerTask;
  return for_each_task(tasks, args.threads, [&](int64_t task) -> int32_t {
    const float* x = args.x + task * kPerTask;
    float* out = args.out + task * kPerTask;
    const int64_t count = std::min(kPerTask, args.count - task * kPerTask);
    switch (args.function) {
      case FIXED_EXP: map_floats(x, count, out, [](float v) { return fixed_exp(v); }); break;
      case FIXED_LOG: map_floats(x, count, out, [](float v) { return fixed_log(v); }); break;
      case FIXED_SIGMOID:
        map_floats(x, count, out, [](float v) { return fixed_sigmoid(v); });
        break;
      case FIXED_SQRT: map_floats(x, count, out, [](float v) { return std::sqrt(v); }); break;
      default: return STATUS_BAD_VALUE;
    }
    return STATUS_OK;
  });
}

// Checks a program of L rows [op, arg]; one value must be left.
inline bool valid_value_program(const int32_t* rows, int64_t length, int64_t num_columns) {
  int64_t depth = 0;
  for (int64_t i = 0; i < length; ++i) {
    const int32_t op = rows[2 * i];
    if (op < 0 || op > static_cast<int32_t>(ValueOp::kSqrt)) return false;
    int64_t operands = 2;
    switch (static_cast<ValueOp>(op)) {
      case ValueOp::kNop: continue;
      case ValueOp::kColumn:
        if (rows[2 * i + 1] < 0 || rows[2 * i + 1] >= num_columns) return false;
        [[fallthrough]];
      case ValueOp::kConst:
        if (++depth > kMaxStack) return false;
        continue;
      case ValueOp::kWhere: operands = 3; break;
      case ValueOp::kNeg: case ValueOp::kNot: case ValueOp::kLog: case ValueOp::kExp:
      case ValueOp::kAbs: case ValueOp::kSqrt: operands = 1; break;
      default: break;
    }
    if (depth < operands) return false;
    depth -= operands - 1;
  }
  return depth == 1;
}

struct ValueStack {
  alignas(64) float values[kMaxStack][kRowsPerPass];
};

template <class Function>
inline void apply_unary(float* a, int64_t count, const Function& function) {
  for (int64_t i = 0; i < count; ++i) a[i] = function(a[i]);
}

template <class Function>
inline void apply_binary(float* a, const float* b, int64_t count, const Function& function) {
  for (int64_t i = 0; i < count; ++i) a[i] = function(a[i], b[i]);
}

// Runs a checked program on at most kRowsPerPass rows of V columns each.
inline void run_value_program(const int32_t* rows, int64_t length, const float* constants,
                              const float* columns, int64_t num_columns, int64_t count,
                              ValueStack* stack, float* out) {
  int64_t depth = 0;
  for (int64_t at = 0; at < length; ++at) {
    const ValueOp op = static_cast<ValueOp>(rows[2 * at]);
    if (op == ValueOp::kNop) continue;
    if (op == ValueOp::kColumn) {
      float* top = stack->values[depth++];
      for (int64_t i = 0; i < count; ++i) top[i] = columns[i * num_columns + rows[2 * at + 1]];
      continue;
    }
    if (op == ValueOp::kConst) {
      std::fill_n(stack->values[depth++], count, constants[at]);
      continue;
    }
    float* top = stack->values[depth - 1];
    switch (op) {
      case ValueOp::kNeg: apply_unary(top, count, [](float a) { return -a; }); continue;
      case ValueOp::kNot:
        apply_unary(top, count, [](float a) { return a == 0.0f ? 1.0f : 0.0f; });
        continue;
      case ValueOp::kLog: apply_unary(top, count, fixed_log); continue;
      case ValueOp::kExp: apply_unary(top, count, fixed_exp); continue;
      case ValueOp::kAbs: apply_unary(top, count, [](float a) { return std::fabs(a); }); continue;
      case ValueOp::kSqrt:
        apply_unary(top, count,
                    [](float a) { return static_cast<float>(std::sqrt(static_cast<double>(a))); });
        continue;
      default: break;
    }
    if (op == ValueOp::kWhere) {
      depth -= 2;
      float* condition = stack->values[depth - 1];
      const float* yes = stack->values[depth];
      const float* no = stack->values[depth + 1];
      for (int64_t i = 0; i < count; ++i) condition[i] = condition[i] != 0.0f ? yes[i] : no[i];
      continue;
    }
    --depth;
    float* a = stack->values[depth - 1];
    const float* b = stack->values[depth];
    const auto binary = [&](auto function) { apply_binary(a, b, count, function); };
    const auto truth = [&](auto function) {
      apply_binary(a, b, count, [&](float x, float y) { return function(x, y) ? 1.0f : 0.0f; });
    };
    switch (op) {
      case ValueOp::kAdd: binary([](float x, float y) { return x + y; }); break;
      case ValueOp::kSub: binary([](float x, float y) { return x - y; }); break;
      case ValueOp::kMul: binary([](float x, float y) { return x * y; }); break;
      case ValueOp::kDiv: binary([](float x, float y) { return x / y; }); break;
      case ValueOp::kMin: binary([](float x, float y) { return x <= y || x != x ? x : y; }); break;
      case ValueOp::kMax: binary([](float x, float y) { return x >= y || x != x ? x : y; }); break;
      case ValueOp::kLt: truth([](float x, float y) { return x < y; }); break;
      case ValueOp::kLe: truth([](float x, float y) { return x <= y; }); break;
      case ValueOp::kGt: truth([](float x, float y) { return x > y; }); break;
      case ValueOp::kGe: truth([](float x, float y) { return x >= y; }); break;
      case ValueOp::kEq: truth([](float x, float y) { return x == y; }); break;
      case ValueOp::kNe: truth([](float x, float y) { return x != y; }); break;
      case ValueOp::kAnd: truth([](float x, float y) { return x != 0.0f && y != 0.0f; }); break;
      case ValueOp::kOr: truth([](float x, float y) { return x != 0.0f || y != 0.0f; }); break;
      default: break;
    }
  }
  const float* result = stack->values[0];
  for (int64_t i = 0; i < count; ++i)
    out[i] = result[i] != result[i] ? -std::numeric_limits<float>::infinity() : result[i];
}

inline int32_t value_program(const ValueProgramArgs& args) {
  for (int64_t b = 0; b < args.num_requests; ++b)
    if (!valid_value_program(args.programs + b * args.length * 2, args.length, args.num_columns))
      return STATUS_BAD_VALUE;
  for (int64_t i = 0; i < args.num_requests * args.length; ++i)
    if (args.constants[i] != args.constants[i]) return STATUS_BAD_VALUE;
  constexpr int64_t kRowsPerTask = 16 * kRowsPerPass;
  const int64_t tasks = (args.num_rows + kRowsPerTask - 1) / kRowsPerTask;
  return for_each_task(tasks, args.threads, [&](int64_t task) -> int32_t {
    static thread_local ValueStack stack;
    const int64_t last = std::min(args.num_rows, (task + 1) * kRowsPerTask);
    // Neighbouring rows of one request run together.
    for (int64_t row = task * kRowsPerTask; row < last;) {
      const int64_t request = args.request[row];
      if (request < 0 || request >= args.num_requests) return STATUS_BAD_VALUE;
      int64_t end = row + 1;
      while (end < last && end < row + kRowsPerPass && args.request[end] == request) ++end;
      run_value_program(args.programs + request * args.length * 2, args.length,
                        args.constants + request * args.length,
                        args.columns + row * args.num_columns, args.num_columns, end - row, &stack,
                        args.out + row);
      row = end;
    }
    return STATUS_OK;
  });
}

}  // namespace silvershard::SILVERSHARD_ISA
