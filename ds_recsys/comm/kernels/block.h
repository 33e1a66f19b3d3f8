/* One-pass encoders and decoders of ds_recsys.comm.compressors; which also say, in torch, what each must give bit for bit.
 *
 * Every encoder:  x = gradient + multiplier * residual (residual may be NULL), payload = C(x), error = x - decode(payload)
 * (error may be NULL), over n values in blocks; returns whether all of x is finite. Rows of the payload follow each other.
 * A block with infinities or NaN is sent as a row that decodes to NaN. Blocks are read whole before anything of them is
 * written. Needs: IEEE single precision, rounding to nearest, no contraction of a * b + c, no reassociation.
 */
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))
#define EXPORT __attribute__((visibility("default")))

enum { QUANTISER_BLOCK = 256, SIGN_BLOCK = 1024, SPARSE_BLOCK = 16384 };
static const uint32_t MAGNITUDE = 0x7fffffff, INFINITE = 0x7f800000, NOT_A_NUMBER = 0x7fc00000;
static const uint32_t TINY = (127 - 120) << 23;         /* 2^-120: its quantiser's reciprocal is still finite */
static const float LARGEST = 0x1.fffffep127f;
static const float ROUNDER = 12582912.0f; /* 1.5 * 2^23: adding it rounds half to even, the low bits are the integer */

INLINE uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
INLINE float float_of(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* x <- gradient + multiplier * residual; the largest magnitude as bits: from INFINITE up, something is not finite. */
INLINE uint32_t read_block(float *x, const float *gradient, const float *residual, float multiplier, int n) {
    int32_t top = 0;
    if (residual)
        for (int i = 0; i < n; i++) {
            float scaled = multiplier * residual[i];
            x[i] = gradient[i] + scaled;
            int32_t magnitude = bits_of(x[i]) & MAGNITUDE;
            top = magnitude > top ? magnitude : top;
        }
    else
        for (int i = 0; i < n; i++) {
            x[i] = gradient[i];
            int32_t magnitude = bits_of(x[i]) & MAGNITUDE;
            top = magnitude > top ? magnitude : top;
        }
    return top;
}

/* error <- x - decoded, past the caches where the CPU can: the next step reads it. Half as fast again where memory is what
 * limits; `all_written` must come before another thread reads it. */
INLINE void write_error(float *error, const float *x, const float *decoded, int n) {
    int i = 0;
#if defined(__AVX512F__)
    if (((uintptr_t)error & 63) == 0)
        for (; i + 16 <= n; i += 16)
            _mm512_stream_ps(error + i, _mm512_sub_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(decoded + i)));
#elif defined(__AVX__)
    if (((uintptr_t)error & 31) == 0)
        for (; i + 8 <= n; i += 8)
            _mm256_stream_ps(error + i, _mm256_sub_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(decoded + i)));
#endif
    for (; i < n; i++) error[i] = x[i] - decoded[i];
}

/* out <- values, past the caches as above. */
INLINE void write_last(float *out, const float *values, int n) {
    int i = 0;
#if defined(__AVX512F__)
    if (((uintptr_t)out & 63) == 0)
        for (; i + 16 <= n; i += 16) _mm512_stream_ps(out + i, _mm512_loadu_ps(values + i));
#elif defined(__AVX__)
    if (((uintptr_t)out & 31) == 0)
        for (; i + 8 <= n; i += 8) _mm256_stream_ps(out + i, _mm256_loadu_ps(values + i));
#endif
    memcpy(out + i, values + i, 4 * (n - i));
}

INLINE void all_written(void) {
#if defined(__AVX__)
    _mm_sfence();
#endif
}

INLINE const float *after(const float *pointer, int64_t offset) { return pointer ? pointer + offset : 0; }

INLINE float quantiser_scale(uint32_t top, int bits) {
    const float reciprocal = 1.0f / (bits == 8 ? 127.0f : 7.0f); /* with both, levels * scale is finite for any top */
    return top < TINY ? 0.0f : float_of(top) * reciprocal;
}

INLINE uint16_t bf16_of(float value) { /* of a finite one; what would round to infinity becomes the largest */
    uint32_t bits = bits_of(value), magnitude = bits & MAGNITUDE;
    uint32_t rounded = (magnitude + 0x7fff + (magnitude >> 16 & 1)) >> 16;
    return (uint16_t)((rounded > 0x7f7f ? 0x7f7f : rounded) | (bits >> 16 & 0x8000));
}

/* The arguments are the same for all methods: `first` and `second` are its options, see each method's `kernel_options`.
 * `how`: ADD to what is in `out`; LAST: nobody reads `out` soon, so that it need not pass through the caches. */
enum { ADD = 1, LAST = 2 };
#define ENCODER(NAME)                                                                                                  \
    EXPORT int NAME##_encode(const float *gradient, const float *residual, float multiplier, float *error,             \
                             uint8_t *payload, int64_t n, int64_t first, int64_t second, uint64_t seed)
#define DECODER(NAME)                                                                                                  \
    EXPORT void NAME##_decode(const uint8_t *payload, float *out, int64_t n, int how, int64_t first, int64_t second,   \
                              uint64_t seed)

/* Several payloads at once, `count` of them. SUMMER: out <- their sum, as the decoder of the first and then of the others with
 * ADD; nobody reads `out` soon. RECODER: the encoder of that sum, which is not kept. */
#define SUMMER(NAME)                                                                                                   \
    EXPORT void NAME##_sum(const uint8_t *const *payloads, int64_t count, float *out, int64_t n, int64_t first,        \
                           int64_t second, uint64_t seed)
#define RECODER(NAME)                                                                                                  \
    EXPORT int NAME##_recode(const uint8_t *const *payloads, int64_t count, const float *residual, float multiplier,   \
                             float *error, uint8_t *payload, int64_t n, int64_t first, int64_t second, uint64_t seed)
