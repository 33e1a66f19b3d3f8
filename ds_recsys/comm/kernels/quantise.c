/* int8 and int4 codes of blocks of 256 values with one scale, rotated or not: see compressors/quantise.py. */
#include "block.h"

static const uint32_t ROTATED_LIMIT = (127 + 118) << 23; /* 2^118: no sum of a rotation overflows */
static const uint64_t SIGNS[4] = {0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89};

/* Codes and what they decode to (before any rotation back). Code j of a byte plane lies beside code j + n/2 for 4 bits. */
INLINE void quantise(const float *x, int n, float scale, int bits, uint8_t *restrict codes, float *restrict decoded) {
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    if (bits == 8) {
        for (int i = 0; i < n; i++) {
            float shifted = x[i] * inverse + ROUNDER;
            codes[i] = (uint8_t)bits_of(shifted);
            decoded[i] = (shifted - ROUNDER) * scale;
        }
        return;
    }
    const int half = (n + 1) / 2;
    uint8_t nibbles[QUANTISER_BLOCK] ALIGNED;
    nibbles[n & (QUANTISER_BLOCK - 1)] = 0; /* the partner that an odd block lacks */
    for (int i = 0; i < n; i++) {
        float shifted = x[i] * inverse + ROUNDER;
        nibbles[i] = bits_of(shifted) & 15;
        decoded[i] = (shifted - ROUNDER) * scale;
    }
    for (int i = 0; i < half; i++) codes[i] = nibbles[i] | (uint8_t)(nibbles[i + half] << 4);
}

INLINE void read_codes(const uint8_t *codes, int n, int bits, int8_t *restrict out) {
    if (bits == 8) {
        memcpy(out, codes, n);
        return;
    }
    const int half = (n + 1) / 2;
    for (int i = 0; i < half; i++) out[i] = (int8_t)(codes[i] << 4) >> 4;
    for (int i = 0; i < n - half; i++) out[half + i] = (int8_t)codes[i] >> 4;
}

/* The Hadamard transform of 256 values as a 16 x 16 matrix M: F (F M)^T, with F the 16-point transform of the columns.
 * Applied twice it gives 256 M. */
#define DEFINE_HADAMARD(NAME, TYPE)                                                   \
    INLINE void NAME##_columns(TYPE *m) {                                             \
        for (int stride = 128; stride >= 16; stride /= 2)                             \
            for (int start = 0; start < 256; start += 2 * stride)                     \
                for (int i = start; i < start + stride; i++) {                        \
                    TYPE a = m[i], b = m[i + stride];                                 \
                    m[i] = a + b;                                                     \
                    m[i + stride] = a - b;                                            \
                }                                                                     \
    }                                                                                 \
    static void NAME(TYPE *restrict m) {                                              \
        TYPE turned[256] ALIGNED;                                                     \
        NAME##_columns(m);                                                            \
        for (int i = 0; i < 16; i++)                                                  \
            for (int j = 0; j < 16; j++) turned[16 * j + i] = m[16 * i + j];          \
        NAME##_columns(turned);                                                       \
        memcpy(m, turned, sizeof turned);                                             \
    }
DEFINE_HADAMARD(hadamard, float)
DEFINE_HADAMARD(hadamard_integers, int16_t) /* codes: sums of 256 stay within 127 * 256, so they are exact */

static void fill_signs(float *signs, float size) {
    for (int i = 0; i < 256; i++) signs[i] = SIGNS[i / 64] >> (i % 64) & 1 ? -size : size;
}

INLINE void rotate_back(const int8_t *codes, float scale, const float *signs, float *restrict out) {
    int16_t sums[256] ALIGNED;
    const float step = scale * 0.0625f;
    for (int i = 0; i < 256; i++) sums[i] = codes[i];
    hadamard_integers(sums);
    for (int i = 0; i < 256; i++) {
        float value = (float)sums[i] * step;
        out[i] = value * signs[i];
    }
}

INLINE int encode_block(const float *gradient, const float *residual, float multiplier, float *error, uint8_t *payload,
                        int n, int bits, const float *signs, const float *sixteenths) {
    float x[QUANTISER_BLOCK] ALIGNED, turned[QUANTISER_BLOCK] ALIGNED, decoded[QUANTISER_BLOCK] ALIGNED;
    const int bytes = bits == 8 ? n : (n + 1) / 2;
    uint32_t top = read_block(x, gradient, residual, multiplier, n), limit = INFINITE;
    if (signs) {
        for (int i = 0; i < n; i++) turned[i] = x[i] * sixteenths[i];
        hadamard(turned);
        top = read_block(turned, turned, 0, 0.0f, n);
        limit = ROTATED_LIMIT;
    }
    if (top >= limit) {
        memcpy(payload, &NOT_A_NUMBER, 4);
        memset(payload + 4, 0, bytes);
        return 0;
    }
    const float scale = quantiser_scale(top, bits);
    memcpy(payload, &scale, 4);
    quantise(signs ? turned : x, n, scale, bits, payload + 4, decoded);
    if (error) {
        if (signs) {
            int8_t codes[QUANTISER_BLOCK] ALIGNED;
            read_codes(payload + 4, n, bits, codes);
            rotate_back(codes, scale, signs, decoded);
        }
        write_error(error, x, decoded, n);
    }
    return 1;
}

INLINE int encode_quantised(const float *gradient, const float *residual, float multiplier, float *error,
                            uint8_t *payload, int64_t n, int bits, int64_t rotate) {
    float signs[256] ALIGNED, sixteenths[256] ALIGNED;
    const int64_t row = 4 + QUANTISER_BLOCK * bits / 8, whole = n / QUANTISER_BLOCK * QUANTISER_BLOCK;
    int finite = 1;
    int64_t at = 0;
    if (rotate) {
        fill_signs(signs, 1.0f);
        fill_signs(sixteenths, 0.0625f);
        for (; at < whole; at += QUANTISER_BLOCK, payload += row)
            finite &= encode_block(gradient + at, after(residual, at), multiplier, (float *)after(error, at), payload,
                                   QUANTISER_BLOCK, bits, signs, sixteenths);
    } else
        for (; at < whole; at += QUANTISER_BLOCK, payload += row)
            finite &= encode_block(gradient + at, after(residual, at), multiplier, (float *)after(error, at), payload,
                                   QUANTISER_BLOCK, bits, 0, 0);
    if (at < n)
        finite &= encode_block(gradient + at, after(residual, at), multiplier, (float *)after(error, at), payload,
                               (int)(n - at), bits, 0, 0);
    all_written();
    return finite;
}

INLINE void decode_block(const uint8_t *payload, float *restrict out, int n, int bits, int how, const float *signs) {
    int8_t codes[QUANTISER_BLOCK] ALIGNED;
    float decoded[QUANTISER_BLOCK] ALIGNED, scale;
    memcpy(&scale, payload, 4);
    read_codes(payload + 4, n, bits, codes);
    if (signs)
        rotate_back(codes, scale, signs, decoded);
    else
        for (int i = 0; i < n; i++) decoded[i] = (float)codes[i] * scale;
    if (how & ADD)
        for (int i = 0; i < n; i++) out[i] = out[i] + decoded[i];
    else if (how & LAST)
        write_last(out, decoded, n);
    else
        memcpy(out, decoded, 4 * n);
}

INLINE void decode_quantised(const uint8_t *payload, float *out, int64_t n, int how, int bits, int64_t rotate) {
    float signs[256] ALIGNED;
    const int64_t row = 4 + QUANTISER_BLOCK * bits / 8, whole = n / QUANTISER_BLOCK * QUANTISER_BLOCK;
    int64_t at = 0;
    if (rotate) {
        fill_signs(signs, 1.0f);
        for (; at < whole; at += QUANTISER_BLOCK, payload += row)
            decode_block(payload, out + at, QUANTISER_BLOCK, bits, how, signs);
    } else
        for (; at < whole; at += QUANTISER_BLOCK, payload += row)
            decode_block(payload, out + at, QUANTISER_BLOCK, bits, how, 0);
    if (at < n) decode_block(payload, out + at, (int)(n - at), bits, how, 0);
    if (how & LAST) all_written();
}

INLINE void sum_block(const uint8_t *const *payloads, int64_t count, int64_t place, float *sum, int n, int bits,
                      const float *signs) {
    decode_block(payloads[0] + place, sum, n, bits, 0, signs);
    for (int64_t i = 1; i < count; i++) decode_block(payloads[i] + place, sum, n, bits, ADD, signs);
}

INLINE void sum_quantised(const uint8_t *const *payloads, int64_t count, float *out, int64_t n, int bits, int64_t rotate) {
    float signs[256] ALIGNED, sum[QUANTISER_BLOCK] ALIGNED;
    const int64_t row = 4 + QUANTISER_BLOCK * bits / 8, whole = n / QUANTISER_BLOCK * QUANTISER_BLOCK;
    int64_t at = 0, place = 0;
    if (rotate) fill_signs(signs, 1.0f);
    for (; at < whole; at += QUANTISER_BLOCK, place += row) {
        if (rotate)
            sum_block(payloads, count, place, sum, QUANTISER_BLOCK, bits, signs);
        else
            sum_block(payloads, count, place, sum, QUANTISER_BLOCK, bits, 0);
        write_last(out + at, sum, QUANTISER_BLOCK);
    }
    if (at < n) {
        sum_block(payloads, count, place, sum, (int)(n - at), bits, 0);
        write_last(out + at, sum, (int)(n - at));
    }
    all_written();
}

INLINE int recode_quantised(const uint8_t *const *payloads, int64_t count, const float *residual, float multiplier,
                            float *error, uint8_t *payload, int64_t n, int bits, int64_t rotate) {
    float signs[256] ALIGNED, sixteenths[256] ALIGNED, sum[QUANTISER_BLOCK] ALIGNED;
    const int64_t row = 4 + QUANTISER_BLOCK * bits / 8, whole = n / QUANTISER_BLOCK * QUANTISER_BLOCK;
    int finite = 1;
    int64_t at = 0, place = 0;
    if (rotate) {
        fill_signs(signs, 1.0f);
        fill_signs(sixteenths, 0.0625f);
    }
    for (; at < whole; at += QUANTISER_BLOCK, place += row) {
        const float *kept = after(residual, at);
        float *left = (float *)after(error, at);
        if (rotate) {
            sum_block(payloads, count, place, sum, QUANTISER_BLOCK, bits, signs);
            finite &= encode_block(sum, kept, multiplier, left, payload + place, QUANTISER_BLOCK, bits, signs, sixteenths);
        } else {
            sum_block(payloads, count, place, sum, QUANTISER_BLOCK, bits, 0);
            finite &= encode_block(sum, kept, multiplier, left, payload + place, QUANTISER_BLOCK, bits, 0, 0);
        }
    }
    if (at < n) {
        sum_block(payloads, count, place, sum, (int)(n - at), bits, 0);
        finite &= encode_block(sum, after(residual, at), multiplier, (float *)after(error, at), payload + place, (int)(n - at),
                               bits, 0, 0);
    }
    all_written();
    return finite;
}

ENCODER(int8) { return encode_quantised(gradient, residual, multiplier, error, payload, n, 8, first); }
DECODER(int8) { decode_quantised(payload, out, n, how, 8, first); }
ENCODER(int4) { return encode_quantised(gradient, residual, multiplier, error, payload, n, 4, first); }
DECODER(int4) { decode_quantised(payload, out, n, how, 4, first); }
RECODER(int8) { return recode_quantised(payloads, count, residual, multiplier, error, payload, n, 8, first); }
RECODER(int4) { return recode_quantised(payloads, count, residual, multiplier, error, payload, n, 4, first); }
SUMMER(int8) { sum_quantised(payloads, count, out, n, 8, first); }
SUMMER(int4) { sum_quantised(payloads, count, out, n, 4, first); }
