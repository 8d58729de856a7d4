// Floating point in 16 and 19 bits.
#pragma once

#include <bit>
#include <cstdint>

namespace ptx {

enum class Rounding : uint8_t { nearest, away, zero, down, up };

struct Format {
  int digits, least_exponent, most_exponent;
};
constexpr Format kHalf{11, -14, 15}, kBfloat16{8, -126, 127}, kTf32{11, -126, 127}, kFloat{24, -126, 127};

// The number of that format that the rounding makes of the value.
double round_to(double value, Format format, Rounding rounding);

// Of a value that the format has.
uint16_t bits_of_half(double value);
uint16_t bits_of_bfloat16(double value);

float half_of_bits(uint16_t bits);
inline float bfloat16_of_bits(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

}  // namespace ptx
