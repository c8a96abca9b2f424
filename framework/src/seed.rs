//! Randomness as a function of its purpose, never of when or where it is drawn.

use rand::SeedableRng;
pub use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// A generator that depends only on the run's seed and `purpose`.
///
/// The four words are the cipher's key, so only equal purposes share a stream.
pub fn generator(seed: u64, purpose: [u64; 3]) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (bytes, word) in key.chunks_exact_mut(8).zip([seed, purpose[0], purpose[1], purpose[2]]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// Hashes a name to a word of a generator's purpose.
pub fn name(name: &str) -> u64 {
    let digest = Sha256::digest(name.as_bytes());
    digest.iter().take(8).fold(0, |word, &byte| word << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::RngCore;

    #[test]
    fn purposes_have_their_own_streams() {
        let first = |seed, purpose| generator(seed, purpose).next_u64();
        assert_eq!(first(1, [2, 3, 4]), first(1, [2, 3, 4]));
        assert_ne!(first(1, [2, 3, 4]), first(1, [2, 4, 3]));
        assert_ne!(first(1, [2, 3, 4]), first(2, [2, 3, 4]));
        assert_ne!(name("encoder.weight"), name("encoder.bias"));
    }
}
