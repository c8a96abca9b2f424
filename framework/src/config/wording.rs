//! Reads values, and rewords the errors of serde and toml for users who write configurations.

use std::ops::Range;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeValue, ValueDeserializer};

/// Why a value is refused, and where the error is.
pub(super) struct Refusal {
    pub(super) message: String,
    pub(super) span: Option<Range<usize>>,
}

/// Reads a value.
pub(super) fn read<T: DeserializeOwned>(value: Spanned<DeValue>) -> Result<T, Refusal> {
    let of = |value: &Spanned<DeValue>| T::deserialize(ValueDeserializer::from(value.clone()));
    let error = match of(&value) {
        Ok(read) => return Ok(read),
        Err(error) => error,
    };
    // If one of several words is expected, toml lists them for a wrong string, but not for other types.
    if error.message() == "wanted string or table"
        && let Some(span) = error.span()
        && let (quoted, Some(text)) = quote(value, &span)
    {
        let message = match of(&quoted) {
            Ok(_) => format!("expected a string: \"{text}\""),
            Err(error) => in_plain_words(error.message()),
        };
        return Err(Refusal { message, span: Some(span) });
    }
    Err(refusal(error))
}

fn refusal(error: toml::de::Error) -> Refusal {
    Refusal { message: in_plain_words(error.message()), span: error.span() }
}

/// The same value with a string in place of the number or boolean at `span`, and that string.
fn quote<'t>(value: Spanned<DeValue<'t>>, span: &Range<usize>) -> (Spanned<DeValue<'t>>, Option<String>) {
    let (at, inner) = (value.span(), value.into_inner());
    let text = match &inner {
        DeValue::Integer(number) if at == *span => Some(number.to_string()),
        DeValue::Float(number) if at == *span => Some(number.to_string()),
        DeValue::Boolean(truth) if at == *span => Some(truth.to_string()),
        _ => None,
    };
    if let Some(text) = text {
        return (Spanned::new(at, DeValue::String(text.clone().into())), Some(text));
    }
    let mut found = None;
    let mut within = |value| {
        let (value, text) = quote(value, span);
        found = found.take().or(text);
        value
    };
    let inner = match inner {
        DeValue::Table(fields) => {
            DeValue::Table(fields.into_iter().map(|(key, value)| (key, within(value))).collect())
        }
        DeValue::Array(values) => DeValue::Array(values.into_iter().map(within).collect()),
        other => other,
    };
    (Spanned::new(at, inner), found)
}

/// Rewords a message of serde's without the names of Rust types.
fn in_plain_words(message: &str) -> String {
    if let Some(rest) = message.strip_prefix("unknown variant ") {
        return format!("unknown value {rest}");
    }
    let wrong = ["invalid type: ", "invalid value: ", "invalid length "];
    let Some(rest) = wrong.iter().find_map(|prefix| message.strip_prefix(prefix)) else {
        return message.to_string();
    };
    let Some((found, expected)) = rest.split_once(", expected ") else { return message.to_string() };
    format!("expected {}, found {}", wanted(expected), present(found))
}

/// Describes what was expected.
fn wanted(expected: &str) -> String {
    let count = expected.strip_prefix("an array of length ").or(expected.strip_prefix("a tuple of size "));
    if let Some(count) = count {
        return format!("a list of {count} values");
    }
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number of at least 0",
        "a nonzero u8" | "a nonzero u32" | "a nonzero u64" | "a nonzero usize" => {
            "a whole number of at least 1"
        }
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" => "`true` or `false`",
        "a string" | "path string" => "a text in quotes",
        "a sequence" => "a list such as `[1, 2]`",
        "a map" => "a table such as `{ key = 1 }`",
        _ if expected.starts_with("struct ") => "a table such as `{ key = 1 }`",
        other => other,
    }
    .to_string()
}

/// Describes what was found.
fn present(found: &str) -> &str {
    match found {
        "map" => "a table",
        "sequence" => "a list",
        _ => ["string ", "integer ", "floating point ", "boolean "]
            .iter()
            .find_map(|kind| found.strip_prefix(kind))
            .unwrap_or(found),
    }
}

/// A hint for a field of PyTorch Lightning that is different here.
pub(super) fn in_our_words(field: &str) -> Option<&'static str> {
    Some(match field {
        "accumulate_grad_batches" => {
            "set `trainer.micro_batch_size`; a step adds up as many as make a `batch_size`"
        }
        "gradient_clip_val" => "it is `trainer.clip_norm`",
        "check_val_every_n_epoch" => "it is `trainer.val_every`, as \"2 epochs\"",
        "val_check_interval" => "it is `trainer.val_every`, as 500 or \"0.25 epochs\"",
        "log_every_n_steps" => "it is `trainer.log_every`",
        "num_sanity_val_steps" => "it is `trainer.sanity_val_batches`",
        "deterministic" => "each run is: equal seeds give equal bits",
        "strategy" => "see `trainer.devices` and [distributed]",
        "num_nodes" => "it is `candlepower launch --nodes`",
        "num_workers" => "it is `data.workers`",
        "learning_rate" => "it is `lr`",
        "save_top_k" => "it is `checkpoint.keep_best`",
        "every_n_train_steps" => "it is `checkpoint.every_steps`",
        "dirpath" => "it is `run.dir`",
        "mode" => "it is `maximize`, true or false",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use serde::Deserialize;

    use crate::config::Document;
    use crate::precision::Precision;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    #[allow(dead_code)]
    struct Fields {
        count: usize,
        some: Option<NonZeroUsize>,
        whole: i64,
        share: f64,
        is_on: bool,
        path: std::path::PathBuf,
        list: Vec<usize>,
        pair: [f64; 2],
        inner: Inner,
        precision: Option<Precision>,
        each: Vec<Precision>,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Inner {
        precision: Option<Precision>,
    }

    #[test]
    fn wrong_values_are_told_in_plain_words() {
        let precisions = "expected one of `32`, `bf16-mixed`, `16-mixed`";
        for (line, words) in [
            ("count = \"four\"", "expected a whole number of at least 0, found \"four\""),
            ("count = -4", "expected a whole number of at least 0, found `-4`"),
            ("count = 4.5", "expected a whole number of at least 0, found `4.5`"),
            ("some = 0", "expected a whole number of at least 1, found `0`"),
            ("whole = true", "expected a whole number, found `true`"),
            ("share = \"half\"", "expected a number, found \"half\""),
            ("is_on = 1", "expected `true` or `false`, found `1`"),
            ("path = 3", "expected a text in quotes, found `3`"),
            ("list = 3", "expected a list such as `[1, 2]`, found `3`"),
            ("pair = [1.0]", "expected a list of 2 values, found 1"),
            ("pair = 1.0", "expected a list of 2 values, found `1.0`"),
            ("inner = 3", "expected a table such as `{ key = 1 }`, found `3`"),
            ("share = [1]", "expected a number, found a list"),
            ("share = { a = 1 }", "expected a number, found a table"),
            ("precision = \"half\"", &format!("unknown value `half`, {precisions}")),
            // As in Lightning.
            ("precision = 16", &format!("unknown value `16`, {precisions}")),
            ("precision = 32", "expected a string: \"32\""),
            ("inner = { precision = 32 }", "expected a string: \"32\""),
            ("each = [\"32\", 1.5]", &format!("unknown value `1.5`, {precisions}")),
            ("precision = true", &format!("unknown value `true`, {precisions}")),
        ] {
            let document = Document::parse("a.toml", format!("[here]\n{line}\n"), &[]).unwrap();
            let error = document.section::<Fields>("here").unwrap_err().to_string();
            assert!(
                error.starts_with("a.toml:2:") && error.contains(&format!(": {words}\n")),
                "{line}: {error}"
            );
        }
    }
}
