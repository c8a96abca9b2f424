//! Training on CUDA devices from the command line: several devices, several processes, and their failures. Needs two
//! devices and `CANDLEPOWER_TEST_DEVICE=cuda`; otherwise each test reports that it is skipped, and passes.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const TINY: &str = r#"
[run]
name = "tiny"
seed = 1

[trainer]
accelerator = "cuda"
batch_size = 2
micro_batch_size = 1
max_steps = 4
limit_val_batches = 0

[module]
name = "conv_lstm"
hidden = 8
patch = 8

[data]
name = "moving_mnist"
digits = "builtin"
digits_per_frame = 1
frames_in = 2
frames_out = 2
train_samples = 16
val_samples = 2

[logging]
image_every = 0
"#;

/// A folder with a configuration in it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Option<Self> {
        if std::env::var("CANDLEPOWER_TEST_DEVICE").as_deref() != Ok("cuda") {
            eprintln!("SKIPPED: CANDLEPOWER_TEST_DEVICE names no CUDA device");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tiny.toml"), TINY).unwrap();
        Some(Place(dir))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, command: &str, run: &str, arguments: &[&str]) -> Command {
        let mut program = Command::new(env!("CARGO_BIN_EXE_candlepower"));
        program.args([command, "tiny.toml", "--set", &format!("run.dir={run:?}")]).args(arguments);
        program.env("RUST_BACKTRACE", "0").current_dir(self.path());
        program.stdout(Stdio::piped()).stderr(Stdio::piped());
        program
    }

    /// Trains, and returns the weights of the last checkpoint.
    fn train(&self, run: &str, arguments: &[&str]) -> Vec<u8> {
        let output = self.command("train", run, arguments).output().unwrap();
        assert!(output.status.success(), "{}", words(&output));
        self.weights(run)
    }

    fn weights(&self, run: &str) -> Vec<u8> {
        std::fs::read(self.checkpoints(run).join("4/model.safetensors")).unwrap()
    }

    fn checkpoints(&self, run: &str) -> PathBuf {
        self.path().join(run).join("tiny/version_0/checkpoints")
    }

    /// Starts two processes, as on two machines. The first one starts last, because others wait for it.
    fn two(&self, run: &str, port: u16, arguments: &[&str]) -> [Child; 2] {
        let [second, first] = ["1", "0"].map(|rank| {
            let master = format!("127.0.0.1:{port}");
            let nodes = ["--nodes", "2", "--node-rank", rank, "--master", &master];
            self.command("launch", run, &[&nodes[..], arguments].concat()).spawn().unwrap()
        });
        [first, second]
    }
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A port on which nothing listens.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn devices_of_one_and_of_two_processes_move_the_weights_as_one_does() {
    let Some(place) = Place::new() else { return };
    let alone = place.train("alone", &[]);
    // Two gradients give the same sum in either order, so the weights are bit-identical.
    assert!(alone == place.train("two", &["--devices", "2"]), "two devices differ from one");
    let sharded = ["--devices", "2", "--set", "distributed.shard=\"optimizer\""];
    assert!(alone == place.train("sharded", &sharded), "a sharded optimizer differs");
    assert!(alone == place.train("recorded", &["--set", "trainer.cuda_graph=true"]), "recorded steps differ");
    // NAdam keeps a scalar in addition to its parameter-sized state; a sharded run saves both and resumes.
    let nadam = ["--set", "optimizer.name=nadam"];
    let alone_by_nadam = place.train("alone by nadam", &nadam);
    let sharded = [&sharded[..], &nadam].concat();
    let first = place.command("train", "nadam", &[&sharded[..], &["--set", "trainer.max_steps=2"]].concat());
    assert!({ first }.status().unwrap().success());
    let resumed = place.train("nadam", &[&sharded[..], &["--resume", "auto"]].concat());
    assert!(alone_by_nadam == resumed, "a sharded NAdam differs");
    for child in place.two("processes", free_port(), &[]) {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", words(&output));
    }
    assert!(alone == place.weights("processes"), "two processes differ from one device");
}

#[test]
fn a_process_that_is_gone_ends_the_others_with_its_name() {
    let Some(place) = Place::new() else { return };
    let arguments = ["--set", "distributed.max_restarts=0", "--set", "trainer.max_steps=100000"];
    let more = ["--set", "data.train_samples=1000000", "--set", "checkpoint.every_steps=1"];
    let [first, mut second] = place.two("gone", free_port(), &[&arguments[..], &more].concat());
    let since = Instant::now();
    while !place.checkpoints("gone").join("2").exists() {
        assert!(since.elapsed() < Duration::from_secs(300), "no step was taken");
        std::thread::sleep(Duration::from_millis(50));
    }
    // Kill the training process, not its supervisor.
    let launch = second.id();
    let children = std::fs::read_to_string(format!("/proc/{launch}/task/{launch}/children")).unwrap();
    let killed = Command::new("kill").arg("-9").args(children.split_whitespace()).status().unwrap();
    assert!(killed.success());
    assert!(!second.wait().unwrap().success());
    let since = Instant::now();
    let output = first.wait_with_output().unwrap();
    let said = words(&output);
    assert!(!output.status.success(), "{said}");
    assert!(since.elapsed() < Duration::from_secs(60), "took {:?}", since.elapsed());
    assert!(said.contains("a rank is gone"), "{said}");
}

/// Whether the devices are the stand-in's; prints a message if they are not.
fn are_played() -> bool {
    let devices = Command::new(env!("CARGO_BIN_EXE_candlepower")).arg("devices").output().unwrap();
    let are_played = String::from_utf8_lossy(&devices.stdout).contains("stand-in");
    if !are_played {
        eprintln!("SKIPPED: only on the stand-in can this be tried");
    }
    are_played
}

#[test]
fn a_library_that_is_missing_is_told_of() {
    let Some(place) = Place::new().filter(|_| are_played()) else { return };
    let path = std::env::var("LD_LIBRARY_PATH").unwrap();
    let (played, others): (Vec<&str>, Vec<&str>) =
        path.split(':').partition(|folder| Path::new(folder).join("libcuda.so.1").exists());
    let cases = [("libcublas.so", "cuBLAS"), ("libcurand.so", "cuRAND"), ("libcudnn.so", "cuDNN 9")];
    for (file, name) in cases.into_iter().chain([("libnvrtc.so", "NVRTC")]) {
        // A folder with all libraries except this one.
        let folder = place.path().join(format!("libraries without {name}"));
        std::fs::create_dir(&folder).unwrap();
        for library in std::fs::read_dir(played[0]).unwrap().map(|entry| entry.unwrap().path()) {
            let own = library.file_name().unwrap().to_str().unwrap();
            if own.starts_with("lib") && !own.starts_with(file) {
                std::os::unix::fs::symlink(&library, folder.join(own)).unwrap();
            }
        }
        let folder = folder.to_str().unwrap();
        let path = if name == "NVRTC" { folder } else { &[&[folder], &others[..]].concat().join(":") };
        let output = place.command("train", name, &[]).env("LD_LIBRARY_PATH", path).output().unwrap();
        let said = words(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(&format!("but not the library {name}:")), "{said}");
        assert!(!place.path().join(name).join("tiny").exists(), "{name}: something was written");
    }
}

#[test]
fn a_full_memory_says_what_to_change() {
    let Some(place) = Place::new().filter(|_| are_played()) else { return };
    let mut train = place.command("train", "full", &["--set", "trainer.micro_batch_size=2"]);
    let output = train.env("CANDLEPOWER_STAND_IN_MEMORY", "2000000").output().unwrap();
    let said = words(&output);
    assert!(!output.status.success());
    assert!(said.contains("out of memory") || said.contains("memory is full"), "{said}");
    assert!(said.contains("micro_batch_size"), "{said}");
}
