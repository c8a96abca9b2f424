// Matrices (rows, columns) whose rows are pixels: adding a bias, scaling, gradients of both, copies of some columns. Also
// packing of weights.

// Adds a bias (columns) to every row of y.
template <typename T> struct AddBias {
    T* y;
    const T* bias;
    unsigned count; // of all values of y
    unsigned columns;
};
template <typename T> DEVICE void add_bias(const AddBias<T>& a) {
    unsigned at = thread_index();
    if (at >= a.count) return;
    from_float(to_float(a.y[at]) + to_float(a.bias[at % a.columns]), a.y[at]);
}

// Multiplies x by a factor per column, the same for all rows or another one for each sample's rows. A thread handles V
// values.
template <typename T> struct ScaleColumns {
    const T* x;
    const T* factors; // (samples, columns)
    T* y;
    unsigned count;  // of all values of x
    unsigned sample; // values per sample
    unsigned columns;
};
template <typename T, int V> DEVICE void scale_columns(const ScaleColumns<T>& a) {
    unsigned at = thread_index() * V;
    if (at >= a.count) return;
    float x[V], factors[V];
    load<T, V>(a.x + at, x);
    load<T, V>(a.factors + (index_t)(at / a.sample) * a.columns + at % a.columns, factors);
    for (int v = 0; v < V; v++) x[v] *= factors[v];
    store<T, V>(a.y + at, x);
}

// Sums of each column of the product of x and d (rows, columns), as `column_sums` adds up those of one tensor.
template <typename T> struct ProductSums {
    const T* x;
    const T* d;
    float* sums;
    unsigned rows, columns;
    unsigned stretch;
    unsigned parts;
};
template <typename T, int V> DEVICE void product_sums(const ProductSums<T>& a) {
    unsigned groups = a.columns / V, at = thread_index();
    if (at >= a.parts * groups) return;
    unsigned part = at / groups, column = at % groups * V, end = (part + 1) * a.stretch;
    if (end > a.rows) end = a.rows;
    float sums[V], x[V], d[V];
    for (int v = 0; v < V; v++) sums[v] = 0.f;
    for (unsigned row = part * a.stretch; row < end; row++) {
        load<T, V>(a.x + (index_t)row * a.columns + column, x);
        load<T, V>(a.d + (index_t)row * a.columns + column, d);
        for (int v = 0; v < V; v++) sums[v] += x[v] * d[v];
    }
    store<float, V>(a.sums + (index_t)part * a.columns + column, sums);
}

// Sums of each column of x (rows, columns) over stretches of rows: (parts, columns), in 32 bits and always in
// the same order. A thread handles V columns.
template <typename T> struct ColumnSums {
    const T* x;
    float* sums;
    unsigned rows, columns;
    unsigned stretch; // rows per part, except the last
    unsigned parts;
};
template <typename T, int V> DEVICE void column_sums(const ColumnSums<T>& a) {
    unsigned groups = a.columns / V, at = thread_index();
    if (at >= a.parts * groups) return;
    unsigned part = at / groups, column = at % groups * V, end = (part + 1) * a.stretch;
    if (end > a.rows) end = a.rows;
    float sums[V], more[V];
    for (int v = 0; v < V; v++) sums[v] = 0.f;
    for (unsigned row = part * a.stretch; row < end; row++) {
        load<T, V>(a.x + (index_t)row * a.columns + column, more);
        for (int v = 0; v < V; v++) sums[v] += more[v];
    }
    store<float, V>(a.sums + (index_t)part * a.columns + column, sums);
}

// Copies the first columns of each pixel of each image.
template <typename T> struct CopyColumns {
    Plane<const T> from;
    Plane<T> to;
    unsigned rows; // pixels of all images
    unsigned columns;
    unsigned pixels; // pixels per image
};
template <typename T> DEVICE void copy_columns(const CopyColumns<T>& a) {
    unsigned at = thread_index();
    if (at >= a.rows * a.columns) return;
    unsigned row = at / a.columns, column = at % a.columns, image = row / a.pixels, pixel = row % a.pixels;
    place(a.to, image, pixel)[column] = place(a.from, image, pixel)[column];
}

// Packs a ConvLSTM layer's weight (outputs, all, kernel), with input channels x then h, for its convolutions:
// (outputs, kernel, channels), with h, x, zeros, followed for the first step by (outputs, kernel, first
// channels), with x, zeros. `weight` is read to pack it, and written when unpacking.
template <typename T> struct PackWeight {
    T* weight;
    T* packed;
    unsigned outputs, all, hidden, kernel; // `kernel` taps
    unsigned channels, first_channels;
};
template <typename T> DEVICE void pack_weight(const PackWeight<T>& a) {
    unsigned rows = a.outputs * a.kernel, x = a.all - a.hidden, at = thread_index();
    if (at >= rows * (a.channels + a.first_channels)) return;
    bool is_first = at >= rows * a.channels;
    unsigned to = is_first ? at - rows * a.channels : at, channels = is_first ? a.first_channels : a.channels;
    unsigned row = to / channels, channel = to % channels, hidden = is_first ? 0 : a.hidden;
    unsigned from = channel < hidden ? x + channel : channel - hidden;
    bool is_zero = channel >= hidden + x;
    a.packed[at] = is_zero ? T() : a.weight[(row / a.kernel * a.all + from) * a.kernel + row % a.kernel];
}
// The adjoint of packing: each value of x is in two places.
template <typename T> DEVICE void unpack_weight(const PackWeight<T>& a) {
    unsigned x = a.all - a.hidden, at = thread_index();
    if (at >= a.outputs * a.all * a.kernel) return;
    unsigned channel = at / a.kernel % a.all, row = at / a.kernel / a.all * a.kernel + at % a.kernel;
    const T* packed = a.packed + row * a.channels;
    const T* first = a.packed + a.outputs * a.kernel * a.channels + row * a.first_channels;
    if (channel >= x) a.weight[at] = packed[channel - x];
    else from_float(to_float(packed[a.hidden + channel]) + to_float(first[channel]), a.weight[at]);
}

// Converts 32-bit sums to T.
template <typename T> struct Narrow {
    const float* from;
    T* to;
    unsigned count;
};
template <typename T> DEVICE void narrow(const Narrow<T>& a) {
    unsigned at = thread_index();
    if (at < a.count) from_float(a.from[at], a.to[at]);
}

#define KERNELS(T)                                                                                                             \
    extern "C" __global__ void add_bias_##T(AddBias<T> a) { add_bias<T>(a); }                                                  \
    extern "C" __global__ void scale_columns_##T##_1(ScaleColumns<T> a) { scale_columns<T, 1>(a); }                            \
    extern "C" __global__ void scale_columns_##T##_4(ScaleColumns<T> a) { scale_columns<T, 4>(a); }                            \
    extern "C" __global__ void product_sums_##T##_1(ProductSums<T> a) { product_sums<T, 1>(a); }                               \
    extern "C" __global__ void product_sums_##T##_4(ProductSums<T> a) { product_sums<T, 4>(a); }                               \
    extern "C" __global__ void column_sums_##T##_1(ColumnSums<T> a) { column_sums<T, 1>(a); }                                  \
    extern "C" __global__ void column_sums_##T##_4(ColumnSums<T> a) { column_sums<T, 4>(a); }                                  \
    extern "C" __global__ void copy_columns_##T(CopyColumns<T> a) { copy_columns<T>(a); }                                      \
    extern "C" __global__ void pack_weight_##T(PackWeight<T> a) { pack_weight<T>(a); }                                         \
    extern "C" __global__ void unpack_weight_##T(PackWeight<T> a) { unpack_weight<T>(a); }                                     \
    extern "C" __global__ void narrow_##T(Narrow<T> a) { narrow<T>(a); }
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
