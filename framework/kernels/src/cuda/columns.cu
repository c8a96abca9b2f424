// Matrices (rows, columns) whose rows are pixels: bias, its gradient, copies of some columns.

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

// Sums of each column of x (rows, columns) over stretches of rows: (parts, columns), in 32 bits and always in one order.
template <typename T> struct ColumnSums {
    const T* x;
    float* sums;
    unsigned rows, columns;
    unsigned stretch; // rows of a part, but for the last
    unsigned parts;
};
template <typename T> DEVICE void column_sums(const ColumnSums<T>& a) {
    unsigned at = thread_index();
    if (at >= a.parts * a.columns) return;
    unsigned part = at / a.columns, column = at % a.columns, end = (part + 1) * a.stretch;
    if (end > a.rows) end = a.rows;
    float sum = 0.f;
    for (unsigned row = part * a.stretch; row < end; row++) sum += to_float(a.x[(index_t)row * a.columns + column]);
    a.sums[at] = sum;
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
    extern "C" __global__ void column_sums_##T(ColumnSums<T> a) { column_sums<T>(a); }                                         \
    extern "C" __global__ void copy_columns_##T(CopyColumns<T> a) { copy_columns<T>(a); }                                      \
    extern "C" __global__ void narrow_##T(Narrow<T> a) { narrow<T>(a); }
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
