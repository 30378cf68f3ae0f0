//! How long the steps of a start took.

use std::time::Instant;

/// Steps by name, in order. Steps may overlap; each is measured from when it was begun.
#[derive(Debug)]
pub struct Timings {
    began: Instant,
    last: Instant,
    steps_us: Vec<(String, u64)>,
}

impl Timings {
    /// Starts the clock.
    pub fn begin() -> Self {
        let now = Instant::now();
        Self { began: now, last: now, steps_us: Vec::new() }
    }

    /// The time since the last step goes to `step`.
    pub fn step(&mut self, step: &str) {
        let now = Instant::now();
        self.add(step, now.duration_since(self.last).as_micros());
        self.last = now;
    }

    /// All steps and their `total`.
    pub fn finish(mut self) -> Vec<(String, u64)> {
        self.add("total", self.began.elapsed().as_micros());
        self.steps_us
    }

    fn add(&mut self, step: &str, micros: u128) {
        self.steps_us.push((step.to_owned(), u64::try_from(micros).unwrap_or(u64::MAX)));
    }
}
