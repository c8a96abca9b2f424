//! Named tensors, and the variables that they are for.

use std::collections::HashMap;

use candle_core::{Tensor, Var};

use crate::error::Result;

/// The differences in names and shapes between known tensors and wanted variables, one per line.
pub(crate) fn differences(known: &HashMap<String, Tensor>, wanted: &[(String, Var)]) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, var) in wanted {
        match known.get(name) {
            None => lines.push(format!("`{name}` is missing")),
            Some(tensor) if tensor.shape() != var.shape() => lines.push(format!(
                "`{name}` has shape {:?}, the model needs {:?}",
                tensor.dims(),
                var.dims()
            )),
            Some(_) => {}
        }
    }
    let is_unknown = |name: &&String| wanted.iter().all(|(wanted, _)| wanted != *name);
    let mut unknown: Vec<&String> = known.keys().filter(is_unknown).collect();
    unknown.sort();
    lines.extend(unknown.iter().map(|name| format!("`{name}` is not in the model")));
    lines
}

/// The first of these lines, and how many more there are.
pub(crate) fn listed(mut lines: Vec<String>) -> String {
    const SHOWN: usize = 6;
    if let Some(more) = lines.len().checked_sub(SHOWN).filter(|more| *more > 0) {
        lines.truncate(SHOWN);
        lines.push(format!("and {more} more"));
    }
    lines.join("\n  ")
}

/// Copies tensors into the variables with their names, converted to the variables' dtype.
pub(crate) fn copy(known: &HashMap<String, Tensor>, vars: &[(String, Var)]) -> Result<()> {
    for (name, var) in vars {
        if let Some(tensor) = known.get(name) {
            var.set(&tensor.to_dtype(var.dtype())?.to_device(var.device())?)?;
        }
    }
    Ok(())
}
