// In-place parameter updates, in 32 bits, and the clipping decision based on the gradients' norm.

// Many tensors at once: a block handles CHUNK values of one of them. P holds a tensor's addresses.
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

// The values of a thread: every blockDim.x-th value of one tensor, from `first` on and below `end`.
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

// The decision on a step's gradients.
struct Decided {
    float norm;
    float factor;
    float max_value; // limit of the absolute value
    float refused;   // 0 or 1
};

// A gradient value after scaling and clamping; NaN stays NaN.
DEVICE float counted(float gradient, const Decided& decided) {
    float x = gradient * decided.factor, max = decided.max_value;
    return x > max ? max : x < -max ? -max : x;
}

// Gradients after scaling and clamping.
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

// A parameter for a rule R, whose `step` returns the new value, given the gradient, and updates the state in
// `kept`.
template <typename T> struct ParamAt {
    float* param;
    const float* gradient;
    float* kept[3]; // null if the parameter lacks this state: it is 0 then, and discarded afterwards
    T* copy;        // or null
};
template <typename T, typename R> struct Update {
    Many<ParamAt<T>> tensors;
    const R* step;
    const Decided* decided;
};

// The rules of updates/rules.rs, which documents their numbers.
struct Adam {
    float one_minus_beta1, beta2, one_minus_beta2, eps, of_moment, of_gradient, root_correction, l2, keep;
};
DEVICE float step(const Adam& rule, float w, float gradient, float (&kept)[3]) {
    float &m = kept[0], &v = kept[1], &largest = kept[2];
    float g = gradient + rule.l2 * w;
    m += (g - m) * rule.one_minus_beta1;
    v = v * rule.beta2 + rule.one_minus_beta2 * g * g;
    // NaN stays NaN.
    largest = largest > v ? largest : v;
    return w * rule.keep - (rule.of_moment * m + rule.of_gradient * g) / (sqrtf(largest) / rule.root_correction + rule.eps);
}
struct Sgd {
    float lr, momentum, entering, l2, nesterov;
};
DEVICE float step(const Sgd& rule, float w, float gradient, float (&kept)[3]) {
    float& update = kept[0];
    float g = gradient + rule.l2 * w;
    update = rule.momentum * update + rule.entering * g;
    return w - rule.lr * (rule.nesterov != 0.f ? g + rule.momentum * update : update);
}
struct Rmsprop {
    float lr, alpha, one_minus_alpha, eps, momentum, l2, centered;
};
DEVICE float step(const Rmsprop& rule, float w, float gradient, float (&kept)[3]) {
    float &square = kept[0], &update = kept[1], &mean = kept[2];
    float g = gradient + rule.l2 * w;
    square = square * rule.alpha + rule.one_minus_alpha * g * g;
    mean += (g - mean) * rule.one_minus_alpha;
    float variance = rule.centered != 0.f ? square - mean * mean : square;
    update = rule.momentum * update + g / (sqrtf(variance) + rule.eps);
    return w - rule.lr * update;
}
struct Adagrad {
    float lr, eps, l2;
};
DEVICE float step(const Adagrad& rule, float w, float gradient, float (&kept)[3]) {
    float& sum = kept[0];
    float g = gradient + rule.l2 * w;
    sum += g * g;
    return w - rule.lr * g / (sqrtf(sum) + rule.eps);
}
struct Adadelta {
    float lr, rho, one_minus_rho, eps, l2;
};
DEVICE float step(const Adadelta& rule, float w, float gradient, float (&kept)[3]) {
    float &square = kept[0], &moved = kept[1];
    float g = gradient + rule.l2 * w;
    square = square * rule.rho + rule.one_minus_rho * g * g;
    float update = g * (sqrtf(moved + rule.eps) / sqrtf(square + rule.eps));
    moved = moved * rule.rho + rule.one_minus_rho * update * update;
    return w - rule.lr * update;
}
struct Adamax {
    float one_minus_beta1, beta2, eps, of_moment, l2;
};
DEVICE float step(const Adamax& rule, float w, float gradient, float (&kept)[3]) {
    float &m = kept[0], &largest = kept[1];
    float g = gradient + rule.l2 * w;
    m += (g - m) * rule.one_minus_beta1;
    float before = largest * rule.beta2, size = fabsf(g) + rule.eps;
    largest = before > size ? before : size;
    return w - rule.of_moment * m / largest;
}

template <typename T, typename R> DEVICE void update(const Update<T, R>& a) {
    const R rule = *a.step;
    const Decided decided = *a.decided;
    if (decided.refused != 0.f) return;
    auto it = own(a.tensors);
    ParamAt<T> at = it.at;
    for (unsigned i = it.first; i < it.end; i += blockDim.x) {
        float kept[3];
        for (int k = 0; k < 3; k++) kept[k] = at.kept[k] ? at.kept[k][i] : 0.f;
        float w = step(rule, at.param[i], counted(at.gradient[i], decided), kept);
        for (int k = 0; k < 3; k++)
            if (at.kept[k]) at.kept[k][i] = kept[k];
        at.param[i] = w;
        if (at.copy) from_float(w, at.copy[i]);
    }
}

#define RULE(NAME, R)                                                                                                          \
    extern "C" __global__ void NAME##_float(Update<float, R> a) { update(a); }                                                 \
    extern "C" __global__ void NAME##_bf16(Update<bf16, R> a) { update(a); }                                                   \
    extern "C" __global__ void NAME##_f16(Update<f16, R> a) { update(a); }
RULE(adam, Adam)
RULE(sgd, Sgd)
RULE(rmsprop, Rmsprop)
RULE(adagrad, Adagrad)
RULE(adadelta, Adadelta)
RULE(adamax, Adamax)

// Copies 32-bit master values to half-precision tensors.
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

// Moves tensors by a fraction of the way towards others.
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

// Each thread adds up the squares of its values, in 64 bits and always in the same order: one sum per thread
// of each block.
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

// One thread adds up the last sums and decides on the gradients that they are from.
struct Decide {
    const double* sums;
    Decided* decided;
    double loss_scale;    // the factor by which the gradients were multiplied
    double max_norm;      // the norm that they are scaled down to; infinite for no limit
    float max_value;      // the largest absolute value of one
    unsigned count;       // number of sums
    unsigned only_finite; // whether to refuse non-finite norms
};
extern "C" __global__ void decide(Decide a) {
    if (thread_index() > 0) return;
    double sum = 0.;
    for (unsigned i = 0; i < a.count; i++) sum += a.sums[i];
    double norm = sqrt(sum) / a.loss_scale, share = a.max_norm / (norm + 1e-6);
    // If the norm is NaN, so is the share; gradients then count in full, as on the host.
    share = share < 1. ? share : 1.;
    // As the host reads it: a norm that is finite only in 64 bits is too large as well.
    float read = (float)norm;
    bool is_finite = read - read == 0.f;
    *a.decided = {read, (float)(share / a.loss_scale), a.max_value, a.only_finite && !is_finite ? 1.f : 0.f};
}
