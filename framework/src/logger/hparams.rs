//! The messages of TensorBoard's HPARAMS tab: the part of `tensorboard/plugins/hparams/plugin_data.proto` in
//! use.

use std::collections::HashMap;

use prost_types::{Value, value::Kind};

/// The plugin that reads these messages.
pub(super) const PLUGIN: &str = "hparams";
/// The tag of [`SessionStart`].
pub(super) const SESSION_START: &str = "_hparams_/session_start_info";
/// The tag of [`SessionEnd`].
pub(super) const SESSION_END: &str = "_hparams_/session_end_info";

/// `HParamsPluginData`: stored in the metadata of a summary without a value.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PluginData {
    #[prost(int32, tag = "1")]
    pub(super) version: i32,
    #[prost(oneof = "Data", tags = "3, 4")]
    pub(super) data: Option<Data>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum Data {
    #[prost(message, tag = "3")]
    Start(SessionStart),
    #[prost(message, tag = "4")]
    End(SessionEnd),
}

/// `SessionStartInfo`: a run and its hyper-parameters.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SessionStart {
    #[prost(map = "string, message", tag = "1")]
    pub(super) hparams: HashMap<String, Value>,
    #[prost(double, tag = "5")]
    pub(super) start_time_secs: f64,
}

/// `SessionEndInfo`: how a run ended.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SessionEnd {
    #[prost(enumeration = "Status", tag = "1")]
    pub(super) status: i32,
    #[prost(double, tag = "2")]
    pub(super) end_time_secs: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(super) enum Status {
    Unknown = 0,
    Success = 1,
    Failure = 2,
    Running = 3,
}

/// Converts a setting to a type that HPARAMS supports: text, number or boolean. TensorBoard drops non-finite
/// numbers and does not support lists; both become text.
pub(super) fn value(setting: &toml::Value) -> Value {
    let kind = match setting {
        toml::Value::Boolean(value) => Kind::BoolValue(*value),
        toml::Value::Integer(value) => Kind::NumberValue(*value as f64),
        toml::Value::Float(value) if value.is_finite() => Kind::NumberValue(*value),
        toml::Value::String(value) => Kind::StringValue(value.clone()),
        other => Kind::StringValue(other.to_string()),
    };
    Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// The expected bytes were produced by the Python package tensorboard 2.21 for the same messages.
    #[test]
    fn messages_have_the_bytes_of_the_python_package() {
        let start = |name: &str, setting: toml::Value| {
            let hparams = HashMap::from([(name.to_string(), value(&setting))]);
            PluginData { version: 0, data: Some(Data::Start(SessionStart { hparams, start_time_secs: 2. })) }
        };
        let end = |status: Status| {
            let end = SessionEnd { status: status.into(), end_time_secs: 3. };
            PluginData { version: 0, data: Some(Data::End(end)) }
        };
        let messages: [(PluginData, &[u8]); 5] = [
            (start("lr", 0.5.into()), b"\x1a\x1a\n\x0f\n\x02lr\x12\t\x11\0\0\0\0\0\0\xe0?)\0\0\0\0\0\0\0@"),
            (start("n", "adam".into()), b"\x1a\x16\n\x0b\n\x01n\x12\x06\x1a\x04adam)\0\0\0\0\0\0\0@"),
            (start("n", true.into()), b"\x1a\x12\n\x07\n\x01n\x12\x02 \x01)\0\0\0\0\0\0\0@"),
            (end(Status::Success), b"\"\x0b\x08\x01\x11\0\0\0\0\0\0\x08@"),
            (end(Status::Failure), b"\"\x0b\x08\x02\x11\0\0\0\0\0\0\x08@"),
        ];
        for (message, bytes) in messages {
            assert_eq!(message.encode_to_vec(), bytes, "{message:?}");
        }
    }

    #[test]
    fn settings_become_what_the_tab_can_show() {
        let kind = |setting: toml::Value| value(&setting).kind.unwrap();
        assert_eq!(kind(7.into()), Kind::NumberValue(7.));
        assert_eq!(kind(f64::INFINITY.into()), Kind::StringValue("inf".into()));
        assert_eq!(
            kind(toml::Value::Array(vec![0.9.into(), 2.into()])),
            Kind::StringValue("[0.9, 2]".into())
        );
    }
}
