//! `candlepower launch`: after any failure, a run ends within seconds, reports the cause, and is restarted.
//!
//! This test program is its own `candlepower`, with a module that fails on request.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::time::{Duration, Instant};

use candlepower::prelude::*;
use libtest_mimic::{Arguments, Failed, Trial};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

fn main() -> ExitCode {
    let command = std::env::args().nth(1);
    if command.is_some_and(|command| ["train", "launch"].contains(&&*command)) {
        let registry = candlepower_launcher::registry();
        return candlepower_launcher::run(
            registry.module::<Troubled>("troubled").dataset::<Numbers>("numbers"),
        );
    }
    let test = |name: &str, test: fn()| {
        Trial::test(name, move || {
            test();
            Ok::<(), Failed>(())
        })
    };
    let mut tests = vec![
        test("a_rank_that_panics_or_errs_or_dies_is_named_and_taken_up", trouble_is_named_and_taken_up),
        test("a_rank_that_hangs_takes_all_down", a_rank_that_hangs_takes_all_down),
        test("a_stopped_process_is_taken_down", a_stopped_process_is_taken_down),
        test("too_many_failures_end_it", too_many_failures_end_it),
        test("fewer_devices_where_allowed", fewer_devices_where_allowed),
        test("killed_at_random_the_weights_are_an_undisturbed_runs", killed_at_random),
        test("a_signal_saves_and_ends_it", a_signal_saves_and_ends_it),
        test("what_fails_once_it_was_told_to_end_is_not_tried_again", told_to_end_it_is_not_tried_again),
        test("a_configuration_error_is_not_tried_again", a_configuration_error_is_not_tried_again),
    ];
    if cfg!(feature = "mpi") {
        tests.push(test("processes_equal_a_single_rank", processes_equal_a_single_rank));
        tests.push(test("a_process_that_errs_ends_all", a_process_that_errs_ends_all));
        tests.push(test("processes_that_differ_are_refused", processes_that_differ_are_refused));
        tests.push(test("processes_killed_at_random", processes_killed_at_random));
    }
    libtest_mimic::run(&Arguments::from_args(), tests).exit_code()
}

/// Sample i is the number i.
struct Numbers;

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct NumbersConfig {}

impl Dataset for Numbers {
    type Batch = Tensors;
    fn len(&self) -> usize {
        40
    }
    fn spec(&self) {}
    fn batch(&self, samples: &[Sample]) -> Result<Tensors> {
        let numbers = samples.iter().map(|sample| sample.index as f32 / 40.);
        Ok(Tensors(vec![Tensor::from_iter(numbers, &Device::Cpu)?]))
    }
}

impl Open for Numbers {
    type Config = NumbersConfig;
    fn open(_: &NumbersConfig, _: Split) -> Result<Self> {
        Ok(Self)
    }
}

/// Learns a slope; in one step, the rank that has the second micro-batch runs into trouble.
struct Troubled {
    slope: Tensor,
    config: TroubledConfig,
}

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct TroubledConfig {
    /// `panic`, `error`, `hang`, `die`, or empty for no trouble.
    trouble: String,
    /// The step at which the trouble happens.
    step: u64,
    /// The trouble happens only until this file exists. Empty: always.
    until: PathBuf,
    /// Duration of a micro-batch in milliseconds.
    pause: u64,
}

impl Default for TroubledConfig {
    fn default() -> Self {
        Self { trouble: String::new(), step: 5, until: "came".into(), pause: 0 }
    }
}

impl Build for Troubled {
    type Config = TroubledConfig;
    fn build(config: &TroubledConfig, (): &(), vb: VarBuilder) -> Result<Self> {
        Ok(Self { slope: vb.get(1, "slope")?, config: config.clone() })
    }
}

impl Module for Troubled {
    type Batch = Tensors;
    fn training_step(&self, batch: &Tensors, step: &mut Step) -> Result<Tensor> {
        let TroubledConfig { trouble, until, pause, .. } = &self.config;
        std::thread::sleep(Duration::from_millis(*pause));
        // Identifies micro-batch 1 of the step: modules do not know their rank.
        let second = step.rng("place") == Step::evaluation(step.global_step(), 1, 0, false).rng("place");
        if step.is_training() && step.global_step() == self.config.step && second && !until.is_file() {
            if !until.as_os_str().is_empty() {
                std::fs::write(until, "").unwrap();
            }
            match &**trouble {
                "panic" => panic!("out of luck"),
                "error" => return Err(candlepower::Error::msg("out of paper")),
                "hang" => std::thread::sleep(Duration::from_secs(3600)),
                "die" => std::process::abort(),
                _ => {}
            }
        }
        let error = (batch.0[0].broadcast_mul(&self.slope)? - (&batch.0[0] * 3.)?)?;
        Ok(error.sqr()?.mean_all()?)
    }
}

const CONFIG: &str = r#"
[run]
name = "run"

[trainer]
batch_size = 8
micro_batch_size = 2
devices = 2
max_steps = 30

[module]
name = "troubled"

[data]
name = "numbers"

[checkpoint]
every_steps = 2

[logging]
progress = false
"#;

/// A folder with `run.toml`; commands run in it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("run.toml"), CONFIG).unwrap();
        Self(dir)
    }

    fn command(&self, command: &str, sets: &[&str]) -> Command {
        let mut process = Command::new(std::env::current_exe().unwrap());
        process.current_dir(self.0.path()).args([command, "run.toml"]).env("RUST_BACKTRACE", "0");
        process.args(sets.iter().flat_map(|set| ["--set", set]));
        process
    }

    /// Runs `launch`; returns its exit code and its standard error.
    fn launch(&self, sets: &[&str]) -> (Option<i32>, String) {
        let Output { status, stderr, .. } = self.command("launch", sets).output().unwrap();
        (status.code(), String::from_utf8(stderr).unwrap())
    }

    /// A file that receives a command's output while it runs.
    fn said(&self) -> File {
        File::create(self.0.path().join("said")).unwrap()
    }

    /// How many restarts the output reports.
    fn restarts(&self) -> usize {
        std::fs::read_to_string(self.0.path().join("said")).unwrap().matches("\nrestart ").count()
    }

    /// The weights of a run's last checkpoint.
    fn weights(&self, version: usize) -> Vec<u8> {
        let checkpoint = self.checkpoint(version);
        assert!(checkpoint.ends_with("30"), "the run ended with {}", checkpoint.display());
        std::fs::read(checkpoint.join("model.safetensors")).unwrap()
    }

    fn checkpoint(&self, version: usize) -> PathBuf {
        let checkpoints = self.0.path().join(format!("runs/run/version_{version}/checkpoints"));
        candlepower::checkpoint::latest(&checkpoints).unwrap().unwrap()
    }
}

/// The weights at the end of an undisturbed run.
fn undisturbed() -> Vec<u8> {
    let place = Place::new();
    assert!(place.command("train", &[]).stderr(Stdio::null()).status().unwrap().success());
    place.weights(0)
}

#[track_caller]
fn assert_says(said: &str, expected: &str) {
    assert!(said.contains(expected), "`{expected}` is not in:\n{said}");
}

fn trouble_is_named_and_taken_up() {
    let expected = undisturbed();
    let cases = [
        ("panic", "the run failed: rank 1: it panicked: out of luck\n"),
        ("error", "the run failed: rank 1: training_step, step 6: out of paper\n"),
        ("die", "the run failed: its process was killed by signal 6\n"),
    ];
    for (trouble, why) in cases {
        let place = Place::new();
        let (code, said) = place.launch(&[&format!("module.trouble={trouble}")]);
        assert_eq!(code, Some(0), "{trouble}: {said}");
        assert_says(&said, why);
        assert_says(
            &said,
            "restart 1 of 3, on 2 device(s), from the last good checkpoint of runs/run/version_0\n",
        );
        assert_eq!(place.weights(0), expected, "{trouble}: the weights are not an undisturbed run's");
    }
}

fn a_rank_that_hangs_takes_all_down() {
    let place = Place::new();
    let (code, said) = place.launch(&["module.trouble=hang", "distributed.hang_timeout=\"3s\""]);
    assert_eq!(code, Some(0), "{said}");
    assert_says(&said, "the run failed: rank 1: it hangs: the others have waited for 3s\n");
    assert_eq!(place.weights(0), undisturbed());
}

fn a_stopped_process_is_taken_down() {
    let place = Place::new();
    // No other rank is left running to report the hang.
    let mut launch = place.command("launch", &["module.pause=20", "distributed.hang_timeout=\"3s\""]);
    let launch = launch.stderr(Stdio::piped()).spawn().unwrap();
    let pid = wait_for(|| child_of(launch.id()).filter(|_| place.0.path().join("runs").exists()));
    signal("STOP", pid);
    let output = launch.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert_says(&said, "the run failed: the run hangs: no step for 6s\n");
}

fn too_many_failures_end_it() {
    let place = Place::new();
    let (code, said) =
        place.launch(&["module.trouble=error", "module.until=\"\"", "distributed.max_restarts=2"]);
    assert_eq!(code, Some(1), "{said}");
    assert_eq!(
        said.matches("the run failed: rank 1: training_step, step 6: out of paper\n").count(),
        2,
        "{said}"
    );
    assert_says(
        &said,
        "error: the run failed: rank 1: training_step, step 6: out of paper; not restarted: `distributed.max_restarts` is 2\n",
    );
    // The last good checkpoint is still there.
    assert!(place.checkpoint(0).ends_with("5"), "{}", place.checkpoint(0).display());
}

fn fewer_devices_where_allowed() {
    // It fails every time: the second restart uses one device less.
    let place = Place::new();
    let sets = [
        "module.trouble=error",
        "module.until=\"\"",
        "distributed.max_restarts=2",
        "distributed.min_devices=1",
    ];
    let (_, said) = place.launch(&sets);
    assert_says(
        &said,
        "restart 1 of 2, on 2 device(s), from the last good checkpoint of runs/run/version_0\n",
    );
    assert_says(
        &said,
        "restart 2 of 2, on 1 device(s), from the last good checkpoint of runs/run/version_0\n",
    );
    // The last failure happened on one device, so no rank is named.
    assert_says(&said, "its process ended with code 1; its message is above; not restarted");
}

/// Launches the run and kills the process that `victim` finds, 20 times, at moments spread over start-up, steps and
/// saving, the same in every run of the test. Each kill must cause one restart, and none may change the weights.
fn kill_at_random(place: &Place, mut launch: Child, victim: impl Fn(usize, u32) -> Option<u32>) {
    const KILLS: usize = 20;
    let mut moment = 0;
    for kill in 0..KILLS {
        moment = (moment * 7919 + 104_729) % 700;
        std::thread::sleep(Duration::from_millis(100 + moment));
        signal("KILL", wait_for(|| victim(kill, launch.id())));
        wait_for(|| (place.restarts() > kill).then_some(()));
    }
    assert!(launch.wait().unwrap().success());
    assert_eq!(place.restarts(), KILLS);
    let versions = std::fs::read_dir(place.0.path().join("runs/run")).unwrap().count();
    // Bit for bit, for processes too: with two ranks, they add the same two numbers as threads do.
    assert_eq!(place.weights(versions - 1), undisturbed());
}

/// Settings that make a run too slow to end before it has been killed 20 times.
const SLOW: [&str; 2] = ["module.pause=90", "distributed.max_restarts=100"];

fn killed_at_random() {
    let place = Place::new();
    let launch = place.command("launch", &SLOW).stderr(place.said()).spawn().unwrap();
    kill_at_random(&place, launch, |_, launch| child_of(launch));
}

fn a_signal_saves_and_ends_it() {
    let place = Place::new();
    let mut launch = place.command("launch", &["module.pause=50", "checkpoint.every_steps=1000"]);
    let launch = launch.stderr(Stdio::piped()).spawn().unwrap();
    wait_for(|| child_of(launch.id()).filter(|_| place.0.path().join("runs").exists()));
    std::thread::sleep(Duration::from_millis(500));
    signal("TERM", launch.id());
    let output = launch.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(143), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(place.checkpoint(0).join("manifest.json").exists());
}

fn told_to_end_it_is_not_tried_again() {
    let place = Place::new();
    let mut launch = place.command("launch", &["module.trouble=hang", "distributed.hang_timeout=\"3s\""]);
    let launch = launch.stderr(Stdio::piped()).spawn().unwrap();
    // The signal arrives before the hang is detected.
    wait_for(|| place.0.path().join("came").exists().then_some(()));
    signal("INT", launch.id());
    let output = launch.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert_says(&said, "the run failed: rank 1: it hangs: the others have waited for 3s\n");
    assert!(!said.contains("restart"), "{said}");
}

fn a_configuration_error_is_not_tried_again() {
    let place = Place::new();
    let (code, said) = place.launch(&["trainer.batch_size=0"]);
    assert_eq!(code, Some(2), "{said}");
    assert_eq!(said.matches("expected at least 1, found 0").count(), 1, "{said}");
    let (code, said) = place.launch(&["distributed.min_devices=3"]);
    assert_eq!(code, Some(2), "{said}");
    assert_says(&said, "`distributed.min_devices`: expected at most `trainer.devices`, which is 2");
}

/// Settings that let `mpirun` run in a container, on fewer cores than processes. Each run has its own temporary folder:
/// two that start at the same time would both create the default one, and one of them would fail.
fn allow_mpi<'c>(command: &'c mut Command, place: &Place) -> &'c mut Command {
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1").env("OMPI_MCA_btl_base_warn_component_unused", "0");
    command.env("TMPDIR", place.0.path())
}

/// Trains with this many processes; returns the exit code and the standard error.
fn mpirun(place: &Place, processes: usize, sets: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new("mpirun");
    command.current_dir(place.0.path()).args(["-n", &processes.to_string()]);
    command.arg(std::env::current_exe().unwrap()).args(["train", "run.toml"]);
    command.args(["--devices", "1"]);
    command.args(sets.iter().flat_map(|set| ["--set", set]));
    let output = allow_mpi(&mut command, place).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn slope(place: &Place) -> f32 {
    let model = place.checkpoint(0).join("model.safetensors");
    let tensors = candlepower::candle_core::safetensors::load(model, &Device::Cpu).unwrap();
    tensors["slope"].to_vec1::<f32>().unwrap()[0]
}

fn processes_equal_a_single_rank() {
    // 40 samples in batches of 7: micro-batches are uneven, and in the last step of an epoch some process has none.
    let uneven = ["trainer.batch_size=7", "optimizer.name=\"sgd\"", "optimizer.lr=0.1"];
    let alone = Place::new();
    let sets = uneven.iter().chain(&["trainer.devices=1"]).flat_map(|set| ["--set", set]);
    assert!(alone.command("train", &[]).args(sets).stderr(Stdio::null()).status().unwrap().success());
    for processes in [2, 4] {
        let place = Place::new();
        let (code, said) = mpirun(&place, processes, &uneven);
        assert_eq!(code, Some(0), "{said}");
        let error = (slope(&place) / slope(&alone) - 1.).abs();
        assert!(error <= 1e-6, "{processes} processes: off by {error:e}");
        // Only one of them writes files and logs.
        assert_eq!(std::fs::read_dir(place.0.path().join("runs/run")).unwrap().count(), 1);
        assert_eq!(said.matches("run folder").count(), 1, "{said}");
        let metrics = |place: &Place| {
            let path = place.0.path().join("runs/run/version_0/metrics.jsonl");
            std::fs::read_to_string(path).unwrap().lines().count()
        };
        assert_eq!(metrics(&place), metrics(&alone));
    }
}

fn a_process_that_errs_ends_all() {
    let (code, said) = mpirun(&Place::new(), 2, &["module.trouble=error"]);
    assert!(code != Some(0), "{said}");
    assert_says(&said, "rank 1 failed: training_step, step 6: out of paper");
}

fn processes_that_differ_are_refused() {
    let place = Place::new();
    std::fs::write(place.0.path().join("other.toml"), CONFIG.replace("max_steps = 30", "max_steps = 31"))
        .unwrap();
    let mut command = Command::new("mpirun");
    command.current_dir(place.0.path());
    let program = std::env::current_exe().unwrap();
    for (i, config) in ["run.toml", "other.toml"].iter().enumerate() {
        if i > 0 {
            command.arg(":");
        }
        command.args(["-n", "1"]).arg(&program).args(["train", config]);
    }
    let output = allow_mpi(&mut command, &place).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert_says(
        &said,
        "rank 1 is configured differently from rank 0: it has `max_steps = 31`, rank 0 has `max_steps = 30`",
    );
}

fn processes_killed_at_random() {
    let place = Place::new();
    let mut launch = place.command("launch", &[&SLOW[..], &["distributed.backend=\"mpi\""]].concat());
    let launch = allow_mpi(&mut launch, &place).stderr(place.said()).spawn().unwrap();
    // Alternates between the two ranks.
    let rank = |kill: usize, launch| children_of(child_of(launch)?).get(kill % 2).copied();
    kill_at_random(&place, launch, rank);
}

/// The process started by a supervisor.
fn child_of(pid: u32) -> Option<u32> {
    children_of(pid).first().copied()
}

fn children_of(pid: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|child| child.parse().ok()).collect()
}

fn wait_for<T>(look: impl Fn() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        // Long, because the machine may be busy.
        assert!(start.elapsed() < Duration::from_secs(180), "waited for three minutes");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn signal(name: &str, pid: u32) {
    Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .stderr(Stdio::null())
        .status()
        .unwrap();
}
