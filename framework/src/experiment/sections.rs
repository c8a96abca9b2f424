//! The sections that configure training, read from a document and written back to tables.

use indexmap::IndexSet;
use serde::de::DeserializeOwned;

use crate::config::{Document, Registry, table, untag};
use crate::error::{Error, Result};
use crate::optim::{AverageConfig, NamedOptimizer, OptimizerConfig, ParamGroup};
use crate::schedule::{Interval, Plateau, Schedule};

/// Reads a section and checks its values.
pub(super) fn checked<T: DeserializeOwned>(
    document: &Document,
    section: &str,
    check: fn(&T) -> Result<()>,
) -> Result<T> {
    let config: T = document.section(section)?;
    check(&config).map_err(|error| document.place(section, error))?;
    Ok(config)
}

/// The name of the only optimizer, which is not shown to modules or in logs.
const ONLY: &str = "optimizer";

/// The optimizers: the one in `[optimizer]`, or those in `[optimizers.*]`.
pub(super) fn turns(document: &Document, registry: &Registry) -> Result<Vec<NamedOptimizer>> {
    let several = document.sections_in("optimizers")?;
    let Some((_, span)) = several.first() else {
        let only = turn(document, registry, ONLY.into(), "optimizer", Some("adam"))?;
        return Ok(vec![NamedOptimizer { params: "*".into(), schedule: None, ..only }]);
    };
    if document.has("optimizer")? {
        let message = "either [optimizer] or [optimizers.*]: a run has one optimizer, or several with names";
        return Err(document.error_at(Some(span.clone()), message.into()).into());
    }
    let turn = |(name, _): (String, _)| {
        let section = format!("optimizers.{name}");
        turn(document, registry, name, &section, None)
    };
    let turns: Vec<NamedOptimizer> = several.into_iter().map(turn).collect::<Result<_>>()?;
    let section = format!("optimizers.{}", turns[0].name);
    NamedOptimizer::check_together(&turns).map_err(|error| document.place(&section, error))?;
    Ok(turns)
}

fn turn(
    document: &Document,
    registry: &Registry,
    name: String,
    section: &str,
    default: Option<&str>,
) -> Result<NamedOptimizer> {
    let mut named = document.named(section, default)?;
    let groups: Option<Vec<ParamGroup>> = document.take_field(&mut named, "groups")?;
    let (params, every, schedule_table): (Option<String>, Option<u64>, Option<toml::Table>) = match default {
        Some(_) => (None, None, None),
        None => (
            document.take_field(&mut named, "params")?,
            document.take_field(&mut named, "every")?,
            document.take_field(&mut named, "schedule")?,
        ),
    };
    let Some(params) = params.or(default.map(|_| "*".into())) else {
        let message =
            format!("[{section}] needs `params`: a pattern of names, for example params = \"{name}.*\"");
        return Err(document.error_at(named.span, message).into());
    };
    let schedule = match schedule_table {
        None => None,
        Some(_) => {
            let section = format!("{section}.schedule");
            let (schedule, plateau) = schedule(document, &section)?;
            if plateau.is_some() {
                let message = "a plateau applies to all optimizers: write [schedule.plateau]";
                return Err(document.place(&section, Error::setting("plateau", message)));
            }
            Some(schedule)
        }
    };
    let optimizer = registry.read_optimizer(document, &named)?;
    let (groups, every) = (groups.unwrap_or_default(), every.unwrap_or(1));
    let turn = NamedOptimizer { name, params, optimizer, groups, schedule, every };
    turn.check().map_err(|error| document.place(section, error))?;
    Ok(turn)
}

/// Reads a schedule's section, with its plateau if it has one.
pub(super) fn schedule(document: &Document, section: &str) -> Result<(Schedule, Option<Plateau>)> {
    let mut named = document.named(section, Some("constant"))?;
    let plateau: Option<Plateau> = document.take_field(&mut named, "plateau")?;
    let interval: Option<Interval> = document.take_field(&mut named, "interval")?;
    let mut schedule: Schedule = document.variant(&named, "schedule")?;
    if interval == Some(Interval::Epoch) {
        schedule = schedule.per_epoch();
    }
    schedule.check().map_err(|error| document.place(section, error))?;
    if let Some(plateau) = &plateau {
        plateau.check(&schedule).map_err(|error| document.place(&format!("{section}.plateau"), error))?;
    }
    Ok((schedule, plateau))
}

/// The fields of a schedule's section.
pub(super) fn schedule_table(schedule: &Schedule) -> Result<toml::Table> {
    let Schedule::PerEpoch(of) = schedule else { return untag(schedule) };
    let mut fields = untag(of)?;
    fields.insert("interval".into(), "epoch".into());
    Ok(fields)
}

pub(super) fn average(document: &Document) -> Result<Option<AverageConfig>> {
    if !document.has("average")? {
        return Ok(None);
    }
    let average: AverageConfig = document.variant(&document.named("average", None)?, "average")?;
    average.check().map_err(|error| document.place("average", error))?;
    Ok(Some(average))
}

/// The section of the optimizers, and its name.
pub(super) fn optimizers_table(turns: &[NamedOptimizer]) -> Result<(&'static str, toml::Table)> {
    if let [only] = turns
        && only.name == ONLY
    {
        return Ok(("optimizer", optimizer_table(only)?));
    }
    let mut optimizers = toml::Table::new();
    for turn in turns {
        let mut fields = optimizer_table(turn)?;
        fields.insert("params".into(), turn.params.clone().into());
        if turn.every > 1 {
            fields.insert("every".into(), toml::Value::Integer(turn.every as i64));
        }
        if let Some(schedule) = &turn.schedule {
            fields.insert("schedule".into(), schedule_table(schedule)?.into());
        }
        optimizers.insert(turn.name.clone(), fields.into());
    }
    Ok(("optimizers", optimizers))
}

fn optimizer_table(turn: &NamedOptimizer) -> Result<toml::Table> {
    let mut fields = match &turn.optimizer {
        OptimizerConfig::Custom(own) => own.table()?,
        ours => untag(ours)?,
    };
    if !turn.groups.is_empty() {
        let groups = turn.groups.iter().map(|group| Ok(table(group)?.into()));
        fields.insert("groups".into(), groups.collect::<Result<Vec<toml::Value>>>()?.into());
    }
    Ok(fields)
}

/// The settings that differ between `old` and `new`, one per line: `trainer.batch_size: 8, was 16`.
pub(super) fn differences(old: &toml::Table, new: &toml::Table, path: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let order = |table: &toml::Table| table.keys().cloned().collect::<Vec<_>>();
    // Optimizers and callbacks run in the order of their sections.
    if ["optimizers", "callbacks"].contains(&path)
        && old.len() == new.len()
        && old.keys().all(|key| new.contains_key(key))
        && order(old) != order(new)
    {
        lines.push(format!("{path}: in the order {}, was {}", order(new).join(", "), order(old).join(", ")));
    }
    let keys: IndexSet<&String> = old.keys().chain(new.keys()).collect();
    for key in keys {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (old.get(key), new.get(key)) {
            (Some(toml::Value::Table(old)), Some(toml::Value::Table(new))) => {
                lines.extend(differences(old, new, &path));
            }
            (Some(old), Some(new)) if old == new => {}
            (Some(old), Some(new)) => lines.push(format!("{path}: {new}, was {old}")),
            (None, Some(new)) => lines.push(format!("{path}: {new}, was not set")),
            (Some(old), None) => lines.push(format!("{path}: not set, was {old}")),
            (None, None) => {}
        }
    }
    lines
}
