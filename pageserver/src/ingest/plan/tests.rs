//! Rules of planning, at the level of keys.
