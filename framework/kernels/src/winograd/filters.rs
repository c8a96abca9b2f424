//! The weights: from PyTorch's layout to transformed panels, and the gradient of the panels back to PyTorch's
//! layout.

use super::transform::{
    POSITIONS, filter_tile, filter_tile_5, filter_tile_adjoint, filter_tile_adjoint_5, load_positions,
    store_positions,
};
use crate::buffer::Buffer;
use crate::parallel::{self, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};

/// Filters of k x k taps (k: 3 or 5) in PyTorch's layout, (outputs, inputs, k, k), or those of some of the inputs.
#[derive(Clone, Copy)]
pub(crate) struct Filters<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) inputs: usize,
    /// 3 or 5.
    pub(crate) kernel: usize,
}

/// The taps of 16 filters.
type Taps = [[f32; LANES]; 25];

/// The order of the output channels in the kernels: the output at each place, or `None` for padding. Its
/// length is a multiple of the vector size.
pub(crate) type ColumnOrder = Vec<Option<usize>>;

/// One matrix per position, cut into panels of 32 columns (the last may have 16):
/// `[panel][position][row][column]`.
#[derive(Debug)]
pub(crate) struct Panels {
    pub(crate) data: Buffer,
    pub(crate) rows: usize,
    /// Vectors in a row, over all panels.
    pub(crate) vectors: usize,
}

impl Panels {
    pub(crate) fn zeroed(rows: usize, columns: usize) -> Panels {
        let vectors = columns.div_ceil(LANES);
        Panels { data: Buffer::zeroed(POSITIONS * rows * vectors * LANES), rows, vectors }
    }
    pub(crate) fn zeroed_parts(parts: usize, rows: usize, columns: usize) -> Vec<Panels> {
        (0..parts).map(|_| Panels::zeroed(rows, columns)).collect()
    }
    pub(crate) fn count(&self) -> usize {
        self.vectors.div_ceil(2)
    }
    /// Vectors in a row of this panel.
    pub(crate) fn width(&self, panel: usize) -> usize {
        (self.vectors - 2 * panel).min(2)
    }
    /// The offset of row 0 of a position.
    pub(crate) fn offset(&self, panel: usize, position: usize) -> usize {
        (2 * panel * POSITIONS + position * self.width(panel)) * self.rows * LANES
    }
}

/// Which filter belongs to a row and a column of the panels.
#[derive(Clone, Copy)]
enum Place<'a> {
    /// Rows are inputs, columns are outputs in this order: for the forward product and the weight gradient.
    InputsByOutputs(&'a [Option<usize>]),
    /// Rows are outputs in this order, columns are inputs, given by their first and count: for the input
    /// gradient.
    OutputsByInputs(&'a [Option<usize>], usize, usize),
}

impl Place<'_> {
    /// The index of the filter in the weights.
    #[inline(always)]
    fn filter(&self, inputs: usize, row: usize, column: usize) -> Option<usize> {
        let (output, input) = match self {
            Place::InputsByOutputs(order) => (order[column], row),
            Place::OutputsByInputs(_, _, count) if column >= *count => (None, 0),
            Place::OutputsByInputs(order, first, _) => (order[row], first + column),
        };
        output.map(|o| o * inputs + input)
    }
}

impl Filters<'_> {
    /// U\[p\] (inputs, outputs).
    pub(crate) fn transform(&self, level: Level, order: &ColumnOrder) -> Panels {
        let mut panels = Panels {
            data: Buffer::new(POSITIONS * self.inputs * order.len()),
            rows: self.inputs,
            vectors: order.len() / LANES,
        };
        self.fill(level, &mut panels, Place::InputsByOutputs(order));
        panels
    }

    /// The transpose of U\[p\] for the `count` inputs from `first` on: (outputs, inputs).
    pub(crate) fn transform_transposed(
        &self,
        level: Level,
        order: &ColumnOrder,
        first: usize,
        count: usize,
    ) -> Panels {
        let vectors = count.div_ceil(LANES);
        let rows = order.len();
        let mut panels = Panels { data: Buffer::new(POSITIONS * rows * vectors * LANES), rows, vectors };
        self.fill(level, &mut panels, Place::OutputsByInputs(order, first, count));
        panels
    }

    fn fill(&self, level: Level, panels: &mut Panels, place: Place) {
        let rows = panels.rows;
        let parts = rows.div_ceil(ROWS);
        let data = Shared::new(&mut panels.data);
        let panels = &*panels;
        parallel::for_each(panels.count() * parts, |task| {
            let (panel, first) = (task / parts, task % parts * ROWS);
            let rows = first..rows.min(first + ROWS);
            level.run(Transform { filters: self, panels, data, place, panel, rows });
        });
    }
}

/// Rows of a panel per task.
const ROWS: usize = 16;

struct Transform<'a> {
    filters: &'a Filters<'a>,
    panels: &'a Panels,
    data: Shared,
    place: Place<'a>,
    panel: usize,
    rows: std::ops::Range<usize>,
}

impl Kernel for Transform<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.panels.width(self.panel);
        let stride = self.panels.rows * width * LANES;
        let taps = self.filters.kernel * self.filters.kernel;
        for row in self.rows {
            for vector in 0..width {
                let mut g: Taps = [[0.; LANES]; 25];
                for lane in 0..LANES {
                    let column = (2 * self.panel + vector) * LANES + lane;
                    if let Some(at) = self.place.filter(self.filters.inputs, row, column) {
                        let filter = &self.filters.data[at * taps..(at + 1) * taps];
                        for (tap, &x) in filter.iter().enumerate() {
                            g[tap][lane] = x;
                        }
                    }
                }
                let to = self.panels.offset(self.panel, 0) + (row * width + vector) * LANES;
                // SAFETY: each task writes its own rows of its own panel, inside the buffer.
                unsafe {
                    let u = if self.filters.kernel == 5 {
                        filter_tile_5(load_taps::<S, 5>(&g))
                    } else {
                        filter_tile(load_taps::<S, 3>(&g))
                    };
                    store_positions(u, self.data.at(to), stride);
                }
            }
        }
    }
}

/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn load_taps<S: Simd, const K: usize>(taps: &Taps) -> [[S; K]; K] {
    // SAFETY: each tap has 16 floats.
    unsafe {
        let mut g = [[S::zero(); K]; K];
        for r in 0..K {
            for c in 0..K {
                g[r][c] = S::load(taps[r * K + c].as_ptr());
            }
        }
        g
    }
}

#[inline(always)]
fn store_taps<S: Simd, const K: usize>(g: [[S; K]; K], taps: &mut Taps) {
    for r in 0..K {
        for c in 0..K {
            // SAFETY: each tap has room for 16 floats.
            unsafe { g[r][c].store(taps[r * K + c].as_mut_ptr()) };
        }
    }
}

/// Adds to the weight gradient, (outputs, inputs, k, k), the gradient of the panels U\[p\], for the inputs
/// from `first` on.
pub(crate) fn add_filter_gradient(
    level: Level,
    panels: &Panels,
    order: &ColumnOrder,
    first: usize,
    gradient: &mut [f32],
    inputs: usize,
    kernel: usize,
) {
    let parts = panels.rows.div_ceil(ROWS);
    let gradient = Shared::new(gradient);
    parallel::for_each(panels.count() * parts, |task| {
        let (panel, from) = (task / parts, task % parts * ROWS);
        let rows = from..panels.rows.min(from + ROWS);
        level.run(Untransform { panels, order, first, gradient, inputs, kernel, panel, rows });
    });
}

struct Untransform<'a> {
    panels: &'a Panels,
    order: &'a ColumnOrder,
    first: usize,
    gradient: Shared,
    inputs: usize,
    kernel: usize,
    panel: usize,
    rows: std::ops::Range<usize>,
}

impl Kernel for Untransform<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.panels.width(self.panel);
        let stride = self.panels.rows * width * LANES;
        for row in self.rows {
            for vector in 0..width {
                let from = self.panels.offset(self.panel, 0) + (row * width + vector) * LANES;
                let mut g: Taps = [[0.; LANES]; 25];
                // SAFETY: the row lies inside the panels.
                unsafe {
                    let u = load_positions::<S>(self.panels.data.as_ptr().add(from), stride);
                    if self.kernel == 5 {
                        store_taps(filter_tile_adjoint_5(u), &mut g);
                    } else {
                        store_taps(filter_tile_adjoint(u), &mut g);
                    }
                }
                for lane in 0..LANES {
                    let column = (2 * self.panel + vector) * LANES + lane;
                    if let Some(output) = self.order[column] {
                        let taps = self.kernel * self.kernel;
                        for (tap, lanes) in g.iter().take(taps).enumerate() {
                            // SAFETY: this is inside the gradient; each filter belongs to exactly one task.
                            unsafe {
                                *self.gradient.at((output * self.inputs + self.first + row) * taps + tap) +=
                                    lanes[lane];
                            }
                        }
                    }
                }
            }
        }
    }
}
