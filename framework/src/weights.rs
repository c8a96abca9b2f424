//! Weights from elsewhere: of another run, or of PyTorch's, to start a training from, or to be evaluated.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use candle_core::pickle::{PthTensors, TensorInfo};
use candle_core::{Device, Tensor, Var};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use wildmatch::WildMatch;
use zip::ZipArchive;

use crate::checkpoint::Checkpoint;
use crate::checkpoint::values::{copy, differences, listed};
use crate::error::{Error, Result};
use crate::params::Params;
use crate::run_dir::RunDir;

/// Fields of `[init]`: weights to start from instead of initial values. A run that is resumed has its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InitConfig {
    /// A run's folder, a checkpoint, a `.safetensors` file, or what PyTorch saves: `.pth`, `.pt`, `.ckpt`.
    pub weights: PathBuf,
    /// Which parameters and buffers get them, by a pattern of names, as `"encoder.*"`; the others keep their initial values.
    #[serde(default = "InitConfig::all")]
    pub params: String,
    /// Whether all of these must be there, with their shapes, and nothing else whose name fits; false: what fits is taken, and the
    /// rest is told of.
    #[serde(default = "InitConfig::strict")]
    pub strict: bool,
}

impl InitConfig {
    /// All of a model's weights.
    pub fn new(weights: impl Into<PathBuf>) -> Self {
        Self { weights: weights.into(), params: Self::all(), strict: Self::strict() }
    }

    /// Gives a model's parameters and buffers these weights.
    ///
    /// # Errors
    /// Where there are none, they cannot be read, or they do not fit.
    pub fn apply(&self, params: &Params) -> Result<()> {
        if !self.weights.exists() {
            let message = format!("{}: there is no such file", self.weights.display());
            return Err(Error::setting("weights", message));
        }
        Weights::read(&self.weights)?.give(params, self)
    }

    fn all() -> String {
        "*".into()
    }

    fn strict() -> bool {
        true
    }
}

/// Tensors by name, as a file or a checkpoint has them.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    tensors: HashMap<String, Tensor>,
}

impl Weights {
    /// Reads weights from what [`InitConfig::weights`] may name. Of a run they are those that it is evaluated with: their
    /// averages, where it keeps some. Of PyTorch's files, those that are a `state_dict`, or have one under that name, as PyTorch
    /// Lightning's have.
    pub fn read(path: &Path) -> Result<Self> {
        let tensors = match path.extension().and_then(|ending| ending.to_str()) {
            _ if path.is_dir() => Checkpoint::load(&RunDir::containing(path)?.1)?.evaluated(),
            Some("safetensors") => {
                candle_core::safetensors::load(path, &Device::Cpu).map_err(Error::content(path))?
            }
            Some("pth" | "pt" | "ckpt" | "bin") => read_pytorch(path)?,
            _ => {
                return Err(Error::msg(format!(
                    "{}: expected a run's folder, a checkpoint, or a file whose name ends in .safetensors, .pth, .pt or .ckpt",
                    path.display()
                )));
            }
        };
        Ok(Self { path: path.to_path_buf(), tensors })
    }

    /// Gives parameters and buffers their values. What all names begin with here and not there, as PyTorch Lightning's `model.`
    /// or `DistributedDataParallel`'s `module.`, is left out.
    ///
    /// # Errors
    /// As `init.strict` says, before anything is changed; and where no parameter's name fits `init.params`.
    pub fn give(&self, params: &Params, init: &InitConfig) -> Result<()> {
        let pattern = WildMatch::new(&init.params);
        let all = params.state_dict();
        let wanted: Vec<(String, Var)> =
            all.iter().filter(|(name, _)| pattern.matches(name)).cloned().collect();
        if wanted.is_empty() {
            let message = format!("`{}` fits no parameter of the model", init.params);
            return Err(Error::setting("params", message));
        }
        let prefix = self.prefix(&wanted);
        let known =
            self.tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)));
        let known: HashMap<String, Tensor> = known
            .filter(|(name, _)| pattern.matches(name))
            .map(|(name, tensor)| (name.to_string(), tensor.clone()))
            .collect();
        let differences = differences(&known, &wanted);
        let taken: Vec<_> = wanted.into_iter().filter(|(name, var)| fits(&known, name, var)).collect();
        let source = self.path.display();
        if !differences.is_empty() {
            let listed = listed(differences);
            if init.strict || taken.is_empty() {
                let message = format!(
                    "{source} does not fit the model:\n  {listed}\n\
                     in [init], `params` can name a part of the model, and `strict = false` takes what fits"
                );
                return Err(Error::setting("weights", message));
            }
            tracing::warn!("{source} does not fit the model everywhere:\n  {listed}");
        }
        copy(&known, &taken)?;
        params.publish()?;
        tracing::info!("{} of the model's {} tensors start from {source}", taken.len(), all.len());
        Ok(())
    }

    /// What stands before most of these names here; nothing, where that is as good.
    fn prefix(&self, wanted: &[(String, Var)]) -> &str {
        let mut found: HashMap<&str, usize> = HashMap::from([("", 0)]);
        for name in self.tensors.keys() {
            for (wanted, _) in wanted {
                if let Some(prefix) = name.strip_suffix(wanted.as_str())
                    && (prefix.is_empty() || prefix.ends_with('.'))
                {
                    *found.entry(prefix).or_default() += 1;
                }
            }
        }
        let best = found
            .into_iter()
            .max_by_key(|(prefix, count)| (*count, std::cmp::Reverse((prefix.len(), *prefix))));
        best.map_or("", |(prefix, _)| prefix)
    }
}

/// The tensors of a `state_dict` that PyTorch saved, by itself or within something else.
fn read_pytorch(path: &Path) -> Result<HashMap<String, Tensor>> {
    let explain = |error: candle_core::Error| {
        Error::msg(format!(
            "{}: {error}\nin Python, `safetensors.torch.save_file(state_dict, \"weights.safetensors\")` writes a file that can \
             always be read",
            path.display()
        ))
    };
    let mut all = Err(candle_core::Error::Msg("there is no `state_dict` in it".into()));
    for key in [Some("state_dict"), Some("model_state_dict"), Some("model"), None] {
        match PthTensors::new(path, key) {
            Ok(tensors) if !tensors.tensor_infos().is_empty() => {
                all = Ok(tensors);
                break;
            }
            Ok(_) => {}
            // Of something else, as that it is no archive; where only the key is missing, the next one may be there.
            Err(error) if key.is_none() => all = Err(error),
            Err(_) => {}
        }
    }
    let all = all.map_err(explain)?;
    let tensor = |(name, info): (&String, &TensorInfo)| {
        let tensor = match info.layout.is_contiguous() {
            true => all.get(name)?,
            false => Some(strided(path, info)?),
        };
        Ok(tensor.map(|tensor| (name.clone(), tensor)))
    };
    let tensors = all.tensor_infos().iter().map(tensor).collect::<candle_core::Result<Vec<_>>>();
    Ok(tensors.map_err(explain)?.into_iter().flatten().collect())
}

/// A tensor whose values do not lie in the order of its axes, as the weights of a network that is channels last: candle reads the
/// others.
fn strided(path: &Path, info: &TensorInfo) -> candle_core::Result<Tensor> {
    let mut storage = Vec::new();
    let failed = |error: &dyn std::fmt::Display| candle_core::Error::Msg(error.to_string());
    let file = BufReader::new(File::open(path)?);
    let mut archive = ZipArchive::new(file).map_err(|error| failed(&error))?;
    archive.by_name(&info.path).map_err(|error| failed(&error))?.read_to_end(&mut storage)?;
    let size = info.dtype.size_in_bytes();
    let storage = Tensor::from_raw_buffer(&storage, info.dtype, &[storage.len() / size], &Device::Cpu)?;
    // Candle counts the offset in bytes.
    let mut places = vec![(info.layout.start_offset() / size) as u32];
    for (len, stride) in info.layout.dims().iter().zip(info.layout.stride()) {
        let along = |place: u32| (0..*len).map(move |i| place + (i * stride) as u32);
        places = places.into_iter().flat_map(along).collect();
    }
    storage.index_select(&Tensor::new(places, &Device::Cpu)?, 0)?.reshape(info.layout.shape())
}

/// Whether there is a tensor of this name and shape.
fn fits(known: &HashMap<String, Tensor>, name: &str, var: &Var) -> bool {
    known.get(name).is_some_and(|tensor| tensor.shape() == var.shape())
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use candle_nn::Init;

    use super::*;

    /// A model of `encoder.w` (2), `encoder.b` (1) and `head.w` (2), all ones.
    fn model() -> Params {
        let params = Params::new(0, DType::F32, &Device::Cpu);
        let vb = params.var_builder();
        for (len, name) in [(2, "encoder.w"), (1, "encoder.b"), (2, "head.w")] {
            vb.get_with_hints(len, name, Init::Const(1.)).unwrap();
        }
        params
    }

    fn values(params: &Params) -> Vec<f32> {
        params.vars().iter().flat_map(|(_, var)| var.to_vec1::<f32>().unwrap()).collect()
    }

    fn weights(tensors: &[(&str, &[f32])]) -> Weights {
        let tensor =
            |(name, values): &(&str, &[f32])| (name.to_string(), Tensor::new(*values, &Device::Cpu).unwrap());
        Weights { path: "file".into(), tensors: tensors.iter().map(tensor).collect() }
    }

    const WHOLE: [(&str, &[f32]); 3] =
        [("encoder.w", &[2., 3.]), ("encoder.b", &[4.]), ("head.w", &[5., 6.])];

    #[test]
    fn all_a_part_or_what_fits_is_taken() {
        let give = |tensors: &[(&str, &[f32])], params: &str, strict: bool| {
            let model = model();
            let init = InitConfig { params: params.into(), strict, ..InitConfig::new("file") };
            weights(tensors).give(&model, &init).map(|()| values(&model)).map_err(|error| {
                // Nothing has changed.
                assert_eq!(values(&model), [1.; 5]);
                error.to_string()
            })
        };
        assert_eq!(give(&WHOLE, "*", true).unwrap(), [2., 3., 4., 5., 6.]);
        assert_eq!(give(&WHOLE, "encoder.*", true).unwrap(), [2., 3., 4., 1., 1.]);
        let other = [WHOLE[0], WHOLE[1], ("head.w", &[5., 6., 7.][..]), ("head.b", &[8.])];
        // What the pattern leaves out may differ.
        assert_eq!(give(&other, "encoder.*", true).unwrap(), [2., 3., 4., 1., 1.]);
        assert_eq!(give(&other, "*", false).unwrap(), [2., 3., 4., 1., 1.]);
        let error = give(&other, "*", true).unwrap_err();
        let expected = "file does not fit the model:\n  `head.w` has shape [3], the model needs [2]\n  \
                        `head.b` is not in the model\n";
        assert!(error.contains(expected), "{error}");
        assert!(give(&WHOLE[..2], "*", true).unwrap_err().contains("`head.w` is missing"));
        assert!(give(&WHOLE, "decoder.*", true).unwrap_err().contains("`decoder.*` fits no parameter"));
        // Nothing at all fits: that is no start, strict or not.
        assert!(give(&[("w", &[1.])], "*", false).unwrap_err().contains("does not fit"));
    }

    #[test]
    fn what_stands_before_all_names_is_left_out() {
        let names = ["model.net.encoder.w", "model.net.encoder.b", "model.net.head.w"];
        let mut tensors: Vec<(&str, &[f32])> =
            names.iter().zip(WHOLE).map(|(name, (_, values))| (*name, values)).collect();
        // Another thing that the file holds.
        tensors.push(("criterion.weight", &[9.]));
        let model = model();
        weights(&tensors).give(&model, &InitConfig::new("file")).unwrap();
        assert_eq!(values(&model), [2., 3., 4., 5., 6.]);
    }
}
