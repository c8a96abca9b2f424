//! Schedules match PyTorch's, step by step.
#![allow(clippy::unwrap_used)]

use candlepower::prelude::*;
use candlepower::schedule::{OneCycle, Plateau, PlateauState, Schedule};
use candlepower_tests::golden_dir;
use candlepower_tests::points::{Dropped, Points};
use candlepower_tests::recorder::Recorder;
use serde_json::Value;

/// The schedule that has this name in PyTorch, with PyTorch's argument names.
fn schedule(name: &str, args: &Value, base_lr: f64) -> Option<Schedule> {
    let number = |key: &str| args[key].as_f64().unwrap_or_else(|| panic!("{name} has no `{key}`: {args}"));
    let or = |key: &str, default: f64| args[key].as_f64().unwrap_or(default);
    let count = |key: &str| number(key) as u64;
    let steps = |key: &str| args[key].as_array().unwrap().iter().map(|x| x.as_u64().unwrap()).collect();
    let linear = |args: &Value| Schedule::Linear {
        start: args["start_factor"].as_f64().unwrap_or(1. / 3.),
        end: args["end_factor"].as_f64().unwrap_or(1.),
        steps: args["total_iters"].as_u64().unwrap_or(5),
    };
    Some(match name {
        "StepLR" => Schedule::Step { every: count("step_size"), gamma: or("gamma", 0.1) },
        "MultiStepLR" => Schedule::MultiStep { milestones: steps("milestones"), gamma: or("gamma", 0.1) },
        "ExponentialLR" => Schedule::Exponential { gamma: number("gamma") },
        "CosineAnnealingLR" => Schedule::Cosine { steps: count("T_max"), min_lr: or("eta_min", 0.) },
        "CosineAnnealingWarmRestarts" => Schedule::CosineRestarts {
            steps: count("T_0"),
            growth: or("T_mult", 1.) as u64,
            min_lr: or("eta_min", 0.),
        },
        "OneCycleLR" => Schedule::OneCycle(OneCycle {
            max_lr: number("max_lr"),
            steps: args["total_steps"].as_u64().unwrap_or_else(|| count("epochs") * count("steps_per_epoch")),
            rising: or("pct_start", 0.3),
            start_divisor: or("div_factor", 25.),
            end_divisor: or("final_div_factor", 1e4),
            linear: args["anneal_strategy"] == "linear",
            three_phases: args["three_phase"] == true,
            momentum: [or("base_momentum", 0.85), or("max_momentum", 0.95)],
            cycle_momentum: args["cycle_momentum"] != false,
        }),
        "LinearLR" => linear(args),
        "ConstantLR" => {
            Schedule::Constant { factor: or("factor", 1. / 3.), steps: or("total_iters", 5.) as u64 }
        }
        "PolynomialLR" => {
            Schedule::Polynomial { steps: or("total_iters", 5.) as u64, power: or("power", 1.) }
        }
        "SequentialLR[LinearLR,CosineAnnealingLR]" => Schedule::Sequence {
            parts: vec![
                linear(&args["linear"]),
                Schedule::Cosine {
                    steps: args["cosine"]["T_max"].as_u64().unwrap(),
                    min_lr: args["cosine"]["eta_min"].as_f64().unwrap_or(0.),
                },
            ],
            milestones: steps("milestones"),
        },
        "LambdaLR" => {
            let text = args["lambda_"].as_str().unwrap();
            Schedule::Noam { warmup: text.split("warm=").nth(1).unwrap().parse().unwrap() }
        }
        "ReduceLROnPlateau" => return None,
        _ => panic!("the fixture has a schedule `{name}` that is not known here; base {base_lr}"),
    })
}

fn plateau(args: &Value) -> Plateau {
    let or = |key: &str, default: f64| args[key].as_f64().unwrap_or(default);
    Plateau {
        factor: or("factor", 0.1),
        patience: or("patience", 10.) as u64,
        threshold: or("threshold", 1e-4),
        absolute: args["threshold_mode"] == "abs",
        maximize: args["mode"] == "max",
        cooldown: or("cooldown", 0.) as u64,
        min_lr: or("min_lr", 0.),
        eps: or("eps", 1e-8),
        ..Default::default()
    }
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().into_iter().flatten().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn one_cycle_is_known_by_pytorchs_names_too() {
    let ours = r#"{"one_cycle": {"max_lr": 1, "steps": 9, "rising": 0.4, "start_divisor": 2, "end_divisor": 3, "three_phases": true}}"#;
    let theirs = r#"{"one_cycle": {"max_lr": 1, "total_steps": 9, "pct_start": 0.4, "div_factor": 2, "final_div_factor": 3,
        "three_phase": true}}"#;
    let [ours, theirs] = [ours, theirs].map(|text| serde_json::from_str::<Schedule>(text).unwrap());
    assert_eq!(ours, theirs);
}

#[test]
fn every_schedule_of_the_fixture() {
    let text = std::fs::read_to_string(golden_dir().join("lr_schedulers.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let cases = golden["schedulers"].as_object().unwrap();
    assert!(!cases.is_empty());
    for (case, expected) in cases {
        let (args, base_lr) = (&expected["args"], expected["base_lr"].as_f64().unwrap());
        let (lrs, momenta) = (numbers(&expected["lr"]), numbers(&expected["momentum_or_beta1"]));
        let metrics = numbers(&expected["metrics"]);
        let schedule = schedule(expected["scheduler"].as_str().unwrap(), args, base_lr);
        let (mut state, mut lowered) = (PlateauState::default(), base_lr);
        for (t, lr) in lrs.iter().enumerate() {
            let found = schedule.as_ref().map_or(lowered.into(), |schedule| schedule.at(t as u64, base_lr));
            let error = (found.lr - lr).abs() / base_lr;
            assert!(error < 1e-12, "{case}, step {t}: {}, not {lr}", found.lr);
            if let (Some(expected), Some(momentum)) = (momenta.get(t), found.momentum) {
                assert!(
                    (momentum - expected).abs() < 1e-12,
                    "{case}, step {t}: momentum {momentum}, not {expected}"
                );
            }
            if schedule.is_none() {
                lowered = plateau(args).next(&mut state, metrics[t], lowered);
            }
        }
    }
}

/// `ReduceLROnPlateau` compares with `best * (1 - threshold)` or `best * (1 + threshold)`: below zero, this
/// accepts values that are slightly worse.
#[test]
fn below_zero_a_share_of_the_best_is_a_step_back() {
    let after = |maximize, metrics: [f64; 2]| {
        let plateau = Plateau { patience: 0, factor: 0.5, threshold: 0.1, maximize, ..Default::default() };
        let mut state = PlateauState::default();
        metrics.into_iter().fold(1., |lr, metric| plateau.next(&mut state, metric, lr))
    };
    assert_eq!((after(false, [-1., -0.95]), after(false, [-1., -0.85])), (1., 0.5));
    assert_eq!((after(true, [-1., -1.05]), after(true, [-1., -1.15])), (1., 0.5));
    assert_eq!((after(false, [1., 0.95]), after(false, [1., 0.85])), (0.5, 1.));
}

#[test]
fn a_metric_that_is_not_a_number_is_no_progress() {
    let plateau = Plateau { patience: 1, factor: 0.5, ..Default::default() };
    let mut state = PlateauState::default();
    let lrs: Vec<f64> = [1., f64::NAN, f64::NAN].map(|metric| plateau.next(&mut state, metric, 1.)).to_vec();
    assert_eq!(lrs, [1., 1., 0.5]);
}

#[test]
fn epochs_are_counted_where_they_are_asked_for() {
    let heard = Recorder::default();
    // 10 samples in batches of 4: three steps per epoch.
    let config = TrainerConfig { batch_size: 4, max_steps: Some(8), log_every: 1, ..Default::default() };
    Trainer::new(config)
        .optimizer(SgdConfig { lr: 0.4, ..Default::default() })
        .schedule(Schedule::Step { every: 1, gamma: 0.5 }.per_epoch())
        .callback(heard.clone())
        .fit(&Dropped::model(1), &Data::new(Points { samples: 10 }))
        .unwrap();
    assert_eq!(heard.train("lr"), [0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.1, 0.1]);
    let parts = vec![Schedule::default(), Schedule::default().per_epoch()];
    let error = Schedule::Sequence { parts, milestones: vec![1] }.check().unwrap_err().to_string();
    assert_eq!(error, "`parts`: `interval` belongs to the sequence, not to a part");
}
