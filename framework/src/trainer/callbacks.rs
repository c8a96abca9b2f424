//! A trainer's callbacks, and the names that their state is saved under.

use std::ops::{Deref, DerefMut};

use indexmap::IndexMap;

use crate::callback::{Callback, Flow};
use crate::checkpoint::State;
use crate::error::Result;

/// The callbacks of a trainer, in the order in which they are called.
#[derive(Default)]
pub(super) struct Callbacks(Vec<Named>);

/// A callback and its names.
pub(super) struct Named {
    /// The name of its kind, or of its section in a configuration.
    pub(super) section: String,
    /// The name of its state in checkpoints. The second callback with a section name gets the suffix `.2`.
    key: String,
    callback: Box<dyn Callback>,
}

impl Deref for Named {
    type Target = dyn Callback;

    fn deref(&self) -> &Self::Target {
        &*self.callback
    }
}

impl DerefMut for Named {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut *self.callback
    }
}

impl Callbacks {
    /// Adds a callback of this section after the existing ones.
    pub(super) fn add(&mut self, section: &str, callback: Box<dyn Callback>) {
        let section = section.to_string();
        let key = match self.iter().filter(|named| named.section == section).count() {
            0 => section.clone(),
            before => format!("{section}.{}", before + 1),
        };
        self.0.push(Named { section, key, callback });
    }

    /// Adds a callback of the library's own, whose state has the name of its kind.
    pub(super) fn add_own(&mut self, callback: impl Callback + 'static) {
        let name = callback.name().to_string();
        self.0.push(Named { key: name.clone(), section: name, callback: Box::new(callback) });
    }

    /// Keeps only the callbacks that run on every rank.
    pub(super) fn keep_those_on_every_rank(&mut self) {
        self.0.retain(|callback| callback.on_every_rank());
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> std::slice::Iter<'_, Named> {
        self.0.iter()
    }

    /// Whether any callback wants the gradients of this step.
    pub(super) fn want_gradients(&self, step: u64) -> bool {
        self.iter().any(|callback| callback.wants_gradients(step))
    }

    /// Tells every callback of an event.
    pub(super) fn tell(&mut self, mut event: impl FnMut(&mut dyn Callback) -> Result<()>) -> Result<()> {
        self.0.iter_mut().try_for_each(|named| event(&mut *named.callback))
    }

    /// Asks every callback; a single one that wants to stop is enough.
    pub(super) fn ask(
        &mut self,
        mut question: impl FnMut(&mut dyn Callback) -> Result<Flow>,
    ) -> Result<Flow> {
        let mut flow = Flow::Continue;
        for named in &mut self.0 {
            flow = flow.or(question(&mut *named.callback)?);
        }
        Ok(flow)
    }

    /// The state of each callback, by its key.
    pub(super) fn states(&self) -> IndexMap<String, serde_json::Value> {
        self.iter().filter_map(|named| Some((named.key.clone(), named.state()?))).collect()
    }

    /// Restores the callbacks' state from a checkpoint. Returns the keys of those that are not attached.
    pub(super) fn restore(&mut self, state: &State) -> Result<Vec<String>> {
        let mut saved = state.callbacks.clone();
        for named in &mut self.0 {
            if let Some(state) = saved.shift_remove(&named.key) {
                named.restore(state)?;
            }
        }
        Ok(saved.into_keys().collect())
    }
}
