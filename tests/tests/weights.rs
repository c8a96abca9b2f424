//! Weights that PyTorch has saved are read (`tests/weights/make.py` wrote them), and a training starts from them.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use candle_core::Tensor;
use candle_nn::Init;
use candlepower::nn::channels_last::BatchNorm;
use candlepower::params::Params;
use candlepower::prelude::*;
use candlepower::weights::{InitConfig, Weights};
use candlepower_tests::device;

fn init(file: &str) -> InitConfig {
    InitConfig::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("weights").join(file))
}

/// Of the network in `make.py`.
fn params() -> Params {
    let params = Params::new(0, DType::F32, &device());
    let vb = params.var_builder();
    vb.get((3, 2), "hidden.weight").unwrap();
    vb.get(3, "hidden.bias").unwrap();
    BatchNorm::new(3, Init::Const(1.), vb.pp("norm")).unwrap();
    params
}

fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn pytorchs_and_lightnings_files_are_read() {
    let names = ["hidden.weight", "hidden.bias", "norm.weight", "norm.bias"];
    let buffers = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"];
    for file in ["state_dict.pth", "lightning.ckpt"] {
        let params = params();
        init(file).apply(&params).unwrap();
        let all = params.state_dict();
        assert_eq!(all.len(), 7);
        for (i, name) in names.iter().chain(&buffers).enumerate() {
            let (_, var) = all.iter().find(|(known, _)| known == name).unwrap();
            let expected: Vec<f64> = (0..var.elem_count()).map(|n| (10 * i + n) as f64).collect();
            assert_eq!(values(var), expected, "{file}, {name}");
        }
    }
}

#[test]
fn tensors_are_read_in_whatever_order_their_values_lie() {
    // Channels last; in half precision; a part of a storage.
    let shapes = [("weight", vec![2, 3, 2, 2]), ("half", vec![4]), ("view", vec![4]), ("turned", vec![3, 2])];
    let params = Params::new(0, DType::F32, &device());
    for (name, shape) in &shapes {
        params.var_builder().get(shape.as_slice(), name).unwrap();
    }
    init("channels_last.pt").apply(&params).unwrap();
    for (name, var) in params.vars() {
        let expected = match name.as_str() {
            "view" => vec![3., 4., 5., 6.],
            "turned" => vec![1., 4., 2., 5., 3., 6.],
            _ => (0..var.elem_count()).map(|n| n as f64).collect(),
        };
        assert_eq!(values(&var), expected, "{name}");
    }
}

#[test]
fn what_cannot_be_read_is_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str| {
        std::fs::write(dir.path().join(name), b"not an archive").unwrap();
        Weights::read(&dir.path().join(name)).unwrap_err().to_string()
    };
    assert!(write("a.pth").contains("safetensors.torch.save_file"));
    assert!(write("a.safetensors").contains("a.safetensors"));
    assert!(write("a.npy").contains("expected a run's folder, a checkpoint, or a file"));
    assert!(Weights::read(dir.path()).unwrap_err().to_string().contains("no good checkpoint"));
    let missing = InitConfig::new(dir.path().join("b.pth"));
    assert!(missing.apply(&params()).unwrap_err().to_string().contains("there is no such file"));
}
