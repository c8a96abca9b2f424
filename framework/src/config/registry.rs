//! The registry: which module, dataset, callback or optimizer a name in a configuration stands for.

use std::any::Any;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use candle_nn::VarBuilder;
use indexmap::IndexMap;
use serde::Serialize;
use serde_json::json;

use super::document::{Document, Named, did_you_mean, quoted_list, table};
use super::schema::{named, schema_of, variants_of};
use crate::batch::Batch;
use crate::callback::{BuildCallback, Callback};
use crate::data::{Open, OpenStream, Settings, Source, Split};
use crate::error::{Error, Result};
use crate::experiment::{Job, Pair};
use crate::module::{Build, Module};
use crate::optim::{Optimizer, OptimizerConfig};

/// The modules, datasets, callbacks and optimizers that configurations can name.
///
/// ```
/// # use candlepower::prelude::*;
/// # fn register<MyModule: Build, MyData: Open>() -> Registry {
/// Registry::default().module::<MyModule>("my_module").dataset::<MyData>("my_data")
/// # }
/// ```
#[derive(Default)]
pub struct Registry {
    families: Vec<Box<dyn AnyFamily>>,
    callbacks: IndexMap<&'static str, Entry<CallbackRecipe>>,
    optimizers: IndexMap<&'static str, Entry<OptimizerConfig>>,
}

impl Registry {
    /// Adds a module under this name.
    pub fn module<M: Build>(mut self, name: &'static str) -> Self {
        let parse = |document: &Document, named: &Named| {
            let config: M::Config = document.fields(named)?;
            let settings = named_table(named, &config)?;
            let build = Arc::new(move |spec: &<M::Batch as Batch>::Spec, vb: VarBuilder| {
                Ok(Box::new(M::build(&config, spec, vb)?) as Box<dyn Module<Batch = M::Batch>>)
            });
            Ok(ModuleRecipe { build, settings })
        };
        let entry = Entry { parse, schema: schema_of::<M::Config> };
        self.family::<M::Batch>().modules.insert(name, entry);
        self
    }

    /// Adds a dataset under this name.
    pub fn dataset<D: Open>(mut self, name: &'static str) -> Self {
        let parse = |document: &Document, named: &Named| {
            let open = |config: &D::Config, split| Ok(Source::Indexed(Arc::new(D::open(config, split)?)));
            DataRecipe::new(named, document.fields(named)?, open, D::read)
        };
        let entry = Entry { parse, schema: schema_of::<D::Config> };
        self.family::<D::Batch>().datasets.insert(name, entry);
        self
    }

    /// Adds a stream under this name.
    pub fn stream<S: OpenStream>(mut self, name: &'static str) -> Self {
        let parse = |document: &Document, named: &Named| {
            let open = |config: &S::Config, split| Ok(Source::Stream(Arc::new(S::open(config, split)?)));
            DataRecipe::new(named, document.fields(named)?, open, S::read)
        };
        let entry = Entry { parse, schema: schema_of::<S::Config> };
        self.family::<S::Batch>().datasets.insert(name, entry);
        self
    }

    /// Adds a callback under this name: a section `[callbacks.NAME]` attaches it to a run.
    pub fn callback<C: BuildCallback>(mut self, name: &'static str) -> Self {
        let parse = |document: &Document, named: &Named| {
            let config: C::Config = document.fields(named)?;
            let settings = table(&config)?;
            let make = Box::new(move || Ok(Box::new(C::watch(&config)?) as Box<dyn Callback>));
            Ok(CallbackRecipe { make, settings })
        };
        self.callbacks.insert(name, Entry { parse, schema: schema_of::<C::Config> });
        self
    }

    /// Adds an optimizer under this name, for `[optimizer]` and `[optimizers.*]`.
    pub fn optimizer<O: Optimizer>(mut self, name: &'static str) -> Self {
        let parse = |document: &Document, named: &Named| {
            let own = OptimizerConfig::custom::<O>(&named.name, document.fields(named)?);
            own.map_err(|error| document.place(named.section(), error))
        };
        self.optimizers.insert(name, Entry { parse, schema: schema_of::<O::Config> });
        self
    }

    /// The optimizer that a section names: a registered one, or one of Candlepower's.
    pub(crate) fn read_optimizer(&self, document: &Document, named: &Named) -> Result<OptimizerConfig> {
        match self.optimizers.get(named.name.as_str()) {
            Some(own) => (own.parse)(document, named),
            None => document.variant(named, "optimizer"),
        }
    }

    /// The modules and datasets with the batch type `B`.
    fn family<B: Batch>(&mut self) -> &mut Family<B> {
        let known = self.families.iter().position(|family| (**family).as_any().is::<Family<B>>());
        let index = known.unwrap_or_else(|| {
            self.families.push(Box::new(Family::<B> { modules: IndexMap::new(), datasets: IndexMap::new() }));
            self.families.len() - 1
        });
        match (*self.families[index]).as_any_mut().downcast_mut() {
            Some(family) => family,
            None => unreachable!("the family at this index was found, or made, with this very batch"),
        }
    }

    /// The job described by `[module]` and `[data]`, checked as far as possible without reading data.
    pub(crate) fn job(&self, document: &Document, module: &Named, data: &Named) -> Result<Box<dyn Job>> {
        let names = |of: fn(&dyn AnyFamily) -> Vec<&'static str>| -> Vec<&'static str> {
            self.families.iter().flat_map(|family| of(&**family)).collect()
        };
        let modules = names(|family| family.modules());
        let datasets = names(|family| family.datasets());
        if !datasets.contains(&data.name.as_str()) {
            return Err(unknown_name(document, data, "data", &datasets));
        }
        let family = self.families.iter().find(|family| family.modules().contains(&module.name.as_str()));
        let Some(family) = family else { return Err(unknown_name(document, module, "module", &modules)) };
        if !family.datasets().contains(&data.name.as_str()) {
            let message = format!(
                "data `{}` has another batch type than module `{}`, expected one of {}",
                data.name,
                module.name,
                quoted_list(&family.datasets())
            );
            return Err(document.error_at(data.span.clone(), message).into());
        }
        family.job(document, module, data)
    }

    /// The callbacks described by the sections in `[callbacks]`: names and recipes, in written order.
    pub(crate) fn callbacks(&self, document: &Document) -> Result<Vec<(String, CallbackRecipe)>> {
        let recipe = |(name, span): (String, Range<usize>)| {
            let Some(entry) = self.callbacks.get(name.as_str()) else {
                let known: Vec<&str> = self.callbacks.keys().copied().collect();
                let message = format!("unknown callback `{name}`, expected one of {}", quoted_list(&known));
                return Err(document.error_at(Some(span), message).hint(did_you_mean(&name, &known)).into());
            };
            let section = document.named(&format!("callbacks.{name}"), Some(&name))?;
            Ok((name, (entry.parse)(document, &section)?))
        };
        document.sections_in("callbacks")?.into_iter().map(recipe).collect()
    }

    /// A JSON Schema of the section `[callbacks]`.
    pub(crate) fn callback_schemas(&self) -> serde_json::Value {
        let schemas = self.callbacks.iter().map(|(name, entry)| (name.to_string(), (entry.schema)()));
        let schemas: serde_json::Map<_, _> = schemas.collect();
        json!({"type": "object", "additionalProperties": false, "properties": schemas})
    }

    /// A JSON Schema of the section `[module]`.
    pub(crate) fn module_schema(&self) -> serde_json::Value {
        named(self.families.iter().flat_map(|family| family.module_schemas()).collect(), None)
    }

    /// A JSON Schema of the section `[data]`, without the fields that are not the dataset's own.
    pub(crate) fn data_schema(&self) -> serde_json::Value {
        named(self.families.iter().flat_map(|family| family.dataset_schemas()).collect(), None)
    }

    /// JSON Schemas of the optimizers, by name.
    pub(crate) fn optimizer_schemas(&self) -> Schemas {
        let own = self.optimizers.iter().map(|(name, own)| (name.to_string(), (own.schema)()));
        let ours = variants_of::<OptimizerConfig>().into_iter();
        own.chain(ours.filter(|(name, _)| !self.optimizers.contains_key(name.as_str()))).collect()
    }
}

/// The error "unknown module `a`, expected one of `b`, `c`", at the location of the name.
fn unknown_name(document: &Document, named: &Named, what: &str, known: &[&str]) -> Error {
    let message = format!("unknown {what} `{}`, expected one of {}", named.name, quoted_list(known));
    document.error_at(named.span.clone(), message).hint(did_you_mean(&named.name, known)).into()
}

/// A module's section, read.
pub(crate) struct ModuleRecipe<B: Batch> {
    pub(crate) build: Arc<BuildModule<B>>,
    pub(crate) settings: toml::Table,
}

type BuildModule<B> =
    dyn Fn(&<B as Batch>::Spec, VarBuilder) -> Result<Box<dyn Module<Batch = B>>> + Send + Sync;

/// A dataset's section, read.
pub(crate) struct DataRecipe<B: Batch> {
    pub(crate) open: Box<dyn Fn(Split) -> Result<Source<B>> + Send + Sync>,
    /// Reads an input to predict from.
    pub(crate) read: Box<ReadBatch<B>>,
    pub(crate) settings: toml::Table,
}

type ReadBatch<B> = dyn Fn(&<B as Batch>::Spec, &Path) -> Result<B> + Send + Sync;

/// A callback's section, read.
pub(crate) struct CallbackRecipe {
    pub(crate) make: Box<dyn Fn() -> Result<Box<dyn Callback>> + Send + Sync>,
    pub(crate) settings: toml::Table,
}

impl<B: Batch> DataRecipe<B> {
    fn new<C: Settings>(
        named: &Named,
        config: C,
        open: fn(&C, Split) -> Result<Source<B>>,
        read: fn(&C, &B::Spec, &Path) -> Result<B>,
    ) -> Result<Self> {
        let settings = named_table(named, &config)?;
        let config = Arc::new(config);
        let shared = config.clone();
        Ok(Self {
            open: Box::new(move |split| open(&shared, split)),
            read: Box::new(move |spec, input| read(&config, spec, input)),
            settings,
        })
    }
}

/// The table of a section that names a type.
fn named_table(named: &Named, config: &impl Serialize) -> Result<toml::Table> {
    let mut section = table(config)?;
    section.insert("name".into(), named.name.clone().into());
    Ok(section)
}

/// A registered name: how to read its section, and the schema of that section.
struct Entry<T> {
    parse: fn(&Document, &Named) -> Result<T>,
    schema: fn() -> serde_json::Value,
}

/// The modules and datasets of one batch type: any of these modules can learn from any of these datasets.
struct Family<B: Batch> {
    modules: IndexMap<&'static str, Entry<ModuleRecipe<B>>>,
    datasets: IndexMap<&'static str, Entry<DataRecipe<B>>>,
}

/// JSON Schemas, by the names that select them.
type Schemas = Vec<(String, serde_json::Value)>;

/// A family of any batch type.
trait AnyFamily: Send + Sync {
    fn as_any(&self) -> &dyn Any;
    fn as_any_mut(&mut self) -> &mut dyn Any;
    fn modules(&self) -> Vec<&'static str>;
    fn datasets(&self) -> Vec<&'static str>;
    fn module_schemas(&self) -> Schemas;
    fn dataset_schemas(&self) -> Schemas;
    fn job(&self, document: &Document, module: &Named, data: &Named) -> Result<Box<dyn Job>>;
}

impl<B: Batch> AnyFamily for Family<B> {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn modules(&self) -> Vec<&'static str> {
        self.modules.keys().copied().collect()
    }

    fn datasets(&self) -> Vec<&'static str> {
        self.datasets.keys().copied().collect()
    }

    fn module_schemas(&self) -> Schemas {
        self.modules.iter().map(|(name, entry)| (name.to_string(), (entry.schema)())).collect()
    }

    fn dataset_schemas(&self) -> Schemas {
        self.datasets.iter().map(|(name, entry)| (name.to_string(), (entry.schema)())).collect()
    }

    fn job(&self, document: &Document, module: &Named, data: &Named) -> Result<Box<dyn Job>> {
        let module = (self.modules[module.name.as_str()].parse)(document, module)?;
        let data = (self.datasets[data.name.as_str()].parse)(document, data)?;
        Ok(Box::new(Pair { module, data }))
    }
}
