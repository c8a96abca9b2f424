//! Writes a picture of the built-in digits: `cargo run -p candlepower-datasets --example contact_sheet`.

use candlepower::picture::save_png;
use candlepower::prelude::*;
use candlepower_datasets::digits::{Config, Digits};

fn main() -> Result<()> {
    let (rows, columns) = (20, 30);
    let digits = Digits::open(&Config::default(), Split::Train)?;
    let sample = |index| Sample { index, split: Split::Train, epoch: 0, seed: 0, repeat: 0, augment: true };
    let batch = digits.batch(&(0..rows * columns).map(sample).collect::<Vec<_>>())?;
    // From (rows * columns, 1, 28, 28) to one picture (1, rows * 28, columns * 28).
    let side = digits.spec().shape[1];
    let sheet = batch.input.reshape((rows, columns, side, side))?.transpose(1, 2)?;
    let sheet = sheet.reshape((1, rows * side, columns * side))?;
    save_png(&sheet, "digits.png".as_ref())?;
    println!("wrote digits.png");
    Ok(())
}
