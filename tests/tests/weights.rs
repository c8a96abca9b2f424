//! Weights saved by PyTorch are read (`tests/weights/make.py` wrote them), and a training starts from them.
#![allow(clippy::unwrap_used)]

use std::io::{Cursor, Read, Write};
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

/// The parameters of the network in `make.py`.
fn params() -> Params {
    with_norm().0
}

/// Like [`params`], and its normalization layer.
fn with_norm() -> (Params, BatchNorm) {
    let params = Params::new(0, DType::F32, &device());
    let vb = params.var_builder();
    vb.get((3, 2), "hidden.weight").unwrap();
    vb.get(3, "hidden.bias").unwrap();
    let norm = BatchNorm::new(3, Init::Const(1.), vb.pp("norm")).unwrap();
    (params, norm)
}

fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn pytorchs_and_lightnings_files_are_read() {
    let names = ["hidden.weight", "hidden.bias", "norm.weight", "norm.bias"];
    let buffers = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"];
    for file in ["state_dict.pth", "lightning.ckpt"] {
        let (params, norm) = with_norm();
        init(file).apply(&params).unwrap();
        // The file's statistics apply immediately, also for training.
        let normalized =
            values(&norm.by_running(&Tensor::zeros((1, 3), DType::F32, &device()).unwrap()).unwrap());
        for (n, y) in (0..3).map(f64::from).zip(normalized) {
            let expected = -(40. + n) / (50. + n + 1e-5).sqrt() * (20. + n) + 30. + n;
            assert!((y / expected - 1.).abs() < 1e-5, "{y}, not {expected}");
        }
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
fn damaged_files_are_errors_and_nothing_worse() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["state_dict.pth", "lightning.ckpt", "channels_last.pt"] {
        let whole = std::fs::read(init(name).weights).unwrap();
        let file = dir.path().join(name);
        for i in (0..whole.len()).step_by(5) {
            let mut bytes = whole.clone();
            bytes[i] ^= 0x55;
            std::fs::write(&file, bytes).unwrap();
            // A file with a flipped name or number may still be readable.
            let _ = Weights::read(&file);
        }
        for len in (0..whole.len()).step_by(97) {
            std::fs::write(&file, &whole[..len]).unwrap();
            assert!(Weights::read(&file).is_err(), "{name}, cut to {len} bytes");
        }
    }
}

/// An archive of PyTorch's with changed bytes in the description of its tensors, in an otherwise intact file.
fn described_by(archive: &[u8], change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let mut from = zip::ZipArchive::new(Cursor::new(archive)).unwrap();
    let mut to = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for i in 0..from.len() {
        let mut entry = from.by_index(i).unwrap();
        let (name, mut bytes) = (entry.name().unwrap().to_string(), Vec::new());
        entry.read_to_end(&mut bytes).unwrap();
        if name.ends_with("data.pkl") {
            change(&mut bytes);
        }
        let stored =
            zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        to.start_file(name, stored).unwrap();
        to.write_all(&bytes).unwrap();
    }
    to.finish().unwrap().into_inner()
}

#[test]
fn what_describes_tensors_wrongly_is_an_error_and_nothing_worse() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.pth");
    let whole = std::fs::read(init("state_dict.pth").weights).unwrap();
    let read = |change: &dyn Fn(&mut Vec<u8>)| {
        std::fs::write(&file, described_by(&whole, change)).unwrap();
        Weights::read(&file)
    };
    assert!(read(&|_| ()).is_ok());
    let mut errors = String::new();
    for i in 0..700 {
        for flip in [0x01, 0x04] {
            let read = read(&|bytes| {
                let i = i % bytes.len();
                bytes[i] ^= flip;
            });
            errors += &read.map_or_else(|error| error.to_string(), |_| String::new());
        }
    }
    // Sizes larger than the stored values, and input that candle's reader fails on.
    assert!(errors.contains("values stored for it"), "{errors}");
    assert!(errors.contains("it is not in PyTorch's format"), "{errors}");
}

fn safetensors_of_one() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("one.safetensors");
    Tensor::new(&[1f32], &Device::Cpu).unwrap().save_safetensors("w", &file).unwrap();
    std::fs::read(file).unwrap()
}

#[test]
fn what_cannot_be_read_is_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let written = |name: &str, bytes: &[u8]| {
        std::fs::write(dir.path().join(name), bytes).unwrap();
        Weights::read(&dir.path().join(name)).unwrap_err().to_string()
    };
    let write = |name: &str| written(name, b"not an archive");
    let whole = std::fs::read(init("state_dict.pth").weights).unwrap();
    for name in ["a.pth", "a.ckpt", "a.safetensors"] {
        assert!(write(name).ends_with(&format!("{name}: this is not a weights file")), "{name}");
        assert!(written(name, b"").ends_with("the file is empty"));
        assert!(written(name, b"version https://git-lfs.github.com/spec/v1").contains("`git lfs pull`"));
        assert!(written(name, b"\x80\x02\x8a\x0al\xfc").contains("before 1.6: in Python, `torch.save("));
    }
    assert!(written("a.pth", &whole[..1000]).contains("safetensors.torch.save_file"));
    assert!(written("a.safetensors", &whole).contains("rename it to end in .pth"));
    let mut safetensors = safetensors_of_one();
    assert!(written("a.pth", &safetensors).contains("rename it to end in .safetensors"));
    safetensors.pop();
    assert!(written("a.safetensors", &safetensors).contains("not a complete safetensors file: "));
    assert!(write("a.npy").contains("expected a run's folder, a checkpoint, or a file"));
    assert!(Weights::read(dir.path()).unwrap_err().to_string().contains("no good checkpoint"));
    let missing = InitConfig::new(dir.path().join("b.pth"));
    assert!(missing.apply(&params()).unwrap_err().to_string().contains("no such file or folder"));
}
