// What every kernel needs: number types, and loads and stores of several values per thread. Included before
// each source.
//
// The sources compile with NVRTC and nvcc without headers, and as plain C++ for tests, where `host.h` is
// included first.

typedef unsigned short bits16;
typedef long long index_t;

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
DEVICE float half_to_float(bits16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
DEVICE bits16 float_to_half(float x) {
    bits16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
DEVICE float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
DEVICE unsigned float_to_bits(float x) { return __float_as_uint(x); }
// Accurate to one or two units in the last place; a very large denominator gives 0.
DEVICE float quotient(float a, float b) { return __fdividef(a, b); }
#endif

struct bf16 {
    bits16 bits;
};
struct f16 {
    bits16 bits;
};

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return bits_to_float((unsigned)x.bits << 16); }
DEVICE float to_float(f16 x) { return half_to_float(x.bits); }

DEVICE void from_float(float x, float& to) { to = x; }
DEVICE void from_float(float x, bf16& to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
    // Rounds to nearest, ties to even; NaN stays NaN.
    unsigned bits = float_to_bits(x);
    unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = (bits16)(x != x ? 0x7fffu : rounded);
#endif
}
DEVICE void from_float(float x, f16& to) { to.bits = float_to_half(x); }

// V values, moved by one load or store.
template <typename T, int V> struct alignas(sizeof(T) * V) Pack {
    T values[V];
};

template <typename T, int V> DEVICE void load(const T* from, float (&x)[V]) {
    Pack<T, V> pack = *(const Pack<T, V>*)from;
    for (int i = 0; i < V; i++) x[i] = to_float(pack.values[i]);
}

template <typename T, int V> DEVICE Pack<T, V> narrowed(const float (&x)[V]) {
    Pack<T, V> pack;
    for (int i = 0; i < V; i++) from_float(x[i], pack.values[i]);
    return pack;
}

template <typename T, int V> DEVICE void store(T* to, const float (&x)[V]) { *(Pack<T, V>*)to = narrowed<T, V>(x); }

// The index of this thread among all threads. Thread counts are below 2^31; memory offsets need more bits.
DEVICE unsigned thread_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

// Pixels of images within a larger tensor, or nothing if `at` is null; the strides are in values, from image
// to image and from pixel to pixel.
template <typename T> struct Plane {
    T* at;
    index_t image;
    index_t pixel;
};
template <typename T> DEVICE T* place(Plane<T> plane, unsigned image, unsigned pixel) {
    return plane.at + image * plane.image + pixel * plane.pixel;
}
