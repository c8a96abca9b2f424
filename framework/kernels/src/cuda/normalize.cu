// Normalisation of (samples, pixels, channels), with an optional activation. A value x of a group, some
// channels of a sample, with mean m and scale s = 1 / sqrt(variance + eps), becomes act(n w + b), where n =
// (x - m) s. For batch normalisation, all pixels of the batch are one sample, and each channel is a group.
//
// Short runs are summed in 32 bits and their sums in 64, always in the same order. Arithmetic is 32 bits wide
// for every T.

struct Sizes {
    unsigned samples, pixels, channels;
    unsigned groups; // groups per sample
};

// The numbers by which values are normalised.
struct Tables {
    const float *means, *scales; // (samples, channels): those of a channel's group
    const float *weight, *bias;  // (channels) or, if the stride is not 0, one per value of a sample: (pixels, channels)
    unsigned stride;             // from one pixel's weights to the next one's, or 0
    unsigned then;               // 0: none, 1: SiLU, 2: GELU, 3: leaky ReLU
    float slope;                 // of leaky ReLU, below zero
};
// The numbers of V channels of a sample.
template <int V> struct Own {
    float mean[V], scale[V], weight[V], bias[V];
};
template <int V>
DEVICE Own<V> own(const Tables& tables, const Sizes& sizes, unsigned sample, unsigned pixel, unsigned channel) {
    Own<V> it;
    load<float, V>(tables.means + sample * sizes.channels + channel, it.mean);
    load<float, V>(tables.scales + sample * sizes.channels + channel, it.scale);
    load<float, V>(tables.weight + (index_t)pixel * tables.stride + channel, it.weight);
    load<float, V>(tables.bias + (index_t)pixel * tables.stride + channel, it.bias);
    return it;
}
DEVICE Point activation(float x, const Tables& tables) {
    if (tables.then == 1) return silu(x, 0.f);
    if (tables.then == 2) return gelu(x, 0.f);
    if (tables.then == 3) return leaky_relu(x, tables.slope);
    return {x, 1.f};
}

// Two sums over parts of the pixels for each channel of each sample: of x and x^2 or, if there is dy, of the
// gradient u of n w + b (times w if each value has its own weight) and of n times that. A thread handles V
// channels of a part.
template <typename T> struct ChannelSums {
    const T* x;
    const T* dy;
    Tables tables; // used if there is dy
    Sizes sizes;
    double* sums; // (samples, parts, 2, channels)
    unsigned stretch; // pixels per part, except the last
    unsigned parts;
};
template <typename T, int V> DEVICE void channel_sums(const ChannelSums<T>& a) {
    unsigned channels = a.sizes.channels, groups = channels / V, at = thread_index();
    if (at >= a.sizes.samples * a.parts * groups) return;
    unsigned channel = at % groups * V, part = at / groups % a.parts, sample = at / groups / a.parts;
    unsigned first = part * a.stretch, end = first + a.stretch;
    if (end > a.sizes.pixels) end = a.sizes.pixels;
    index_t start = (index_t)sample * a.sizes.pixels * channels + channel;
    float pivot[V], one[V], two[V], x[V], dy[V];
    // Squares are more precise after the pivot is subtracted.
    load<T, V>(a.x + start + (index_t)first * channels, pivot);
    for (int v = 0; v < V; v++) one[v] = two[v] = 0.f;
    Own<V> it;
    if (a.dy) it = own<V>(a.tables, a.sizes, sample, first, channel);
    for (unsigned pixel = first; pixel < end; pixel++) {
        load<T, V>(a.x + start + (index_t)pixel * channels, x);
        if (a.dy) load<T, V>(a.dy + start + (index_t)pixel * channels, dy);
        if (a.dy && a.tables.stride) it = own<V>(a.tables, a.sizes, sample, pixel, channel);
        for (int v = 0; v < V; v++) {
            if (a.dy) {
                float n = (x[v] - it.mean[v]) * it.scale[v];
                float u = dy[v] * activation(n * it.weight[v] + it.bias[v], a.tables).slope;
                if (a.tables.stride) u *= it.weight[v];
                one[v] += u;
                two[v] += n * u;
            } else {
                float rest = x[v] - pivot[v];
                one[v] += rest;
                two[v] += rest * rest;
            }
        }
    }
    double* to = a.sums + (index_t)(sample * a.parts + part) * 2 * channels + channel;
    for (int v = 0; v < V; v++) {
        double sum = one[v], squares = two[v], count = end - first, less = pivot[v];
        to[v] = a.dy ? sum : sum + count * less;
        to[channels + v] = a.dy ? squares : squares + less * (2. * sum + count * less);
    }
}

// Adds up every `fewer`-th part: (samples, parts, columns) to (samples, fewer, columns).
struct AddParts {
    const double* from;
    double* to;
    unsigned samples, parts, columns, fewer;
};
extern "C" __global__ void add_parts(AddParts a) {
    unsigned at = thread_index(), column = at % a.columns, part = at / a.columns % a.fewer, sample = at / a.columns / a.fewer;
    if (sample >= a.samples) return;
    double sum = 0.;
    for (unsigned from = part; from < a.parts; from += a.fewer) sum += a.from[((index_t)sample * a.parts + from) * a.columns + column];
    a.to[at] = sum;
}

// Mean, (biased) variance and scale of each group, from sums (samples, 2, channels).
struct Statistics {
    const double* sums;
    double *means, *variances;    // (samples, groups)
    float *narrow_means, *scales; // (samples, channels)
    Sizes sizes;
    double eps;
};
extern "C" __global__ void statistics(Statistics a) {
    unsigned at = thread_index(), width = a.sizes.channels / a.sizes.groups;
    if (at >= a.sizes.samples * a.sizes.groups) return;
    const double* sums = a.sums + (index_t)(at / a.sizes.groups) * 2 * a.sizes.channels + at % a.sizes.groups * width;
    double sum = 0., squares = 0., count = (double)a.sizes.pixels * width;
    for (unsigned channel = 0; channel < width; channel++) {
        sum += sums[channel];
        squares += sums[a.sizes.channels + channel];
    }
    double mean = sum / count, variance = squares / count - mean * mean;
    // NaN stays NaN.
    if (variance < 0.) variance = 0.;
    a.means[at] = mean;
    a.variances[at] = variance;
    for (unsigned channel = at * width; channel < (at + 1) * width; channel++) {
        a.narrow_means[channel] = (float)mean;
        a.scales[channel] = (float)(1. / sqrt(variance + a.eps));
    }
}

// From sums (samples, 2, channels) of u and n u: the constant that is subtracted from the gradient of each
// value of a group, and the factor of n that is subtracted.
struct GroupGradients {
    const double* sums;
    const float* weight; // null if the sums include it
    const float* scales;
    float *shifts, *tilts; // (samples, channels)
    Sizes sizes;
};
extern "C" __global__ void group_gradients(GroupGradients a) {
    unsigned at = thread_index(), width = a.sizes.channels / a.sizes.groups, first = at % a.sizes.groups * width;
    if (at >= a.sizes.samples * a.sizes.groups) return;
    const double* sums = a.sums + (index_t)(at / a.sizes.groups) * 2 * a.sizes.channels + first;
    double shift = 0., tilt = 0., count = (double)a.sizes.pixels * width;
    for (unsigned channel = 0; channel < width; channel++) {
        double weight = a.weight ? a.weight[first + channel] : 1.f;
        shift += weight * sums[channel];
        tilt += weight * sums[a.sizes.channels + channel];
    }
    double scale = a.scales[at * width];
    for (unsigned channel = at * width; channel < (at + 1) * width; channel++) {
        a.shifts[channel] = (float)(scale * shift / count);
        a.tilts[channel] = (float)(scale * tilt / count);
    }
}

// The gradients of weight and bias, from the same sums.
struct ChannelGradients {
    const double* sums;
    float *d_weight, *d_bias; // (channels)
    unsigned samples, channels;
};
extern "C" __global__ void channel_gradients(ChannelGradients a) {
    unsigned channel = thread_index();
    if (channel >= a.channels) return;
    double plain = 0., projected = 0.;
    for (unsigned sample = 0; sample < a.samples; sample++) {
        const double* sums = a.sums + (index_t)sample * 2 * a.channels + channel;
        plain += sums[0];
        projected += sums[a.channels];
    }
    a.d_bias[channel] = (float)plain;
    a.d_weight[channel] = (float)projected;
}

// The same gradients if each value has its own weight and bias. A thread handles V channels of a pixel, over
// all samples.
template <typename T> struct ValueGradients {
    const T *x, *dy;
    Tables tables;
    float *d_weight, *d_bias; // (pixels, channels)
    Sizes sizes;
};
template <typename T, int V> DEVICE void value_gradients(const ValueGradients<T>& a) {
    unsigned groups = a.sizes.channels / V, at = thread_index(), channel = at % groups * V, pixel = at / groups;
    if (pixel >= a.sizes.pixels) return;
    index_t place = (index_t)pixel * a.sizes.channels + channel;
    float plain[V], projected[V], x[V], dy[V];
    for (int v = 0; v < V; v++) plain[v] = projected[v] = 0.f;
    for (unsigned sample = 0; sample < a.sizes.samples; sample++) {
        index_t of_sample = (index_t)sample * a.sizes.pixels * a.sizes.channels + place;
        load<T, V>(a.x + of_sample, x);
        load<T, V>(a.dy + of_sample, dy);
        Own<V> it = own<V>(a.tables, a.sizes, sample, pixel, channel);
        for (int v = 0; v < V; v++) {
            float n = (x[v] - it.mean[v]) * it.scale[v];
            float u = dy[v] * activation(n * it.weight[v] + it.bias[v], a.tables).slope;
            plain[v] += u;
            projected[v] += n * u;
        }
    }
    store<float, V>(a.d_bias + place, plain);
    store<float, V>(a.d_weight + place, projected);
}

// act(n w + b) or, if there is dy, the gradient of x: s w u - shift - tilt n. A thread handles V channels of
// a pixel.
template <typename T> struct Normalize {
    const T* x;
    const T* dy;
    T* to;
    Tables tables;
    const float *shifts, *tilts; // (samples, channels), if there is dy
    Sizes sizes;
};
template <typename T, int V> DEVICE void normalize(const Normalize<T>& a) {
    unsigned groups = a.sizes.channels / V, at = thread_index(), channel = at % groups * V, row = at / groups;
    if (row >= a.sizes.samples * a.sizes.pixels) return;
    unsigned sample = row / a.sizes.pixels, pixel = row % a.sizes.pixels;
    index_t place = (index_t)row * a.sizes.channels + channel;
    float x[V], dy[V], shifts[V], tilts[V];
    load<T, V>(a.x + place, x);
    if (a.dy) {
        load<T, V>(a.dy + place, dy);
        load<float, V>(a.shifts + sample * a.sizes.channels + channel, shifts);
        load<float, V>(a.tilts + sample * a.sizes.channels + channel, tilts);
    }
    Own<V> it = own<V>(a.tables, a.sizes, sample, pixel, channel);
    for (int v = 0; v < V; v++) {
        float n = (x[v] - it.mean[v]) * it.scale[v];
        Point point = activation(n * it.weight[v] + it.bias[v], a.tables);
        x[v] = point.value;
        if (a.dy) x[v] = it.scale[v] * it.weight[v] * dy[v] * point.slope - shifts[v] - tilts[v] * n;
    }
    store<T, V>(a.to + place, x);
}

#define KERNELS(T, V)                                                                                                          \
    extern "C" __global__ void channel_sums_##T##_##V(ChannelSums<T> a) { channel_sums<T, V>(a); }                             \
    extern "C" __global__ void value_gradients_##T##_##V(ValueGradients<T> a) { value_gradients<T, V>(a); }                    \
    extern "C" __global__ void normalize_##T##_##V(Normalize<T> a) { normalize<T, V>(a); }
KERNELS(float, 1)
KERNELS(float, 4)
KERNELS(bf16, 1)
KERNELS(bf16, 4)
KERNELS(f16, 1)
KERNELS(f16, 4)
