// Updates of parameters in place, in 32 bits, and what the norm of gradients decides of them.

// Many tensors at once: a block takes CHUNK values of one of them. What of a tensor is used, `at` says for each kernel.
struct Span {
    unsigned long long at[6]; // 0 for nothing
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

// What was decided of a step's gradients.
struct Decided {
    float norm;
    float factor; // not a number where the step is refused
    float value;  // the largest that counts, of either sign
};

// What counts of a gradient's value; what is not a number stays so.
DEVICE float counted(float gradient, Decided decided) {
    float x = gradient * decided.factor;
    return x > decided.value ? decided.value : x < -decided.value ? -decided.value : x;
}

// A step of Adam (Kingma and Ba 2015, algorithm 1) or AdamW (Loshchilov and Hutter 2019, algorithm 2), as PyTorch computes it.
struct AdamStep {
    float one_minus_beta1, beta2, one_minus_beta2, eps;
    float step_size;       // the learning rate over the first moment's correction
    float root_correction; // the root of the second moment's
    float l2;              // times the parameter, added to its gradient
    float keep;            // what decay leaves of the parameter itself
};
struct Adam {
    Many tensors; // parameter, gradient, first moment, second moment, largest one or 0 without AMSGrad, copy or 0
    const AdamStep* step;
    const Decided* decided;
};
template <typename T> DEVICE void adam(const Adam& a) {
    const AdamStep step = *a.step;
    const Decided decided = *a.decided;
    if (decided.factor != decided.factor) return;
    unsigned at, end;
    const Span& span = own_span(a.tensors, at, end);
    float *param = (float*)span.at[0], *first = (float*)span.at[2], *second = (float*)span.at[3];
    float* largest = (float*)span.at[4];
    const float* gradient = (const float*)span.at[1];
    T* copy = (T*)span.at[5];
    for (; at < end; at += blockDim.x) {
        float w = param[at], g = counted(gradient[at], decided) + step.l2 * w, m = first[at], v = second[at];
        m += (g - m) * step.one_minus_beta1;
        v = v * step.beta2 + step.one_minus_beta2 * g * g;
        first[at] = m;
        second[at] = v;
        if (largest) {
            v = fmaxf(largest[at], v);
            largest[at] = v;
        }
        w = w * step.keep - step.step_size * (m / (sqrtf(v) / step.root_correction + step.eps));
        param[at] = w;
        if (copy) from_float(w, copy[at]);
    }
}
extern "C" __global__ void adam_float(Adam a) { adam<float>(a); }
extern "C" __global__ void adam_bf16(Adam a) { adam<bf16>(a); }
extern "C" __global__ void adam_f16(Adam a) { adam<f16>(a); }

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
struct SgdStep {
    float lr, momentum;
    float entering; // the share of the gradient that enters the momentum
    float l2;       // times the parameter, added to its gradient
    float nesterov; // 0 or 1
};
struct Sgd {
    Many tensors; // parameter, gradient, momentum buffer or 0 without momentum, copy or 0
    const SgdStep* step;
    const Decided* decided;
};
template <typename T> DEVICE void sgd(const Sgd& a) {
    const SgdStep step = *a.step;
    const Decided decided = *a.decided;
    if (decided.factor != decided.factor) return;
    unsigned at, end;
    const Span& span = own_span(a.tensors, at, end);
    float *param = (float*)span.at[0], *buffer = (float*)span.at[2];
    const float* gradient = (const float*)span.at[1];
    T* copy = (T*)span.at[3];
    for (; at < end; at += blockDim.x) {
        float w = param[at], g = counted(gradient[at], decided) + step.l2 * w;
        if (buffer) {
            float b = step.momentum * buffer[at] + step.entering * g;
            buffer[at] = b;
            g = step.nesterov != 0.f ? g + step.momentum * b : b;
        }
        w -= step.lr * g;
        param[at] = w;
        if (copy) from_float(w, copy[at]);
    }
}
extern "C" __global__ void sgd_float(Sgd a) { sgd<float>(a); }
extern "C" __global__ void sgd_bf16(Sgd a) { sgd<bf16>(a); }
extern "C" __global__ void sgd_f16(Sgd a) { sgd<f16>(a); }

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

// One thread adds up the last sums and decides what becomes of the gradients whose squares they are of.
struct Decide {
    const double* sums;
    Decided* decided;
    double loss_scale; // what the gradients were multiplied with
    double norm;       // what they are scaled down to; infinite: whatever they come to
    float value;       // the largest value that counts
    unsigned count;
    unsigned only_finite; // refuses others
};
extern "C" __global__ void decide(Decide a) {
    if (thread_index() > 0) return;
    double sum = 0.;
    for (unsigned at = 0; at < a.count; at++) sum += a.sums[at];
    double norm = sqrt(sum) / a.loss_scale, factor = a.norm / (norm + 1e-6);
    // Not where the norm is not a number.
    factor = factor < 1. ? factor : 1.;
    // As the host reads it: what is finite in 64 bits alone is too large as well.
    a.decided->norm = (float)norm;
    bool finite = a.decided->norm - a.decided->norm == 0.f;
    a.decided->factor = a.only_finite && !finite ? bits_to_float(0x7fc00000u) : (float)(factor / a.loss_scale);
    a.decided->value = a.value;
}
