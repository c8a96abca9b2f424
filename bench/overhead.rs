//! The framework's overhead: its training loop compared with hand-written candle loops, at steps of about a
//! millisecond.
//!
//!     RAYON_NUM_THREADS=1 cargo run --release -p candlepower-tests --example overhead [BLOCKS]
//!
//! All loops train the same network on the same prefetched batches with Adam, and read the loss every 10
//! steps. One hand-written loop uses only candle, with `candle_nn::AdamW` (no weight decay). The other uses
//! Candlepower's Adam, so it does the same arithmetic as the framework, and the difference is the loop. The
//! framework does all that `candlepower train` does in a step: two data workers, the check that every
//! parameter gets a gradient, the gradients' norm and the guard against non-finite values, means of logged
//! values, and metrics written to a folder (jsonl, csv, TensorBoard); no progress bar. The loops alternate
//! every 50 steps in one thread, so other load on the machine affects all of them. Prints medians over the
//! blocks (40) of a block's mean step time, and the median and quartiles of the ratios of neighboring blocks:
//! for wall time, and for the CPU time of the whole process, including data workers, which other programs
//! disturb less. The ratio of a hand-written loop to itself is the noise of the measurement.

use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use candlepower::candle_core::Var;
use candlepower::candle_nn::{self, Linear, Optimizer as _, VarMap, linear, loss::cross_entropy};
use candlepower::logger::{Loggers, LoggingConfig};
use candlepower::optim::{FusedOptimizer, GradScale, OptimizerConfig, Param};
use candlepower::prelude::*;
use candlepower::rand::{Rng, SeedableRng};
use candlepower::schedule::{Rates, Schedule};
use candlepower::seed::ChaCha8Rng;
use cpu_time::ProcessTime;

const BATCH: usize = 64;
const BATCHES: usize = 32;
const INPUTS: usize = 160;
const HIDDEN: usize = 160;
const CLASSES: usize = 10;
/// Steps of one loop before the next one's turn: a whole number of logging intervals.
const BLOCK: u64 = 50;
const LOG_EVERY: u64 = 10;
const LR: f64 = 1e-3;

/// Three layers: about a millisecond per step on one core.
struct Mlp([Linear; 3]);

impl Mlp {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self([
            linear(INPUTS, HIDDEN, vb.pp("first"))?,
            linear(HIDDEN, HIDDEN, vb.pp("second"))?,
            linear(HIDDEN, CLASSES, vb.pp("class"))?,
        ]))
    }

    fn loss(&self, batch: &Labelled) -> Result<Tensor> {
        let [first, second, class] = &self.0;
        let hidden = second.forward(&first.forward(&batch.input)?.relu()?)?.relu()?;
        Ok(cross_entropy(&class.forward(&hidden)?, &batch.label)?)
    }
}

impl Module for Mlp {
    type Batch = Labelled;

    fn training_step(&self, batch: &Labelled, _: &mut Step) -> Result<Tensor> {
        self.loss(batch)
    }
}

/// Batches of noise, prefetched, so requesting one costs nothing.
#[derive(Clone)]
struct Ready(Vec<Labelled>);

impl Ready {
    fn new() -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut batch = || -> Result<Labelled> {
            let pixels: Vec<f32> = (0..BATCH * INPUTS).map(|_| rng.random()).collect();
            let labels: Vec<u32> = (0..BATCH).map(|_| rng.random_range(0..CLASSES as u32)).collect();
            Ok(Labelled {
                input: Tensor::from_vec(pixels, (BATCH, INPUTS), &Device::Cpu)?,
                label: Tensor::from_vec(labels, BATCH, &Device::Cpu)?,
            })
        };
        (0..BATCHES).map(|_| batch()).collect::<Result<_>>().map(Self)
    }
}

impl Dataset for Ready {
    type Batch = Labelled;

    fn len(&self) -> usize {
        BATCH * BATCHES
    }

    fn spec(&self) -> LabelledSpec {
        LabelledSpec { shape: vec![INPUTS], classes: CLASSES }
    }

    fn batch(&self, samples: &[Sample]) -> Result<Labelled> {
        Ok(self.0[samples[0].index / BATCH].clone())
    }
}

/// The Adam implementation of a hand-written loop.
enum Rule {
    Candles(candle_nn::AdamW),
    Ours(Box<dyn FusedOptimizer>, Vec<Var>),
}

/// A training loop without a framework.
struct ByHand {
    mlp: Mlp,
    rule: Rule,
    batches: Ready,
    step: u64,
    loss: f32,
}

impl ByHand {
    fn new(batches: Ready, ours: bool) -> Result<Self> {
        let map = VarMap::new();
        let mlp = Mlp::new(VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu))?;
        let named: Vec<(String, Var)> = map
            .data()
            .lock()
            .map_err(|_| Error::msg("the variables are poisoned"))?
            .iter()
            .map(|(name, var)| (name.clone(), var.clone()))
            .collect();
        let params: Vec<Param> = named.iter().cloned().map(Param::from).collect();
        let adam = OptimizerConfig::from(AdamConfig::default()).build(&params, &Schedule::default())?;
        let vars: Vec<Var> = named.into_iter().map(|(_, var)| var).collect();
        let rule = if ours {
            Rule::Ours(adam, vars)
        } else {
            let config = candle_nn::ParamsAdamW { lr: LR, weight_decay: 0., ..Default::default() };
            Rule::Candles(candle_nn::AdamW::new(vars, config)?)
        };
        Ok(Self { mlp, rule, batches, step: 0, loss: f32::NAN })
    }

    fn step(&mut self) -> Result<()> {
        let batch = &self.batches.0[self.step as usize % BATCHES];
        let loss = self.mlp.loss(batch)?;
        self.step += 1;
        match &mut self.rule {
            Rule::Candles(adam) => adam.backward_step(&loss)?,
            Rule::Ours(adam, vars) => {
                let mut found = loss.backward()?;
                let gradients: Vec<Tensor> = vars.iter().filter_map(|var| found.remove(var)).collect();
                adam.prepare(self.step, Rates { lr: LR, momentum: None })?;
                adam.step(&gradients, &GradScale::default())?;
                adam.commit()?;
            }
        }
        if self.step.is_multiple_of(LOG_EVERY) {
            self.loss = loss.to_scalar()?;
        }
        Ok(())
    }

    /// Runs a block of steps; returns its time.
    fn block(&mut self) -> Result<Times> {
        let start = Start::now();
        (0..BLOCK).try_for_each(|_| self.step())?;
        Ok(start.elapsed())
    }
}

/// The start of a block.
struct Start(Instant, ProcessTime);

impl Start {
    fn now() -> Self {
        Self(Instant::now(), ProcessTime::now())
    }

    fn elapsed(&self) -> Times {
        [self.0.elapsed(), self.1.elapsed()]
    }
}

/// Wall time and CPU time.
type Times = [Duration; 2];

/// The times of a turn: a block of the framework, one with only candle, then two with Candlepower's Adam.
type Turn = [Times; 4];

/// After every 50 of the framework's steps, runs as many steps of the other loops in the same thread.
struct TakeTurns {
    candle: ByHand,
    by_hand: ByHand,
    since: Option<Start>,
    turns: Sender<Turn>,
}

impl Callback for TakeTurns {
    fn on_step_end(&mut self, step: &StepEnd) -> Result<Flow> {
        if step.progress.step.is_multiple_of(BLOCK) {
            let framework = self.since.as_ref().map(Start::elapsed);
            let (candle, by_hand) = (self.candle.block()?, [self.by_hand.block()?, self.by_hand.block()?]);
            if let Some(framework) = framework {
                // The receiver lives as long as the training, so this cannot fail.
                let _ = self.turns.send([framework, candle, by_hand[0], by_hand[1]]);
            }
            self.since = Some(Start::now());
        }
        Ok(Flow::Continue)
    }
}

fn main() -> Result<()> {
    let blocks = std::env::args().nth(1).and_then(|blocks| blocks.parse().ok()).unwrap_or(40).max(1);
    let data = Ready::new()?;
    let folder = std::env::temp_dir().join(format!("candlepower-overhead-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(Error::file(&folder))?;
    let (turns, receiver) = channel();
    let config = TrainerConfig {
        batch_size: BATCH,
        // The first block is a warm-up.
        max_steps: Some((blocks + 1) * BLOCK),
        threads: std::env::var("RAYON_NUM_THREADS").ok().and_then(|threads| threads.parse().ok()),
        log_every: LOG_EVERY,
        ..Default::default()
    };
    let (candle, by_hand) = (ByHand::new(data.clone(), false)?, ByHand::new(data.clone(), true)?);
    let mut trainer = Trainer::new(config)
        .callback(Loggers::in_folder(&folder, &LoggingConfig::default(), 0)?)
        .callback(TakeTurns { candle, by_hand, since: None, turns });
    let trained = trainer.fit(&Model::new(Mlp::new, 0, &Device::Cpu)?, &Data::new(data));
    std::fs::remove_dir_all(&folder).map_err(Error::file(&folder))?;
    trained?;

    let turns: Vec<Turn> = receiver.try_iter().collect();
    let of = |side: &dyn Fn(&Turn) -> f64| {
        let mut values: Vec<f64> = turns.iter().map(side).collect();
        values.sort_by(f64::total_cmp);
        [1, 2, 3].map(|quarter| values[(values.len() - 1) * quarter / 4])
    };
    let ms = |block: Duration| 1e3 * block.as_secs_f64() / BLOCK as f64;
    let percent = |a: Duration, b: Duration| 100. * (a.as_secs_f64() / b.as_secs_f64() - 1.);
    println!("{} blocks of {BLOCK} steps", turns.len());
    for (i, kind) in ["time", "processor time"].into_iter().enumerate() {
        let [framework, candle, by_hand] = [0, 1, 3].map(|side| of(&|turn| ms(turn[side][i]))[1]);
        println!(
            "{kind}, ms a step: framework {framework:.4}, candle alone {candle:.4}, with our Adam {by_hand:.4}"
        );
        for (name, side, of_what) in [
            ("framework over candle alone", 0, 1),
            ("framework over the loop with our Adam", 0, 3),
            ("that loop over itself (noise)", 2, 3),
        ] {
            let [low, middle, high] = of(&|turn| percent(turn[side][i], turn[of_what][i]));
            println!("  {name:38} {middle:+.2} %  (quartiles {low:+.2} to {high:+.2})");
        }
    }
    Ok(())
}
