//! What editors are told of configuration files.

use schemars::schema_for;
use serde_json::json;

use crate::checkpoint::CheckpointConfig;
use crate::collective::DistributedConfig;
use crate::config::Registry;
use crate::logger::LoggingConfig;
use crate::optim::{AverageConfig, OptimizerConfig};
use crate::run_dir::RunConfig;
use crate::schedule::Schedule;
use crate::trainer::TrainerConfig;
use crate::weights::InitConfig;

/// A JSON Schema of configuration files, for editors.
pub fn schema(registry: &Registry) -> serde_json::Value {
    let [module, data] = registry.schemas();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Candlepower configuration",
        "type": "object",
        "required": ["module", "data"],
        "additionalProperties": false,
        "properties": {
            "run": schema_for!(RunConfig),
            "init": schema_for!(InitConfig),
            "trainer": schema_for!(TrainerConfig),
            "module": module,
            "data": data,
            "optimizer": named_variants(schema_for!(OptimizerConfig)),
            "optimizers": {
                "type": "object",
                "additionalProperties": named_variants(schema_for!(OptimizerConfig)),
            },
            "schedule": named_variants(schema_for!(Schedule)),
            "average": named_variants(schema_for!(AverageConfig)),
            "checkpoint": schema_for!(CheckpointConfig),
            "logging": schema_for!(LoggingConfig),
            "distributed": schema_for!(DistributedConfig),
            "callbacks": registry.callback_schemas(),
        },
    })
}

/// The schema of an enum whose variants are chosen by `name`, their fields beside it.
fn named_variants(schema: schemars::Schema) -> serde_json::Value {
    let mut schema = schema.to_value();
    let definitions = schema["$defs"].take();
    let variants = schema["oneOf"].take().as_array().cloned().unwrap_or_default();
    let variant = |tagged: serde_json::Value| {
        let (name, fields) = tagged["properties"].as_object()?.iter().next()?;
        let definition = fields["$ref"].as_str().and_then(|path| definitions.get(path.rsplit('/').next()?));
        let mut fields = definition.unwrap_or(fields).clone();
        fields["properties"]["name"] = json!({"const": name});
        Some(fields)
    };
    json!({"type": "object", "anyOf": variants.into_iter().filter_map(variant).collect::<Vec<_>>()})
}
