//! A custom dataset over a folder of files: pictures whose names begin with their class. Files are read on
//! demand by the data workers, so the folder may be larger than memory.
//!
//!     cargo run --release --example data_folder

use std::path::{Path, PathBuf};

use candlepower::candle_nn::{Linear, linear, loss::cross_entropy};
use candlepower::picture::save_png;
use candlepower::prelude::*;
use candlepower::video_file::pictures;

/// Pictures of 8x8 pixels, `dark_*.png` and `light_*.png`.
struct Pictures(Vec<PathBuf>);

impl Dataset for Pictures {
    type Batch = Labelled;
    fn len(&self) -> usize {
        self.0.len()
    }
    fn spec(&self) -> LabelledSpec {
        LabelledSpec { shape: vec![64], classes: 2 }
    }
    fn batch(&self, samples: &[Sample]) -> Result<Labelled> {
        let files: Vec<&PathBuf> = samples.iter().map(|sample| &self.0[sample.index]).collect();
        let pixels = files.iter().map(|file| Ok(pictures(file)?.planes(0, 1))).collect::<Result<Vec<_>>>()?;
        let light = |file: &&PathBuf| {
            u32::from(file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("light")))
        };
        let label = Tensor::from_iter(files.iter().map(light), &Device::Cpu)?;
        Ok(Labelled { input: Tensor::new(pixels, &Device::Cpu)?, label })
    }
}

impl Pictures {
    fn open(folder: &Path) -> Result<Self> {
        let entries = std::fs::read_dir(folder).map_err(Error::file(folder))?;
        let files = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
        let mut files = files.map_err(Error::file(folder))?;
        // Folders are unordered, but a resumed run needs the same order.
        files.sort();
        Ok(Self(files))
    }
}

struct Brightness(Linear);

impl Module for Brightness {
    type Batch = Labelled;
    fn training_step(&self, batch: &Labelled, step: &mut Step) -> Result<Tensor> {
        let logits = self.0.forward(&batch.input)?;
        step.log("accuracy", &logits.argmax(1)?.eq(&batch.label)?.to_dtype(DType::F32)?.mean_all()?);
        Ok(cross_entropy(&logits, &batch.label)?)
    }
}

fn main() -> Result<()> {
    // Creates sixty pictures as training data. In practice the folder exists already.
    let folder = std::env::temp_dir().join(format!("candlepower-pictures-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(Error::file(&folder))?;
    for i in 0..60 {
        let (name, shade) = if i % 2 == 0 { ("dark", 0.0..0.6f32) } else { ("light", 0.4..1.) };
        let picture = Tensor::rand(shade.start, shade.end, (1, 8, 8), &Device::Cpu)?;
        save_png(&picture, &folder.join(format!("{name}_{i}.png")))?;
    }
    let model = Model::new(|vb: VarBuilder| Ok(Brightness(linear(64, 2, vb)?)), 0, &Device::Cpu)?;
    let config = TrainerConfig { batch_size: 10, max_epochs: Some(40), ..Default::default() };
    let data = Data::new(Pictures::open(&folder)?).val(Pictures::open(&folder)?);
    let outcome =
        Trainer::new(config).optimizer(AdamConfig { lr: 0.01, ..Default::default() }).fit(&model, &data)?;
    println!("{:?}", outcome.validation);
    std::fs::remove_dir_all(&folder).map_err(Error::file(&folder))
}
