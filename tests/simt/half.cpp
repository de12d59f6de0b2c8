// Half and bfloat16 in software: values as doubles, which hold both exactly, and one rounding to nearest, even.
#include <cmath>
#include <cstring>

#include "ptx.cuh"

namespace simt {

template <class T>
struct Layout;
template <>
struct Layout<Half> {
    static constexpr int mantissa = 10, smallest_exponent = -14;
    static constexpr u32 infinity = 0x7c00;
};
template <>
struct Layout<Bfloat> {
    static constexpr int mantissa = 7, smallest_exponent = -126;
    static constexpr u32 infinity = 0x7f80;
};

template <class T>
double decode(u32 bits) {
    using L = Layout<T>;
    const u32 magnitude = bits & 0x7fff;
    const int exponent = magnitude >> L::mantissa;
    const int fraction = magnitude & ((1 << L::mantissa) - 1);
    double value;
    if (magnitude >= L::infinity)
        value = fraction ? NAN : INFINITY;
    else if (exponent == 0)
        value = std::ldexp((double)fraction, L::smallest_exponent - L::mantissa);
    else
        value = std::ldexp((double)(fraction + (1 << L::mantissa)), exponent - 1 + L::smallest_exponent - L::mantissa);
    return bits & 0x8000 ? -value : value;
}

template <class T>
u32 encode(double value) {
    using L = Layout<T>;
    if (std::isnan(value)) return 0x7fff;  // what cvt gives, whatever the NaN
    const u32 sign = std::signbit(value) ? 0x8000 : 0;
    const double magnitude = std::fabs(value);
    if (magnitude == 0) return sign;
    if (std::isinf(magnitude)) return sign | L::infinity;
    int exponent = std::ilogb(magnitude);
    if (exponent < L::smallest_exponent) exponent = L::smallest_exponent;
    if (exponent > 1 - L::smallest_exponent) return sign | L::infinity;
    // In units of the last place: up to 2 << mantissa, which carries into the exponent by itself.
    const u32 units = (u32)std::nearbyint(std::ldexp(magnitude, L::mantissa - exponent));
    return sign | (((u32)(exponent - L::smallest_exponent) << L::mantissa) + units);
}

// a * b + c, rounded once. The product is exact in double; the sum is rounded to odd, so that what a double cannot
// hold still decides which way encode rounds.
template <class T>
u32 fma_bits(u32 a_bits, u32 b_bits, u32 c_bits) {
    const double product = decode<T>(a_bits) * decode<T>(b_bits), c = decode<T>(c_bits);
    double sum = product + c;
    if (std::isfinite(sum)) {
        const double part = sum - product;
        const double rest = (product - (sum - part)) + (c - part);
        u64 pattern;
        std::memcpy(&pattern, &sum, 8);
        if (rest != 0 && (pattern & 1) == 0) sum = std::nextafter(sum, rest > 0 ? INFINITY : -INFINITY);
    }
    return encode<T>(sum);
}

template double decode<Half>(u32);
template double decode<Bfloat>(u32);
template u32 encode<Half>(double);
template u32 encode<Bfloat>(double);
template u32 fma_bits<Half>(u32, u32, u32);
template u32 fma_bits<Bfloat>(u32, u32, u32);

}  // namespace simt
