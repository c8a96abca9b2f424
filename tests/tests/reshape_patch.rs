//! Folding patches into channels matches the reference, and unfolding reverses it.
#![allow(clippy::unwrap_used)]

use candlepower::nn::{depth_to_space, space_to_depth};
use candlepower_tests::golden;

#[test]
fn patches_are_folded_as_the_reference_does() {
    let golden = golden("reshape_patch");
    let patch = golden.size("patch_size");
    // The fixture is channels-last: (B, T, H, W, C) and (B, T, H/p, W/p, p*p*C).
    let frames = golden.get("in.frames_bthwc").permute((0, 1, 4, 2, 3)).unwrap();
    let folded = space_to_depth(&frames, patch).unwrap();
    let expected = golden.get("out.patched").permute((0, 1, 4, 2, 3)).unwrap();
    let values = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(folded.dims(), expected.dims());
    assert_eq!(values(&folded), values(&expected));
    assert_eq!(values(&depth_to_space(&folded, patch).unwrap()), values(&frames));
}
