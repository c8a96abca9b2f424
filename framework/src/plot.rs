//! Plots: lines over an axis, with points marked, as SVG.

use std::fmt::Display;
use std::ops::Range;
use std::path::Path;

use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use crate::atomic_file::write_atomic;
use crate::error::{Error, Result};

/// In pixels; SVG scales.
const SIZE: (u32, u32) = (900, 520);
const FONT: &str = "sans-serif";
/// Approximate width of a letter of a mark's text, in pixels; the viewer's font decides.
const LETTER: i32 = 7;
const TEXT: RGBColor = RGBColor(60, 60, 60);
const GRID: RGBColor = RGBColor(225, 225, 225);
/// Colours of the lines, in order, chosen for red-green colour blindness (Okabe and Ito 2008).
const COLOURS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];
const FAINT: RGBColor = RGBColor(185, 195, 205);
const MARK: RGBColor = RGBColor(213, 94, 0);

/// A line plot.
///
/// ```
/// # use candlepower::plot::{Axis, Plot};
/// let squares = (1..10).map(|x| (x as f64, (x * x) as f64));
/// let plot = Plot::new("Squares", Axis::linear("x"), Axis::log("x times x")).line("squares", squares);
/// assert!(plot.mark((3., 9.), "three").svg()?.starts_with("<svg"));
/// # Ok::<_, candlepower::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Plot {
    title: String,
    x: Axis,
    y: Axis,
    lines: Vec<Line>,
    marks: Vec<(Point, String)>,
}

/// An axis of a plot.
#[derive(Debug, Clone)]
pub struct Axis {
    name: String,
    log: bool,
    range: Option<Range<f64>>,
}

type Point = (f64, f64);

#[derive(Debug, Clone)]
struct Line {
    name: String,
    points: Vec<Point>,
    faint: bool,
}

impl Axis {
    /// A linear axis.
    pub fn linear(name: impl Into<String>) -> Self {
        Self { name: name.into(), log: false, range: None }
    }

    /// A logarithmic axis. Values that are not positive are omitted.
    pub fn log(name: impl Into<String>) -> Self {
        Self { log: true, ..Self::linear(name) }
    }

    /// Sets the range. Values outside it are omitted. Default: the range of all values.
    pub fn range(self, range: Range<f64>) -> Self {
        Self { range: Some(range), ..self }
    }

    fn shows(&self, value: f64) -> bool {
        let inside = self.range.as_ref().is_none_or(|range| range.start <= value && value <= range.end);
        inside && value.is_finite() && (value > 0. || !self.log)
    }

    /// The range of the axis for `values`, with a small margin on both sides.
    fn span(&self, values: impl Iterator<Item = f64> + Clone) -> Range<f64> {
        const ROOM: f64 = 0.04;
        if let Some(range) = &self.range {
            return range.clone();
        }
        let (low, high) =
            (values.clone().fold(f64::INFINITY, f64::min), values.fold(f64::NEG_INFINITY, f64::max));
        match (self.log, low < high) {
            (true, true) => {
                let room = (high / low).powf(ROOM);
                low / room..high * room
            }
            (true, false) => low / 2.0..2. * low,
            (false, true) => low - ROOM * (high - low)..high + ROOM * (high - low),
            (false, false) => low - 1.0..low + 1.,
        }
    }
}

impl Plot {
    /// A plot without lines.
    pub fn new(title: impl Into<String>, x: Axis, y: Axis) -> Self {
        Self { title: title.into(), x, y, lines: Vec::new(), marks: Vec::new() }
    }

    /// Adds a line through these points, with this name in the legend.
    pub fn line(self, name: impl Into<String>, points: impl IntoIterator<Item = Point>) -> Self {
        self.add(name.into(), points, false)
    }

    /// Adds a thin gray line for the background.
    pub fn faint_line(self, name: impl Into<String>, points: impl IntoIterator<Item = Point>) -> Self {
        self.add(name.into(), points, true)
    }

    fn add(mut self, name: String, points: impl IntoIterator<Item = Point>, faint: bool) -> Self {
        let shown = |(x, y): &Point| self.x.shows(*x) && self.y.shows(*y);
        let points = points.into_iter().filter(shown).collect();
        self.lines.push(Line { name, points, faint });
        self
    }

    /// Marks a point in a separate colour, with a text next to it.
    pub fn mark(mut self, point: Point, text: impl Into<String>) -> Self {
        self.marks.push((point, text.into()));
        self
    }

    /// Writes an SVG file atomically.
    pub fn save(&self, path: &Path) -> Result<()> {
        write_atomic(path, self.svg()?.as_bytes())
    }

    /// The plot as SVG.
    pub fn svg(&self) -> Result<String> {
        let points = self.lines.iter().flat_map(|line| &line.points);
        let points = points.chain(self.marks.iter().map(|(point, _)| point));
        if points.clone().next().is_none() {
            return Err(Error::msg(format!("there is nothing to plot in \"{}\"", self.title)));
        }
        let (x, y) = (self.x.span(points.clone().map(|p| p.0)), self.y.span(points.map(|p| p.1)));
        match (self.x.log, self.y.log) {
            (false, false) => self.draw(x, y),
            (true, false) => self.draw(x.log_scale(), y),
            (false, true) => self.draw(x, y.log_scale()),
            (true, true) => self.draw(x.log_scale(), y.log_scale()),
        }
    }

    fn draw<X, Y>(&self, x: X, y: Y) -> Result<String>
    where
        X: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
        Y: AsRangedCoord<Value = f64, CoordDescType: ValueFormatter<f64>>,
    {
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            area.fill(&WHITE).map_err(failed)?;
            let text = |size: u32| (FONT, size).into_font().color(&TEXT);
            let mut chart = ChartBuilder::on(&area)
                .caption(&self.title, text(20))
                .margin(16)
                .x_label_area_size(48)
                .y_label_area_size(70)
                .build_cartesian_2d(x, y)
                .map_err(failed)?;
            chart
                .configure_mesh()
                .x_desc(&self.x.name)
                .y_desc(&self.y.name)
                .axis_desc_style(text(16))
                .label_style(text(14))
                .axis_style(TEXT)
                .bold_line_style(GRID)
                .light_line_style(TRANSPARENT)
                .x_label_formatter(&|value| tick(*value))
                .y_label_formatter(&|value| tick(*value))
                .draw()
                .map_err(failed)?;
            let mut colours = COLOURS.iter().cycle();
            for line in &self.lines {
                let style = match (line.faint, colours.clone().next()) {
                    (false, Some(colour)) => {
                        colours.next();
                        colour.stroke_width(3)
                    }
                    _ => FAINT.stroke_width(1),
                };
                let drawn = chart.draw_series(LineSeries::new(line.points.iter().copied(), style));
                let sample = move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style);
                drawn.map_err(failed)?.label(&line.name).legend(sample);
            }
            for (point, label) in &self.marks {
                // Next to the point on the side with room, on a translucent background.
                let width = LETTER * label.chars().count() as i32;
                let right = chart.backend_coord(point).0 + 16 + width < SIZE.0 as i32;
                let left = if right { 12 } else { -12 - width };
                let ground = WHITE.mix(0.8).filled();
                let drawn = chart.draw_series([EmptyElement::at(*point)
                    + Rectangle::new([(left - 3, -25), (left + width, -3)], ground)
                    + Circle::new((0, 0), 7, MARK.filled())
                    + Text::new(label.clone(), (left, -22), (FONT, 17).into_font().color(&MARK))]);
                drawn.map_err(failed)?;
            }
            if self.lines.len() > 1 {
                chart
                    .configure_series_labels()
                    .position(SeriesLabelPosition::UpperRight)
                    .background_style(WHITE.mix(0.85))
                    .border_style(GRID)
                    .label_font(text(14))
                    .draw()
                    .map_err(failed)?;
            }
            area.present().map_err(failed)?;
        }
        Ok(svg)
    }
}

fn failed(error: impl Display) -> Error {
    Error::msg(format!("cannot draw a plot: {error}"))
}

/// Formats a number in its short form: 0.25, 1e-8.
fn tick(value: f64) -> String {
    // Axes accumulate steps: without rounding, 0.3 would be 0.30000000000000004.
    let value: f64 = format!("{value:.6e}").parse().unwrap_or(value);
    if value == 0. || (1e-3..1e5).contains(&value.abs()) { format!("{value}") } else { format!("{value:e}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_an_axis_are_short() {
        let ticks = [0.25, 1e-8, 0.1 + 0.2, 0., 250_000., -3.].map(tick);
        assert_eq!(ticks, ["0.25", "1e-8", "0.3", "0", "2.5e5", "-3"]);
    }

    #[test]
    fn one_point_is_a_plot_and_none_is_not() {
        let axes = [Axis::linear as fn(&'static str) -> Axis, Axis::log];
        for (x, y) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let plot = Plot::new("a < b", axes[x]("x"), axes[y]("y"));
            let message = plot.svg().unwrap_err().to_string();
            assert_eq!(message, "there is nothing to plot in \"a < b\"");
            assert!(plot.line("one", [(2., 3.)]).svg().unwrap().contains("a &lt; b"));
        }
        // Values that an axis cannot show are omitted.
        let log = || Plot::new("", Axis::log("x"), Axis::linear("y").range(0.0..1.));
        assert!(log().line("", [(0., 0.5), (-1., 0.5), (1., 2.), (1., f64::NAN)]).svg().is_err());
    }

    #[test]
    fn a_text_at_the_edge_stays_inside() {
        let text = "some words about the last point";
        let plot = Plot::new("", Axis::linear("x"), Axis::linear("y")).line("", [(0., 0.), (1., 1.)]);
        let x = |point: Point| -> i32 {
            let svg = plot.clone().mark(point, text).svg().unwrap();
            let element = &svg[svg[..svg.find(text).unwrap()].rfind("<text").unwrap()..];
            let number = element.split("x=\"").nth(1).unwrap();
            number.split('"').next().unwrap().parse().unwrap()
        };
        let width = LETTER * text.len() as i32;
        assert!(x((1., 1.)) + width < SIZE.0 as i32 && x((0., 0.)) > 0);
    }
}
