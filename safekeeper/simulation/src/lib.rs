//! A simulated installation: acceptors with disks that lose or tear what was not flushed, rot and fill up; proposers that
//! compete; connections that break, stall, and deliver late, twice and out of order. One seed gives one run, step for step.

mod computes;
mod control;
mod disk;
mod error;
mod heal;
mod network;
mod nodes;
mod observer;
mod world;

pub use disk::{Disk, SimScanner, make_record};
pub use error::SimError;
pub use world::{SimOptions, World};

/// Random numbers from a seed (splitmix64).
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next_u64() % limit.max(1) as u64) as usize
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}
