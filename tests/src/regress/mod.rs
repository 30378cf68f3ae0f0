//! `make regress`: PostgreSQL's own tests on a stock server and on a Dormouse compute, compared; or on one compute directly and
//! through its pool.

mod compare;
mod dumps;
mod suites;
mod through;

pub use compare::{Comparison, compare};
pub use dumps::{Dump, amcheck};
pub use suites::{Outcomes, Sources, Suite, Target};
pub use through::{Pooled, through_the_pooler};
