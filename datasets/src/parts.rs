//! Divides data that comes as one file among the splits.

use std::ops::Range;

use candlepower::data::Split;

/// The items of one file that belong to `split`: the first 90 % are for training, the last 10 % are held out.
///
/// Validation and test share the held-out part. No item is both in training and held out.
pub(crate) fn part(split: Split, len: usize) -> Range<usize> {
    let cut = len - len.div_ceil(10);
    match split {
        Split::Train => 0..cut,
        Split::Val | Split::Test => cut..len,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_cover_a_file_and_do_not_meet() {
        for (len, cut) in [(10_000, 9_000), (10, 9), (19, 17), (2, 1), (1, 0), (0, 0)] {
            assert_eq!(part(Split::Train, len), 0..cut);
            assert_eq!(part(Split::Val, len), cut..len);
            assert_eq!(part(Split::Test, len), cut..len);
        }
    }
}
