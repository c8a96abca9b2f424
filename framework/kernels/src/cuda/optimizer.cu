// Updates of parameters in place, in 32 bits, and the sum of gradients' squares.

// A step of Adam (Kingma and Ba 2015, algorithm 1) or AdamW (Loshchilov and Hutter 2019, algorithm 2), as PyTorch computes it.
struct Adam {
    float* w;
    const float* gradient;
    float* first;
    float* second;
    float* largest; // null without AMSGrad
    unsigned count;
    float one_minus_beta1, beta2, one_minus_beta2, eps;
    float step_size;       // the learning rate over the first moment's correction
    float root_correction; // the root of the second moment's
    float l2;              // times the parameter, added to its gradient
    float keep;            // what decay leaves of the parameter itself
};
extern "C" __global__ void adam(Adam a) {
    unsigned at = thread_index();
    if (at >= a.count) return;
    float w = a.w[at], g = a.gradient[at] + a.l2 * w, m = a.first[at], v = a.second[at];
    m += (g - m) * a.one_minus_beta1;
    v = v * a.beta2 + a.one_minus_beta2 * g * g;
    a.first[at] = m;
    a.second[at] = v;
    if (a.largest) {
        v = fmaxf(a.largest[at], v);
        a.largest[at] = v;
    }
    a.w[at] = w * a.keep - a.step_size * (m / (sqrtf(v) / a.root_correction + a.eps));
}

// A step of SGD (Sutskever et al. 2013), as PyTorch computes it. `momentum_buffer` is null without momentum.
struct Sgd {
    float* w;
    const float* gradient;
    float* momentum_buffer;
    unsigned count;
    float lr, momentum;
    float entering; // the share of the gradient that enters the momentum
    float l2;       // times the parameter, added to its gradient
    unsigned nesterov;
};
extern "C" __global__ void sgd(Sgd a) {
    unsigned at = thread_index();
    if (at >= a.count) return;
    float w = a.w[at], g = a.gradient[at] + a.l2 * w;
    if (a.momentum_buffer) {
        float b = a.momentum * a.momentum_buffer[at] + a.entering * g;
        a.momentum_buffer[at] = b;
        g = a.nesterov ? g + a.momentum * b : b;
    }
    a.w[at] = w - a.lr * g;
}

// Moves x a share of the way to `target`.
struct Approach {
    float* x;
    const float* target;
    unsigned count;
    float share;
};
extern "C" __global__ void approach(Approach a) {
    unsigned at = thread_index();
    if (at < a.count) a.x[at] += (a.target[at] - a.x[at]) * a.share;
}

// Each of `parts` threads adds up every parts-th square, in 64 bits and always in one order.
struct SquareSums {
    const float* x;
    double* sums;
    unsigned count, parts;
};
extern "C" __global__ void square_sums(SquareSums a) {
    unsigned part = thread_index();
    if (part >= a.parts) return;
    double sum = 0.;
    for (index_t at = part; at < a.count; at += a.parts) sum += (double)a.x[at] * (double)a.x[at];
    a.sums[part] = sum;
}

// The same of sums.
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
