//! Which layers to merge, of which ranges to make images, which layers may go. Pure: no clock, no IO, no randomness.

pub mod gc;
pub mod plan;

pub use gc::{GcInput, garbage, images_pay};
pub use plan::{
    Cell, Job, MAX_LAYERS_VISITED, MergePart, PlanInput, PlanLimits, cells, cuts_after_image, is_full, next_job,
};
