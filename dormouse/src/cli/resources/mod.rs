//! One file for each kind of thing that the API has.

pub mod branches;
pub mod catalog;
pub mod endpoints;
pub mod history;
pub mod jwks;
pub mod projects;
pub mod safekeepers;
