// Pointwise activations. Arithmetic is 32 bits wide for every T.

template <typename T> struct Pointwise {
    const T* x;
    const T* d;     // the results' gradients, or null for the forward pass
    T* to;          // results, or the gradients of x
    float slope;    // of leaky_relu, below zero
    unsigned count;
};

// A thread handles V values.
template <typename T, int V, Point (*AT)(float, float)> DEVICE void pointwise(const Pointwise<T>& a) {
    unsigned at = thread_index() * V;
    if (at >= a.count) return;
    float x[V], d[V];
    load<T, V>(a.x + at, x);
    if (a.d) load<T, V>(a.d + at, d);
    for (int v = 0; v < V; v++) {
        Point point = AT(x[v], a.slope);
        x[v] = a.d ? d[v] * point.slope : point.value;
    }
    store<T, V>(a.to + at, x);
}

#define KERNELS(T, V)                                                                                                          \
    extern "C" __global__ void silu_##T##_##V(Pointwise<T> a) { pointwise<T, V, silu>(a); }                                    \
    extern "C" __global__ void gelu_##T##_##V(Pointwise<T> a) { pointwise<T, V, gelu>(a); }                                    \
    extern "C" __global__ void leaky_relu_##T##_##V(Pointwise<T> a) { pointwise<T, V, leaky_relu>(a); }
KERNELS(float, 1)
KERNELS(float, 4)
KERNELS(bf16, 1)
KERNELS(bf16, 4)
KERNELS(f16, 1)
KERNELS(f16, 4)
