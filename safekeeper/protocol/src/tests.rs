//! Stories that a reader can follow, and the simulation's verdicts.

mod scenarios;
mod simulation;
