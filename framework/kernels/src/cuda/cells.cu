// The pointwise parts of recurrent cells, in 32 bits: sums of gates, memory updates, output gates, blends.
//
// A row is a pixel, in which gates of `width` channels are stored side by side; a thread handles V channels
// of one gate.

DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// The channels of this thread, among `count` parts of `width` channels in each row.
struct Spot {
    unsigned row, part, channel;
    bool exists;
};
template <int V> DEVICE Spot spot(unsigned rows, unsigned count, unsigned width) {
    unsigned groups = width / V, at = thread_index();
    return {at / groups / count, at / groups % count, at % groups * V, at < rows * count * groups};
}

// A convolution's contribution to gates: the offset of each gate in its rows, or -1 if it does not
// contribute.
struct Term {
    const float* at; // or null
    unsigned stride; // values from row to row
    int places[16];
};
struct SumGates {
    Term terms[3];
    float* sum; // (rows, gates width)
    unsigned rows, gates, width;
};
template <int V> DEVICE void sum_gates(const SumGates& a) {
    Spot spot = ::spot<V>(a.rows, a.gates, a.width);
    if (!spot.exists) return;
    float sum[V], x[V];
    for (int v = 0; v < V; v++) sum[v] = 0.f;
    for (int term = 0; term < 3; term++) {
        int place = a.terms[term].places[spot.part];
        if (!a.terms[term].at || place < 0) continue;
        load<float, V>(a.terms[term].at + (index_t)spot.row * a.terms[term].stride + place + spot.channel, x);
        for (int v = 0; v < V; v++) sum[v] += x[v];
    }
    store<float, V>(a.sum + ((index_t)spot.row * a.gates + spot.part) * a.width + spot.channel, sum);
}

// m' = sigmoid(f + bias) m + sigmoid(i) tanh(g), or the gradients of gates and m given that of m'.
struct MemoryUpdate {
    const float* gates;  // (rows, count width)
    const float* memory; // (rows, width)
    const float* d;      // (rows, width), or null for the forward pass
    float* to;           // (rows, width): m', or the gradient of m, which may be null
    float* d_gates;      // (rows, count width), if there is d
    int input, candidate, forget; // indices of gates; forget may be -1: nothing is forgotten
    float bias;
    unsigned squash; // 0 or 1: whether to use tanh(m) instead of m
    unsigned rows, width, count;
};
template <int V> DEVICE void memory_update(const MemoryUpdate& a) {
    Spot spot = ::spot<V>(a.rows, 1, a.width);
    if (!spot.exists) return;
    index_t cell = (index_t)spot.row * a.width + spot.channel;
    index_t gates = (index_t)spot.row * a.count * a.width + spot.channel;
    float i[V], g[V], f[V], m[V], d[V];
    load<float, V>(a.gates + gates + a.input * a.width, i);
    load<float, V>(a.gates + gates + a.candidate * a.width, g);
    load<float, V>(a.memory + cell, m);
    if (a.forget >= 0) load<float, V>(a.gates + gates + a.forget * a.width, f);
    if (a.d) load<float, V>(a.d + cell, d);
    float zero[V];
    for (int v = 0; v < V; v++) {
        float input = sigmoid(i[v]), candidate = tanhf(g[v]), forget = a.forget >= 0 ? sigmoid(f[v] + a.bias) : 1.f;
        float kept = a.squash ? tanhf(m[v]) : m[v];
        zero[v] = 0.f;
        if (!a.d) {
            m[v] = forget * kept + input * candidate;
            continue;
        }
        i[v] = d[v] * candidate * input * (1.f - input);
        g[v] = d[v] * input * (1.f - candidate * candidate);
        f[v] = d[v] * kept * forget * (1.f - forget);
        m[v] = d[v] * forget * (a.squash ? 1.f - kept * kept : 1.f);
    }
    if (a.to) store<float, V>(a.to + cell, m);
    if (!a.d) return;
    for (int gate = 0; gate < (int)a.count; gate++) {
        float* to = a.d_gates + gates + gate * a.width;
        if (gate == a.input) store<float, V>(to, i);
        else if (gate == a.candidate) store<float, V>(to, g);
        else if (gate == a.forget) store<float, V>(to, f);
        else store<float, V>(to, zero);
    }
}

// An output gate times tanh(y), or the gradients of y, of the gates and of the additional term, given that of
// the result.
struct OpenOutput {
    const float* gates; // (rows, count width)
    const float* y;     // (rows, width)
    const float* more;  // (rows, width), or null: added to the gate
    const float* d;     // (rows, width), or null for the forward pass
    float* to;          // (rows, width): the output, or the gradient of y
    float* d_gates;     // (rows, count width), if there is d
    float* d_more;      // (rows, width), or null
    int place;          // index of the gate
    unsigned kind;      // 0: sigmoid(o), 1: tanh(o), 2: sigmoid(tanh(o))
    unsigned rows, width, count;
};
template <int V> DEVICE void open_output(const OpenOutput& a) {
    Spot spot = ::spot<V>(a.rows, 1, a.width);
    if (!spot.exists) return;
    index_t cell = (index_t)spot.row * a.width + spot.channel;
    index_t gates = (index_t)spot.row * a.count * a.width + spot.channel;
    float o[V], y[V], more[V], d[V], zero[V];
    for (int v = 0; v < V; v++) more[v] = zero[v] = 0.f;
    load<float, V>(a.gates + gates + a.place * a.width, o);
    load<float, V>(a.y + cell, y);
    if (a.more) load<float, V>(a.more + cell, more);
    if (a.d) load<float, V>(a.d + cell, d);
    for (int v = 0; v < V; v++) {
        float x = o[v] + more[v], inner = a.kind ? tanhf(x) : x;
        float open = a.kind == 1 ? inner : sigmoid(inner);
        float slope = (a.kind == 1 ? 1.f : open * (1.f - open)) * (a.kind ? 1.f - inner * inner : 1.f);
        float squashed = tanhf(y[v]);
        y[v] = a.d ? d[v] * open * (1.f - squashed * squashed) : open * squashed;
        o[v] = a.d ? d[v] * squashed * slope : 0.f;
    }
    store<float, V>(a.to + cell, y);
    if (!a.d) return;
    if (a.d_more) store<float, V>(a.d_more + cell, o);
    for (int gate = 0; gate < (int)a.count; gate++) {
        if (gate == a.place) store<float, V>(a.d_gates + gates + gate * a.width, o);
        else store<float, V>(a.d_gates + gates + gate * a.width, zero);
    }
}

// sigmoid(gate) a + (1 - sigmoid(gate)) b, or the gradients of the three, each at its place in a tensor.
struct Blended {
    const float* at;
    float* gradient; // of the whole tensor, or null
    unsigned stride; // values from row to row
    unsigned offset; // offset in a row
};
struct Blend {
    Blended of[3];  // the gate, a, b
    const float* d; // (rows, width), or null for the forward pass
    float* to;      // (rows, width), if there is no d
    unsigned rows, width;
};
template <int V> DEVICE void blend(const Blend& a) {
    Spot spot = ::spot<V>(a.rows, 1, a.width);
    if (!spot.exists) return;
    index_t cell = (index_t)spot.row * a.width + spot.channel, places[3];
    float x[3][V], d[V];
    for (int k = 0; k < 3; k++) {
        places[k] = (index_t)spot.row * a.of[k].stride + a.of[k].offset + spot.channel;
        load<float, V>(a.of[k].at + places[k], x[k]);
    }
    if (a.d) load<float, V>(a.d + cell, d);
    for (int v = 0; v < V; v++) {
        float open = sigmoid(x[0][v]), difference = x[1][v] - x[2][v];
        if (!a.d) {
            x[0][v] = open * difference + x[2][v];
            continue;
        }
        x[0][v] = d[v] * difference * open * (1.f - open);
        x[1][v] = d[v] * open;
        x[2][v] = d[v] - d[v] * open;
    }
    if (!a.d) store<float, V>(a.to + cell, x[0]);
    for (int k = 0; k < 3; k++)
        if (a.d && a.of[k].gradient) store<float, V>(a.of[k].gradient + places[k], x[k]);
}

#define KERNELS(V)                                                                                                             \
    extern "C" __global__ void sum_gates_##V(SumGates a) { sum_gates<V>(a); }                                                  \
    extern "C" __global__ void memory_update_##V(MemoryUpdate a) { memory_update<V>(a); }                                      \
    extern "C" __global__ void open_output_##V(OpenOutput a) { open_output<V>(a); }                                            \
    extern "C" __global__ void blend_##V(Blend a) { blend<V>(a); }
KERNELS(1)
KERNELS(4)
