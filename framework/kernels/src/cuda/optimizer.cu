// Updates of parameters in place, in 32 bits, and what the norm of gradients decides of them.

// Many tensors at once: a block takes CHUNK values of one of them. P says where a kernel finds what belongs to a tensor.
template <typename P> struct Span {
    P at;
    unsigned count; // values
    unsigned end;   // blocks of this tensor and of those before it
};
template <typename P> struct Many {
    Span<P> spans[64];
    unsigned tensors;
};
enum { CHUNK = 4096 };

// What a thread takes: of one tensor every blockDim.x-th value from `first` on, below `end`.
template <typename P> struct Own {
    P at;
    unsigned first, end;
};
template <typename P> DEVICE Own<P> own(const Many<P>& many) {
    unsigned tensor = 0;
    while (tensor + 1 < many.tensors && blockIdx.x >= many.spans[tensor].end) tensor++;
    const Span<P>& span = many.spans[tensor];
    unsigned before = tensor ? many.spans[tensor - 1].end : 0;
    unsigned first = (blockIdx.x - before) * CHUNK;
    unsigned end = span.count - first < CHUNK ? span.count : first + CHUNK;
    return {span.at, first + threadIdx.x, end};
}

// What was decided of a step's gradients.
struct Decided {
    float norm;
    float factor;
    float max_value; // of either sign
    float refused;   // 0 or 1
};

// What counts of a gradient's value; what is not a number stays so.
DEVICE float counted(float gradient, const Decided& decided) {
    float x = gradient * decided.factor, max = decided.max_value;
    return x > max ? max : x < -max ? -max : x;
}

// Gradients as they count.
struct CountedAt {
    const float* gradient;
    float* to;
};
struct Counted {
    Many<CountedAt> tensors;
    const Decided* decided;
};
extern "C" __global__ void counted(Counted a) {
    const Decided decided = *a.decided;
    auto it = own(a.tensors);
    for (unsigned i = it.first; i < it.end; i += blockDim.x) it.at.to[i] = counted(it.at.gradient[i], decided);
}

// What a rule moves parameters by: `S` are its numbers.
template <typename P, typename S> struct Update {
    Many<P> tensors;
    const S* step;
    const Decided* decided;
};

// A step of Adam (Kingma and Ba 2015, algorithm 1) or AdamW (Loshchilov and Hutter 2019, algorithm 2), as PyTorch computes it.
struct AdamStep {
    float one_minus_beta1, beta2, one_minus_beta2, eps;
    float step_size;       // the learning rate over the first moment's correction
    float root_correction; // the root of the second moment's
    float l2;              // times the parameter, added to its gradient
    float keep;            // what decay leaves of the parameter itself
};
template <typename T> struct AdamAt {
    float* param;
    const float* gradient;
    float *first, *second;
    float* largest; // null without AMSGrad
    T* copy;        // or null
};
template <typename T> DEVICE void adam(const Update<AdamAt<T>, AdamStep>& a) {
    const AdamStep step = *a.step;
    const Decided decided = *a.decided;
    if (decided.refused != 0.f) return;
    auto it = own(a.tensors);
    AdamAt<T> at = it.at;
    for (unsigned i = it.first; i < it.end; i += blockDim.x) {
        float w = at.param[i], g = counted(at.gradient[i], decided) + step.l2 * w, m = at.first[i], v = at.second[i];
        m += (g - m) * step.one_minus_beta1;
        v = v * step.beta2 + step.one_minus_beta2 * g * g;
        at.first[i] = m;
        at.second[i] = v;
        if (at.largest) {
            v = fmaxf(at.largest[i], v);
            at.largest[i] = v;
        }
        w = w * step.keep - step.step_size * (m / (sqrtf(v) / step.root_correction + step.eps));
        at.param[i] = w;
        if (at.copy) from_float(w, at.copy[i]);
    }
}
extern "C" __global__ void adam_float(Update<AdamAt<float>, AdamStep> a) { adam(a); }
extern "C" __global__ void adam_bf16(Update<AdamAt<bf16>, AdamStep> a) { adam(a); }
extern "C" __global__ void adam_f16(Update<AdamAt<f16>, AdamStep> a) { adam(a); }

// A step of SGD (Sutskever et al. 2013), as PyTorch computes it.
struct SgdStep {
    float lr, momentum;
    float entering; // the share of the gradient that enters the momentum
    float l2;       // times the parameter, added to its gradient
    float nesterov; // 0 or 1
};
template <typename T> struct SgdAt {
    float* param;
    const float* gradient;
    float* buffer; // null without momentum
    T* copy;       // or null
};
template <typename T> DEVICE void sgd(const Update<SgdAt<T>, SgdStep>& a) {
    const SgdStep step = *a.step;
    const Decided decided = *a.decided;
    if (decided.refused != 0.f) return;
    auto it = own(a.tensors);
    SgdAt<T> at = it.at;
    for (unsigned i = it.first; i < it.end; i += blockDim.x) {
        float w = at.param[i], g = counted(at.gradient[i], decided) + step.l2 * w;
        if (at.buffer) {
            float b = step.momentum * at.buffer[i] + step.entering * g;
            at.buffer[i] = b;
            g = step.nesterov != 0.f ? g + step.momentum * b : b;
        }
        w -= step.lr * g;
        at.param[i] = w;
        if (at.copy) from_float(w, at.copy[i]);
    }
}
extern "C" __global__ void sgd_float(Update<SgdAt<float>, SgdStep> a) { sgd(a); }
extern "C" __global__ void sgd_bf16(Update<SgdAt<bf16>, SgdStep> a) { sgd(a); }
extern "C" __global__ void sgd_f16(Update<SgdAt<f16>, SgdStep> a) { sgd(a); }

// Gives half-precision copies the values that their 32-bit masters have now.
template <typename T> struct PublishAt {
    const float* master;
    T* copy;
};
template <typename T> DEVICE void publish(const Many<PublishAt<T>>& tensors) {
    auto it = own(tensors);
    for (unsigned i = it.first; i < it.end; i += blockDim.x) from_float(it.at.master[i], it.at.copy[i]);
}
extern "C" __global__ void publish_bf16(Many<PublishAt<bf16>> tensors) { publish(tensors); }
extern "C" __global__ void publish_f16(Many<PublishAt<f16>> tensors) { publish(tensors); }

// Moves tensors a share of the way to others.
struct ApproachAt {
    float* x;
    const float* target;
};
struct Approach {
    Many<ApproachAt> tensors;
    float share;
};
extern "C" __global__ void approach(Approach a) {
    auto it = own(a.tensors);
    float* x = it.at.x;
    for (unsigned i = it.first; i < it.end; i += blockDim.x) x[i] += (it.at.target[i] - x[i]) * a.share;
}

// Each thread adds up the squares of its values, in 64 bits and always in one order: a sum for each thread of each block.
struct SquareSums {
    Many<const float*> tensors;
    double* sums;
};
extern "C" __global__ void square_sums(SquareSums a) {
    auto it = own(a.tensors);
    double sum = 0.;
    for (unsigned i = it.first; i < it.end; i += blockDim.x) sum += (double)it.at[i] * (double)it.at[i];
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
    double loss_scale;    // what the gradients were multiplied with
    double max_norm;      // what they are scaled down to; infinite: whatever they come to
    float max_value;      // that counts of one
    unsigned count;       // sums
    unsigned only_finite; // refuses others
};
extern "C" __global__ void decide(Decide a) {
    if (thread_index() > 0) return;
    double sum = 0.;
    for (unsigned i = 0; i < a.count; i++) sum += a.sums[i];
    double norm = sqrt(sum) / a.loss_scale, share = a.max_norm / (norm + 1e-6);
    // Where the norm is not a number, neither is the share: then gradients count whole, as they do on the host.
    share = share < 1. ? share : 1.;
    // As the host reads it: what is finite in 64 bits alone is too large as well.
    float read = (float)norm;
    bool is_finite = read - read == 0.f;
    *a.decided = {read, (float)(share / a.loss_scale), a.max_value, a.only_finite && !is_finite ? 1.f : 0.f};
}
