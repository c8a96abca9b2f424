// Activations: the value and the derivative at x.

struct Point {
    float value, slope;
};
DEVICE Point silu(float x, float) {
    float s = 1.f / (1.f + expf(-x));
    return {x * s, s * (1.f + x * (1.f - s))};
}
DEVICE Point gelu(float x, float) {
    float cumulative = 0.5f * (1.f + erff(x * 0.70710678f)), density = 0.39894228f * expf(-0.5f * x * x);
    // Far from zero the density is 0, and 0 times infinity would be NaN.
    return {x * cumulative, cumulative + fminf(fmaxf(x, -1e4f), 1e4f) * density};
}
DEVICE Point leaky_relu(float x, float slope) { return {x > 0.f ? x : slope * x, x > 0.f ? 1.f : slope}; }

