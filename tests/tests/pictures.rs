//! Pictures are drawn during training: with the right values, in order, before the next checkpoint, without
//! waiting.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use candlepower::callback::Picture;
use candlepower::candle_nn::{Linear, linear};
use candlepower::checkpoint::CheckpointConfig;
use candlepower::prelude::*;
use candlepower_tests::device;
use candlepower_tests::points::Points;

/// Opened once; earlier callers wait.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let closed = self.0.0.lock().unwrap();
        drop(self.0.1.wait_while(closed, |open| !*open).unwrap());
    }
}

/// Draws its weights as four gray pixels, once a gate is open.
struct Painter {
    layer: Linear,
    gate: Gate,
    fails_at: u64,
}

impl Painter {
    fn model(gate: &Gate, fails_at: u64) -> Model<Tensors> {
        let gate = gate.clone();
        let build = move |vb: VarBuilder| {
            Ok(Self { layer: linear(4, 1, vb.pp("layer"))?, gate: gate.clone(), fails_at })
        };
        Model::new(build, 1, &device()).unwrap()
    }
}

impl Module for Painter {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        let weight = self.layer.weight().reshape((1, 1, 4))?;
        if step.images_due() {
            let gate = self.gate.clone();
            step.draw_image("weights", &[&weight], move |of| {
                gate.pass();
                Ok(of[0].clone())
            });
        }
        if step.is_training() && step.global_step() + 1 == self.fails_at {
            return Err(candlepower::Error::msg("this step fails"));
        }
        Ok((self.layer.forward(&batch.0[0])? - &batch.0[1])?.sqr()?.mean_all()?)
    }
}

type Seen = Arc<Mutex<Vec<String>>>;

/// Records pictures, steps and checkpoints; opens the gate after a step.
struct Watcher {
    seen: Seen,
    values: Arc<Mutex<Vec<Vec<f32>>>>,
    gate: Gate,
    opens_at: u64,
}

impl Watcher {
    fn note(&self, what: String) -> Result<()> {
        self.seen.lock().unwrap().push(what);
        Ok(())
    }
}

impl Callback for Watcher {
    fn on_step_end(&mut self, step: &StepEnd) -> Result<Flow> {
        self.values.lock().unwrap().push(flat(&step.params[0].1));
        if step.progress.step == self.opens_at {
            self.gate.open();
        }
        self.note(format!("step {}", step.progress.step))?;
        Ok(Flow::Continue)
    }

    fn on_picture(&mut self, picture: &Picture) -> Result<()> {
        let values = flat(&picture.pixels);
        let wanted = &self.values.lock().unwrap()[picture.step as usize - 2];
        assert_eq!(&values, wanted, "weights of another step than {}", picture.step);
        self.note(format!("picture {}", picture.step))
    }

    fn on_checkpoint(&mut self, checkpoint: &Path) -> Result<()> {
        self.note(format!("checkpoint {}", checkpoint.file_name().unwrap().display()))
    }
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Ten steps with a picture at every second one, none of which can be drawn before step `opens_at` is done.
fn trainer(gate: &Gate, opens_at: u64) -> (Trainer, Seen) {
    let (seen, values) = (Seen::default(), Arc::default());
    let config = TrainerConfig { batch_size: 2, max_steps: Some(10), max_epochs: None, ..Default::default() };
    let watcher = Watcher { seen: seen.clone(), values, gate: gate.clone(), opens_at };
    (Trainer::new(config).image_every(2).callback(watcher), seen)
}

fn data() -> Data<Tensors> {
    Data::new(Points { samples: 6 })
}

fn place(seen: &[String], what: &str) -> usize {
    seen.iter().position(|it| it == what).unwrap_or_else(|| panic!("no {what} in {seen:?}"))
}

#[test]
fn training_goes_on_while_pictures_are_drawn() {
    let gate = Gate::default();
    let (mut trainer, seen) = trainer(&gate, 7);
    // If training waited for a picture, this would never end.
    trainer.fit(&Painter::model(&gate, 0), &data()).unwrap();
    let seen = seen.lock().unwrap();
    let pictures: Vec<&String> = seen.iter().filter(|it| it.starts_with("picture")).collect();
    assert_eq!(pictures, ["picture 2", "picture 4", "picture 6", "picture 8", "picture 10"]);
    assert!(place(&seen, "picture 2") > place(&seen, "step 7"), "{seen:?}");
}

#[test]
fn a_checkpoint_waits_for_the_pictures_before_it() {
    let (gate, dir) = (Gate::default(), tempfile::tempdir().unwrap());
    let (trainer, seen) = trainer(&gate, 0);
    let later = gate.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        later.open();
    });
    let checkpoint = CheckpointConfig { every_steps: Some(4), keep_last: 9, ..Default::default() };
    trainer.checkpoints(dir.path(), checkpoint).fit(&Painter::model(&gate, 0), &data()).unwrap();
    let seen = seen.lock().unwrap();
    assert!(place(&seen, "picture 4") < place(&seen, "step 5"), "{seen:?}");
    assert!(place(&seen, "picture 10") < place(&seen, "checkpoint 10"), "{seen:?}");
}

#[test]
fn an_error_does_not_take_the_pictures_before_it_along() {
    let gate = Gate::default();
    let (mut trainer, seen) = trainer(&gate, 4);
    let error = trainer.fit(&Painter::model(&gate, 5), &data()).unwrap_err().to_string();
    assert_eq!(error, "training_step, step 5: this step fails");
    let seen = seen.lock().unwrap();
    assert_eq!(seen.iter().filter(|it| it.starts_with("picture")).count(), 2, "{seen:?}");
}

/// Draws with a given function.
struct Draws(Linear, fn(&mut Step, &Tensor));

impl Module for Draws {
    type Batch = Tensors;

    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        if step.images_due() {
            (self.1)(step, &self.0.weight().reshape((1, 1, 4))?);
        }
        Ok((self.0.forward(&batch.0[0])? - &batch.0[1])?.sqr()?.mean_all()?)
    }
}

#[test]
fn names_may_have_slashes_and_stand_for_one_picture() {
    use candlepower::logger::{Loggers, LoggingConfig};
    let fit = |draw: fn(&mut Step, &Tensor)| {
        let dir = tempfile::tempdir().unwrap();
        let build = move |vb: VarBuilder| Ok(Draws(linear(4, 1, vb)?, draw));
        let config = TrainerConfig { max_steps: Some(1), ..Default::default() };
        let loggers = Loggers::in_folder(dir.path(), &LoggingConfig::default(), 0)?;
        let model = Model::new(build, 1, &device())?;
        let data = Data::new(Points { samples: 4 });
        Trainer::new(config).image_every(1).callback(loggers).fit(&model, &data).map(|_| dir)
    };
    let dir = fit(|step, weight| step.draw_image("gan/fake", &[weight], |of| Ok(of[0].clone()))).unwrap();
    assert!(dir.path().join("images/train_gan_fake_000001.png").exists());
    let twice = fit(|step, weight| {
        for _ in 0..2 {
            step.draw_image("same", &[weight], |of| Ok(of[0].clone()));
        }
    });
    let error = twice.unwrap_err().to_string();
    assert!(error.contains("a module cannot draw `same` twice in one step: use two names"), "{error}");
}
