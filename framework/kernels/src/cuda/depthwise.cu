// Depthwise convolutions with stride 1, channels last: each channel is convolved with its own filter. Sums are
// 32 bits wide for every T.

// Where the values lie that an output pixel sums over.
struct Window {
    unsigned height, width;         // of the images that are read
    unsigned to_height, to_width;   // of the outputs
    unsigned channels;
    unsigned kernel_height, kernel_width;
    unsigned dilation;
    int above, left; // the position of the first tap, relative to the output pixel
};

// Packs a weight (channels, taps) as (taps, channels), so that neighbouring threads read neighbouring values.
template <typename T> struct PackTaps {
    const T* weight;
    float* taps;
    unsigned channels, count;
    unsigned rotated; // by 180 degrees
};
template <typename T> DEVICE void pack_taps(const PackTaps<T>& a) {
    unsigned at = thread_index();
    if (at >= a.channels * a.count) return;
    unsigned tap = at / a.channels, channel = at % a.channels;
    a.taps[at] = to_float(a.weight[channel * a.count + (a.rotated ? a.count - 1 - tap : tap)]);
}

// Convolves. A thread computes V channels of PIXELS neighbouring pixels, so that it reads a filter once for all.
template <typename T> struct Depthwise {
    const T* from;
    const float* taps;
    T* to;
    Window window;
    unsigned rows; // of all images' outputs
};
enum { PIXELS = 4 };
template <typename T, int V> DEVICE void depthwise(const Depthwise<T>& a) {
    const Window& w = a.window;
    unsigned groups = w.channels / V, across = (w.to_width + PIXELS - 1) / PIXELS, at = thread_index();
    if (at >= a.rows * across * groups) return;
    unsigned channel = at % groups * V, first = at / groups % across * PIXELS, row = at / groups / across;
    unsigned image = row / w.to_height, y = row % w.to_height;
    float sums[PIXELS][V], filter[V], x[V];
    for (int p = 0; p < PIXELS; p++)
        for (int v = 0; v < V; v++) sums[p][v] = 0.f;
    for (unsigned down = 0; down < w.kernel_height; down++) {
        // Positions before the image wrap around to large ones.
        unsigned from_y = y + w.above + down * w.dilation;
        if (from_y >= w.height) continue;
        const T* line = a.from + (index_t)(image * w.height + from_y) * w.width * w.channels + channel;
        for (unsigned right = 0; right < w.kernel_width; right++) {
            load<float, V>(a.taps + (index_t)(down * w.kernel_width + right) * w.channels + channel, filter);
            for (int p = 0; p < PIXELS; p++) {
                unsigned from_x = first + p + w.left + right * w.dilation;
                if (from_x >= w.width) continue;
                load<T, V>(line + (index_t)from_x * w.channels, x);
                for (int v = 0; v < V; v++) sums[p][v] += x[v] * filter[v];
            }
        }
    }
    for (int p = 0; p < PIXELS; p++)
        if (first + p < w.to_width)
            store<T, V>(a.to + ((index_t)row * w.to_width + first + p) * w.channels + channel, sums[p]);
}

// The sums of the weight's gradient over stretches of output rows: (parts, taps, channels), always in the same
// order. A thread handles V channels of a tap.
template <typename T> struct TapSums {
    const T* x;
    const T* dy;
    float* sums;
    Window window;
    unsigned rows;    // of all images' outputs
    unsigned stretch; // rows per part, except the last
    unsigned parts;
};
template <typename T, int V> DEVICE void tap_sums(const TapSums<T>& a) {
    const Window& w = a.window;
    unsigned groups = w.channels / V, taps = w.kernel_height * w.kernel_width, at = thread_index();
    if (at >= a.parts * taps * groups) return;
    unsigned channel = at % groups * V, tap = at / groups % taps, part = at / groups / taps;
    unsigned down = tap / w.kernel_width * w.dilation, right = tap % w.kernel_width * w.dilation;
    unsigned end = (part + 1) * a.stretch < a.rows ? (part + 1) * a.stretch : a.rows;
    float sums[V], x[V], dy[V];
    for (int v = 0; v < V; v++) sums[v] = 0.f;
    for (unsigned row = part * a.stretch; row < end; row++) {
        unsigned image = row / w.to_height, from_y = row % w.to_height + w.above + down;
        if (from_y >= w.height) continue;
        const T* line = a.x + (index_t)(image * w.height + from_y) * w.width * w.channels + channel;
        const T* gradients = a.dy + (index_t)row * w.to_width * w.channels + channel;
        for (unsigned to_x = 0; to_x < w.to_width; to_x++) {
            unsigned from_x = to_x + w.left + right;
            if (from_x >= w.width) continue;
            load<T, V>(line + (index_t)from_x * w.channels, x);
            load<T, V>(gradients + (index_t)to_x * w.channels, dy);
            for (int v = 0; v < V; v++) sums[v] += x[v] * dy[v];
        }
    }
    store<float, V>(a.sums + ((index_t)part * taps + tap) * w.channels + channel, sums);
}

// Adds up the parts to a weight's gradient (channels, taps), which is overwritten or added to.
template <typename T> struct AddTaps {
    const float* sums;
    T* gradient;
    unsigned channels, count, parts;
    unsigned add;
};
template <typename T> DEVICE void add_taps(const AddTaps<T>& a) {
    unsigned each = a.channels * a.count, at = thread_index();
    if (at >= each) return;
    float sum = 0.f;
    for (unsigned part = 0; part < a.parts; part++) sum += a.sums[(index_t)part * each + at];
    T& to = a.gradient[at % a.channels * a.count + at / a.channels];
    from_float(a.add ? to_float(to) + sum : sum, to);
}

#define KERNELS(T)                                                                                                             \
    extern "C" __global__ void pack_taps_##T(PackTaps<T> a) { pack_taps<T>(a); }                                               \
    extern "C" __global__ void depthwise_##T##_1(Depthwise<T> a) { depthwise<T, 1>(a); }                                       \
    extern "C" __global__ void depthwise_##T##_4(Depthwise<T> a) { depthwise<T, 4>(a); }                                       \
    extern "C" __global__ void tap_sums_##T##_1(TapSums<T> a) { tap_sums<T, 1>(a); }                                           \
    extern "C" __global__ void tap_sums_##T##_4(TapSums<T> a) { tap_sums<T, 4>(a); }                                           \
    extern "C" __global__ void add_taps_##T(AddTaps<T> a) { add_taps<T>(a); }
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
