// Rows of float32, float16, bfloat16 and bytes as float32 and back, by integers alone, so that the loops become vector
// instructions at every level. Included inside a namespace without a name.

inline float float_of_half(uint16_t half) {
  const uint32_t rest = half & 0x7FFFu;
  const uint32_t normal = (rest << 13) + (rest >= 0x7C00u ? 0x70000000u : 0x38000000u);  // infinities and NaN stay such
  const float small = static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f;
  const uint32_t bits = rest < 0x400u ? uniflow::bits_of_float(small) : normal;
  return uniflow::float_of_bits(bits | (half & 0x8000u) << 16);
}

inline uint16_t half_of_float(float value) {  // to the nearest, a tie to the even one
  const uint32_t bits = uniflow::bits_of_float(value), rest = bits & 0x7FFFFFFFu;
  const uint32_t normal = (rest - 0x38000000u + 0xFFFu + (rest >> 13 & 1u)) >> 13;
  // the addition rounds to what the least float16 is a unit of
  const uint32_t small = uniflow::bits_of_float(uniflow::float_of_bits(rest) + 0.5f) - 0x3F000000u;
  const uint32_t large = rest > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = rest < 0x38800000u ? small : normal;
  return static_cast<uint16_t>((rest >= 0x47800000u ? large : finite) | (bits >> 16 & 0x8000u));
}

inline float float_of_bfloat16(uint16_t value) { return uniflow::float_of_bits(static_cast<uint32_t>(value) << 16); }

inline uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = uniflow::bits_of_float(value);
  const uint32_t nearest = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : nearest);
}

inline uint8_t byte_of_float(float value) {  // of a value in [0, 1]; a NaN is 0
  const float scaled = value * 255.0f + 8388608.0f;  // 2^23: the addition rounds to an integer
  return static_cast<uint8_t>(value == value ? uniflow::bits_of_float(scaled) : 0u);
}

// `count` elements as float32: where they are, or in `scratch`.
inline const float* floats(const void* from, int32_t type, int64_t count, float* __restrict scratch) {
  if (type == kFloat32) return static_cast<const float*>(from);
  const auto* words = static_cast<const uint16_t*>(from);
  if (type == kFloat16) {
    for (int64_t i = 0; i < count; ++i) scratch[i] = float_of_half(words[i]);
  } else if (type == kBFloat16) {
    for (int64_t i = 0; i < count; ++i) scratch[i] = float_of_bfloat16(words[i]);
  } else {
    const auto* bytes = static_cast<const uint8_t*>(from);
    for (int64_t i = 0; i < count; ++i) scratch[i] = static_cast<float>(bytes[i]);
  }
  return scratch;
}

inline void store(const float* __restrict from, int32_t type, int64_t count, void* __restrict to) {
  auto* words = static_cast<uint16_t*>(to);
  if (type == kFloat32) {
    memcpy(to, from, count * sizeof(float));
  } else if (type == kFloat16) {
    for (int64_t i = 0; i < count; ++i) words[i] = half_of_float(from[i]);
  } else if (type == kBFloat16) {
    for (int64_t i = 0; i < count; ++i) words[i] = bfloat16_of_float(from[i]);
  } else {
    auto* bytes = static_cast<uint8_t*>(to);
    for (int64_t i = 0; i < count; ++i) bytes[i] = byte_of_float(from[i]);
  }
}

inline int64_t bytes_of(int32_t type) { return type == kFloat32 ? 4 : type == kUInt8 ? 1 : 2; }

inline char* at(void* data, int64_t bytes) { return static_cast<char*>(data) + bytes; }

inline const char* at(const void* data, int64_t bytes) { return static_cast<const char*>(data) + bytes; }
