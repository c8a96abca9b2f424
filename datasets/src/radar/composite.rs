//! MeteoSwiss radar composites: pictures whose palette indices encode rain, and whose file names encode the time.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candlepower::error::{Error, Result};
use gif::{ColorOutput, DecodeOptions};

/// The index of a pixel that no radar covers.
pub const NO_DATA: u8 = 255;
/// Intervals per hour: an index is the rain of five minutes.
const AN_HOUR: f64 = 12.;

/// The rain rate in mm/h that a palette index stands for; `None` where no radar covers the pixel.
///
/// Index i below 2, or from 251 to 254, is no rain. Otherwise the radar's reflectivity Z is 10^((i - 71.5) /
/// 20), and Z = 316 R^1.5 gives the depth R in mm that falls in five minutes.
pub fn rain_rate(index: u8) -> Option<f32> {
    match index {
        NO_DATA => None,
        0..2 | 251.. => Some(0.),
        index => {
            let reflectivity = 10f64.powf((f64::from(index) - 71.5) / 20.);
            Some((AN_HOUR * (reflectivity / 316.).powf(1. / 1.5)) as f32)
        }
    }
}

/// The scale of the logarithm, and the rain rate that maps to 1, both in mm/h.
const OFFSET: f64 = 0.1;
const MOST: f64 = 100.;

/// Maps a rain rate in mm/h to a value in `[0, 1]`: log(1 + rate / 0.1) / log(1 + 100 / 0.1), so no rain is
/// 0, and 100 mm/h or more is 1.
pub fn to_value(rate: f64) -> f32 {
    ((rate / OFFSET).ln_1p() / (MOST / OFFSET).ln_1p()).clamp(0., 1.) as f32
}

/// The rain rate in mm/h of a value in `[0, 1]`; the inverse of [`to_value`] below 100 mm/h.
pub fn to_rate(value: f32) -> f64 {
    OFFSET * (f64::from(value) * (MOST / OFFSET).ln_1p()).exp_m1()
}

/// The (rows, columns) of a composite and its palette indices, row by row.
pub fn read(path: &Path) -> Result<([usize; 2], Vec<u8>)> {
    let broken = |error: gif::DecodingError| {
        Error::msg(format!("{}: cannot be read as .gif: {error}", path.display()))
    };
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    let file = File::open(path).map_err(Error::file(path))?;
    let mut decoder = options.read_info(BufReader::new(file)).map_err(broken)?;
    let size = [usize::from(decoder.height()), usize::from(decoder.width())];
    let Some(frame) = decoder.read_next_frame().map_err(broken)? else {
        return Err(Error::msg(format!("{}: holds no picture", path.display())));
    };
    if [usize::from(frame.height), usize::from(frame.width)] != size {
        let message = format!("{}: its picture does not cover it: not a radar composite", path.display());
        return Err(Error::msg(message));
    }
    Ok((size, frame.buffer.to_vec()))
}

/// Minutes from the start of 2000 to the time in a composite's name: `AQC151351545F...` is 2015, day 135, 15:45.
pub fn minutes(path: &Path) -> Result<i64> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let refused = || {
        Error::msg(format!(
            "{}: expected a name like AQC151351545F: three letters, year, day of the year, hour, minute",
            path.display()
        ))
    };
    let digits = name
        .get(3..12)
        .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
        .ok_or_else(refused)?;
    let number = |from: usize, to: usize| digits[from..to].parse::<i64>().map_err(|_| refused());
    let (year, day, hour, minute) = (number(0, 2)?, number(2, 5)?, number(5, 7)?, number(7, 9)?);
    if !(1..=366).contains(&day) || hour > 23 || minute > 59 {
        return Err(refused());
    }
    // 2000 and every fourth year after it are leap years.
    let days = 365 * year + (year + 3) / 4 + day - 1;
    Ok((24 * days + hour) * 60 + minute)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn rain_follows_the_law() {
        assert_eq!([0, 1, 251, 254].map(rain_rate), [Some(0.); 4]);
        assert_eq!(rain_rate(NO_DATA), None);
        // By hand: (10^((121.5 - 71.5)/20) / 316)^(2/3) is 1.00050 mm in five minutes; indices are whole numbers.
        let depth = |index: f64| (10f64.powf((index - 71.5) / 20.) / 316.).powf(2. / 3.);
        assert!((depth(121.5) - 1.0005).abs() < 1e-4);
        for index in [2, 100, 121, 122, 250] {
            let (found, expected) = (f64::from(rain_rate(index).unwrap()), 12. * depth(f64::from(index)));
            assert!((found / expected - 1.).abs() < 1e-6, "{index}: {found}, expected {expected}");
        }
        assert!(rain_rate(121).unwrap() < 12. * 1.0005 && rain_rate(122).unwrap() > 12. * 1.0005);
    }

    #[test]
    fn values_stand_for_rates() {
        assert_eq!([0., 100., 1e9].map(to_value), [0., 1., 1.]);
        let half_a_millimetre = to_value(0.5);
        assert!((f64::from(half_a_millimetre) - 6f64.ln() / 1001f64.ln()).abs() < 1e-7);
        for rate in [0., 0.05, 0.5, 3., 99.] {
            assert!((to_rate(to_value(rate)) - rate).abs() < 1e-4 * (1. + rate));
        }
    }

    #[test]
    fn times_are_in_the_names() {
        let at = |name: &str| minutes(Path::new(name));
        let first = at("x/AQC151351545F_00005.801.gif").unwrap();
        assert_eq!(at("AQC151351550V").unwrap() - first, 5);
        // Over midnight, over the end of a leap year, and over the end of a common year.
        assert_eq!(at("AQC161940000V").unwrap() - at("AQC161932355V").unwrap(), 5);
        assert_eq!(at("AQC170010000V").unwrap() - at("AQC163662355V").unwrap(), 5);
        assert_eq!(at("AQC160010000V").unwrap() - at("AQC153652355V").unwrap(), 5);
        assert_eq!(at("AQC000010001V").unwrap(), 1);
        for name in [
            "AQC15135154",
            "AQC153671545F",
            "AQC150001545F",
            "AQC151352445F",
            "AQC151351560F",
            "frame_000001.gif",
        ] {
            let error = at(name).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name}: expected a name like")), "{error}");
        }
    }
}
