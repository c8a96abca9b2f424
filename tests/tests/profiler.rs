//! The phases of a real training, as reported by the profiler and the trace.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::time::Instant;

use candlepower::checkpoint::CheckpointConfig;
use candlepower::prelude::*;
use candlepower::profiler::{Profiler, Trace};
use candlepower::trainer::Every;
use candlepower_models::ConvLstm;
use candlepower_models::conv_lstm::ConvLstmConfig;
use candlepower_tests::blobs::Blobs;
use serde_json::Value;
use tracing_subscriber::prelude::*;

fn model() -> Model<Video> {
    let config = ConvLstmConfig { hidden: 4, ..Default::default() };
    Model::build::<ConvLstm>(&config, &Blobs { samples: 1 }.spec(), 0, &Device::Cpu).unwrap()
}

#[test]
fn every_phase_of_a_training_is_seen_as_often_as_it_happens() {
    // 6 steps of 2 micro-batches: 2 epochs of 3 steps.
    let config = TrainerConfig {
        batch_size: 4,
        micro_batch_size: Some(2),
        max_steps: Some(6),
        log_every: 2,
        val_every: Some(Every::Steps(3)),
        sanity_val_batches: 0,
        ..Default::default()
    };
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = CheckpointConfig { every_steps: Some(2), ..Default::default() };
    let data = Data::new(Blobs { samples: 12 }).val(Blobs { samples: 2 });
    let profiler = Profiler::default();
    let (layer, trace) = Trace::start();
    let subscriber = tracing_subscriber::registry().with(profiler.layer()).with(layer);
    let start = Instant::now();
    tracing::subscriber::with_default(subscriber, || {
        Trainer::new(config).checkpoints(dir.path().join("checkpoints"), checkpoints).fit(&model(), &data)
    })
    .unwrap();
    let profile = profiler.profile();
    assert!(profile.total() <= start.elapsed(), "{profile}");

    let calls: HashMap<&str, u64> = profile.phases.iter().map(|phase| (phase.name, phase.calls)).collect();
    let saved = calls["checkpoint"];
    let expected = [
        ("data_wait", 12),
        ("forward", 12),
        ("backward", 12),
        ("optimizer", 6),
        ("logging", 3),
        ("validation", 2),
        ("checkpoint", saved),
    ];
    assert_eq!(calls, HashMap::from(expected));
    // At steps 2, 4 and 6, at step 3, which is the best so far, and no step twice.
    assert_eq!(saved, 4);

    let path = dir.path().join("trace.json");
    trace.save(&path).unwrap();
    let events: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut begun = HashMap::<String, u64>::new();
    let mut open = Vec::new();
    let mut last = 0.;
    for event in events.iter().filter(|event| event["ph"] != "M") {
        let (name, time) = (event["name"].as_str().unwrap(), event["ts"].as_f64().unwrap());
        assert!(time >= last, "{event} comes before its predecessor");
        last = time;
        if event["ph"] == "B" {
            *begun.entry(name.to_string()).or_default() += 1;
            open.push(name);
        } else {
            assert_eq!((event["ph"].as_str(), open.pop()), (Some("E"), Some(name)));
        }
    }
    assert!(open.is_empty(), "{open:?} did not end");
    assert_eq!(begun, calls.iter().map(|(name, calls)| (name.to_string(), *calls)).collect());
}
