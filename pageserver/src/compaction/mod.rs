//! Which layers to merge, of which ranges to make images, which layers may go. Pure: no clock, no IO, no randomness.

pub mod gc;

pub use gc::{GcInput, garbage};
