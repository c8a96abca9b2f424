//! Weights from other runs or from PyTorch files, to start training from or to evaluate.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
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

/// The `[init]` section: weights to start from instead of initial values. A resumed run ignores it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InitConfig {
    /// A run's folder, a checkpoint, a `.safetensors` file, or a PyTorch file: `.pth`, `.pt`, `.ckpt`,
    /// `.bin`.
    pub weights: PathBuf,
    /// The parameters and buffers to load, as a name pattern such as `"encoder.*"`; the others keep their
    /// initial values.
    #[serde(default = "InitConfig::all")]
    pub params: String,
    /// A prefix of the names in the file that the model's names do not have, such as PyTorch Lightning's
    /// `"model."`. Default: the prefix that most of the model's names have in the file, if it is unambiguous.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// Whether all selected tensors must be present with their shapes, and no other tensor may match
    /// `params`. If false, tensors that fit are loaded and the rest is reported in a warning.
    #[serde(default = "InitConfig::strict")]
    pub strict: bool,
}

impl InitConfig {
    /// Loads all of a model's weights from `weights`.
    pub fn new(weights: impl Into<PathBuf>) -> Self {
        Self { weights: weights.into(), params: Self::all(), prefix: None, strict: Self::strict() }
    }

    /// Loads these weights into a model's parameters and buffers.
    ///
    /// # Errors
    /// If `params` matches nothing, or the weights cannot be read or do not fit. The model is then unchanged.
    pub fn apply(&self, params: &Params) -> Result<()> {
        let pattern = WildMatch::new(&self.params);
        let all = params.state_dict();
        let wanted: Vec<_> = all.iter().filter(|(name, _)| pattern.matches(name)).cloned().collect();
        if wanted.is_empty() {
            return Err(Error::setting(
                "params",
                format!("`{}` matches no parameter of the model", self.params),
            ));
        }
        let in_setting = |error: Error| Error::setting("weights", error.to_string());
        let weights = Weights::read(&self.weights).map_err(in_setting)?;
        let found = weights
            .named_as(&all, self.prefix.as_deref())
            .map_err(|error| Error::setting("weights", format!("{error}: choose one with `prefix`")))?;
        let known = found.tensors.into_iter().filter(|(name, _)| pattern.matches(name)).collect();
        let differences = differences(&known, &wanted);
        let taken: Vec<_> = wanted.into_iter().filter(|(name, var)| fits(&known, name, var)).collect();
        let source = format!("{}{}", self.weights.display(), found.without);
        if !differences.is_empty() {
            let listed = listed(differences);
            if self.strict || taken.is_empty() {
                let message = format!(
                    "{source} does not fit the model:\n  {listed}\n\
                     `params` selects a part of the model, and `strict = false` takes whatever fits"
                );
                return Err(Error::setting("weights", message));
            }
            tracing::warn!("{source} fits only a part of the model:\n  {listed}");
        }
        copy(&known, &taken)?;
        params.publish()?;
        params.roll_back_buffers()?;
        tracing::info!("{} of the model's {} tensors start from {source}", taken.len(), all.len());
        Ok(())
    }

    fn all() -> String {
        "*".into()
    }

    fn strict() -> bool {
        true
    }
}

/// Tensors by name, as stored in a file or a checkpoint.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    tensors: HashMap<String, Tensor>,
}

/// Tensors by their names in a model.
struct Found {
    tensors: HashMap<String, Tensor>,
    /// For messages: the prefix removed from the names.
    without: String,
}

impl Weights {
    /// Reads weights from any source that [`InitConfig::weights`] allows. From a run, reads the weights that
    /// it is evaluated with: the averages, if it keeps any. A PyTorch file must be a `state_dict`, or contain
    /// one as `state_dict` (like PyTorch Lightning's), `model_state_dict` or `model`.
    pub fn read(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::msg(format!("{}: no such file or folder", path.display())));
        }
        let tensors = match path.extension().and_then(|ending| ending.to_str()) {
            _ if path.is_dir() => Checkpoint::load(&RunDir::containing(path)?.1)?.evaluated(),
            Some("safetensors") => read_safetensors(path)?,
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

    /// Loads the weights into all of a model's parameters and buffers.
    ///
    /// # Errors
    /// If a tensor is missing, superfluous or of another shape. The model is then unchanged.
    pub fn give(&self, params: &Params) -> Result<()> {
        let wanted = params.state_dict();
        let found = self.named_as(&wanted, None);
        let known = found.map_err(|error| Error::msg(format!("{error}: keep one of them")))?.tensors;
        let differences = differences(&known, &wanted);
        if !differences.is_empty() {
            return Err(Error::msg(format!(
                "{} does not fit the model: is [module] what these weights were trained with?\n  {}",
                self.path.display(),
                listed(differences)
            )));
        }
        copy(&known, &wanted)?;
        params.publish()?;
        params.roll_back_buffers()
    }

    /// The tensors whose names begin with `prefix`, with the prefix removed. Without `prefix`, uses the one
    /// that most of the wanted names have here, such as PyTorch Lightning's `model.` or
    /// `DistributedDataParallel`'s `module.`.
    fn named_as(&self, wanted: &[(String, Var)], prefix: Option<&str>) -> Result<Found> {
        let prefix = prefix.map_or_else(|| self.prefix(wanted), Ok)?;
        let named = self.tensors.iter().filter_map(|(name, x)| Some((name.strip_prefix(prefix)?, x)));
        let tensors = named.map(|(name, tensor)| (name.to_string(), tensor.clone())).collect();
        let without = if prefix.is_empty() { String::new() } else { format!(" (without `{prefix}`)") };
        Ok(Found { tensors, without })
    }

    /// The prefix that most of these names have here; the empty prefix if it fits equally well. Fails if
    /// ambiguous.
    fn prefix(&self, wanted: &[(String, Var)]) -> Result<&str> {
        let mut found: BTreeMap<&str, usize> = BTreeMap::from([("", 0)]);
        for name in self.tensors.keys() {
            for (wanted, _) in wanted {
                if let Some(prefix) = name.strip_suffix(wanted.as_str())
                    && (prefix.is_empty() || prefix.ends_with('.'))
                {
                    *found.entry(prefix).or_default() += 1;
                }
            }
        }
        let most = found.values().copied().max().unwrap_or(0);
        let best: Vec<&str> =
            found.into_iter().filter(|(_, n)| *n == most).map(|(prefix, _)| prefix).collect();
        match best[..] {
            [prefix] | [prefix @ "", ..] => Ok(prefix),
            _ => Err(Error::msg(format!(
                "{}: several prefixes match the model: `{}`",
                self.path.display(),
                best.join("` and `")
            ))),
        }
    }
}

fn read_safetensors(path: &Path) -> Result<HashMap<String, Tensor>> {
    candle_core::safetensors::load(path, &Device::Cpu).map_err(|error| {
        let what = what_else(path).unwrap_or_else(|| {
            let said = first_line(&error);
            let is_whole = said.contains("unsupported safetensor dtype");
            if is_whole { said } else { format!("not a complete safetensors file: {said}") }
        });
        Error::msg(format!("{}: {what}", path.display()))
    })
}

/// The first line of candle's error, without a backtrace.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

/// Describes a file by its first bytes, if they contradict its extension.
fn what_else(path: &Path) -> Option<String> {
    const ARCHIVE: &[u8] = b"PK";
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(64).read_to_end(&mut bytes).ok()?;
    let is_pytorch = path.extension().is_none_or(|ending| ending != "safetensors");
    // Eight bytes of length, which may have any value, then JSON.
    let is_safetensors = bytes.get(8) == Some(&b'{');
    Some(match &bytes[..] {
        [] => "the file is empty".into(),
        bytes if bytes.starts_with(b"version https://git-lfs") => {
            "this is a git-lfs pointer: `git lfs pull` fetches the file".into()
        }
        _ if is_safetensors && is_pytorch => {
            "this is a safetensors file: rename it to end in .safetensors".into()
        }
        bytes if is_safetensors || bytes.starts_with(ARCHIVE) && is_pytorch => return None,
        bytes if bytes.starts_with(ARCHIVE) => "this is a PyTorch file: rename it to end in .pth".into(),
        [0x80, 2, ..] => {
            "this file was saved by PyTorch before 1.6: in Python, `torch.save(torch.load(file), file)` converts it".into()
        }
        _ => "this is not a weights file".into(),
    })
}

/// The tensors of a `state_dict` saved by PyTorch, on its own or inside another object.
fn read_pytorch(path: &Path) -> Result<HashMap<String, Tensor>> {
    let fail = |what: String| Error::msg(format!("{}: {what}", path.display()));
    if let Some(what) = what_else(path) {
        return Err(fail(what));
    }
    let explain = |error: candle_core::Error| {
        fail(format!(
            "{}\nin Python, `safetensors.torch.save_file(state_dict, \"weights.safetensors\")` writes a file that can always be \
             read",
            first_line(&error)
        ))
    };
    // Candle may panic on archives that PyTorch did not write.
    let tensors = catch_unwind(AssertUnwindSafe(|| read_archive(path)));
    tensors
        .unwrap_or_else(|_| Err(candle_core::Error::Msg("it is not in PyTorch's format".into())))
        .map_err(explain)
}

fn read_archive(path: &Path) -> candle_core::Result<HashMap<String, Tensor>> {
    let nothing = "it contains no float tensors, as `torch.save(model.state_dict(), file)` writes them";
    let mut all = Err(candle_core::Error::Msg(nothing.into()));
    for key in [Some("state_dict"), Some("model_state_dict"), Some("model"), None] {
        match PthTensors::new(path, key) {
            Ok(tensors) if !tensors.tensor_infos().is_empty() => {
                all = Ok(tensors);
                break;
            }
            Ok(_) => {}
            // Errors such as a truncated file are reported by the last attempt, without a key; after a
            // missing key, the next one is tried.
            Err(error) if key.is_none() => all = Err(error),
            Err(_) => {}
        }
    }
    let mut archive = ZipArchive::new(BufReader::new(File::open(path)?)).map_err(candle_core::Error::wrap)?;
    let tensor = |(name, info): (&String, &TensorInfo)| {
        let tensor = read_tensor(&mut archive, info);
        let named =
            |error: candle_core::Error| candle_core::Error::Msg(format!("`{name}`: {}", first_line(&error)));
        Ok((name.clone(), tensor.map_err(named)?))
    };
    all?.tensor_infos().iter().map(tensor).collect()
}

/// Reads a tensor of an archive in any memory layout; channels-last networks are not stored in row-major
/// order.
fn read_tensor(archive: &mut ZipArchive<BufReader<File>>, info: &TensorInfo) -> candle_core::Result<Tensor> {
    let mut storage = Vec::new();
    archive.by_name(&info.path).map_err(candle_core::Error::wrap)?.read_to_end(&mut storage)?;
    let (size, layout) = (info.dtype.size_in_bytes(), &info.layout);
    let (len, shape) = (storage.len() / size, layout.shape());
    // Candle counts the offset in bytes.
    let first = layout.start_offset() / size;
    let last =
        shape.dims().iter().zip(layout.stride()).try_fold(first, |last, (dim, stride)| {
            last.checked_add(dim.saturating_sub(1).checked_mul(*stride)?)
        });
    let count = shape.dims().iter().try_fold(1usize, |count, dim| count.checked_mul(*dim));
    let fits = last.is_some_and(|last| last < len) && count.is_some_and(|count| count <= len);
    if !(fits || count == Some(0)) || !storage.len().is_multiple_of(size) {
        candle_core::bail!("its sizes {:?} do not match the {len} values stored for it", shape.dims());
    }
    let storage = Tensor::from_raw_buffer(&storage, info.dtype, &[len], &Device::Cpu)?;
    if layout.is_contiguous() {
        return storage.narrow(0, first, shape.elem_count())?.reshape(shape);
    }
    let mut places = vec![first as i64];
    for (dim, stride) in shape.dims().iter().zip(layout.stride()) {
        let along = |place: i64| (0..*dim).map(move |i| place + (i * stride) as i64);
        places = places.into_iter().flat_map(along).collect();
    }
    storage.index_select(&Tensor::new(places, &Device::Cpu)?, 0)?.reshape(shape)
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

    /// Saves these tensors and starts a model from them with the settings of `init`. Returns its values, or
    /// the error.
    fn start(
        tensors: &[(&str, &[f32])],
        init: impl Fn(InitConfig) -> InitConfig,
    ) -> Result<Vec<f32>, String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.safetensors");
        let tensor =
            |(name, values): &(&str, &[f32])| (name.to_string(), Tensor::new(*values, &Device::Cpu).unwrap());
        let tensors: HashMap<String, Tensor> = tensors.iter().map(tensor).collect();
        candle_core::safetensors::save(&tensors, &file).unwrap();
        let model = model();
        init(InitConfig::new(&file)).apply(&model).map(|()| values(&model)).map_err(|error| {
            assert_eq!(values(&model), [1.; 5], "something has changed");
            error.to_string()
        })
    }

    const WHOLE: [(&str, &[f32]); 3] =
        [("encoder.w", &[2., 3.]), ("encoder.b", &[4.]), ("head.w", &[5., 6.])];

    #[test]
    fn all_a_part_or_what_fits_is_taken() {
        let start = |tensors: &[(&str, &[f32])], params: &str, strict: bool| {
            start(tensors, |init| InitConfig { params: params.into(), strict, ..init })
        };
        assert_eq!(start(&WHOLE, "*", true).unwrap(), [2., 3., 4., 5., 6.]);
        assert_eq!(start(&WHOLE, "encoder.*", true).unwrap(), [2., 3., 4., 1., 1.]);
        let other = [WHOLE[0], WHOLE[1], ("head.w", &[5., 6., 7.][..]), ("head.b", &[8.])];
        // Tensors that the pattern excludes may differ.
        assert_eq!(start(&other, "encoder.*", true).unwrap(), [2., 3., 4., 1., 1.]);
        assert_eq!(start(&other, "*", false).unwrap(), [2., 3., 4., 1., 1.]);
        let error = start(&other, "*", true).unwrap_err();
        let expected = "a.safetensors does not fit the model:\n  `head.w` has shape [3], the model needs [2]\n  \
                        `head.b` is not in the model\n";
        assert!(error.contains(expected), "{error}");
        assert!(start(&WHOLE[..2], "*", true).unwrap_err().contains("`head.w` is missing"));
        assert!(start(&WHOLE, "decoder.*", true).unwrap_err().contains("`decoder.*` matches no parameter"));
        // If nothing fits, it is an error even when not strict.
        assert!(start(&[("w", &[1.])], "*", false).unwrap_err().contains("does not fit"));
    }

    #[test]
    fn what_stands_before_all_names_is_left_out() {
        let named = |prefix: &str, factor: f32| -> Vec<(String, Vec<f32>)> {
            let scaled = |values: &[f32]| values.iter().map(|x| x * factor).collect();
            WHOLE.iter().map(|(name, values)| (format!("{prefix}{name}"), scaled(values))).collect()
        };
        let start = |tensors: &[(String, Vec<f32>)], prefix: Option<&str>| {
            let tensors: Vec<(&str, &[f32])> = tensors.iter().map(|(name, x)| (&name[..], &x[..])).collect();
            start(&tensors, |init| InitConfig { prefix: prefix.map(String::from), ..init })
        };
        // Next to other contents of the file.
        let lightning = [named("model.net.", 1.), vec![("criterion.weight".into(), vec![9.])]].concat();
        assert_eq!(start(&lightning, None).unwrap(), [2., 3., 4., 5., 6.]);
        let twice = [named("net.", 1.), named("ema.", 2.)].concat();
        let error = start(&twice, None).unwrap_err();
        assert!(error.contains("several prefixes match the model: `ema.` and `net.`: choose one"), "{error}");
        assert_eq!(start(&twice, Some("net.")).unwrap(), [2., 3., 4., 5., 6.]);
        assert_eq!(start(&twice, Some("ema.")).unwrap(), [4., 6., 8., 10., 12.]);
        assert!(start(&twice, Some("other.")).unwrap_err().contains("`encoder.w` is missing"));
        // A single name could have several prefixes; all names together have only one.
        let more = [named("model.", 1.), vec![("model.layer.head.w".into(), vec![9., 9.])]].concat();
        let tensors: Vec<(&str, &[f32])> = more.iter().map(|(name, x)| (&name[..], &x[..])).collect();
        let part = super::tests::start(&tensors, |init| InitConfig { params: "head.*".into(), ..init });
        assert_eq!(part.unwrap(), [1., 1., 1., 5., 6.]);
    }
}
