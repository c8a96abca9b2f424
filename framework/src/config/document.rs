//! A parsed configuration file with its `--set` overrides; every value keeps its location.

use std::ops::Range;
use std::path::Path;

use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::ConfigError;
use super::wording::{in_our_words, read};
use crate::error::{Error, Result};

/// A TOML document with overrides applied to it.
///
/// Overrides are parsed as if they followed the end of the file, so a value's byte range tells whether it
/// came from the file or from which `--set`. The parsed tables borrow from the text, so they are rebuilt for
/// each section that is read; configurations are small.
pub struct Document {
    origin: String,
    text: String,
    /// Overrides as they were given, and as they are parsed.
    sets: Vec<(String, String)>,
}

/// A section that names a type (`name = "conv_lstm"`) and holds that type's own fields.
#[derive(Debug, Clone)]
pub struct Named {
    /// The type's name.
    pub name: String,
    /// The location of the name.
    pub span: Option<Range<usize>>,
    /// The path of the section in the document: `module`, or `optimizers.generator`.
    section: String,
    /// Keys of the section that are not fields of the type.
    taken: Vec<&'static str>,
}

impl Named {
    /// The section's name.
    pub(crate) fn section(&self) -> &str {
        &self.section
    }
}

impl Document {
    /// Reads a file and applies `--set section.key=value` overrides to it.
    pub fn read(path: &Path, sets: &[String]) -> Result<Self> {
        let origin = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| {
            let message = format!("cannot read this configuration file: {error}");
            ConfigError::missing(&origin, message).hint(neighbours(path))
        })?;
        Self::parse(&origin, text, sets)
    }

    /// Parses `text`; `origin` names it in errors.
    pub fn parse(origin: &str, text: String, sets: &[String]) -> Result<Self> {
        let mut document = Self { origin: origin.to_string(), text, sets: Vec::new() };
        document.root()?;
        for set in sets {
            let padded = document.pad(set)?;
            document.sets.push((set.clone(), padded));
        }
        document.root()?;
        Ok(document)
    }

    /// The file with all overrides applied.
    fn root(&self) -> Result<DeTable<'_>> {
        let mut root = self.table_of(&self.text)?;
        for (_, padded) in &self.sets {
            merge(&mut root, self.table_of(padded)?);
        }
        Ok(root)
    }

    fn table_of<'t>(&self, text: &'t str) -> Result<DeTable<'t>> {
        let table = DeTable::parse(text).map_err(|error| {
            self.error_at(Some(error.span().unwrap_or(0..0)), error.message().replace('\n', "; "))
        });
        Ok(table?.into_inner())
    }

    /// An override padded with leading spaces, so its locations come after everything before it.
    fn pad(&self, set: &str) -> Result<String> {
        let wrong = |message: &str| {
            ConfigError::at("--set", set, 0..set.len(), message.to_string()).hint(Some(
                "write it as --set section.key=value, for example --set trainer.max_steps=100".into(),
            ))
        };
        let (key, value) = set.split_once('=').ok_or_else(|| wrong("an override needs a `=`"))?;
        if !key.contains('.') {
            return Err(wrong("an override names a section and a key").into());
        }
        // Anything that is not a TOML value is a string: shells strip quotes, and paths are common.
        let quoted = || format!("{key}={}", toml::Value::String(value.trim().to_string()));
        let text = if DeTable::parse(set).is_ok() { set.to_string() } else { quoted() };
        DeTable::parse(&text).map_err(|error| wrong(error.message()))?;
        Ok(" ".repeat(self.end()) + &text)
    }

    /// Where the locations of the next override start.
    fn end(&self) -> usize {
        self.sets.iter().fold(self.text.len() + 1, |end, (set, _)| end + set.len() + 1)
    }

    /// Reads the fields of a section; a missing section is empty. `callbacks.ema` is a nested section.
    pub fn section<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.deserialize(name, &[])
    }

    /// Reads a section that names a type. `default` is the type if the section has no `name`.
    pub fn named(&self, section: &str, default: Option<&str>) -> Result<Named> {
        let mut root = self.root()?;
        let (mut fields, _) = self.table(&mut root, section)?;
        let (name, span) = match (fields.remove("name").map(|name| (name.span(), name.into_inner())), default)
        {
            (Some((span, DeValue::String(name))), _) => (name.into_owned(), Some(span)),
            (Some((span, _)), _) => {
                return Err(self.error_at(Some(span), format!("`{section}.name` is a string")).into());
            }
            (None, Some(default)) => (default.to_string(), None),
            (None, None) => {
                let message = format!("section [{section}] needs a `name`");
                return Err(self.error_at(self.locate(section, ""), message).into());
            }
        };
        Ok(Named { name, span, section: section.to_string(), taken: vec!["name"] })
    }

    /// Takes one field out of a named section, for a reader other than the named type.
    pub fn take_field<T: DeserializeOwned>(&self, named: &mut Named, key: &'static str) -> Result<Option<T>> {
        named.taken.push(key);
        let mut root = self.root()?;
        let Some(value) = self.table(&mut root, &named.section)?.0.remove(key) else { return Ok(None) };
        let span = value.span();
        read(value).map(Some).map_err(|refusal| {
            let hint = did_you_mean_in(&refusal.message);
            self.error_at(refusal.span.or(Some(span)), refusal.message).hint(hint).into()
        })
    }

    /// Reads the fields of a named section that are the type's own.
    pub fn fields<T: DeserializeOwned>(&self, named: &Named) -> Result<T> {
        self.deserialize(&named.section, &named.taken)
    }

    /// Reads a section whose name selects a variant of the enum `T`, and whose fields are that variant's.
    /// `what` describes the variants in errors.
    pub fn variant<T: DeserializeOwned>(&self, named: &Named, what: &str) -> Result<T> {
        let mut root = self.root()?;
        let (mut fields, place) = self.table(&mut root, &named.section)?;
        named.taken.iter().for_each(|key| drop(fields.remove(*key)));
        let span = place.clone().unwrap_or_default();
        let key = Spanned::new(named.span.clone().unwrap_or(span.clone()), named.name.clone().into());
        let tagged = DeTable::from_iter([(key, Spanned::new(span.clone(), DeValue::Table(fields)))]);
        read(Spanned::new(span, DeValue::Table(tagged))).map_err(|refusal| {
            let unknown = format!("unknown value `{}`", named.name);
            let (span, message) = match refusal.message.strip_prefix(&unknown) {
                Some(expected) => (named.span.clone(), format!("unknown {what} `{}`{expected}", named.name)),
                None => (refusal.span, refusal.message),
            };
            let hint = did_you_mean_in(&message);
            self.error_at(span.or(place), message).hint(hint).into()
        })
    }

    /// A section's table, removed from the document, and its location.
    fn table<'t>(&self, root: &mut DeTable<'t>, name: &str) -> Result<(DeTable<'t>, Option<Range<usize>>)> {
        let (outer, inner) = name.split_once('.').unwrap_or((name, ""));
        let Some(value) = root.remove(outer) else { return Ok((DeTable::new(), None)) };
        let span = value.span();
        match value.into_inner() {
            DeValue::Table(mut table) if !inner.is_empty() => self.table(&mut table, inner),
            DeValue::Table(table) => Ok((table, Some(span))),
            _ => Err(self.error_at(Some(span), format!("`{name}` is a section: write [{name}]")).into()),
        }
    }

    fn deserialize<T: DeserializeOwned>(&self, section: &str, without: &[&str]) -> Result<T> {
        let mut root = self.root()?;
        let (mut fields, span) = self.table(&mut root, section)?;
        without.iter().for_each(|key| drop(fields.remove(*key)));
        let value = Spanned::new(span.clone().unwrap_or_default(), DeValue::Table(fields));
        read(value).map_err(|refusal| {
            let place = span.and_then(|span| refusal.span.or(Some(span)));
            let message = match place {
                Some(_) => refusal.message,
                None => format!("section [{section}]: {}", refusal.message),
            };
            let hint = did_you_mean_in(&message);
            self.error_at(place, message).hint(hint).into()
        })
    }

    /// Whether a section is present.
    pub fn has(&self, section: &str) -> Result<bool> {
        Ok(self.table(&mut self.root()?, section)?.1.is_some())
    }

    /// The names of the sections in a section, in the order in which they are written.
    pub fn sections_in(&self, section: &str) -> Result<Vec<(String, Range<usize>)>> {
        let mut root = self.root()?;
        let (table, _) = self.table(&mut root, section)?;
        let name = |(key, _): (Spanned<std::borrow::Cow<str>>, _)| (key.get_ref().to_string(), key.span());
        let mut names: Vec<_> = table.into_iter().map(name).collect();
        names.sort_by_key(|(_, span)| span.start);
        Ok(names)
    }

    /// Refuses unknown sections.
    pub fn check_sections(&self, known: &[&str]) -> Result<()> {
        let root = self.root()?;
        match root.keys().find(|key| !known.contains(&key.get_ref().as_ref())) {
            None => Ok(()),
            Some(key) => {
                let message =
                    format!("unknown section `{}`, expected one of {}", key.get_ref(), quoted_list(known));
                let hint = did_you_mean(key.get_ref(), known);
                Err(self.error_at(Some(key.span()), message).hint(hint).into())
            }
        }
    }

    /// Adds the location in the file to an [`Error::Setting`] of a section; returns other errors unchanged.
    pub fn place(&self, section: &str, error: Error) -> Error {
        match error {
            Error::Setting { key, message } => {
                let message = format!("`{section}.{key}`: {message}");
                self.error_at(self.locate(section, &key), message).into()
            }
            other => other,
        }
    }

    /// The location of a key in a section, or of the section if the key is not present.
    fn locate(&self, section: &str, key: &str) -> Option<Range<usize>> {
        let root = self.root().ok()?;
        let mut names = section.split('.');
        let mut table = root.get(names.next()?)?;
        for name in names {
            let DeValue::Table(fields) = table.get_ref() else { return None };
            table = fields.get(name)?;
        }
        let value = match table.get_ref() {
            DeValue::Table(fields) => fields.get(key),
            _ => None,
        };
        Some(value.map_or_else(|| table.span(), Spanned::span))
    }

    /// An error at a location in this document.
    pub fn error_at(&self, span: Option<Range<usize>>, message: String) -> ConfigError {
        let Some(span) = span else { return ConfigError::missing(&self.origin, message) };
        let mut start = self.text.len() + 1;
        if span.start < start {
            return ConfigError::at(&self.origin, &self.text, span, message);
        }
        for (set, _) in &self.sets {
            let end = start + set.len() + 1;
            if span.start < end {
                let local = span.start - start..span.end.saturating_sub(start).min(set.len());
                return ConfigError::at("--set", set, local, message);
            }
            start = end;
        }
        ConfigError::missing(&self.origin, message)
    }
}

/// The table of a section's fields.
pub(crate) fn table(fields: &impl serde::Serialize) -> Result<toml::Table> {
    toml::Table::try_from(fields).map_err(|error| Error::msg(error.to_string()))
}

/// Reverses [`Document::variant`]: the table of the variant's fields and its name.
pub(crate) fn untag<T: serde::Serialize>(variant: &T) -> Result<toml::Table> {
    let tagged = toml::Value::try_from(variant).map_err(|error| Error::msg(error.to_string()))?;
    let entry = tagged.try_into::<toml::Table>().ok().and_then(|table| table.into_iter().next());
    let Some((name, fields)) = entry else { return Ok(toml::Table::new()) };
    let mut fields = fields.try_into::<toml::Table>().unwrap_or_default();
    fields.insert("name".into(), name.into());
    Ok(fields)
}

/// Merges `over` into `base`: tables key by key, other values as a whole.
fn merge<'t>(base: &mut DeTable<'t>, over: DeTable<'t>) {
    for (key, value) in over {
        match (base.get_mut(key.get_ref().as_ref()).map(Spanned::get_mut), value.get_ref()) {
            (Some(DeValue::Table(old)), DeValue::Table(new)) => merge(old, new.clone()),
            // Removed first, so the key gets its new location too.
            _ => {
                base.remove(key.get_ref().as_ref());
                base.insert(key, value);
            }
        }
    }
}

/// A list of names as "`a`, `b`, `c`".
pub(crate) fn quoted_list<S: AsRef<str>>(names: &[S]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{}`", name.as_ref())).collect();
    quoted.join(", ")
}

/// A hint with the known name that was probably meant.
pub(crate) fn did_you_mean<S: AsRef<str>>(name: &str, known: &[S]) -> Option<String> {
    // The first measure tolerates a missing ending, the second tells an extra `s` from a wrong letter.
    let begins_alike = |known: &S| strsim::jaro_winkler(name, known.as_ref());
    let likeness =
        |known: &S| begins_alike(known) + strsim::normalized_damerau_levenshtein(name, known.as_ref());
    let best = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (begins_alike(best) > 0.8).then(|| format!("did you mean `{}`?", best.as_ref()))
}

/// Like [`did_you_mean`], for serde's "unknown field `a`, expected one of `b`, `c`".
fn did_you_mean_in(message: &str) -> Option<String> {
    let (unknown, expected) = message.strip_prefix("unknown ")?.split_once(", expected ")?;
    let names =
        |text: &str| -> Vec<String> { text.split('`').skip(1).step_by(2).map(str::to_string).collect() };
    let unknown = names(unknown);
    let lightning = || in_our_words(unknown.first()?).map(str::to_string);
    did_you_mean(unknown.first()?, &names(expected)).or_else(lightning)
}

/// A hint with the configuration file next to a missing path that was probably meant.
fn neighbours(path: &Path) -> Option<String> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let entries =
        std::fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let names: Vec<String> = entries.filter(|name| name.ends_with(".toml")).collect();
    did_you_mean(path.file_name()?.to_str()?, &names)
}
