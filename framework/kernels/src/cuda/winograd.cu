// Winograd's F(4x4, 3x3) in 32 bits: y = A' [(G g G') . (B' d B)] A at the points 0, 1, -1, 2, -2 and
// infinity (Lavin and Gray, "Fast algorithms for convolutional neural networks", 2015, section 4.3), and its
// adjoints.
//
// Images are (images, height, width, channels). A tile is 4x4 pixels of a convolution's output, or the 6x6
// pixels of its input from which they are computed. Transformed data has 36 positions: tiles (36, tiles,
// channels), filters (36, outputs, inputs). A thread handles one channel of a tile, or one filter of one
// channel.

// Each transform, applied to one line of values.
DEVICE void input(const float (&d)[6], float (&t)[6]) { // B' d
    float even = d[4] - 4.f * d[2], odd = d[3] - 4.f * d[1], even2 = d[4] - d[2], odd2 = d[3] - d[1];
    t[0] = 4.f * d[0] + (d[4] - 5.f * d[2]);
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = even2 + 2.f * odd2;
    t[4] = even2 - 2.f * odd2;
    t[5] = 4.f * d[1] + (d[5] - 5.f * d[3]);
}
DEVICE void output(const float (&m)[6], float (&y)[4]) { // A' m
    float sum = m[1] + m[2], difference = m[1] - m[2], sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    y[0] = m[0] + (sum + sum2);
    y[1] = difference + 2.f * difference2;
    y[2] = sum + 4.f * sum2;
    y[3] = difference + 8.f * difference2 + m[5];
}
DEVICE void output_adjoint(const float (&y)[4], float (&m)[6]) { // A y
    float even = y[0] + y[2], odd = y[1] + y[3], even4 = y[0] + 4.f * y[2], odd4 = 2.f * (y[1] + 4.f * y[3]);
    m[0] = y[0];
    m[1] = even + odd;
    m[2] = even - odd;
    m[3] = even4 + odd4;
    m[4] = even4 - odd4;
    m[5] = y[3];
}
DEVICE void filter(const float (&g)[3], float (&u)[6]) { // G g
    float sum = -1.f / 6.f * (g[0] + g[2]), middle = -1.f / 6.f * g[1];
    float sum2 = 1.f / 24.f * g[0] + 1.f / 6.f * g[2], middle2 = 1.f / 12.f * g[1];
    u[0] = 0.25f * g[0];
    u[1] = sum + middle;
    u[2] = sum - middle;
    u[3] = sum2 + middle2;
    u[4] = sum2 - middle2;
    u[5] = g[2];
}
DEVICE void filter_adjoint(const float (&u)[6], float (&g)[3]) { // G' u
    float sum = -1.f / 6.f * (u[1] + u[2]), difference = 1.f / 6.f * (u[2] - u[1]);
    float sum2 = u[3] + u[4], difference2 = u[3] - u[4];
    g[0] = 0.25f * u[0] + (sum + 1.f / 24.f * sum2);
    g[1] = difference + 1.f / 12.f * difference2;
    g[2] = sum + 1.f / 6.f * sum2 + u[5];
}

// Applies a transform to a square's rows, and then to its columns.
template <int N, int M, void (*LINE)(const float (&)[N], float (&)[M])>
DEVICE void both_ways(const float (&x)[N][N], float (&y)[M][M]) {
    float rows[N][M];
    for (int r = 0; r < N; r++) LINE(x[r], rows[r]);
    for (int c = 0; c < M; c++) {
        float column[N], to[M];
        for (int r = 0; r < N; r++) column[r] = rows[r][c];
        LINE(column, to);
        for (int r = 0; r < M; r++) y[r][c] = to[r];
    }
}

struct Tiles {
    float* images;         // (images, height, width, channels)
    float* transformed;    // (36, tiles, channels)
    unsigned count;        // tiles * channels
    unsigned height, width, channels;
    unsigned down, across; // tiles per image
    unsigned padding;      // zeros before an image's first pixel that belong to its first tile
};

// One channel of a tile.
struct Tile {
    float* image; // the channel of the image's first pixel
    float* transformed;
    int top, left; // the position of its first pixel
};
DEVICE Tile tile_of(const Tiles& a, unsigned at) {
    unsigned channel = at % a.channels, tile = at / a.channels, row = tile / a.across % a.down;
    index_t image = tile / a.across / a.down;
    return {a.images + image * (a.height * a.width * a.channels) + channel, a.transformed + at, (int)(4 * row - a.padding),
            (int)(4 * (tile % a.across) - a.padding)};
}
DEVICE bool is_inside(int at, unsigned size) { return (unsigned)at < size; }
// The address of the first pixel of a tile's row, which may be outside the image.
DEVICE float* row_of(const Tiles& a, const Tile& tile, int row) {
    return tile.image + ((tile.top + row) * (int)a.width + tile.left) * (int)a.channels;
}
// Pixels outside the image are zero.
template <int N> DEVICE void load_pixels(const Tiles& a, const Tile& tile, float (&x)[N][N]) {
    for (int r = 0; r < N; r++) {
        const float* row = row_of(a, tile, r);
        for (int c = 0; c < N; c++) {
            x[r][c] = 0.f;
            if (is_inside(tile.top + r, a.height) && is_inside(tile.left + c, a.width)) x[r][c] = row[c * a.channels];
        }
    }
}
template <int N> DEVICE void store_pixels(const Tiles& a, const Tile& tile, const float (&x)[N][N]) {
    for (int r = 0; r < N; r++) {
        float* row = row_of(a, tile, r);
        for (int c = 0; c < N; c++) {
            if (is_inside(tile.top + r, a.height) && is_inside(tile.left + c, a.width)) row[c * a.channels] = x[r][c];
        }
    }
}
DEVICE void load_positions(const float* from, unsigned count, float (&t)[6][6]) {
    for (int r = 0; r < 6; r++) {
        for (int c = 0; c < 6; c++, from += count) t[r][c] = *from;
    }
}
DEVICE void store_positions(float* to, unsigned count, const float (&t)[6][6]) {
    for (int r = 0; r < 6; r++) {
        for (int c = 0; c < 6; c++, to += count) *to = t[r][c];
    }
}

extern "C" __global__ void winograd_input(Tiles a) {
    unsigned at = thread_index();
    if (at >= a.count) return;
    Tile tile = tile_of(a, at);
    float d[6][6], t[6][6];
    load_pixels(a, tile, d);
    both_ways<6, 6, input>(d, t);
    store_positions(tile.transformed, a.count, t);
}

extern "C" __global__ void winograd_output(Tiles a) {
    unsigned at = thread_index();
    if (at >= a.count) return;
    Tile tile = tile_of(a, at);
    float m[6][6], y[4][4];
    load_positions(tile.transformed, a.count, m);
    both_ways<6, 4, output>(m, y);
    store_pixels(a, tile, y);
}

extern "C" __global__ void winograd_output_adjoint(Tiles a) {
    unsigned at = thread_index();
    if (at >= a.count) return;
    Tile tile = tile_of(a, at);
    float y[4][4], m[6][6];
    load_pixels(a, tile, y);
    both_ways<4, 6, output_adjoint>(y, m);
    store_positions(tile.transformed, a.count, m);
}

struct Filters {
    float* weight;      // (outputs, 3, 3, inputs)
    float* transformed; // (36, outputs, inputs)
    unsigned outputs, inputs;
    unsigned turned;    // whether filters are rotated by 180 degrees first; ignored by the adjoint
};

extern "C" __global__ void winograd_filter(Filters a) {
    unsigned at = thread_index(), count = a.outputs * a.inputs;
    if (at >= count) return;
    const float* weight = a.weight + (index_t)(at / a.inputs) * 9 * a.inputs + at % a.inputs;
    float g[3][3], u[6][6];
    for (int r = 0; r < 3; r++) {
        for (int c = 0; c < 3; c++) g[r][c] = weight[(a.turned ? 8 - 3 * r - c : 3 * r + c) * a.inputs];
    }
    both_ways<3, 6, filter>(g, u);
    store_positions(a.transformed + at, count, u);
}

extern "C" __global__ void winograd_filter_adjoint(Filters a) {
    unsigned at = thread_index(), count = a.outputs * a.inputs;
    if (at >= count) return;
    float u[6][6], g[3][3];
    load_positions(a.transformed + at, count, u);
    both_ways<6, 3, filter_adjoint>(u, g);
    float* weight = a.weight + (index_t)(at / a.inputs) * 9 * a.inputs + at % a.inputs;
    for (int r = 0; r < 3; r++) {
        for (int c = 0; c < 3; c++) weight[(3 * r + c) * a.inputs] = g[r][c];
    }
}
