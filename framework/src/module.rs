//! The traits that users implement, [`Module`] and [`Build`]; the [`Step`] passed to a module; and [`Model`],
//! which the trainer trains.

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

/// A model: turns a batch into a loss.
pub trait Module: Send + Sync {
    /// The batch type it is trained on.
    type Batch: Batch;

    /// Returns the scalar loss to minimise: the mean over the batch's samples, or over the count given to
    /// [`Step::weigh_loss`].
    fn training_step(&self, batch: &Self::Batch, step: &mut Step) -> Result<Tensor>;

    /// Returns the loss on held-out data. Other metrics can be logged on `step`.
    fn validation_step(&self, batch: &Self::Batch, step: &mut Step) -> Result<Tensor> {
        self.training_step(batch, step)
    }

    /// Returns the prediction for this batch, (B, ...).
    fn predict_step(&self, _batch: &Self::Batch, _step: &mut Step) -> Result<Tensor> {
        Err(Error::msg("this module does not implement `predict_step`, which `predict` needs"))
    }

    /// Returns metrics of a whole evaluation that are not means over its samples, by name: areas under
    /// curves, correlations, quantiles. Called after the last batch with the values that `validation_step`
    /// passed to [`Step::collect`], identically on every rank. Not called if nothing was collected.
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

    /// Parameters that no loss of this module depends on, as patterns in which `*` matches any text. They are
    /// saved in every checkpoint and never updated. It is an error if any other parameter has no gradient, or
    /// if one of these gets one.
    fn unused_parameters(&self) -> &[&str] {
        &[]
    }

    /// Floating-point operations of one sample's forward pass, counting a multiply-add as two; `None` if
    /// unknown. A training step counts as three forward passes.
    fn flops(&self) -> Option<f64> {
        None
    }
}

/// A module built from its own section of the configuration file.
pub trait Build: Module + Sized + 'static {
    /// The fields of its `[module]` section.
    type Config: Settings;

    /// Builds the module for batches of this `spec`; `vb` creates its parameters by name.
    fn build(config: &Self::Config, spec: &<Self::Batch as Batch>::Spec, vb: VarBuilder) -> Result<Self>;
}

/// A metric logged by a module.
#[derive(Clone)]
pub(crate) struct Metric {
    pub(crate) name: String,
    /// A scalar.
    pub(crate) value: Tensor,
    /// The number of items that the value is the mean of, if not the batch's samples.
    pub(crate) weight: Option<f64>,
    /// Whether training logs the mean over an epoch instead of values of single steps.
    pub(crate) of_epoch: bool,
}

/// A value that can be logged: a scalar tensor on any device, or a number.
pub trait Loggable {
    /// Converts to a tensor of one number.
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

/// Names that every record already contains.
pub(crate) const TAKEN: [&str; 6] = ["loss", "lr", "grad_norm", "step", "epoch", "split"];

/// Draws a picture (C, H, W) from tensors on the CPU.
pub(crate) type Draw = Arc<dyn Fn(&[Tensor]) -> Result<Tensor> + Send + Sync>;

/// A picture logged by a module and not yet drawn.
#[derive(Clone)]
pub(crate) struct Sketch {
    pub(crate) name: String,
    pub(crate) of: Vec<Tensor>,
    pub(crate) draw: Draw,
}

/// The context of one call of a module: read-only facts about the run, and what the module logs.
pub struct Step {
    training: bool,
    index: u64,
    micro_batch: u64,
    seed: u64,
    optimizer: String,
    images_due: bool,
    /// Set when the module asks for a value that differs from step to step.
    asked: Arc<AtomicBool>,
    metrics: Vec<Metric>,
    images: Vec<Sketch>,
    /// Per-sample values collected for [`Module::metrics`].
    collected: Vec<(String, Tensor)>,
    /// The number of items that the loss is the mean of, if not the batch's samples.
    loss_weight: Option<f64>,
    /// The first error in logging, if any.
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

    /// The context of a call outside training, after `index` training steps.
    pub fn evaluation(index: u64, micro_batch: u64, seed: u64, images_due: bool) -> Self {
        Self { training: false, ..Self::training(index, micro_batch, seed, "", images_due) }
    }

    /// The name of the optimizer whose turn it is, as in `[optimizers.NAME]`: the returned loss updates only
    /// its parameters. Not needed with a single optimizer or outside training.
    pub fn optimizer(&self) -> &str {
        &self.optimizer
    }

    /// Whether this call is part of training. Dropout and similar layers are active only then.
    pub fn is_training(&self) -> bool {
        self.training
    }

    /// Optimizer steps completed so far in this run.
    pub fn global_step(&self) -> u64 {
        self.asked.store(true, Ordering::Relaxed);
        self.index
    }

    /// Returns a random generator for the purpose `name` (a layer's dropout, noise), determined by (seed,
    /// step, micro-batch, name).
    pub fn rng(&self, name: &str) -> seed::ChaCha8Rng {
        self.asked.store(true, Ordering::Relaxed);
        seed::generator(self.seed, [seed::name(name), self.index, self.micro_batch])
    }

    /// Sets the number of items that the loss is the mean of, if not the batch's samples: non-padding tokens,
    /// known pixels, or the sum of their weights. Gradients of micro-batches and ranks then add up to the
    /// gradient of one whole batch, and so do the losses of a validation.
    ///
    /// A module that calls this must call it in every step. A loss over zero items is ignored, but must be
    /// finite.
    ///
    /// ```
    /// # use candlepower::prelude::*;
    /// # fn example(step: &mut Step, losses: &Tensor, is_known: &Tensor, tokens: usize) -> Result<Tensor> {
    /// step.weigh_loss(tokens as f64);
    /// Ok(((losses * is_known)?.sum_all()? / tokens.max(1) as f64)?)
    /// # }
    /// ```
    pub fn weigh_loss(&mut self, items: f64) {
        // A replayed step would reuse the weight of the recorded one.
        self.asked.store(true, Ordering::Relaxed);
        if !(items.is_finite() && items >= 0.) {
            let message = format!("`Step::weigh_loss` was given {items}: expected a number of at least 0");
            self.refused = self.refused.take().or(Some(Error::msg(message)));
        }
        self.loss_weight = Some(items);
    }

    /// The count given to [`weigh_loss`](Self::weigh_loss).
    pub(crate) fn loss_weight(&self) -> Option<f64> {
        self.loss_weight
    }

    /// Logs a metric: a scalar or a number that is the mean over the batch's samples. It stays on its device
    /// until it is read.
    ///
    /// The name must be unique within a step and different from the names that the trainer logs (`loss`,
    /// `lr`, `grad_norm`).
    pub fn log(&mut self, name: &str, value: impl Loggable) {
        self.note(name, value, None, false);
    }

    /// Logs a training metric as its mean over the samples of the epoch: once, at the end of the epoch, or
    /// when training ends within it (except after a signal or a failure). All completed steps and all
    /// optimizer turns count, whether or not the step is logged. An interrupted and resumed epoch counts as
    /// one. The name must differ from those of other metrics. In evaluation this is the same as
    /// [`Step::log`].
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

    /// Like [`log_epoch`](Self::log_epoch), for a metric that is the mean over `weight` items other than
    /// samples.
    pub fn log_epoch_weighted(&mut self, name: &str, value: impl Loggable, weight: f64) {
        self.note(name, value, Some(weight), true);
    }

    /// Logs a metric that is the mean over `weight` items other than samples, such as tokens or unmasked
    /// pixels.
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
        // With several optimizers, each has its own, as `loss/NAME`.
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

    /// Collects per-sample values, (B, ...), for [`Module::metrics`] of a whole evaluation. Waits for the
    /// device. Does nothing in training.
    pub fn collect(&mut self, name: &str, rows: &Tensor) {
        if self.collected.iter().any(|(known, _)| known == name) {
            let message = format!("a module cannot collect `{name}` twice in one step: use two names");
            self.refused = self.refused.take().or(Some(Error::msg(message)));
        }
        if !self.training {
            self.collected.push((name.to_string(), rows.detach()));
        }
    }

    /// Takes the collected per-sample values.
    pub(crate) fn take_collected(&mut self) -> Vec<(String, Tensor)> {
        std::mem::take(&mut self.collected)
    }

    /// Whether pictures are due in this step. Check it first, to avoid computing pictures in other steps.
    pub fn images_due(&self) -> bool {
        self.images_due
    }

    /// Logs a picture, (C, H, W) with C = 1 or 3 and values in `[0, 1]`.
    pub fn log_image(&mut self, name: &str, picture: &Tensor) {
        self.draw_image(name, &[picture], |of| Ok(of[0].clone()));
    }

    /// Logs a picture that takes time to draw. `draw` receives the values of these tensors at the end of the
    /// step's passes, as f32 on the CPU, and returns the picture, (C, H, W) as for [`Step::log_image`]. It
    /// runs on another thread while training continues; an error in it ends training. `draw` must not capture
    /// tensors: only the training thread may use a device.
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

    /// The step's number, from 1. For messages; does not count as asking for it.
    pub(crate) fn number(&self) -> u64 {
        self.index + 1
    }

    /// A flag that is set when the module asks for a value that differs between steps: the step's index,
    /// random numbers or the loss weight.
    pub(crate) fn watch(&self) -> Arc<AtomicBool> {
        self.asked.clone()
    }

    /// Returns the logged metrics and pictures.
    ///
    /// # Errors
    /// If something could not be logged.
    pub(crate) fn into_logged(self) -> Result<(Vec<Metric>, Vec<Sketch>)> {
        self.refused.map_or(Ok((self.metrics, self.images)), Err)
    }
}

/// Builds a module from a `VarBuilder`.
type Builder<B> = dyn Fn(VarBuilder) -> Result<Box<dyn Module<Batch = B>>> + Send + Sync;

/// A module with its parameters, ready to be trained.
///
/// The module is built twice over the same parameters: on variables that record gradients, and on plain
/// tensors that share their memory. Evaluation uses the second, which records no graph, so it needs little
/// memory and no `no_grad`.
pub struct Model<B: Batch> {
    build: Arc<Builder<B>>,
    pub(crate) seed: u64,
    params: Params,
    training: Box<dyn Module<Batch = B>>,
    evaluation: Box<dyn Module<Batch = B>>,
    /// Optimizer steps that its weights have been trained for, if known from a checkpoint.
    pub(crate) steps: u64,
}

impl<B: Batch> Model<B> {
    /// Builds a module of type `M` from its configuration.
    pub fn build<M>(config: &M::Config, spec: &B::Spec, seed: u64, device: &Device) -> Result<Self>
    where
        M: Build + Module<Batch = B>,
        M::Config: Clone,
    {
        let (config, spec) = (config.clone(), spec.clone());
        Self::new(move |vb| M::build(&config, &spec, vb), seed, device)
    }

    /// Builds a module with a closure, which is called twice, or three times per rank when several ranks
    /// train. Initial values depend only on `seed` and the parameter's name.
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

    /// Like [`new`](Self::new), for a module that computes in this precision; [`TrainerConfig::precision`]
    /// must match.
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

    /// Like [`with_precision`](Self::with_precision), for a boxed module.
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

    /// The same module on this device with separate parameters at their initial values, for another rank.
    pub(crate) fn replica(&self, device: &Device) -> Result<Self> {
        let params = Params::new(self.seed, self.params.dtype(), device);
        Self::on(self.build.clone(), self.seed, params)
    }

    /// Builds the module once more over the same parameters, with taps that report its gradients.
    pub(crate) fn tapped(&self, put: Arc<PutTap>) -> Result<Box<dyn Module<Batch = B>>> {
        (self.build)(self.params.tapped_var_builder(put))
    }

    /// The parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The batch as the module takes it: on its device, with inputs of the type that it computes in.
    pub(crate) fn prepared(&self, batch: &B) -> Result<B> {
        batch.to_device(self.params.device())?.cast(self.params.dtype())
    }

    /// The module for training, which records gradients.
    pub fn training(&self) -> &dyn Module<Batch = B> {
        &*self.training
    }

    /// The module for evaluation, which records no graph.
    pub fn evaluation(&self) -> &dyn Module<Batch = B> {
        &*self.evaluation
    }
}
