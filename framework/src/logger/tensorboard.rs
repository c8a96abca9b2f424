//! TensorBoard event files.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use prost::Message;
use tfrecord::EventWriter;
use tfrecord::protobuf::event::What;
use tfrecord::protobuf::session_log::SessionStatus;
use tfrecord::protobuf::summary::value::Value as Content;
use tfrecord::protobuf::summary::{Image, Value};
use tfrecord::protobuf::summary_metadata::PluginData;
use tfrecord::protobuf::tensor_shape_proto::Dim;
use tfrecord::protobuf::{
    DataClass, DataType, Event, SessionLog, Summary, SummaryMetadata, TensorProto, TensorShapeProto,
};

use super::hparams::{self, Data, SessionEnd, SessionStart, Status};
use super::{HyperParameters, Logger, histogram::histogram};
use crate::callback::{Picture, Record, StopReason};
use crate::error::{Error, Result};

/// Writes scalars as `<split>/<metric>`, pictures as `<split>/<name>`, histograms, texts, and the session for
/// the HPARAMS tab.
///
/// No experiment is declared for that tab, so TensorBoard collects its columns from the settings and scalars
/// of all runs shown. If experiments were declared, it would use an arbitrary one and hide columns that only
/// other runs have.
pub struct TensorBoard {
    events: Events,
    session_path: PathBuf,
    session: Option<Events>,
}

impl TensorBoard {
    /// Starts a new event file in `dir`. TensorBoard merges the files of a folder, so a resumed run
    /// continues; events of an earlier attempt after `step` are replaced.
    pub fn create(dir: &Path, step: u64) -> Result<Self> {
        let name = format!("events.out.tfevents.{:.6}.candlepower.{}", now(), std::process::id());
        let mut events = Events::create(dir.join(name))?;
        let start = SessionLog { status: SessionStatus::Start.into(), ..Default::default() };
        events.write(step + 1, What::SessionLog(start))?;
        // TensorBoard keeps the first session that it finds in a folder. It therefore has its own file, which
        // the next attempt can replace. That file sorts first, because a live reader moves from one file to
        // the next.
        let session_path = dir.join("events.out.tfevents.0.candlepower.hparams");
        Ok(Self { events, session_path, session: None })
    }
}

impl Logger for TensorBoard {
    fn log(&mut self, record: &Record) -> Result<()> {
        let scalar = |(name, value): (&String, &f64)| Value {
            tag: format!("{}/{name}", record.split.name()),
            value: Some(Content::SimpleValue(*value as f32)),
            ..Default::default()
        };
        self.events.summary(record.step, record.metrics.iter().map(scalar).collect())
    }

    fn picture(&mut self, picture: &Picture) -> Result<()> {
        let (colorspace, height, width) = picture.pixels.dims3()?;
        let image = Image {
            height: height as i32,
            width: width as i32,
            colorspace: colorspace as i32,
            encoded_image_string: picture.png.clone(),
        };
        let tag = format!("{}/{}", picture.split.name(), picture.name);
        let value = Value { tag, value: Some(Content::Image(image)), ..Default::default() };
        self.events.summary(picture.step, vec![value])
    }

    fn histogram(&mut self, step: u64, name: &str, values: &Tensor) -> Result<()> {
        let Some(histogram) = histogram(values)? else { return Ok(()) };
        let value = Value { tag: name.into(), value: Some(Content::Histo(histogram)), ..Default::default() };
        self.events.summary(step, vec![value])
    }

    fn text(&mut self, step: u64, name: &str, text: &str) -> Result<()> {
        // The TEXT tab renders Markdown. Indented lines are code, whatever they contain.
        let code: String = text.lines().map(|line| format!("    {line}\n")).collect();
        let tensor = TensorProto {
            dtype: DataType::DtString.into(),
            tensor_shape: Some(TensorShapeProto::default()),
            string_val: vec![code.into_bytes()],
            ..Default::default()
        };
        self.events.summary(step, vec![plugin_value(name, "text", Vec::new(), tensor)])
    }

    fn hyper_parameters(&mut self, settings: &HyperParameters) -> Result<()> {
        let hparams = settings.iter().map(|(name, setting)| (name.clone(), hparams::value(setting)));
        let start = SessionStart { hparams: hparams.collect(), start_time_secs: now() };
        if self.session_path.exists() {
            std::fs::remove_file(&self.session_path).map_err(Error::file(&self.session_path))?;
        }
        let mut session = Events::create(self.session_path.clone())?;
        session.summary(0, vec![session_value(hparams::SESSION_START, Data::Start(start))])?;
        self.session = Some(session);
        Ok(())
    }

    fn close(&mut self, reason: &StopReason) -> Result<()> {
        let Some(session) = &mut self.session else { return Ok(()) };
        let status = match reason {
            StopReason::Finished | StopReason::Callback(_) => Status::Success,
            StopReason::Signal(_) | StopReason::Failed(_) => Status::Failure,
        };
        let end = SessionEnd { status: status.into(), end_time_secs: now() };
        session.summary(0, vec![session_value(hparams::SESSION_END, Data::End(end))])
    }
}

/// A message to the HPARAMS tab: it is stored in the metadata, and the value is an empty tensor.
fn session_value(tag: &str, data: Data) -> Value {
    let content = hparams::PluginData { version: 0, data: Some(data) }.encode_to_vec();
    let shape = TensorShapeProto { dim: vec![Dim::default()], unknown_rank: false };
    let dtype = DataType::DtFloat.into();
    let empty = TensorProto { dtype, tensor_shape: Some(shape), ..Default::default() };
    plugin_value(tag, hparams::PLUGIN, content, empty)
}

fn plugin_value(tag: &str, plugin: &str, content: Vec<u8>, tensor: TensorProto) -> Value {
    let metadata = SummaryMetadata {
        plugin_data: Some(PluginData { plugin_name: plugin.into(), content }),
        data_class: DataClass::Tensor.into(),
        ..Default::default()
    };
    let value = Some(Content::Tensor(tensor));
    Value { tag: tag.into(), metadata: Some(metadata), value, ..Default::default() }
}

/// One event file.
struct Events {
    path: PathBuf,
    writer: EventWriter<BufWriter<File>>,
}

impl Events {
    fn create(path: PathBuf) -> Result<Self> {
        let writer = EventWriter::create(&path, Default::default()).map_err(Error::content(&path))?;
        let mut events = Self { path, writer };
        events.write(0, What::FileVersion("brain.Event:2".into()))?;
        Ok(events)
    }

    fn summary(&mut self, step: u64, value: Vec<Value>) -> Result<()> {
        self.write(step, What::Summary(Summary { value }))
    }

    fn write(&mut self, step: u64, what: What) -> Result<()> {
        let event = Event { wall_time: now(), step: step as i64, what: Some(what), ..Default::default() };
        self.writer.write_event(event).map_err(Error::content(&self.path))
    }
}

/// Seconds since 1970, the time unit of event files.
fn now() -> f64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0., |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use indexmap::IndexMap;
    use prost_types::value::Kind;
    use tfrecord::EventIter;

    use super::*;
    use crate::data::Split;

    /// All values in the folder's event files with their steps, file after file as TensorBoard reads them.
    fn values(dir: &Path) -> Vec<(i64, Value)> {
        let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let events = files.iter().flat_map(|file| EventIter::open(file, Default::default()).unwrap());
        let values = events.map(Result::unwrap).flat_map(|event: Event| match event.what {
            Some(What::Summary(summary)) => {
                summary.value.into_iter().map(|value| (event.step, value)).collect()
            }
            _ => Vec::new(),
        });
        values.collect()
    }

    fn session(dir: &Path) -> Vec<Data> {
        let session = values(dir).into_iter().filter(|(_, value)| value.tag.starts_with("_hparams_/"));
        let plugin = session.map(|(_, value)| value.metadata.unwrap().plugin_data.unwrap());
        plugin.map(|plugin| hparams::PluginData::decode(&*plugin.content).unwrap().data.unwrap()).collect()
    }

    #[test]
    fn scalars_pictures_histograms_and_texts_are_read_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut logger = TensorBoard::create(dir.path(), 0).unwrap();
        let metrics = IndexMap::from([("loss".to_string(), 0.5)]);
        logger.log(&Record { step: 10, epoch: 0, split: Split::Train, metrics }).unwrap();
        let pixels = Tensor::zeros((1, 4, 6), DType::F32, &Device::Cpu).unwrap();
        logger.picture(&Picture::new(11, Split::Val, "prediction", &pixels).unwrap()).unwrap();
        let weights = Tensor::new(&[[1f32, -2.], [0., 3.]], &Device::Cpu).unwrap();
        logger.histogram(12, "weights/layer", &weights).unwrap();
        logger.text(13, "configuration", "[run]\nname = 'a'").unwrap();

        let values = values(dir.path());
        let tags: Vec<_> = values.iter().map(|(step, value)| (*step, value.tag.as_str())).collect();
        assert_eq!(
            tags,
            [(10, "train/loss"), (11, "val/prediction"), (12, "weights/layer"), (13, "configuration")]
        );
        let content: Vec<_> = values.into_iter().map(|(_, value)| value.value.unwrap()).collect();
        let [
            Content::SimpleValue(scalar),
            Content::Image(image),
            Content::Histo(histogram),
            Content::Tensor(text),
        ] = &content[..]
        else {
            panic!("{content:?}")
        };
        assert_eq!((*scalar, image.width, image.height, image.colorspace), (0.5, 6, 4, 1));
        assert_eq!((histogram.bucket.iter().sum(), histogram.min, histogram.max), (4., -2., 3.));
        assert_eq!(text.string_val, [b"    [run]\n    name = 'a'\n"]);
    }

    #[test]
    fn the_session_tells_settings_and_the_end_of_the_last_attempt_only() {
        let dir = tempfile::tempdir().unwrap();
        let attempt = |lr: f64, reason: StopReason| {
            let settings =
                IndexMap::from([("optimizer.lr".to_string(), lr.into()), ("n".into(), "x".into())]);
            let mut logger = TensorBoard::create(dir.path(), 0).unwrap();
            logger.close(&reason).unwrap();
            logger.hyper_parameters(&settings).unwrap();
            logger.close(&reason).unwrap();
        };
        attempt(0.5, StopReason::Signal(15));
        let [Data::Start(_), Data::End(end)] = &session(dir.path())[..] else { panic!() };
        assert_eq!(end.status(), Status::Failure);

        attempt(0.25, StopReason::Finished);
        let [Data::Start(start), Data::End(end)] = &session(dir.path())[..] else { panic!() };
        let kinds = ["n", "optimizer.lr"].map(|name| start.hparams[name].kind.clone().unwrap());
        assert_eq!(kinds, [Kind::StringValue("x".into()), Kind::NumberValue(0.25)]);
        assert_eq!((start.hparams.len(), end.status()), (2, Status::Success));
        assert!(end.end_time_secs >= start.start_time_secs && start.start_time_secs > 1.6e9);
    }

    #[test]
    fn an_attempt_says_from_which_step_on_it_replaces_an_earlier_one() {
        let dir = tempfile::tempdir().unwrap();
        let _logger = TensorBoard::create(dir.path(), 20).unwrap();
        let file = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let events: Vec<Event> =
            EventIter::open(file, Default::default()).unwrap().map(Result::unwrap).collect();
        let [Some(What::FileVersion(version)), Some(What::SessionLog(log))] =
            [0, 1].map(|i| events[i].what.clone())
        else {
            panic!("{events:?}")
        };
        assert_eq!(
            (version.as_str(), log.status(), events[1].step),
            ("brain.Event:2", SessionStatus::Start, 21)
        );
    }
}
