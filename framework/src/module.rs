//! What a user writes: [`Module`] and [`Build`]. What they are handed: [`Step`]. What the trainer trains: [`Model`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor, Var};
use candle_nn::VarBuilder;

use crate::batch::Batch;
use crate::config::quoted_list;
use crate::data::Settings;
use crate::error::{Error, Result};
use crate::metrics::Collected;
use crate::params::{Params, PutTap};
use crate::precision::Precision;
use crate::seed;

/// Something that turns a batch into a loss.
pub trait Module: Send + Sync {
    /// What it learns from.
    type Batch: Batch;

    /// The scalar to minimise: the mean over the batch's samples, or over what [`Step::weigh_loss`] says.
    fn training_step(&self, batch: &Self::Batch, step: &mut Step) -> Result<Tensor>;

    /// The loss on held-out data; other metrics are logged on `step`.
    fn validation_step(&self, batch: &Self::Batch, step: &mut Step) -> Result<Tensor> {
        self.training_step(batch, step)
    }

    /// What the module says about this batch, (B, ...).
    fn predict_step(&self, _batch: &Self::Batch, _step: &mut Step) -> Result<Tensor> {
        Err(Error::msg("this module does not implement `predict_step`, which `predict` needs"))
    }

    /// Metrics of a whole evaluation that are no means over its samples, by name: areas under curves, correlations, quantiles. They are
    /// computed of what `validation_step` has given to [`Step::collect`], after the last batch, and on every rank alike; where
    /// nothing was collected, nobody asks.
    ///
    /// ```
    /// # use candlepower::prelude::*;
    /// use candlepower::metrics::{Collected, classification::auroc};
    /// # struct Detector;
    /// # impl Module for Detector {
    /// # type Batch = Labelled;
    /// # fn training_step(&self, _: &Labelled, _: &mut Step) -> Result<Tensor> { unimplemented!() }
    /// // In `validation_step`: `step.collect("score", &scores); step.collect("label", &batch.label);`
    /// fn metrics(&self, all: &Collected) -> Result<Vec<(String, f64)>> {
    ///     Ok(vec![("auroc".into(), auroc(&all.get("score")?, &all.get("label")?)?)])
    /// }
    /// # }
    /// ```
    fn metrics(&self, _all: &Collected) -> Result<Vec<(String, f64)>> {
        Ok(Vec::new())
    }

    /// Parameters that no loss of this module depends on, as patterns in which `*` stands for any text: they are in every
    /// checkpoint and are never moved. A parameter without gradient that is not among them is an error, and so is one
    /// among them that gets a gradient.
    fn unused(&self) -> &[&str] {
        &[]
    }

    /// Floating-point operations of one sample's forward pass, a multiply-add counted as two; none where nobody has
    /// counted them. A training step counts as three forward passes.
    fn flops(&self) -> Option<f64> {
        None
    }
}

/// Something made from its own section of the configuration file.
pub trait Build: Module + Sized + 'static {
    /// The fields of its `[module]` section.
    type Config: Settings;

    /// Makes the module for batches of this `spec`; `vb` hands out its parameters by name.
    fn build(config: &Self::Config, spec: &<Self::Batch as Batch>::Spec, vb: VarBuilder) -> Result<Self>;
}

/// A number that a module logged.
#[derive(Clone)]
pub(crate) struct Metric {
    pub(crate) name: String,
    /// A scalar.
    pub(crate) value: Tensor,
    /// Of how many things it is the mean, where that is not the batch's samples.
    pub(crate) weight: Option<f64>,
    /// Whether training logs its mean over an epoch, instead of that of single steps.
    pub(crate) of_epoch: bool,
}

/// What can be logged: a scalar on any device, or a number.
pub trait Loggable {
    /// A tensor of one number.
    fn scalar(self) -> candle_core::Result<Tensor>;
}

impl Loggable for &Tensor {
    fn scalar(self) -> candle_core::Result<Tensor> {
        Ok(self.detach())
    }
}

impl Loggable for Tensor {
    fn scalar(self) -> candle_core::Result<Tensor> {
        Ok(self.detach())
    }
}

impl Loggable for &Var {
    fn scalar(self) -> candle_core::Result<Tensor> {
        Ok(self.as_detached_tensor())
    }
}

impl Loggable for f64 {
    fn scalar(self) -> candle_core::Result<Tensor> {
        Tensor::new(self, &Device::Cpu)
    }
}

impl Loggable for f32 {
    fn scalar(self) -> candle_core::Result<Tensor> {
        f64::from(self).scalar()
    }
}

/// Names of what is in every record.
pub(crate) const TAKEN: [&str; 6] = ["loss", "lr", "grad_norm", "step", "epoch", "split"];

/// Makes a picture (C, H, W) of tensors on the CPU.
pub(crate) type Draw = Arc<dyn Fn(&[Tensor]) -> Result<Tensor> + Send + Sync>;

/// A picture that a module logged and that is still to be drawn.
#[derive(Clone)]
pub(crate) struct Sketch {
    pub(crate) name: String,
    pub(crate) of: Vec<Tensor>,
    pub(crate) draw: Draw,
}

/// One call of a module: what it may know about the run, and what it wants to tell.
pub struct Step {
    training: bool,
    index: u64,
    micro_batch: u64,
    seed: u64,
    optimizer: String,
    images_due: bool,
    /// Whether it was asked for what differs from step to step.
    asked: Arc<AtomicBool>,
    metrics: Vec<Metric>,
    images: Vec<Sketch>,
    /// Of each sample, for metrics of all.
    collected: Vec<(String, Tensor)>,
    /// Of how many things the loss is the mean, where that is not the batch's samples.
    loss_weight: Option<f64>,
    /// What could not be logged.
    refused: Option<Error>,
}

impl Step {
    pub(crate) fn training(
        index: u64,
        micro_batch: u64,
        seed: u64,
        optimizer: &str,
        images_due: bool,
    ) -> Self {
        Self {
            training: true,
            index,
            micro_batch,
            seed,
            optimizer: optimizer.to_string(),
            images_due,
            asked: Arc::default(),
            metrics: Vec::new(),
            images: Vec::new(),
            collected: Vec::new(),
            loss_weight: None,
            refused: None,
        }
    }

    /// A call outside training, after `index` steps of it.
    pub fn evaluation(index: u64, micro_batch: u64, seed: u64, images_due: bool) -> Self {
        Self { training: false, ..Self::training(index, micro_batch, seed, "", images_due) }
    }

    /// The optimizer whose turn it is, by its name in `[optimizers.NAME]`: the loss that is returned moves its parameters
    /// alone. With one optimizer, and outside training, modules need not ask.
    pub fn optimizer(&self) -> &str {
        &self.optimizer
    }

    /// Whether this call is for training: dropout and the like act only then.
    pub fn is_training(&self) -> bool {
        self.training
    }

    /// Optimizer steps done so far in this run.
    pub fn index(&self) -> u64 {
        self.asked.store(true, Ordering::Relaxed);
        self.index
    }

    /// A generator for what `name` says (dropout of a layer, noise): a function of (seed, step, micro-batch, name).
    pub fn rng(&self, name: &str) -> seed::ChaCha8Rng {
        self.asked.store(true, Ordering::Relaxed);
        seed::generator(self.seed, [seed::name(name), self.index, self.micro_batch])
    }

    /// Says of how many things the loss is the mean, where that is not the batch's samples: of tokens that are no padding, of pixels
    /// that are known; or the sum of their weights. So the gradients of micro-batches and of ranks add up to what one batch
    /// of all would give, and the losses of a validation to what one batch would.
    ///
    /// A module that says so does it in each step. A loss that is the mean of nothing counts for nothing, and must be a number.
    ///
    /// ```
    /// # use candlepower::prelude::*;
    /// # fn example(step: &mut Step, losses: &Tensor, is_known: &Tensor, tokens: usize) -> Result<Tensor> {
    /// step.weigh_loss(tokens as f64);
    /// Ok(((losses * is_known)?.sum_all()? / tokens.max(1) as f64)?)
    /// # }
    /// ```
    pub fn weigh_loss(&mut self, things: f64) {
        // A recorded step would count as much as the one that was recorded.
        self.asked.store(true, Ordering::Relaxed);
        if !(things.is_finite() && things >= 0.) {
            let message = format!("`Step::weigh_loss` was given {things}: expected a number of at least 0");
            self.refused = self.refused.take().or(Some(Error::msg(message)));
        }
        self.loss_weight = Some(things);
    }

    /// What [`weigh_loss`](Self::weigh_loss) was told.
    pub(crate) fn loss_weight(&self) -> Option<f64> {
        self.loss_weight
    }

    /// Logs a metric: a scalar, or a number, that is the mean over the batch's samples. It stays on its device until it is read.
    ///
    /// Its name is its own: it is logged once in a step, and is none of those that the trainer logs (`loss`, `lr`, `grad_norm`).
    pub fn log(&mut self, name: &str, value: impl Loggable) {
        self.note(name, value, None, false);
    }

    /// Logs a metric of training as its mean over the epoch's samples: once, when the epoch is over, or when training ends within it,
    /// but for a signal or a failure. Every step that is taken counts, whether it is one of those whose metrics are logged or not, and
    /// each optimizer's turn; a resumed epoch counts as one. Its name is no other metric's. In evaluation this is [`Step::log`].
    ///
    /// ```
    /// # use candlepower::prelude::*;
    /// # fn example(step: &mut Step, correct: &Tensor) -> Result<()> {
    /// step.log_epoch("accuracy", &correct.mean_all()?);
    /// # Ok(()) }
    /// ```
    pub fn log_epoch(&mut self, name: &str, value: impl Loggable) {
        self.note(name, value, None, true);
    }

    /// The same of a metric that is the mean over so many other things than samples.
    pub fn log_epoch_weighted(&mut self, name: &str, value: impl Loggable, weight: f64) {
        self.note(name, value, Some(weight), true);
    }

    /// Logs a metric that is the mean over so many other things than samples: tokens, pixels that are not masked.
    ///
    /// ```
    /// # use candlepower::prelude::*;
    /// # fn example(step: &mut Step, losses: &Tensor, tokens: usize) -> Result<()> {
    /// step.log_weighted("token_loss", &losses.mean_all()?, tokens as f64);
    /// # Ok(()) }
    /// ```
    pub fn log_weighted(&mut self, name: &str, value: impl Loggable, weight: f64) {
        self.note(name, value, Some(weight), false);
    }

    fn note(&mut self, name: &str, value: impl Loggable, weight: Option<f64>, of_epoch: bool) {
        // With several optimizers, each has its own.
        let (of, optimizer) = name.split_once('/').unwrap_or((name, &self.optimizer));
        let refused =
            if TAKEN.contains(&name) || (TAKEN.contains(&of) && optimizer == self.optimizer && name != of) {
                Some(format!(
                    "a module cannot log `{name}`: {} are in every record; use another name",
                    quoted_list(&TAKEN)
                ))
            } else if self.metrics.iter().any(|metric| metric.name == name) {
                Some(format!("a module cannot log `{name}` twice in one step: use two names"))
            } else {
                None
            };
        let scalar = refused.map_or_else(|| Ok(value.scalar()?), |why| Err(Error::msg(why)));
        match scalar {
            Ok(value) => self.metrics.push(Metric { name: name.to_string(), value, weight, of_epoch }),
            Err(error) => self.refused = self.refused.take().or(Some(error)),
        }
    }

    /// Keeps something of each sample, (B, ...), for [`Module::metrics`] of a whole evaluation; it waits for the device. In training
    /// nothing is kept.
    pub fn collect(&mut self, name: &str, rows: &Tensor) {
        if self.collected.iter().any(|(known, _)| known == name) {
            let message = format!("a module cannot collect `{name}` twice in one step: use two names");
            self.refused = self.refused.take().or(Some(Error::msg(message)));
        }
        if !self.training {
            self.collected.push((name.to_string(), rows.detach()));
        }
    }

    /// What was kept of each sample.
    pub(crate) fn take_collected(&mut self) -> Vec<(String, Tensor)> {
        std::mem::take(&mut self.collected)
    }

    /// Whether pictures are due in this step; making them only then costs nothing in all others.
    pub fn images_due(&self) -> bool {
        self.images_due
    }

    /// Logs a picture: (C, H, W), C = 1 or 3, values in `[0, 1]`.
    pub fn log_image(&mut self, name: &str, picture: &Tensor) {
        self.draw_image(name, &[picture], |of| Ok(of[0].clone()));
    }

    /// Logs a picture that takes time to draw: `draw` makes it, (C, H, W) as for [`Step::log_image`], of the values that
    /// these tensors have at the end of the step's passes, which it is handed as f32 on the CPU. That happens in another
    /// thread, while training goes on; an error there ends training. `draw` must hold no tensor of its own: nobody but the
    /// thread that trains may ask a device for anything.
    ///
    /// ```
    /// # use candlepower::prelude::*;
    /// # fn example(step: &mut Step, frames: &Tensor) -> Result<()> {
    /// if step.images_due() {
    ///     // The first sample's frames (T, C, H, W), one below the other.
    ///     step.draw_image("frames", &[&frames.get(0)?], |of| {
    ///         Ok(Tensor::cat(&of[0].chunk(of[0].dim(0)?, 0)?, 2)?.squeeze(0)?)
    ///     });
    /// }
    /// # Ok(()) }
    /// ```
    pub fn draw_image(
        &mut self,
        name: &str,
        of: &[&Tensor],
        draw: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
    ) {
        if self.images.iter().any(|sketch| sketch.name == name) {
            let message = format!("a module cannot draw `{name}` twice in one step: use two names");
            self.refused = self.refused.take().or(Some(Error::msg(message)));
        }
        let of = of.iter().map(|x| x.detach()).collect();
        self.images.push(Sketch { name: name.to_string(), of, draw: Arc::new(draw) });
    }

    /// Its own number, from 1: for messages, which do not count as asking.
    pub(crate) fn number(&self) -> u64 {
        self.index + 1
    }

    /// Becomes true when the module asks for what is another in each step: its number, or random numbers.
    pub(crate) fn watch(&self) -> Arc<AtomicBool> {
        self.asked.clone()
    }

    /// The metrics and the pictures that were logged.
    ///
    /// # Errors
    /// Where something could not be.
    pub(crate) fn into_logged(self) -> Result<(Vec<Metric>, Vec<Sketch>)> {
        self.refused.map_or(Ok((self.metrics, self.images)), Err)
    }
}

/// What makes a module of parameters by name.
type Builder<B> = dyn Fn(VarBuilder) -> Result<Box<dyn Module<Batch = B>>> + Send + Sync;

/// A module with its parameters, ready to be trained.
///
/// The module exists twice over the same parameters: once on variables that record gradients, once on plain tensors
/// that share their memory. Evaluating the second keeps no graph, so it needs little memory and no `no_grad`.
pub struct Model<B: Batch> {
    build: Arc<Builder<B>>,
    pub(crate) seed: u64,
    params: Params,
    training: Box<dyn Module<Batch = B>>,
    evaluation: Box<dyn Module<Batch = B>>,
    /// Optimizer steps that its weights have been trained, where a checkpoint has told.
    pub(crate) steps: u64,
}

impl<B: Batch> Model<B> {
    /// Builds `M` from its configuration.
    pub fn build<M>(config: &M::Config, spec: &B::Spec, seed: u64, device: &Device) -> Result<Self>
    where
        M: Build + Module<Batch = B>,
        M::Config: Clone,
    {
        let (config, spec) = (config.clone(), spec.clone());
        Self::new(move |vb| M::build(&config, &spec, vb), seed, device)
    }

    /// Builds a module with a closure, which is called twice; where several ranks train, three times for each of them.
    /// Initial values depend on `seed` and each parameter's name alone.
    pub fn new<M>(
        build: impl Fn(VarBuilder) -> Result<M> + Send + Sync + 'static,
        seed: u64,
        device: &Device,
    ) -> Result<Self>
    where
        M: Module<Batch = B> + 'static,
    {
        Self::with_precision(build, seed, device, Precision::Full)
    }

    /// The same for a module that computes in this precision; [`TrainerConfig::precision`] must be the same.
    ///
    /// [`TrainerConfig::precision`]: crate::trainer::TrainerConfig::precision
    pub fn with_precision<M>(
        build: impl Fn(VarBuilder) -> Result<M> + Send + Sync + 'static,
        seed: u64,
        device: &Device,
        precision: Precision,
    ) -> Result<Self>
    where
        M: Module<Batch = B> + 'static,
    {
        Self::boxed(move |vb| Ok(Box::new(build(vb)?)), seed, device, precision)
    }

    /// The same for a module whose type is not known.
    pub fn boxed(
        build: impl Fn(VarBuilder) -> Result<Box<dyn Module<Batch = B>>> + Send + Sync + 'static,
        seed: u64,
        device: &Device,
        precision: Precision,
    ) -> Result<Self> {
        Self::on(Arc::new(build), seed, Params::new(seed, precision.dtype(), device))
    }

    fn on(build: Arc<Builder<B>>, seed: u64, params: Params) -> Result<Self> {
        let training = build(params.var_builder())?;
        let evaluation = build(params.detached_var_builder())?;
        Ok(Self { build, seed, params, training, evaluation, steps: 0 })
    }

    /// The same module on this device, with parameters of its own, at their initial values: what another rank trains.
    pub(crate) fn replica(&self, device: &Device) -> Result<Self> {
        let params = Params::new(self.seed, self.params.dtype(), device);
        Self::on(self.build.clone(), self.seed, params)
    }

    /// The same module over the same parameters once more, which tells of its gradients by taps.
    pub(crate) fn tapped(&self, put: Arc<PutTap>) -> Result<Box<dyn Module<Batch = B>>> {
        (self.build)(self.params.tapped_var_builder(put))
    }

    /// The parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The module that records gradients.
    pub fn training(&self) -> &dyn Module<Batch = B> {
        &*self.training
    }

    /// The module that keeps no graph.
    pub fn evaluation(&self) -> &dyn Module<Batch = B> {
        &*self.evaluation
    }
}
