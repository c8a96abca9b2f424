//! JSON Schemas of parts of a configuration file.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

/// A type's schema. What it refers to stands where it is used: schemas are put together, and none has a place for definitions.
pub(crate) fn schema_of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    settings.into_generator().into_root_schema_for::<T>().to_value()
}

/// The schemas of an enum's variants by their names.
pub(crate) fn variants_of<T: JsonSchema>() -> Vec<(String, Value)> {
    let variants = schema_of::<T>()["oneOf"].take();
    let variant = |tagged: &Value| {
        let (name, fields) = tagged["properties"].as_object()?.iter().next()?;
        Some((name.clone(), fields.clone()))
    };
    variants.as_array().into_iter().flatten().filter_map(variant).collect()
}

/// A section that one of these names, with the fields that each of them takes. Without a name `default` is meant, where there is one.
pub(crate) fn named(variants: Vec<(String, Value)>, default: Option<&str>) -> Value {
    let variant = |(name, mut fields): (String, Value)| {
        if default != Some(&name) {
            require(&mut fields, "name");
        }
        fields["properties"]["name"] = json!({"const": name});
        fields
    };
    json!({"type": "object", "anyOf": variants.into_iter().map(variant).collect::<Vec<_>>()})
}

/// Says that a section needs a field.
pub(crate) fn require(section: &mut Value, field: &str) {
    match section["required"].as_array_mut() {
        Some(required) => required.push(field.into()),
        None => section["required"] = json!([field]),
    }
}
