// Compiles the kernel sources as C++ for tests: each device thread is a function call.
#include <cmath>
#include <cstring>

#define DEVICE static inline
#define __global__
#define __launch_bounds__(threads, blocks)

struct Place {
    unsigned x;
};
static Place threadIdx, blockIdx, blockDim, gridDim;

extern "C" void stand_at(unsigned block, unsigned blocks, unsigned thread, unsigned threads) {
    blockIdx.x = block;
    gridDim.x = blocks;
    threadIdx.x = thread;
    blockDim.x = threads;
}

DEVICE float bits_to_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
DEVICE unsigned float_to_bits(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
DEVICE float half_to_float(unsigned short bits) {
    _Float16 x;
    memcpy(&x, &bits, 2);
    return (float)x;
}
DEVICE unsigned short float_to_half(float x) {
    _Float16 half = (_Float16)x;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}
DEVICE float quotient(float a, float b) { return a / b; }
