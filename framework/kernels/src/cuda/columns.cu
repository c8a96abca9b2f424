// Matrices (rows, columns) whose rows are pixels: bias, its gradient, copies of some columns. And weights in another order.

// Adds a bias (columns) to every row of y.
template <typename T> struct AddBias {
    T* y;
    const T* bias;
    unsigned count; // of all values
    unsigned columns;
};
template <typename T> DEVICE void add_bias(const AddBias<T>& a) {
    unsigned at = thread_index();
    if (at >= a.count) return;
    from_float(to_float(a.y[at]) + to_float(a.bias[at % a.columns]), a.y[at]);
}

// Sums of each column of x (rows, columns) over stretches of rows: (parts, columns), in 32 bits and always in one order. A
// thread takes V columns.
template <typename T> struct ColumnSums {
    const T* x;
    float* sums;
    unsigned rows, columns;
    unsigned stretch; // rows of a part, but for the last
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
    unsigned pixels; // of an image
};
template <typename T> DEVICE void copy_columns(const CopyColumns<T>& a) {
    unsigned at = thread_index();
    if (at >= a.rows * a.columns) return;
    unsigned row = at / a.columns, column = at % a.columns, image = row / a.pixels, pixel = row % a.pixels;
    place(a.to, image, pixel)[column] = place(a.from, image, pixel)[column];
}

// A ConvLSTM layer's weight (outputs, all, kernel), input channels x then h, as its convolution takes it: (outputs, kernel,
// channels), h then x then zeros. `packed` is read or written.
template <typename T> struct PackWeight {
    T* weight;
    T* packed;
    unsigned outputs, all, hidden, kernel; // `kernel` taps
    unsigned channels;
};
template <typename T> DEVICE bool packed_from(const PackWeight<T>& a, unsigned at, unsigned& from) {
    unsigned channel = at % a.channels, tap = at / a.channels % a.kernel, output = at / a.channels / a.kernel;
    if (channel >= a.all) return false;
    channel = channel < a.hidden ? a.all - a.hidden + channel : channel - a.hidden;
    from = (output * a.all + channel) * a.kernel + tap;
    return true;
}
template <typename T> DEVICE void pack_weight(const PackWeight<T>& a) {
    unsigned at = thread_index(), from;
    if (at >= a.outputs * a.kernel * a.channels) return;
    a.packed[at] = packed_from(a, at, from) ? a.weight[from] : T();
}
// The way back: each value of the weight has one place.
template <typename T> DEVICE void unpack_weight(const PackWeight<T>& a) {
    unsigned at = thread_index(), from;
    if (at >= a.outputs * a.kernel * a.channels) return;
    if (packed_from(a, at, from)) a.weight[from] = a.packed[at];
}

// Narrows what was summed in 32 bits.
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
    extern "C" __global__ void column_sums_##T##_1(ColumnSums<T> a) { column_sums<T, 1>(a); }                                  \
    extern "C" __global__ void column_sums_##T##_4(ColumnSums<T> a) { column_sums<T, 4>(a); }                                  \
    extern "C" __global__ void copy_columns_##T(CopyColumns<T> a) { copy_columns<T>(a); }                                      \
    extern "C" __global__ void pack_weight_##T(PackWeight<T> a) { pack_weight<T>(a); }                                         \
    extern "C" __global__ void unpack_weight_##T(PackWeight<T> a) { unpack_weight<T>(a); }                                     \
    extern "C" __global__ void narrow_##T(Narrow<T> a) { narrow<T>(a); }
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
