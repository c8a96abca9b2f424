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

/// Returns a JSON Schema of configuration files, for editors.
pub fn schema(registry: &Registry) -> Value {
    let [module, data] = registry.schemas();
    let data = with_fields(data, &[("workers", schema_of::<usize>()), ("prefetch", schema_of::<usize>())]);
    let groups = [("groups", schema_of::<Vec<ParamGroup>>())];
    let optimizer = |default| with_fields(named(registry.optimizer_schemas(), default), &groups);
    let interval = ("interval", schema_of::<Interval>());
    let schedule = with_fields(named(variants_of::<Schedule>(), Some("constant")), &[interval]);
    let own_fields =
        [("params", schema_of::<String>()), ("every", schema_of::<u64>()), ("schedule", schedule.clone())];
    let mut one_of_several = with_fields(optimizer(None), &own_fields);
    require(&mut one_of_several, "params");
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Candlepower configuration",
        "type": "object",
        "required": ["module", "data"],
        "additionalProperties": false,
        "properties": {
            "run": schema_of::<RunConfig>(),
            "init": schema_of::<InitConfig>(),
            "trainer": schema_of::<TrainerConfig>(),
            "module": module,
            "data": data,
            "optimizer": optimizer(Some("adam")),
            "optimizers": {"type": "object", "additionalProperties": one_of_several},
            "schedule": with_fields(schedule, &[("plateau", schema_of::<Plateau>())]),
            "average": named(variants_of::<AverageConfig>(), None),
            "checkpoint": schema_of::<CheckpointConfig>(),
            "logging": schema_of::<LoggingConfig>(),
            "distributed": schema_of::<DistributedConfig>(),
            "callbacks": registry.callback_schemas(),
        },
    })
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
