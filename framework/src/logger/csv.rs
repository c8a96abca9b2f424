//! `metrics.csv`: one row per record, one column per metric.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::Logger;
use crate::atomic_file::write_atomic;
use crate::callback::Record;
use crate::error::{Error, Result};

/// Appends each record as a row. A new metric adds a column to all rows.
pub struct Csv {
    path: PathBuf,
    file: File,
    header: Vec<String>,
}

impl Csv {
    /// Opens the file and drops the rows after `step`.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let (mut header, mut rows) = (["step", "epoch", "split"].map(String::from).to_vec(), Vec::new());
        if path.exists() {
            (header, rows) = read(path)?;
            rows.retain(|row| row[0].parse().is_ok_and(|at: u64| at <= step));
        }
        let file = rewrite(path, &header, &rows)?;
        Ok(Self { path: path.to_path_buf(), file, header })
    }
}

impl Logger for Csv {
    fn log(&mut self, record: &Record) -> Result<()> {
        let columns = self.header.len();
        for name in record.metrics.keys() {
            if !self.header.contains(name) {
                self.header.push(name.clone());
            }
        }
        if self.header.len() > columns {
            self.file = rewrite(&self.path, &self.header, &read(&self.path)?.1)?;
        }
        let cell = |name: &String| match name.as_str() {
            "step" => record.step.to_string(),
            "epoch" => record.epoch.to_string(),
            "split" => record.split.name().to_string(),
            name => record.metrics.get(name).map(f64::to_string).unwrap_or_default(),
        };
        let row: Vec<String> = self.header.iter().map(cell).collect();
        let line = lines(&self.path, [&row], row.len())?;
        self.file.write_all(&line).map_err(Error::file(&self.path))
    }
}

/// Reads the header and rows of a file, without a truncated last line.
fn read(path: &Path) -> Result<(Vec<String>, Vec<Vec<String>>)> {
    let cells = |row: &::csv::StringRecord| row.iter().map(str::to_string).collect();
    let mut reader = ::csv::Reader::from_path(path).map_err(Error::content(path))?;
    let header = cells(reader.headers().map_err(Error::content(path))?);
    Ok((header, reader.records().map_while(|row| row.ok()).map(|row| cells(&row)).collect()))
}

/// Rewrites the whole file and opens it for appending.
fn rewrite(path: &Path, header: &Vec<String>, rows: &[Vec<String>]) -> Result<File> {
    write_atomic(path, &lines(path, std::iter::once(header).chain(rows), header.len())?)?;
    OpenOptions::new().append(true).open(path).map_err(Error::file(path))
}

/// Formats rows with `cells` cells each; shorter rows are padded with empty cells.
fn lines<'r>(path: &Path, rows: impl IntoIterator<Item = &'r Vec<String>>, cells: usize) -> Result<Vec<u8>> {
    let mut writer = ::csv::Writer::from_writer(Vec::new());
    for row in rows {
        let missing = std::iter::repeat_n("", cells - row.len());
        let row = row.iter().map(String::as_str).chain(missing);
        writer.write_record(row).map_err(Error::content(path))?;
    }
    writer.into_inner().map_err(Error::content(path))
}
