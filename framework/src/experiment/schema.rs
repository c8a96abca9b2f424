//! The JSON Schema of configuration files.

use serde_json::{Value, json};

use crate::checkpoint::CheckpointConfig;
use crate::collective::DistributedConfig;
use crate::config::Registry;
use crate::config::schema::{named, require, schema_of, variants_of};
use crate::logger::LoggingConfig;
use crate::optim::{AverageConfig, ParamGroup};
use crate::run_dir::RunConfig;
use crate::schedule::{Interval, Plateau, Schedule};
use crate::trainer::TrainerConfig;
use crate::weights::InitConfig;

/// Makes the schema of a section.
type SchemaOf = fn(&Registry) -> Value;

/// The sections of a configuration, each with its schema.
pub(super) const SECTIONS: [(&str, SchemaOf); 13] = [
    ("run", |_| schema_of::<RunConfig>()),
    ("init", |_| schema_of::<InitConfig>()),
    ("trainer", |_| schema_of::<TrainerConfig>()),
    ("module", Registry::module_schema),
    ("data", data),
    ("optimizer", |registry| optimizer(registry, Some("adam"))),
    ("optimizers", optimizers),
    ("schedule", |_| with_fields(schedule(), &[("plateau", schema_of::<Plateau>())])),
    ("average", |_| named(variants_of::<AverageConfig>(), None)),
    ("checkpoint", |_| schema_of::<CheckpointConfig>()),
    ("logging", |_| schema_of::<LoggingConfig>()),
    ("distributed", |_| schema_of::<DistributedConfig>()),
    ("callbacks", Registry::callback_schemas),
];

/// Returns a JSON Schema of configuration files, for editors.
pub fn schema(registry: &Registry) -> Value {
    let sections = SECTIONS.iter().map(|(name, schema)| (name.to_string(), schema(registry)));
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Candlepower configuration",
        "type": "object",
        "required": ["module", "data"],
        "additionalProperties": false,
        "properties": sections.collect::<serde_json::Map<_, _>>(),
    })
}

fn data(registry: &Registry) -> Value {
    let loading = [("workers", schema_of::<usize>()), ("prefetch", schema_of::<usize>())];
    with_fields(registry.data_schema(), &loading)
}

fn optimizer(registry: &Registry, default: Option<&str>) -> Value {
    let groups = ("groups", schema_of::<Vec<ParamGroup>>());
    with_fields(named(registry.optimizer_schemas(), default), &[groups])
}

fn optimizers(registry: &Registry) -> Value {
    let own_fields =
        [("params", schema_of::<String>()), ("every", schema_of::<u64>()), ("schedule", schedule())];
    let mut one_of_several = with_fields(optimizer(registry, None), &own_fields);
    require(&mut one_of_several, "params");
    json!({"type": "object", "additionalProperties": one_of_several})
}

/// A schedule without a plateau.
fn schedule() -> Value {
    let interval = ("interval", schema_of::<Interval>());
    with_fields(named(variants_of::<Schedule>(), Some("constant")), &[interval])
}

/// Adds fields to every variant of a section.
fn with_fields(mut section: Value, fields: &[(&str, Value)]) -> Value {
    for variant in section["anyOf"].as_array_mut().into_iter().flatten() {
        for (name, schema) in fields {
            variant["properties"][*name] = schema.clone();
        }
    }
    section
}
