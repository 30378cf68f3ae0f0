//! Seeds, and damage to bytes, for tests with random input: the pool's and the proxy's.

#![allow(dead_code, reason = "not every test damages bytes")]

use std::{env, ops::Range};

use rand::{Rng, RngExt, rngs::StdRng};

fn number(variable: &str) -> Option<u64> {
    env::var(variable).ok()?.parse().ok()
}

/// Seeds of a test with `default` rounds: `DORMOUSE_FUZZ_ROUNDS` says how many, `DORMOUSE_FUZZ_SEED` is one to repeat.
pub fn seeds(default: u64) -> Range<u64> {
    let all = 0..number("DORMOUSE_FUZZ_ROUNDS").unwrap_or(default);
    number("DORMOUSE_FUZZ_SEED").map_or(all, |seed| seed..seed + 1)
}

/// Changes, repeats or takes away some of the bytes.
pub fn damage(rng: &mut StdRng, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        return;
    }
    let at = rng.random_range(0..bytes.len());
    let end = (at + rng.random_range(1..9)).min(bytes.len());
    match rng.random_range(0..6) {
        0 => bytes[at] ^= 1 << rng.random_range(0..8),
        1 => bytes[at] = [0, 1, 4, 0x7f, 0x80, 0xff][rng.random_range(0..6)],
        2 => drop(bytes.drain(at..end)),
        3 => {
            let again = bytes[at..end].to_vec();
            bytes.splice(at..at, again);
        }
        4 => rng.fill_bytes(&mut bytes[at..end]),
        _ => bytes.truncate(at),
    }
}
