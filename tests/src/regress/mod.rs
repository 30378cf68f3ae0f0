//! `make regress`: PostgreSQL's own tests on a stock server and on a Dormouse compute, compared.

mod compare;
mod dumps;
mod suites;

pub use compare::{Comparison, compare};
pub use dumps::{Dump, amcheck};
pub use suites::{Outcomes, Sources, Suite, Target};
