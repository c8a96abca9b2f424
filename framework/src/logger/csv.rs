//! `metrics.csv`: one row a record, one column a metric.

use std::path::{Path, PathBuf};

use super::{Logger, replace};
use crate::callback::Record;
use crate::error::{Error, Result};

/// Appends each record as one row; a metric that is new adds a column to all rows.
pub struct Csv {
    path: PathBuf,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Csv {
    /// Opens the file and drops the rows after `step`.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let header = ["step", "epoch", "split"].map(String::from).to_vec();
        let mut csv = Self { path: path.to_path_buf(), header, rows: Vec::new() };
        if path.exists() {
            let mut reader = ::csv::Reader::from_path(path).map_err(Error::content(path))?;
            csv.header = reader.headers().map_err(Error::content(path))?.iter().map(str::to_string).collect();
            let rows = reader.records().map_while(|row| row.ok());
            let rows = rows.map(|row| row.iter().map(str::to_string).collect::<Vec<_>>());
            csv.rows = rows.filter(|row| row[0].parse().is_ok_and(|at: u64| at <= step)).collect();
        }
        csv.write_all()?;
        Ok(csv)
    }

    fn write_all(&self) -> Result<()> {
        let mut writer = ::csv::WriterBuilder::new().flexible(false).from_writer(Vec::new());
        let padded = |row: &Vec<String>| {
            let missing = self.header.len() - row.len();
            row.iter().cloned().chain(std::iter::repeat_n(String::new(), missing)).collect::<Vec<_>>()
        };
        let rows = std::iter::once(self.header.clone()).chain(self.rows.iter().map(padded));
        for row in rows {
            writer.write_record(row).map_err(Error::content(&self.path))?;
        }
        let bytes = writer.into_inner().map_err(Error::content(&self.path))?;
        replace(&self.path, &bytes)
    }

    fn append(&self, row: &[String]) -> Result<()> {
        let file =
            std::fs::OpenOptions::new().append(true).open(&self.path).map_err(Error::file(&self.path))?;
        let mut writer = ::csv::Writer::from_writer(file);
        writer.write_record(row).map_err(Error::content(&self.path))?;
        writer.flush().map_err(Error::file(&self.path))
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
        let cell = |name: &String| match name.as_str() {
            "step" => record.step.to_string(),
            "epoch" => record.epoch.to_string(),
            "split" => record.split.name().to_string(),
            name => record.metrics.get(name).map(f64::to_string).unwrap_or_default(),
        };
        self.rows.push(self.header.iter().map(cell).collect());
        match self.rows.last() {
            Some(row) if self.header.len() == columns => self.append(row),
            _ => self.write_all(),
        }
    }
}
