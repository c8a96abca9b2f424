//! Command-line arguments and subcommands.

use std::path::PathBuf;

use candlepower::data::Split;
use candlepower::experiment::Resume;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Train models from TOML files: Lightning-style training for Rust.
///
/// A first run that needs no download:  candlepower train configs/quickstart.toml
#[derive(Parser)]
#[command(name = "candlepower", version)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Train the model that a configuration describes.
    ///
    /// Writes checkpoints, metrics, TensorBoard events and pictures into <run.dir>/<run.name>/version_N/.
    /// Ctrl-C finishes the current step, saves, and exits; a second Ctrl-C exits immediately. SIGUSR1 saves
    /// and continues.
    Train {
        #[command(flatten)]
        config: Config,
        /// Resume an earlier run. `auto` takes the newest run of this name, or starts a new one if there is
        /// none. DIR is a run's folder, one of its checkpoints, or the folder that holds all its versions
        /// (then the newest is used).
        #[arg(long, value_name = "auto|DIR")]
        resume: Option<String>,
        /// Show where the time goes: print a table of the loop's phases at the end, and write `trace.json`
        /// into the run's folder, which opens in https://ui.perfetto.dev or chrome://tracing.
        ///
        /// The phases are `data_wait`, `forward`, `backward`, `optimizer`, `logging`, `pictures`,
        /// `validation`, `checkpoint`, and on several devices `all_reduce`. The time of a nested phase is not
        /// counted in the enclosing one. `data_wait` is the time that training waits for a batch; it is near
        /// zero while the data workers keep up. The trace holds the first 100,000 phases, the table all of
        /// them. On a GPU, a phase is the time it takes to submit the work.
        #[arg(long)]
        profile: bool,
    },
    /// Train under supervision, and restart from the last good checkpoint after a failure
    ///
    /// Starts `train` and watches it. If a rank panics, returns an error, is killed, or completes no step for
    /// `distributed.hang_timeout`, the failure is reported and all ranks are stopped within seconds. Then `train`
    /// resumes from the run's last good checkpoint, up to `distributed.max_restarts` times, on fewer devices if
    /// `distributed.min_devices` allows it. With `distributed.backend = "mpi"` the ranks are processes of `mpirun`.
    /// Signals are forwarded: Ctrl-C finishes the step, saves, and exits.
    ///
    /// To train on several machines with CUDA devices, run it on each of them, with the same file:
    ///
    ///   candlepower launch config.toml --nodes 2 --node-rank 0 --master node1:29500      on node1
    ///   candlepower launch config.toml --nodes 2 --node-rank 1 --master node1:29500      on the other
    ///
    /// Under `srun` and `torchrun`, which assign the ranks, none of these options is needed.
    #[command(verbatim_doc_comment)]
    Launch {
        #[command(flatten)]
        config: Config,
        /// Number of machines that train together. Short for --set distributed.nodes=N.
        #[arg(long, value_name = "N")]
        nodes: Option<usize>,
        /// Index of this machine, from 0.
        #[arg(long, value_name = "R")]
        node_rank: Option<usize>,
        /// Address at which the other machines reach the machine of rank 0. Short for --set
        /// distributed.master=HOST:PORT.
        #[arg(long, value_name = "HOST:PORT")]
        master: Option<String>,
        /// Resume an earlier run, as in `train`.
        #[arg(long, value_name = "auto|DIR")]
        resume: Option<String>,
    },
    /// Evaluate a checkpoint on the validation data, or on another split.
    Validate {
        #[command(flatten)]
        config: Config,
        /// A checkpoint (`RUN/checkpoints/best` is the best one), a run's folder (then its last good
        /// checkpoint), the folder of all its versions (then the newest), or a weights file: .safetensors, or
        /// PyTorch's .pth, .pt, .ckpt.
        #[arg(long, value_name = "PATH")]
        checkpoint: PathBuf,
        /// The data to evaluate on.
        #[arg(long, value_enum, default_value_t = SplitName::Val)]
        split: SplitName,
        /// Also score the predictions by lead time, alongside baselines that learn nothing: print a table,
        /// and write plots and numbers into this folder.
        #[arg(long, value_name = "FOLDER")]
        lead_times: Option<PathBuf>,
        /// Print one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Predict with a checkpoint's weights, from a file or from a split of the data.
    Predict {
        #[command(flatten)]
        config: Config,
        /// A checkpoint (`RUN/checkpoints/best` is the best one), a run's folder (then its last good
        /// checkpoint), the folder of all its versions (then the newest), or a weights file: .safetensors, or
        /// PyTorch's .pth, .pt, .ckpt.
        #[arg(long, value_name = "PATH")]
        checkpoint: PathBuf,
        #[command(flatten)]
        source: Source,
        /// Output file; its extension selects the format: .gif is an animation, .png a grid of frames, .npy
        /// an array. With --split, a folder that receives one .npy file per batch.
        #[arg(long, value_name = "PATH")]
        output: PathBuf,
    },
    /// Time a configuration's training steps, without writing any files.
    ///
    /// The steps are those of `train`, without validation, checkpoints, pictures and logs; the first two are
    /// not timed. With --json, one object goes to standard output: `ms_per_step` (the median),
    /// `samples_per_second`, `peak_rss_mb` (10^6 bytes, of the whole process; null if the system does not
    /// report it), `peak_device_mb` (10^6 bytes held by tensors on a CUDA device, otherwise null),
    /// `flops_per_sample` (three forward passes; null if the module does not report it), `tflops`, `device`,
    /// `threads`, `precision`.
    Bench {
        #[command(flatten)]
        config: Config,
        /// Number of steps to time.
        #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
        steps: u64,
        /// Time the forward pass of validation instead; `flops_per_sample` then counts one forward pass.
        #[arg(long)]
        forward: bool,
        /// Print one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Find a learning rate: train for some steps while it grows, and see where the loss falls fastest.
    ///
    /// The learning rate grows by the same factor in every step (Smith 2017, section 3.3), until the average
    /// loss is four times its lowest value. Training starts as `train` does, with the configuration's model,
    /// data, batch size and optimizer; [schedule] is ignored. Several optimizers, and parameter groups with
    /// their own learning rates, keep their proportions. Nothing is written except --output.
    ///
    /// Treat the suggestion as a starting point, and look at the plot. It should lie on the slope, well
    /// before the bottom; a third of it is the safer choice for long training. If noise hides the fall, there
    /// is no suggestion: use more steps. With [schedule] name = "one_cycle", use the suggestion as `max_lr`.
    ///
    /// With --json, one object goes to standard output: `suggestion` (null if there is none; then the reason
    /// goes to standard error, and the exit code is 1), `points` (a list of `lr`, `loss`, `smoothed`),
    /// `proportions` (by name, the ratio of each configured learning rate to the first optimizer's).
    FindLr {
        #[command(flatten)]
        config: Config,
        /// Number of steps, each at its own learning rate.
        #[arg(long, value_name = "N", default_value_t = 400, value_parser = clap::value_parser!(u64).range(2..))]
        steps: u64,
        /// Learning rate of the first step.
        #[arg(long, value_name = "X", default_value_t = 1e-8)]
        min: f64,
        /// Learning rate of the last step.
        #[arg(long, value_name = "X", default_value_t = 1.)]
        max: f64,
        /// Plot the loss over the learning rate, with the suggestion marked, into this SVG file, which any
        /// browser opens.
        #[arg(long, value_name = "lr.svg")]
        output: Option<PathBuf>,
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Find a batch size: time training steps with 1, 2, 4, ... samples.
    ///
    /// The search ends when a larger batch is no faster, would not fit into memory, or is larger than the
    /// data. There are two answers: the smallest batch within 5 % of the best speed, and the largest that
    /// fits. Small batches train better than large ones: take the first answer, unless you have a
    /// reason not to. To keep `batch_size` as it is, set `trainer.micro_batch_size` to the answer instead:
    /// that changes only speed and memory. Nothing is written.
    ///
    /// With --json, one object goes to standard output: `trials` (a list of `batch_size`, `ms_per_step`,
    /// `samples_per_second`, `memory_mb`, which is null if unknown), `suggestion`, `largest`, `ended`.
    FindBatchSize {
        #[command(flatten)]
        config: Config,
        /// The first batch size.
        #[arg(long, value_name = "N", default_value_t = 1)]
        start: usize,
        /// The largest batch to try. Default: the number of samples in the data.
        #[arg(long, value_name = "N")]
        max: Option<usize>,
        /// Memory that training may use, in 10^6 bytes. Default: 80 % of the available memory.
        #[arg(long, value_name = "MB")]
        memory: Option<f64>,
        /// Print one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// List the devices that this program can train on.
    Devices,
    /// Print a configuration with every default written out.
    Config {
        #[command(flatten)]
        config: OptionalConfig,
        /// Print a JSON Schema of all configurations instead, for completion in an editor.
        #[arg(long)]
        schema: bool,
    },
}

/// The input of a prediction.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Source {
    /// Frames to predict from, read as the dataset reads its own: .npy (T,H,W), (N,T,H,W) or (N,T,C,H,W), an
    /// animated .gif, a folder of pictures; for `radar`, a folder of composites. Only the first frames of a
    /// longer clip are used.
    #[arg(long, value_name = "PATH")]
    pub(crate) input: Option<PathBuf>,
    /// Predict from every sample of this split instead.
    #[arg(long, value_enum)]
    pub(crate) split: Option<SplitName>,
}

/// A split of the data.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum SplitName {
    Train,
    Val,
    Test,
}

impl From<SplitName> for Split {
    fn from(name: SplitName) -> Split {
        match name {
            SplitName::Train => Split::Train,
            SplitName::Val => Split::Val,
            SplitName::Test => Split::Test,
        }
    }
}

/// A configuration file and overrides of its values.
#[derive(Args)]
pub(crate) struct Config {
    /// The TOML file.
    #[arg(value_name = "CONFIG")]
    pub(crate) path: PathBuf,
    #[command(flatten)]
    pub(crate) changes: Changes,
}

#[derive(Args)]
pub(crate) struct OptionalConfig {
    /// The TOML file.
    #[arg(value_name = "CONFIG", required_unless_present = "schema")]
    pub(crate) path: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) changes: Changes,
}

#[derive(Args)]
pub(crate) struct Changes {
    /// Change one value, for example --set module.hidden=32; repeatable.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
    /// Short for --set trainer.devices=N.
    #[arg(long, value_name = "N")]
    devices: Option<String>,
    /// Short for --set trainer.accelerator=A: auto, cpu or cuda.
    #[arg(long, value_name = "A")]
    accelerator: Option<String>,
    /// Short for --set trainer.precision=P.
    #[arg(long, value_name = "P")]
    precision: Option<String>,
    /// Short for --set trainer.batch_size=N.
    #[arg(long, value_name = "N")]
    batch_size: Option<String>,
    /// Short for --set logging.tensorboard=true.
    #[arg(long)]
    tensorboard: bool,
}

impl Command {
    /// Whether this command records a profile.
    pub(crate) fn profiles(&self) -> bool {
        matches!(self, Command::Train { profile: true, .. })
    }
}

impl Changes {
    /// All changes as overrides; a later one wins.
    pub(crate) fn sets(&self) -> Vec<String> {
        let mut sets = self.sets.clone();
        let quoted = |text: &Option<String>| text.as_ref().map(|text| format!("{text:?}"));
        for (key, value) in [
            ("devices", &self.devices),
            ("accelerator", &quoted(&self.accelerator)),
            ("precision", &quoted(&self.precision)),
            ("batch_size", &self.batch_size),
        ] {
            sets.extend(value.as_ref().map(|value| format!("trainer.{key}={value}")));
        }
        sets.extend(self.tensorboard.then(|| "logging.tensorboard=true".to_string()));
        sets
    }
}

/// The value of `--resume`.
pub(crate) fn resume(argument: Option<&str>) -> Resume {
    match argument {
        None => Resume::No,
        Some("auto") => Resume::Auto,
        Some(path) => Resume::From(path.into()),
    }
}
