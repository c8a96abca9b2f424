// The pointwise half of a ConvLSTM cell: c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(c').
//
// A thread takes V channels of a pixel. Gates lie as i, f, o, g, N channels each, side by side in a pixel. Arithmetic and the
// cell's state are 32 bits wide whatever T is.

// The functions of 32-bit runs are as exact as the type; half types round more than the quick ones do.
DEVICE float exponential(float x, float) { return expf(x); }
template <typename T> DEVICE float exponential(float x, T) {
#ifdef __CUDACC__
    return __expf(x);
#else
    return expf(x);
#endif
}
template <typename T> DEVICE float sigmoid(float x, T like) { return 1.f / (1.f + exponential(-x, like)); }
DEVICE float tangent(float x, float) { return tanhf(x); }
template <typename T> DEVICE float tangent(float x, T like) { return 2.f * sigmoid(2.f * x, like) - 1.f; }

template <typename T> struct GatesForward {
    T* gates;              // (rows, 4 N): pre-activations without their bias; where `keep`, the activations take their place
    const T* bias;         // (4 N)
    const float* c_before; // (rows, N), or null: zeros
    float* c;              // (rows, N)
    Plane<T> h[3];         // where h goes
    unsigned rows;         // pixels of all images
    unsigned hidden;       // N
    unsigned pixels;       // of an image
    unsigned keep;
};

template <typename T, int V> DEVICE void gates_forward(const GatesForward<T>& a) {
    unsigned groups = a.hidden / V, at = thread_index();
    if (at >= a.rows * groups) return;
    unsigned row = at / groups, channel = at % groups * V, n = a.hidden;
    index_t cell = (index_t)row * n + channel;
    T* first = a.gates + (index_t)row * 4 * n + channel;
    const T* bias = a.bias + channel;
    float i[V], f[V], o[V], g[V], bi[V], bf[V], bo[V], bg[V], before[V], after[V], h[V];
    load<T, V>(first, i);
    load<T, V>(first + n, f);
    load<T, V>(first + 2 * n, o);
    load<T, V>(first + 3 * n, g);
    load<T, V>(bias, bi);
    load<T, V>(bias + n, bf);
    load<T, V>(bias + 2 * n, bo);
    load<T, V>(bias + 3 * n, bg);
    for (int v = 0; v < V; v++) before[v] = 0.f;
    if (a.c_before) load<float, V>(a.c_before + cell, before);
    T like = T();
    for (int v = 0; v < V; v++) {
        i[v] = sigmoid(i[v] + bi[v], like);
        f[v] = sigmoid(f[v] + bf[v], like);
        o[v] = sigmoid(o[v] + bo[v], like);
        g[v] = tangent(g[v] + bg[v], like);
        after[v] = f[v] * before[v] + i[v] * g[v];
        h[v] = o[v] * tangent(after[v], like);
    }
    if (a.keep) {
        store<T, V>(first, i);
        store<T, V>(first + n, f);
        store<T, V>(first + 2 * n, o);
        store<T, V>(first + 3 * n, g);
    }
    store<float, V>(a.c + cell, after);
    unsigned image = row / a.pixels, pixel = row % a.pixels;
    for (int to = 0; to < 3; to++) {
        if (a.h[to].at) store<T, V>(place(a.h[to], image, pixel) + channel, h);
    }
}

template <typename T> struct GatesBackward {
    T* gates;              // (rows, 4 N): the activations; the gradients of the pre-activations take their place
    const float* c_before; // (rows, N), or null: zeros
    const float* c;        // (rows, N)
    float* dc;             // (rows, N): the gradient of c; that of c_before takes its place
    Plane<const T> dh[3];  // the gradient of h is the sum of these
    unsigned rows, hidden, pixels;
};

template <typename T, int V> DEVICE void gates_backward(const GatesBackward<T>& a) {
    unsigned groups = a.hidden / V, at = thread_index();
    if (at >= a.rows * groups) return;
    unsigned row = at / groups, channel = at % groups * V, n = a.hidden;
    index_t cell = (index_t)row * n + channel;
    T* first = a.gates + (index_t)row * 4 * n + channel;
    float i[V], f[V], o[V], g[V], before[V], after[V], dafter[V], dh[V], more[V];
    load<T, V>(first, i);
    load<T, V>(first + n, f);
    load<T, V>(first + 2 * n, o);
    load<T, V>(first + 3 * n, g);
    for (int v = 0; v < V; v++) before[v] = dh[v] = 0.f;
    if (a.c_before) load<float, V>(a.c_before + cell, before);
    load<float, V>(a.c + cell, after);
    load<float, V>(a.dc + cell, dafter);
    unsigned image = row / a.pixels, pixel = row % a.pixels;
    for (int from = 0; from < 3; from++) {
        if (!a.dh[from].at) continue;
        load<T, V>(place(a.dh[from], image, pixel) + channel, more);
        for (int v = 0; v < V; v++) dh[v] += more[v];
    }
    T like = T();
    for (int v = 0; v < V; v++) {
        float squashed = tangent(after[v], like);
        float input = i[v], forget = f[v], output = o[v], candidate = g[v];
        float d = dafter[v] + dh[v] * output * (1.f - squashed * squashed);
        i[v] = d * candidate * input * (1.f - input);
        f[v] = d * before[v] * forget * (1.f - forget);
        o[v] = dh[v] * squashed * output * (1.f - output);
        g[v] = d * input * (1.f - candidate * candidate);
        dafter[v] = d * forget;
    }
    store<T, V>(first, i);
    store<T, V>(first + n, f);
    store<T, V>(first + 2 * n, o);
    store<T, V>(first + 3 * n, g);
    store<float, V>(a.dc + cell, dafter);
}

#define KERNELS(T, V)                                                                                                          \
    extern "C" __global__ void gates_forward_##T##_##V(GatesForward<T> a) { gates_forward<T, V>(a); }                          \
    extern "C" __global__ void gates_backward_##T##_##V(GatesBackward<T> a) { gates_backward<T, V>(a); }
KERNELS(float, 1)
KERNELS(float, 4)
KERNELS(bf16, 1)
KERNELS(bf16, 4)
KERNELS(f16, 1)
KERNELS(f16, 4)
