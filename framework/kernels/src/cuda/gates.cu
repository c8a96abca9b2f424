// The pointwise half of a ConvLSTM cell: c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(c').
//
// A thread handles V channels of a pixel. The gates of a pixel are stored as i, f, o, g, N channels each,
// side by side. Arithmetic and the cell state are 32 bits wide for every T.

// For float, the functions are accurate to the type; half types round more than the fast versions do.
DEVICE float sigmoid(float x, float) { return 1.f / (1.f + expf(-x)); }
DEVICE float tangent(float x, float) { return tanhf(x); }
template <typename T> DEVICE float sigmoid(float x, T) {
#ifdef __CUDACC__
    float power = __expf(-x);
#else
    float power = expf(-x);
#endif
    return quotient(1.f, 1.f + power);
}
template <typename T> DEVICE float tangent(float x, T like) { return 2.f * sigmoid(2.f * x, like) - 1.f; }

// The gates of V channels of a pixel.
template <typename T, int V> struct Gates {
    float i[V], f[V], o[V], g[V];
};
// Computes them from pre-activations (rows, 4 N) without their bias, and the bias (4 N), both starting at a
// row and channel.
template <typename T, int V> DEVICE Gates<T, V> activated(const T* first, const T* bias, unsigned n) {
    Gates<T, V> x, b;
    load<T, V>(first, x.i);
    load<T, V>(first + n, x.f);
    load<T, V>(first + 2 * n, x.o);
    load<T, V>(first + 3 * n, x.g);
    load<T, V>(bias, b.i);
    load<T, V>(bias + n, b.f);
    load<T, V>(bias + 2 * n, b.o);
    load<T, V>(bias + 3 * n, b.g);
    T like = T();
    for (int v = 0; v < V; v++) {
        x.i[v] = sigmoid(x.i[v] + b.i[v], like);
        x.f[v] = sigmoid(x.f[v] + b.f[v], like);
        x.o[v] = sigmoid(x.o[v] + b.o[v], like);
        x.g[v] = tangent(x.g[v] + b.g[v], like);
    }
    return x;
}

template <typename T> struct GatesForward {
    const T* gates;        // (rows, 4 N): pre-activations without their bias
    const T* bias;         // (4 N)
    const float* c_before; // (rows, N), or null: zeros
    float* c;              // (rows, N), or null if no step needs it
    Plane<T> h[3];         // where h is written
    unsigned rows;         // pixels of all images
    unsigned hidden;       // N
    unsigned pixels;       // pixels per image
};

template <typename T, int V> DEVICE void gates_forward(const GatesForward<T>& a) {
    unsigned groups = a.hidden / V, at = thread_index();
    if (at >= a.rows * groups) return;
    unsigned row = at / groups, channel = at % groups * V, n = a.hidden;
    index_t cell = (index_t)row * n + channel;
    Gates<T, V> x = activated<T, V>(a.gates + (index_t)row * 4 * n + channel, a.bias + channel, n);
    float before[V], after[V], h[V];
    for (int v = 0; v < V; v++) before[v] = 0.f;
    if (a.c_before) load<float, V>(a.c_before + cell, before);
    T like = T();
    for (int v = 0; v < V; v++) {
        after[v] = x.f[v] * before[v] + x.i[v] * x.g[v];
        h[v] = x.o[v] * tangent(after[v], like);
    }
    if (a.c) store<float, V>(a.c + cell, after);
    Pack<T, V> pack = narrowed<T, V>(h);
    unsigned image = row / a.pixels, pixel = row % a.pixels;
    for (int to = 0; to < 3; to++) {
        if (a.h[to].at) *(Pack<T, V>*)(place(a.h[to], image, pixel) + channel) = pack;
    }
}

template <typename T> struct GatesBackward {
    T* gates;              // (rows, 4 N): as in the forward pass; overwritten by their gradients
    const T* bias;         // (4 N)
    const float* c_before; // (rows, N), or null: zeros
    const float* dc;       // (rows, N): the gradient of c, or null: zeros
    float* dc_before;      // (rows, N): receives the gradient of c_before; may be dc itself, or null
    Plane<const T> dh[3];  // the gradient of h is the sum of these
    float* sums;           // (parts, 4 N): the sums of the gates' gradients are added to these
    unsigned rows, hidden, pixels;
    unsigned parts; // parts of the rows: each handles every parts-th row
};

template <int V> DEVICE void add(float* to, const float (&x)[V]) {
    float sums[V];
    load<float, V>(to, sums);
    for (int v = 0; v < V; v++) sums[v] += x[v];
    store<float, V>(to, sums);
}

// Gates and states are recomputed, because writing and reading them would take longer. A thread handles V
// channels of a part.
template <typename T, int V> DEVICE void gates_backward(const GatesBackward<T>& a) {
    unsigned groups = a.hidden / V, at = thread_index();
    if (at >= a.parts * groups) return;
    unsigned part = at / groups, channel = at % groups * V, n = a.hidden;
    Gates<T, V> sums = {};
    for (unsigned row = part; row < a.rows; row += a.parts) {
        index_t cell = (index_t)row * n + channel;
        T* first = a.gates + (index_t)row * 4 * n + channel;
        // No read depends on a computation, so nearly all are in flight before the first one is waited for.
        Gates<T, V> x = activated<T, V>(first, a.bias + channel, n);
        float before[V], dc[V];
        for (int v = 0; v < V; v++) before[v] = dc[v] = 0.f;
        if (a.c_before) load<float, V>(a.c_before + cell, before);
        if (a.dc) load<float, V>(a.dc + cell, dc);
        unsigned image = row / a.pixels, pixel = row % a.pixels;
        float parts_of_dh[3][V];
        for (int from = 0; from < 3; from++) {
            // If there is no such plane, rereads memory that is read anyway.
            const T* source = a.dh[from].at ? place(a.dh[from], image, pixel) + channel : first;
            load<T, V>(source, parts_of_dh[from]);
        }
        T like = T();
        for (int v = 0; v < V; v++) {
            float dh = 0.f, input = x.i[v], forget = x.f[v], output = x.o[v], candidate = x.g[v];
            for (int from = 0; from < 3; from++) dh += a.dh[from].at ? parts_of_dh[from][v] : 0.f;
            float squashed = tangent(forget * before[v] + input * candidate, like);
            float d = dc[v] + dh * output * (1.f - squashed * squashed);
            x.i[v] = d * candidate * input * (1.f - input);
            x.f[v] = d * before[v] * forget * (1.f - forget);
            x.o[v] = dh * squashed * output * (1.f - output);
            x.g[v] = d * input * (1.f - candidate * candidate);
            dc[v] = d * forget;
            sums.i[v] += x.i[v];
            sums.f[v] += x.f[v];
            sums.o[v] += x.o[v];
            sums.g[v] += x.g[v];
        }
        store<T, V>(first, x.i);
        store<T, V>(first + n, x.f);
        store<T, V>(first + 2 * n, x.o);
        store<T, V>(first + 3 * n, x.g);
        if (a.dc_before) store<float, V>(a.dc_before + cell, dc);
    }
    float* to = a.sums + (index_t)part * 4 * n + channel;
    add<V>(to, sums.i);
    add<V>(to + n, sums.f);
    add<V>(to + 2 * n, sums.o);
    add<V>(to + 3 * n, sums.g);
}

// Three blocks per multiprocessor at once, which the host assumes when it divides the rows.
#define KERNELS(T, V)                                                                                                          \
    extern "C" __global__ void gates_forward_##T##_##V(GatesForward<T> a) { gates_forward<T, V>(a); }                          \
    extern "C" __global__ void __launch_bounds__(256, 3) gates_backward_##T##_##V(GatesBackward<T> a) {                        \
        gates_backward<T, V>(a);                                                                                               \
    }
KERNELS(float, 1)
KERNELS(float, 4)
KERNELS(bf16, 1)
KERNELS(bf16, 4)
KERNELS(f16, 1)
KERNELS(f16, 4)
