// Updates of parameters in place, in 32 bits, and the sum of gradients' squares.

// Many tensors at once: a block takes CHUNK values of one of them. What of a tensor is used, `at` says for each kernel.
struct Span {
    unsigned long long at[5]; // 0 for nothing
    unsigned count;           // values
    unsigned end;             // blocks of this tensor and of those before it
};
struct Many {
    Span spans[64];
    unsigned tensors;
};
enum { CHUNK = 4096 };

// The tensor that this block works on, and which of its values this thread takes: from `first` on, every blockDim.x-th,
// below `end`.
DEVICE const Span& own_span(const Many& many, unsigned& first, unsigned& end) {
    unsigned tensor = 0;
    while (tensor + 1 < many.tensors && blockIdx.x >= many.spans[tensor].end) tensor++;
    const Span& span = many.spans[tensor];
    unsigned before = tensor ? many.spans[tensor - 1].end : 0;
    first = (blockIdx.x - before) * CHUNK;
    end = span.count - first < CHUNK ? span.count : first + CHUNK;
    first += threadIdx.x;
    return span;
}

// A step of Adam (Kingma and Ba 2015, algorithm 1) or AdamW (Loshchilov and Hutter 2019, algorithm 2), as PyTorch computes it.
struct Adam {
    Many tensors; // parameter, gradient, first moment, second moment, largest second moment or 0 without AMSGrad
    float one_minus_beta1, beta2, one_minus_beta2, eps;
    float step_size;       // the learning rate over the first moment's correction
    float root_correction; // the root of the second moment's
    float l2;              // times the parameter, added to its gradient
    float keep;            // what decay leaves of the parameter itself
};
extern "C" __global__ void adam(Adam a) {
    unsigned at, end;
    const Span& span = own_span(a.tensors, at, end);
    float *param = (float*)span.at[0], *first = (float*)span.at[2], *second = (float*)span.at[3];
    float* largest = (float*)span.at[4];
    const float* gradient = (const float*)span.at[1];
    for (; at < end; at += blockDim.x) {
        float w = param[at], g = gradient[at] + a.l2 * w, m = first[at], v = second[at];
        m += (g - m) * a.one_minus_beta1;
        v = v * a.beta2 + a.one_minus_beta2 * g * g;
        first[at] = m;
        second[at] = v;
        if (largest) {
            v = fmaxf(largest[at], v);
            largest[at] = v;
        }
        param[at] = w * a.keep - a.step_size * (m / (sqrtf(v) / a.root_correction + a.eps));
    }
}

// Gives half-precision copies the values that their 32-bit masters have now.
DEVICE void publish(const Many& tensors, bf16) {
    unsigned at, end;
    const Span& span = own_span(tensors, at, end);
    for (; at < end; at += blockDim.x) from_float(((const float*)span.at[0])[at], ((bf16*)span.at[1])[at]);
}
DEVICE void publish(const Many& tensors, f16) {
    unsigned at, end;
    const Span& span = own_span(tensors, at, end);
    for (; at < end; at += blockDim.x) from_float(((const float*)span.at[0])[at], ((f16*)span.at[1])[at]);
}
extern "C" __global__ void publish_bf16(Many tensors) { publish(tensors, bf16()); }
extern "C" __global__ void publish_f16(Many tensors) { publish(tensors, f16()); }

// A step of SGD (Sutskever et al. 2013), as PyTorch computes it.
struct Sgd {
    Many tensors; // parameter, gradient, momentum buffer or 0 without momentum
    float lr, momentum;
    float entering; // the share of the gradient that enters the momentum
    float l2;       // times the parameter, added to its gradient
    unsigned nesterov;
};
extern "C" __global__ void sgd(Sgd a) {
    unsigned at, end;
    const Span& span = own_span(a.tensors, at, end);
    float *param = (float*)span.at[0], *buffer = (float*)span.at[2];
    const float* gradient = (const float*)span.at[1];
    for (; at < end; at += blockDim.x) {
        float w = param[at], g = gradient[at] + a.l2 * w;
        if (buffer) {
            float b = a.momentum * buffer[at] + a.entering * g;
            buffer[at] = b;
            g = a.nesterov ? g + a.momentum * b : b;
        }
        param[at] = w - a.lr * g;
    }
}

// Moves tensors a share of the way to others.
struct Approach {
    Many tensors; // what is moved, where to
    float share;
};
extern "C" __global__ void approach(Approach a) {
    unsigned at, end;
    const Span& span = own_span(a.tensors, at, end);
    float* x = (float*)span.at[0];
    const float* target = (const float*)span.at[1];
    for (; at < end; at += blockDim.x) x[at] += (target[at] - x[at]) * a.share;
}

// Each thread adds up the squares of its values, in 64 bits and always in one order: a sum for each thread of each block.
struct SquareSums {
    Many tensors;
    double* sums;
};
extern "C" __global__ void square_sums(SquareSums a) {
    unsigned at, end;
    const float* x = (const float*)own_span(a.tensors, at, end).at[0];
    double sum = 0.;
    for (; at < end; at += blockDim.x) sum += (double)x[at] * (double)x[at];
    a.sums[thread_index()] = sum;
}

// Each of `parts` threads adds up every parts-th sum.
struct Sums {
    const double* x;
    double* sums;
    unsigned count, parts;
};
extern "C" __global__ void sums(Sums a) {
    unsigned part = thread_index();
    if (part >= a.parts) return;
    double sum = 0.;
    for (index_t at = part; at < a.count; at += a.parts) sum += a.x[at];
    a.sums[part] = sum;
}
