//! Reference numbers from PyTorch for the tests: `golden("seed_convlstm")` opens a fixture.
#![allow(clippy::unwrap_used)]

pub mod blobs;
pub mod normed;
pub mod points;
pub mod recorder;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use candlepower::accelerator::Accelerator;
use candlepower::params::Params;

/// The device for models compared with reference numbers: the CPU or, with `CANDLEPOWER_TEST_DEVICE=cuda`,
/// the first CUDA device.
pub fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let open = || match std::env::var("CANDLEPOWER_TEST_DEVICE").as_deref() {
        Ok("cuda") => Accelerator::Cuda.open(1).unwrap(),
        _ => Device::Cpu,
    };
    DEVICE.get_or_init(open).clone()
}

/// The folder of the fixtures: `$CANDLEPOWER_GOLDEN` if set, otherwise the one next to the tests.
pub fn golden_dir() -> PathBuf {
    match std::env::var_os("CANDLEPOWER_GOLDEN") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"),
    }
}

/// The path of one of this project's own fixtures, by file name: in [`golden_dir`] if it is there, else next
/// to the tests.
pub fn own_fixture(name: &str) -> PathBuf {
    let given = golden_dir().join(name);
    if given.exists() { given } else { Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name) }
}

/// The path `part` in the folder that `variable` names, or otherwise in `beside` within the folder `shared`
/// next to the repository. Prints a message and returns `None` if it does not exist.
pub fn outside(variable: &str, beside: &str, part: &str) -> Option<PathBuf> {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared").join(beside);
    let path = std::env::var_os(variable).map_or(shared, PathBuf::from).join(part);
    if !path.exists() {
        eprintln!("skipped: there is no {}; set {variable} to the folder that holds {part}", path.display());
        return None;
    }
    Some(path)
}

/// A fixture: tensors by name, and the hyper-parameters that produced them.
pub struct Golden {
    /// Every tensor of the file.
    pub tensors: HashMap<String, Tensor>,
    /// The file's `hparams`.
    pub hparams: serde_json::Value,
}

impl Golden {
    /// Opens `<folder>/<name>.safetensors`.
    pub fn open(folder: &Path, name: &str) -> Self {
        let path = folder.join(name).with_extension("safetensors");
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let hparams = header.metadata().as_ref().and_then(|m| m.get("hparams")).map(String::as_str);
        Self {
            tensors: candle_core::safetensors::load_buffer(&bytes, &device()).unwrap(),
            hparams: serde_json::from_str(hparams.unwrap_or("{}")).unwrap(),
        }
    }

    /// A tensor of the fixture.
    pub fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("the fixture has no tensor `{name}`"))
    }

    /// An integer among the hyper-parameters.
    pub fn size(&self, name: &str) -> usize {
        self.hparams[name].as_u64().unwrap_or_else(|| panic!("the fixture has no size `{name}`")) as usize
    }

    /// The tensors whose names start with `prefix`, with the prefix removed.
    pub fn under(&self, prefix: &str) -> HashMap<String, Tensor> {
        let strip = |(name, tensor): (&String, &Tensor)| {
            Some((name.strip_prefix(prefix)?.to_string(), tensor.clone()))
        };
        self.tensors.iter().filter_map(strip).collect()
    }
}

impl Golden {
    /// Sets a model's parameters and buffers to the fixture's values. Panics if the names differ.
    pub fn load(&self, params: &Params) {
        for (prefix, vars) in [("param.", params.vars()), ("buffer.", params.buffers())] {
            let values = self.under(prefix);
            let sorted = |mut names: Vec<String>| {
                names.sort();
                names
            };
            let own = sorted(vars.iter().map(|(name, _)| name.clone()).collect());
            assert_eq!(
                own,
                sorted(values.keys().cloned().collect()),
                "`{prefix}`: other names than the fixture"
            );
            vars.iter().for_each(|(name, var)| var.set(&values[name]).unwrap());
        }
        params.publish().unwrap();
        params.roll_back_buffers().unwrap();
    }

    /// Whether this parameter's gradient is only rounding error.
    pub fn has_no_true_gradient(&self, name: &str) -> bool {
        self.hparams["zero_true_grad"].as_array().is_some_and(|names| names.iter().any(|n| n == name))
    }

    /// Compares every parameter's gradient, except those that are only rounding errors.
    #[track_caller]
    pub fn assert_gradients(&self, params: &Params, grads: &GradStore, tolerance: f64) {
        let mut compared = 0;
        for (name, var) in params.vars().into_iter().filter(|(name, _)| !self.has_no_true_gradient(name)) {
            let gradient = grads.get(&var).unwrap_or_else(|| panic!("{name} has no gradient"));
            assert_close(
                &format!("gradient of {name}"),
                gradient,
                self.get(&format!("grad.{name}")),
                tolerance,
            );
            compared += 1;
        }
        assert!(compared > 0);
    }

    /// Compares the buffers after a training step's forward pass.
    #[track_caller]
    pub fn assert_buffers_after(&self, params: &Params, tolerance: f64) {
        params.commit_buffers().unwrap();
        for (name, var) in params.buffers() {
            let expected = self.get(&format!("buffer_after.{name}"));
            assert_eq!(var.dtype(), expected.dtype(), "{name}");
            assert_close(&format!("buffer {name}"), &var, expected, tolerance);
        }
    }
}

/// Opens a fixture in the folder of fixtures.
pub fn golden(name: &str) -> Golden {
    Golden::open(&golden_dir(), name)
}

/// The largest difference, relative to the largest expected value.
pub fn relative_error(actual: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(actual.dims(), expected.dims(), "shapes differ");
    let largest = |t: &Tensor| -> f64 {
        let flat = t.abs().unwrap().flatten_all().unwrap();
        flat.to_vec1::<f64>().unwrap().into_iter().fold(0., f64::max)
    };
    let exact = |x: &Tensor| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let (actual, expected) = (exact(actual), exact(expected));
    largest(&(actual - &expected).unwrap()) / largest(&expected).max(f64::MIN_POSITIVE)
}

/// Panics if `actual` differs from `expected` by more than `tolerance`, relative to the largest expected
/// value.
#[track_caller]
pub fn assert_close(what: &str, actual: &Tensor, expected: &Tensor, tolerance: f64) {
    let error = relative_error(actual, expected);
    assert!(error <= tolerance, "{what}: relative error {error:.2e} is over {tolerance:.0e}");
}
