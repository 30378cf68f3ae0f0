//! Public REST types: JSON of Neon's API v2 where it has the same notion.
