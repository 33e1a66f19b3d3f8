/* bf16 and sign: see compressors/dense.py and compressors/sign.py. */
#include "block.h"

INLINE int encode_bf16_block(const float *gradient, const float *residual, float multiplier, float *error,
                             uint8_t *payload, int n) {
    float x[QUANTISER_BLOCK] ALIGNED;
    uint16_t codes[QUANTISER_BLOCK] ALIGNED;
    const uint32_t top = read_block(x, gradient, residual, multiplier, n);
    for (int i = 0; i < n; i++) codes[i] = bf16_of(x[i]);
    if (top >= INFINITE)
        for (int i = 0; i < n; i++)
            if ((bits_of(x[i]) & MAGNITUDE) >= INFINITE) codes[i] = NOT_A_NUMBER >> 16;
    memcpy(payload, codes, 2 * n);
    if (error)
        for (int i = 0; i < n; i++) error[i] = x[i] - float_of((uint32_t)codes[i] << 16);
    return top < INFINITE;
}

ENCODER(bf16) {
    int finite = 1;
    int64_t at = 0;
    for (; at + QUANTISER_BLOCK <= n; at += QUANTISER_BLOCK)
        finite &= encode_bf16_block(gradient + at, after(residual, at), multiplier, (float *)after(error, at),
                                    payload + 2 * at, QUANTISER_BLOCK);
    if (at < n)
        finite &= encode_bf16_block(gradient + at, after(residual, at), multiplier, (float *)after(error, at),
                                    payload + 2 * at, (int)(n - at));
    return finite;
}

DECODER(bf16) {
    const uint16_t *codes = (const uint16_t *)payload;
    for (int64_t i = 0; i < n; i++) {
        float value = float_of((uint32_t)codes[i] << 16);
        out[i] = how & ADD ? out[i] + value : value;
    }
}

INLINE int encode_sign_block(const float *gradient, const float *residual, float multiplier, float *error,
                             uint8_t *payload, int n) {
    float x[SIGN_BLOCK] ALIGNED, sums[SIGN_BLOCK] ALIGNED;
    uint8_t codes[SIGN_BLOCK / 8] ALIGNED;
    const int bytes = (n + 7) / 8;
    const uint32_t top = read_block(x, gradient, residual, multiplier, n);
    for (int i = n; i < SIGN_BLOCK; i++) x[i] = 0.0f;
    if (top >= INFINITE) {
        memcpy(payload, &NOT_A_NUMBER, 4);
        memset(payload + 4, 0, bytes);
        return 0;
    }
    for (int i = 0; i < SIGN_BLOCK; i++) sums[i] = float_of(bits_of(x[i]) & MAGNITUDE) * (1.0f / SIGN_BLOCK);
    for (int half = SIGN_BLOCK / 2; half; half /= 2) /* this order of summing is part of the format */
        for (int i = 0; i < half; i++) sums[i] = sums[i] + sums[i + half];
    float scale = sums[0] * (float)((double)SIGN_BLOCK / n);
    scale = top < TINY ? 0.0f : scale > LARGEST ? LARGEST : scale;
    memset(codes, 0, sizeof codes);
    for (int plane = 0; plane < 8; plane++)
        for (int i = 0; i < bytes; i++) codes[i] |= (uint8_t)(bits_of(x[plane * bytes + i]) >> 31 << plane);
    memcpy(payload, &scale, 4);
    memcpy(payload + 4, codes, bytes);
    if (error)
        for (int i = 0; i < n; i++) error[i] = x[i] - float_of(bits_of(scale) | (bits_of(x[i]) & ~MAGNITUDE));
    return 1;
}

INLINE void decode_sign_block(const uint8_t *payload, float *out, int n, int add) {
    const int bytes = (n + 7) / 8;
    float decoded[SIGN_BLOCK] ALIGNED;
    uint32_t scale;
    memcpy(&scale, payload, 4);
    for (int plane = 0; plane < 8; plane++)
        for (int i = 0; i < bytes; i++)
            decoded[plane * bytes + i] = float_of(scale ^ (uint32_t)(payload[4 + i] >> plane & 1) << 31);
    if (add)
        for (int i = 0; i < n; i++) out[i] = out[i] + decoded[i];
    else
        memcpy(out, decoded, 4 * n);
}

ENCODER(sign) {
    int finite = 1;
    for (int64_t at = 0; at < n; at += SIGN_BLOCK, payload += 4 + SIGN_BLOCK / 8)
        finite &= n - at >= SIGN_BLOCK
                      ? encode_sign_block(gradient + at, after(residual, at), multiplier, (float *)after(error, at),
                                          payload, SIGN_BLOCK)
                      : encode_sign_block(gradient + at, after(residual, at), multiplier, (float *)after(error, at),
                                          payload, (int)(n - at));
    return finite;
}

DECODER(sign) {
    for (int64_t at = 0; at < n; at += SIGN_BLOCK, payload += 4 + SIGN_BLOCK / 8)
        if (n - at >= SIGN_BLOCK)
            decode_sign_block(payload, out + at, SIGN_BLOCK, how & ADD);
        else
            decode_sign_block(payload, out + at, (int)(n - at), how & ADD);
}
