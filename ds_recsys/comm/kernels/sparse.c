/* Top-k and random-k of blocks of 16384 values: see compressors/topk.py and compressors/randomk.py. */
#include "block.h"

enum { FP32 = 0, BF16 = 1, INT8 = 2 };

/* Finds the digit, of `digits` counted ones, that holds the k-th largest; *above gains the number of larger ones. */
INLINE uint32_t digit_of(const uint16_t *counts, uint32_t digits, int k, int *above) {
    uint32_t digit = digits;
    int count;
    while ((count = counts[--digit]) + *above < k) *above += count;
    return digit;
}

/* Positions, rising, of the k largest magnitudes; of equal ones the first. A radix select over 11, 10 and 10 bits. */
static void select_largest(const float *x, int n, int k, uint16_t *restrict positions) {
    uint16_t counts[4][2048], candidates[SPARSE_BLOCK];
    int above = 0, found = 0, candidate = 0;
    memset(counts, 0, sizeof counts);
    for (int i = 0; i < n; i++) counts[i & 3][(bits_of(x[i]) & MAGNITUDE) >> 20]++; /* 4: neighbours fall together */
    for (int i = 0; i < 2048; i++) counts[0][i] += counts[1][i] + counts[2][i] + counts[3][i];
    uint32_t threshold = digit_of(counts[0], 2048, k, &above) << 20;
    for (int i = 0; i < n; i++) {
        candidates[candidate] = (uint16_t)i;
        candidate += (bits_of(x[i]) & MAGNITUDE) >= threshold;
    }
    for (int shift = 10; shift >= 0; shift -= 10) {
        memset(counts[0], 0, sizeof counts[0]);
        for (int c = 0; c < candidate; c++) {
            const uint32_t magnitude = bits_of(x[candidates[c]]) & MAGNITUDE;
            counts[0][magnitude >> shift & 1023] += magnitude >> (shift + 10) == threshold >> (shift + 10);
        }
        threshold |= digit_of(counts[0], 1024, k, &above) << shift;
    }
    for (int c = 0, ties = k - above; c < candidate; c++) {
        const uint32_t magnitude = bits_of(x[candidates[c]]) & MAGNITUDE;
        if (magnitude > threshold || (magnitude == threshold && ties-- > 0)) positions[found++] = candidates[c];
    }
}

/* Writes value j of a row; returns what it decodes to. `scale` and `inverse` are of int8. */
INLINE float put_value(uint8_t *values, int j, float value, int kind, float scale, float inverse) {
    if (kind == FP32) {
        memcpy(values + 4 * j, &value, 4);
        return value;
    }
    if (kind == BF16) {
        const uint16_t code = bf16_of(value);
        memcpy(values + 2 * j, &code, 2);
        return float_of((uint32_t)code << 16);
    }
    const float shifted = value * inverse + ROUNDER;
    values[j] = (uint8_t)bits_of(shifted);
    return (shifted - ROUNDER) * scale;
}

INLINE float get_value(const uint8_t *values, int j, int kind, float scale) {
    if (kind == INT8) return (float)(int8_t)values[j] * scale;
    uint32_t bits = 0;
    uint16_t code;
    if (kind == FP32)
        memcpy(&bits, values + 4 * j, 4);
    else {
        memcpy(&code, values + 2 * j, 2);
        bits = (uint32_t)code << 16;
    }
    return float_of(bits);
}

INLINE int value_bytes(int kind) { return kind == FP32 ? 4 : kind == BF16 ? 2 : 1; }

INLINE void put_not_finite(uint8_t *values, int k, int kind) {
    const uint32_t bits = NOT_A_NUMBER;
    const uint16_t code = NOT_A_NUMBER >> 16;
    if (kind == INT8) memcpy(values - 4, &bits, 4);
    for (int j = 0; j < k; j++)
        if (kind == FP32)
            memcpy(values + 4 * j, &bits, 4);
        else if (kind == BF16)
            memcpy(values + 2 * j, &code, 2);
        else
            values[j] = 0;
}

INLINE int encode_largest(const float *gradient, const float *residual, float multiplier, float *error,
                          uint8_t *payload, int64_t n, int64_t k_whole, int64_t k_last, int kind) {
    float own[SPARSE_BLOCK] ALIGNED;
    uint16_t positions[SPARSE_BLOCK];
    int finite = 1;
    for (int64_t at = 0; at < n; at += SPARSE_BLOCK) {
        const int length = (int)least(SPARSE_BLOCK, n - at), k = (int)(length == SPARSE_BLOCK ? k_whole : k_last);
        float *x = error ? error + at : own, scale = 0.0f;
        const uint32_t top = read_block(x, gradient + at, after(residual, at), multiplier, length);
        if (kind == INT8) {
            scale = quantiser_scale(top, 8);
            memcpy(payload, &scale, 4);
            payload += 4;
        }
        if (top >= INFINITE) {
            finite = 0;
            put_not_finite(payload, k, kind);
            for (int j = 0; j < k; j++) positions[j] = (uint16_t)j;
        } else {
            const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
            select_largest(x, length, k, positions);
            for (int j = 0; j < k; j++) {
                const float value = x[positions[j]];
                const float sent = put_value(payload, j, value, kind, scale, inverse);
                if (error) x[positions[j]] = value - sent;
            }
        }
        memcpy(payload + k * value_bytes(kind), positions, 2 * k);
        payload += k * (2 + value_bytes(kind));
    }
    return finite;
}

INLINE void decode_largest(const uint8_t *payload, float *out, int64_t n, int add, int64_t k_whole, int64_t k_last,
                           int kind) {
    if (!add) memset(out, 0, 4 * n);
    for (int64_t at = 0; at < n; at += SPARSE_BLOCK) {
        const int length = (int)least(SPARSE_BLOCK, n - at), k = (int)(length == SPARSE_BLOCK ? k_whole : k_last);
        float scale = 0.0f;
        if (kind == INT8) {
            memcpy(&scale, payload, 4);
            payload += 4;
        }
        const uint8_t *positions = payload + k * value_bytes(kind);
        for (int j = 0; j < k; j++) {
            uint16_t position;
            memcpy(&position, positions + 2 * j, 2);
            if (position >= length) continue; /* a damaged payload must not write elsewhere */
            const float value = get_value(payload, j, kind, scale);
            out[at + position] = add ? out[at + position] + value : value;
        }
        payload += k * (2 + value_bytes(kind));
    }
}

#define TOP_K(NAME, KIND)                                                                                    \
    ENCODER(NAME) {                                                                                          \
        return encode_largest(gradient, residual, multiplier, error, payload, n, first, second, KIND);       \
    }                                                                                                        \
    DECODER(NAME) { decode_largest(payload, out, n, how & ADD, first, second, KIND); }
TOP_K(topk_fp32, FP32)
TOP_K(topk_bf16, BF16)
TOP_K(topk_int8, INT8)

/* ---- random-k: position j is (offset + j * stride) mod length, stride coprime to length ---- */

static uint64_t splitmix(uint64_t state) { /* https://prng.di.unimi.it/splitmix64.c */
    state += 0x9e3779b97f4a7c15;
    state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9;
    state = (state ^ (state >> 27)) * 0x94d049bb133111eb;
    return state ^ (state >> 31);
}

static int coprime(int a, int b) {
    while (b) {
        const int rest = a % b;
        a = b;
        b = rest;
    }
    return a == 1;
}

INLINE void progression(uint64_t seed, int length, int *offset, int *stride) {
    const uint64_t hash = splitmix(seed);
    *offset = (int)((hash & 0xffffffff) % length);
    *stride = (int)((hash >> 32) % length);
    while (!coprime(*stride, length)) *stride += 1;
}

ENCODER(randomk) {
    float own[SPARSE_BLOCK] ALIGNED;
    int finite = 1;
    for (int64_t at = 0; at < n; at += SPARSE_BLOCK, seed++) {
        const int length = (int)least(SPARSE_BLOCK, n - at), k = (int)(length == SPARSE_BLOCK ? first : second);
        int position, stride;
        float *x = error ? error + at : own;
        const uint32_t top = read_block(x, gradient + at, after(residual, at), multiplier, length);
        progression(seed, length, &position, &stride);
        if (top >= INFINITE) {
            finite = 0;
            put_not_finite(payload, k, FP32);
        } else
            for (int j = 0; j < k; j++) {
                memcpy(payload + 4 * j, x + position, 4);
                x[position] = 0.0f;
                position += stride;
                position -= position >= length ? length : 0;
            }
        payload += 4 * k;
    }
    return finite;
}

DECODER(randomk) {
    if (!(how & ADD)) memset(out, 0, 4 * n);
    for (int64_t at = 0; at < n; at += SPARSE_BLOCK, seed++) {
        const int length = (int)least(SPARSE_BLOCK, n - at), k = (int)(length == SPARSE_BLOCK ? first : second);
        int position, stride;
        progression(seed, length, &position, &stride);
        for (int j = 0; j < k; j++) {
            float value;
            memcpy(&value, payload + 4 * j, 4);
            out[at + position] = how & ADD ? out[at + position] + value : value;
            position += stride;
            position -= position >= length ? length : 0;
        }
        payload += 4 * k;
    }
}
