//! What the command line understands.

use std::path::PathBuf;

use candlepower::data::Split;
use candlepower::experiment::Resume;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Trains models from TOML files: Lightning-style training for Rust.
///
/// A first run, without any download:  candlepower train configs/quickstart.toml
#[derive(Parser)]
#[command(name = "candlepower", version)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Train what a configuration describes.
    ///
    /// Writes <run.dir>/<run.name>/version_N/ with checkpoints, metrics, TensorBoard events and pictures. Ctrl-C
    /// finishes the step, saves, and exits; twice exits at once. SIGUSR1 saves and goes on.
    Train {
        #[command(flatten)]
        config: Config,
        /// Go on with an earlier run: `auto` takes the newest run of this name (and starts afresh where there is
        /// none); a folder is a run, one of its checkpoints, or that of all its versions (the newest).
        #[arg(long, value_name = "auto|DIR")]
        resume: Option<String>,
        /// Tell where the time goes: a table of the loop's phases at the end, and `trace.json` in the run's folder, to
        /// be opened in https://ui.perfetto.dev or chrome://tracing.
        ///
        /// The phases are `data_wait`, `forward`, `backward`, `optimizer`, `logging`, `validation`, `checkpoint`, and on several
        /// devices `all_reduce`; a
        /// phase inside another counts for itself alone. `data_wait` is the time that training stands still for want
        /// of a batch: near zero while the data workers keep up. The trace holds the first 100,000 phases, the table
        /// all of them. On a GPU a phase is the time it takes to ask for the work.
        #[arg(long)]
        profile: bool,
    },
    /// Train under supervision: what fails is named, ended within seconds, and taken up again
    ///
    /// Starts `train` and watches it. A rank that panics, errors, is killed, or makes no step for
    /// `distributed.hang_timeout` takes all others down; then `train` goes on from the run's last good checkpoint, up to
    /// `distributed.max_restarts` times, on fewer devices where `distributed.min_devices` allows it. With
    /// `distributed.backend = "mpi"` the ranks are processes of `mpirun`. Signals are handed on: Ctrl-C finishes the
    /// step, saves, and exits.
    ///
    /// On several machines with CUDA devices, start it on each, with the same file:
    ///
    ///   candlepower launch config.toml --nodes 2 --node-rank 0 --master node1:29500      on node1
    ///   candlepower launch config.toml --nodes 2 --node-rank 1 --master node1:29500      on the other
    ///
    /// Under `srun` and `torchrun`, which say who is who, it needs none of these.
    #[command(verbatim_doc_comment)]
    Launch {
        #[command(flatten)]
        config: Config,
        /// Short for --set distributed.nodes=N: how many machines train together.
        #[arg(long, value_name = "N")]
        nodes: Option<usize>,
        /// Which of them this is, from 0.
        #[arg(long, value_name = "R")]
        node_rank: Option<usize>,
        /// Short for --set distributed.master=HOST:PORT: where the machine of rank 0 can be reached by the others.
        #[arg(long, value_name = "HOST:PORT")]
        master: Option<String>,
        /// Go on with an earlier run, as in `train`.
        #[arg(long, value_name = "auto|DIR")]
        resume: Option<String>,
    },
    /// Measure a checkpoint on the validation data, or on another split.
    Validate {
        #[command(flatten)]
        config: Config,
        /// A checkpoint (`RUN/checkpoints/best` is the best), a run's folder (then its last good checkpoint), that of all its
        /// versions (then the newest), or weights in a file: .safetensors, or PyTorch's .pth, .pt, .ckpt.
        #[arg(long, value_name = "PATH")]
        checkpoint: PathBuf,
        /// The data to measure it on.
        #[arg(long, value_enum, default_value_t = SplitName::Val)]
        split: SplitName,
        /// Also score what it predicts by lead time, beside predictors that learn nothing: prints a table, and writes plots
        /// and numbers into this folder.
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
        /// A checkpoint (`RUN/checkpoints/best` is the best), a run's folder (then its last good checkpoint), that of all its
        /// versions (then the newest), or weights in a file: .safetensors, or PyTorch's .pth, .pt, .ckpt.
        #[arg(long, value_name = "PATH")]
        checkpoint: PathBuf,
        #[command(flatten)]
        source: Source,
        /// Where the prediction goes; the ending says what it becomes: .gif moves, .png is a grid, .npy numbers. With
        /// --split, a folder that gets a .npy file for each batch.
        #[arg(long, value_name = "PATH")]
        output: PathBuf,
    },
    /// Time a configuration's training steps; writes nothing.
    ///
    /// Steps are those of `train`, without validation, checkpoints, pictures and logs; the first two are not counted.
    /// With --json, one object goes to standard output: `ms_per_step` (the median), `samples_per_second`, `peak_rss_mb`
    /// (10^6 bytes, of the whole process; null where the system does not tell), `flops_per_sample` (three forward
    /// passes; null where the module does not say), `tflops`, `device`, `threads`, `precision`.
    Bench {
        #[command(flatten)]
        config: Config,
        /// How many steps are timed.
        #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
        steps: u64,
        /// Time the forward pass of validation instead; a sample then counts one forward pass.
        #[arg(long)]
        forward: bool,
        /// Print one JSON object instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Find a learning rate: train some steps while it grows, and see where the loss falls fastest.
    ///
    /// The learning rate grows by the same factor in every step (Smith 2017, section 3.3), until the average loss is four
    /// times its lowest. It starts where a training would, with the configuration's model, data, batch size and
    /// optimizer; what [schedule] says plays no part. Several optimizers, and groups with rates of their own, keep
    /// their proportions. Nothing is written but --output.
    ///
    /// The suggestion is a start, not a truth: look at the plot. It should lie on the slope, well before the bottom; a
    /// third of it is the safer choice for long training. Where noise hides the fall there is none: take more steps. With [schedule] name = "one_cycle" it belongs into `max_lr`.
    ///
    /// With --json, one object goes to standard output: `suggestion` (null where there is none; the reason goes to
    /// standard error, and the exit code is 1), `points` (a list of `lr`, `loss`, `smoothed`), `proportions` (of each
    /// configured learning rate to the first optimizer's, by name).
    FindLr {
        #[command(flatten)]
        config: Config,
        /// How many steps are taken, a learning rate each.
        #[arg(long, value_name = "N", default_value_t = 400, value_parser = clap::value_parser!(u64).range(2..))]
        steps: u64,
        /// The learning rate of the first step.
        #[arg(long, value_name = "X", default_value_t = 1e-8)]
        min: f64,
        /// The learning rate of the last step.
        #[arg(long, value_name = "X", default_value_t = 1.)]
        max: f64,
        /// Draw the loss over the learning rate, the suggestion marked, into this SVG file; any browser shows it.
        #[arg(long, value_name = "lr.svg")]
        output: Option<PathBuf>,
        /// Print one JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Find a batch size: time training steps with 1, 2, 4, ... samples.
    ///
    /// The search ends where a larger batch is no faster, would not fit into memory, or is larger than the data. Look at
    /// two answers: the smallest batch that is within 5 % of the best speed, and the largest that fits. Weights learn
    /// better from small batches than from large ones: take the first, unless you have a reason. To keep `batch_size`
    /// as it is, set `trainer.micro_batch_size` to the answer instead: that changes speed and memory alone. Nothing is
    /// written.
    ///
    /// With --json, one object goes to standard output: `trials` (a list of `batch_size`, `ms_per_step`,
    /// `samples_per_second`, `memory_mb`, which is null where it is not known), `suggestion`, `largest`, `ended`.
    FindBatchSize {
        #[command(flatten)]
        config: Config,
        /// The first batch size.
        #[arg(long, value_name = "N", default_value_t = 1)]
        start: usize,
        /// The largest batch that is tried. Default: as many samples as there are.
        #[arg(long, value_name = "N")]
        max: Option<usize>,
        /// The memory that training may take, in 10^6 bytes. Default: 80 % of what is available.
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
        /// Print a JSON Schema of all configurations instead, for an editor's completion.
        #[arg(long)]
        schema: bool,
    },
}

/// What is predicted from.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Source {
    /// Frames to predict from, read as the dataset's own: .npy (T,H,W), (N,T,H,W) or (N,T,C,H,W), an animated .gif, a
    /// folder of pictures; for `radar` a folder of composites. Of a longer clip the first frames count.
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

/// A configuration and what is changed in it.
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
    /// Change one value, for example --set module.hidden=32; may be repeated.
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
    /// Whether a profile is asked for.
    pub(crate) fn profiles(&self) -> bool {
        matches!(self, Command::Train { profile: true, .. })
    }
}

impl Changes {
    /// All changes as overrides, in the order in which they win.
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

/// What `--resume` says.
pub(crate) fn resume(argument: Option<&str>) -> Resume {
    match argument {
        None => Resume::No,
        Some("auto") => Resume::Auto,
        Some(path) => Resume::From(path.into()),
    }
}
