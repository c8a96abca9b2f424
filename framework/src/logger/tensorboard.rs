//! TensorBoard event files.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use tfrecord::EventWriter;
use tfrecord::protobuf::event::What;
use tfrecord::protobuf::summary::value::Value as Content;
use tfrecord::protobuf::summary::{Image, Value};
use tfrecord::protobuf::{Event, Summary};

use super::Logger;
use crate::callback::{Picture, Record};
use crate::error::{Error, Result};
use crate::picture::png_bytes;

/// Writes scalars as `<split>/<metric>` and pictures as `<split>/<name>`.
pub struct TensorBoard {
    writer: EventWriter<BufWriter<File>>,
}

impl TensorBoard {
    /// Starts a new event file in `dir`. TensorBoard joins the files of one folder, so a resumed run goes on.
    pub fn create(dir: &Path) -> Result<Self> {
        let name = format!("events.out.tfevents.{:.6}.candlepower.{}", now(), std::process::id());
        let path = dir.join(name);
        let mut writer = EventWriter::create(&path, Default::default()).map_err(Error::content(&path))?;
        writer
            .write_event(event(0, What::FileVersion("brain.Event:2".into())))
            .map_err(Error::content(&path))?;
        Ok(Self { writer })
    }

    fn write(&mut self, step: u64, values: Vec<(String, Content)>) -> Result<()> {
        let value = |(tag, content)| Value { tag, value: Some(content), ..Default::default() };
        let summary = Summary { value: values.into_iter().map(value).collect() };
        let written = self.writer.write_event(event(step, What::Summary(summary)));
        written.map_err(|error| Error::msg(format!("TensorBoard events: {error}")))
    }
}

impl Logger for TensorBoard {
    fn log(&mut self, record: &Record) -> Result<()> {
        let scalar = |(name, value): (&String, &f64)| {
            (format!("{}/{name}", record.split.name()), Content::SimpleValue(*value as f32))
        };
        self.write(record.step, record.metrics.iter().map(scalar).collect())
    }

    fn picture(&mut self, picture: &Picture) -> Result<()> {
        let (colorspace, height, width) = picture.pixels.dims3()?;
        let image = Image {
            height: height as i32,
            width: width as i32,
            colorspace: colorspace as i32,
            encoded_image_string: png_bytes(&picture.pixels)?,
        };
        let tag = format!("{}/{}", picture.split.name(), picture.name);
        self.write(picture.step, vec![(tag, Content::Image(image))])
    }
}

fn event(step: u64, what: What) -> Event {
    Event { wall_time: now(), step: step as i64, what: Some(what), ..Default::default() }
}

/// Seconds since 1970, as event files count time.
fn now() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0., |time| time.as_secs_f64())
}
