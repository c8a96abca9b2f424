//! JSON Schemas of parts of a configuration file.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

/// A type's schema. Subschemas are inlined: schemas get combined, and there is no place for definitions.
pub(crate) fn schema_of<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.inline_subschemas = true;
        settings.meta_schema = None;
    });
    settings.into_generator().into_root_schema_for::<T>().to_value()
}

/// The schemas of an enum's variants, by name.
pub(crate) fn variants_of<T: JsonSchema>() -> Vec<(String, Value)> {
    let variants = schema_of::<T>()["oneOf"].take();
    let variant = |tagged: &Value| {
        let (name, fields) = tagged["properties"].as_object()?.iter().next()?;
        Some((name.clone(), fields.clone()))
    };
    variants.as_array().into_iter().flatten().filter_map(variant).collect()
}

/// The schema of a section that names one of these variants and has its fields. `default` is the variant of a
/// section without a name, if that is allowed.
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

/// Marks a field of a section as required.
pub(crate) fn require(section: &mut Value, field: &str) {
    match section["required"].as_array_mut() {
        Some(required) => required.push(field.into()),
        None => section["required"] = json!([field]),
    }
}
