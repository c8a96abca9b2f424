//! The weights: from PyTorch's layout to transformed panels, and the gradient of the panels back.

use super::transform::{POSITIONS, filter_tile, filter_tile_adjoint, load_positions, store_positions};
use crate::buffer::Buffer;
use crate::parallel::{self, Shared};
use crate::simd::{Kernel, LANES, Level, Simd};

/// 3x3 filters in PyTorch's layout, (outputs, inputs, 3, 3), or those of some of the inputs.
#[derive(Clone, Copy)]
pub(crate) struct Filters<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) inputs: usize,
}

const TAPS: usize = 9;

/// The order of the output channels as the kernels see it: the output at each place, or none where it is only padding.
/// As long as a whole number of vectors.
pub(crate) type ColumnOrder = Vec<Option<usize>>;

/// A matrix for each of the 36 positions, cut into panels of 32 columns (the last may have 16): `[panel][position][row][column]`.
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
    /// Where row 0 of a position begins.
    pub(crate) fn offset(&self, panel: usize, position: usize) -> usize {
        (2 * panel * POSITIONS + position * self.width(panel)) * self.rows * LANES
    }
}

/// Which filter stands at a row and a column of the panels.
#[derive(Clone, Copy)]
enum Place<'a> {
    /// Rows are inputs, columns outputs in this order: for the forward product and the weights' gradient.
    InputsByOutputs(&'a [Option<usize>]),
    /// Rows are outputs in this order, columns the inputs from here on: for the inputs' gradient.
    OutputsByInputs(&'a [Option<usize>], usize, usize),
}

impl Place<'_> {
    /// The offset of the filter in the weights.
    #[inline(always)]
    fn filter(&self, inputs: usize, row: usize, column: usize) -> Option<usize> {
        let (output, input) = match self {
            Place::InputsByOutputs(order) => (order[column], row),
            Place::OutputsByInputs(_, _, count) if column >= *count => (None, 0),
            Place::OutputsByInputs(order, first, _) => (order[row], first + column),
        };
        output.map(|o| (o * inputs + input) * TAPS)
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

/// Rows of a panel in a task.
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
        for row in self.rows {
            for vector in 0..width {
                let mut g = [[0f32; LANES]; TAPS];
                for lane in 0..LANES {
                    let column = (2 * self.panel + vector) * LANES + lane;
                    if let Some(at) = self.place.filter(self.filters.inputs, row, column) {
                        let filter = &self.filters.data[at..at + TAPS];
                        for (tap, &x) in filter.iter().enumerate() {
                            g[tap][lane] = x;
                        }
                    }
                }
                let to = self.panels.offset(self.panel, 0) + (row * width + vector) * LANES;
                // SAFETY: each task writes its own rows of its own panel, inside the buffer.
                unsafe {
                    let mut filter = [[S::zero(); 3]; 3];
                    for (tap, lanes) in g.iter().enumerate() {
                        filter[tap / 3][tap % 3] = S::load(lanes.as_ptr());
                    }
                    store_positions(filter_tile(filter), self.data.at(to), stride);
                }
            }
        }
    }
}

/// Adds to the weights' gradient, (outputs, inputs, 3, 3), that of the panels U\[p\] for the inputs from `first` on.
pub(crate) fn add_filter_gradient(
    level: Level,
    panels: &Panels,
    order: &ColumnOrder,
    first: usize,
    gradient: &mut [f32],
    inputs: usize,
) {
    let parts = panels.rows.div_ceil(ROWS);
    let gradient = Shared::new(gradient);
    parallel::for_each(panels.count() * parts, |task| {
        let (panel, from) = (task / parts, task % parts * ROWS);
        let rows = from..panels.rows.min(from + ROWS);
        level.run(Untransform { panels, order, first, gradient, inputs, panel, rows });
    });
}

struct Untransform<'a> {
    panels: &'a Panels,
    order: &'a ColumnOrder,
    first: usize,
    gradient: Shared,
    inputs: usize,
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
                let mut g = [[0f32; LANES]; TAPS];
                // SAFETY: the row lies inside the panels.
                unsafe {
                    let u = load_positions::<S>(self.panels.data.as_ptr().add(from), stride);
                    let filter = filter_tile_adjoint(u);
                    for (tap, lanes) in g.iter_mut().enumerate() {
                        filter[tap / 3][tap % 3].store(lanes.as_mut_ptr());
                    }
                }
                for lane in 0..LANES {
                    let column = (2 * self.panel + vector) * LANES + lane;
                    if let Some(output) = self.order[column] {
                        for (tap, lanes) in g.iter().enumerate() {
                            // SAFETY: inside the gradient; each filter belongs to one task.
                            unsafe {
                                *self.gradient.at((output * self.inputs + self.first + row) * TAPS + tap) +=
                                    lanes[lane];
                            }
                        }
                    }
                }
            }
        }
    }
}
