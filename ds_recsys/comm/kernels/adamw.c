/* A step of AdamW that leaves no trace but the weights: see modes/look_ahead.py. */
#include "block.h"
#include <math.h>

/* kept <- weight; weight <- decay * weight - rate * m / (root * sqrt(v) + eps), m and v the moments after `gradient`, which stay
 * what they are; moments of NULL are zero. */
EXPORT void adamw_ahead(float *restrict weight, float *restrict kept, const float *restrict gradient,
                        const float *restrict mean, const float *restrict square, int64_t n, float beta1, float beta2,
                        float decay, float rate, float root, float eps) {
    const float new1 = 1.0f - beta1, new2 = 1.0f - beta2;
    if (!mean || !square) {
        for (int64_t i = 0; i < n; i++) {
            const float w = weight[i], g = gradient[i];
            kept[i] = w;
            weight[i] = decay * w - rate * (new1 * g) / (root * sqrtf(new2 * g * g) + eps);
        }
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        const float w = weight[i], g = gradient[i];
        const float m = beta1 * mean[i] + new1 * g, v = beta2 * square[i] + new2 * g * g;
        kept[i] = w;
        weight[i] = decay * w - rate * m / (root * sqrtf(v) + eps);
    }
}
