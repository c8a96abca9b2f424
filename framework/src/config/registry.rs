//! The registry: which module, dataset, callback or optimizer a name in a configuration stands for.

use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use candle_nn::VarBuilder;
use indexmap::IndexMap;
use serde_json::json;

use super::document::{Document, Named, did_you_mean, quoted_list};
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
    callbacks: IndexMap<&'static str, Entry<dyn CallbackRecipe>>,
    optimizers: IndexMap<&'static str, OwnEntry>,
}

/// A custom optimizer: how to read its section, and the schema of that section.
struct OwnEntry {
    parse: fn(&Document, &Named) -> Result<OptimizerConfig>,
    schema: fn() -> serde_json::Value,
}

impl Registry {
    /// Adds a module under this name.
    pub fn module<M: Build>(mut self, name: &'static str) -> Self {
        let parse = |document: &Document, named: &Named| -> Result<Box<dyn ModuleRecipe<M::Batch>>> {
            Ok(Box::new(FromConfig::<M, M::Config> { config: document.fields(named)?, makes: PhantomData }))
        };
        let entry = Entry { parse, schema: schema_of::<M::Config> };
        self.family::<M::Batch>().modules.insert(name, entry);
        self
    }

    /// Adds a dataset under this name.
    pub fn dataset<D: Open>(mut self, name: &'static str) -> Self {
        let parse = |document: &Document, named: &Named| -> Result<Box<dyn DataRecipe<D::Batch>>> {
            let open = |config: &D::Config, split| Ok(Source::Indexed(Arc::new(D::open(config, split)?)));
            Ok(Box::new(DataFromConfig { config: document.fields(named)?, open, read: D::read }))
        };
        let entry = Entry { parse, schema: schema_of::<D::Config> };
        self.family::<D::Batch>().datasets.insert(name, entry);
        self
    }

    /// Adds a stream under this name.
    pub fn stream<S: OpenStream>(mut self, name: &'static str) -> Self {
        let parse = |document: &Document, named: &Named| -> Result<Box<dyn DataRecipe<S::Batch>>> {
            let open = |config: &S::Config, split| Ok(Source::Stream(Arc::new(S::open(config, split)?)));
            Ok(Box::new(DataFromConfig { config: document.fields(named)?, open, read: S::read }))
        };
        let entry = Entry { parse, schema: schema_of::<S::Config> };
        self.family::<S::Batch>().datasets.insert(name, entry);
        self
    }

    /// Adds a callback under this name: a section `[callbacks.NAME]` attaches it to a run.
    pub fn callback<C: BuildCallback>(mut self, name: &'static str) -> Self {
        let parse = |document: &Document, named: &Named| -> Result<Box<dyn CallbackRecipe>> {
            Ok(Box::new(FromConfig::<C, C::Config> { config: document.fields(named)?, makes: PhantomData }))
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
        self.optimizers.insert(name, OwnEntry { parse, schema: schema_of::<O::Config> });
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
    pub(crate) fn callbacks(&self, document: &Document) -> Result<Vec<(String, Box<dyn CallbackRecipe>)>> {
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

    /// JSON Schemas of the sections `[module]` and `[data]`.
    pub(crate) fn schemas(&self) -> [serde_json::Value; 2] {
        let all = |of: fn(&dyn AnyFamily) -> Schemas| {
            named(self.families.iter().flat_map(|family| of(&**family)).collect(), None)
        };
        [all(|family| family.module_schemas()), all(|family| family.dataset_schemas())]
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

/// Builds modules from parsed settings.
pub(crate) trait ModuleRecipe<B: Batch>: Send + Sync {
    fn build(&self, spec: &B::Spec, vb: VarBuilder) -> Result<Box<dyn Module<Batch = B>>>;
    fn settings(&self) -> Result<toml::Table>;
}

/// Opens datasets, and reads inputs to predict from, with parsed settings.
pub(crate) trait DataRecipe<B: Batch>: Send + Sync {
    fn open(&self, split: Split) -> Result<Source<B>>;
    fn read(&self, spec: &B::Spec, input: &Path) -> Result<B>;
    fn settings(&self) -> Result<toml::Table>;
}

/// Creates callbacks from parsed settings.
pub(crate) trait CallbackRecipe: Send + Sync {
    fn make(&self) -> Result<Box<dyn Callback>>;
    fn settings(&self) -> Result<toml::Table>;
}

struct DataFromConfig<B: Batch, C> {
    config: C,
    open: fn(&C, Split) -> Result<Source<B>>,
    read: fn(&C, &B::Spec, &Path) -> Result<B>,
}

struct FromConfig<T, C> {
    config: C,
    makes: PhantomData<fn() -> T>,
}

fn table(config: &impl serde::Serialize) -> Result<toml::Table> {
    toml::Table::try_from(config).map_err(|error| Error::msg(error.to_string()))
}

impl<M: Build> ModuleRecipe<M::Batch> for FromConfig<M, M::Config> {
    fn build(
        &self,
        spec: &<M::Batch as Batch>::Spec,
        vb: VarBuilder,
    ) -> Result<Box<dyn Module<Batch = M::Batch>>> {
        Ok(Box::new(M::build(&self.config, spec, vb)?))
    }

    fn settings(&self) -> Result<toml::Table> {
        table(&self.config)
    }
}

impl<B: Batch, C: Settings> DataRecipe<B> for DataFromConfig<B, C> {
    fn open(&self, split: Split) -> Result<Source<B>> {
        (self.open)(&self.config, split)
    }

    fn read(&self, spec: &B::Spec, input: &Path) -> Result<B> {
        (self.read)(&self.config, spec, input)
    }

    fn settings(&self) -> Result<toml::Table> {
        table(&self.config)
    }
}

impl<C: BuildCallback> CallbackRecipe for FromConfig<C, C::Config> {
    fn make(&self) -> Result<Box<dyn Callback>> {
        Ok(Box::new(C::watch(&self.config)?))
    }

    fn settings(&self) -> Result<toml::Table> {
        table(&self.config)
    }
}

/// A registered name: how to read its section, and the schema of that section. `R` is a recipe.
struct Entry<R: ?Sized> {
    parse: fn(&Document, &Named) -> Result<Box<R>>,
    schema: fn() -> serde_json::Value,
}

/// The modules and datasets of one batch type: any of these modules can learn from any of these datasets.
struct Family<B: Batch> {
    modules: IndexMap<&'static str, Entry<dyn ModuleRecipe<B>>>,
    datasets: IndexMap<&'static str, Entry<dyn DataRecipe<B>>>,
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
        Ok(Box::new(Pair { module: module.into(), data }))
    }
}
