//! Names of projects, branches, endpoints and nodes; terms and generations.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

/// Longest id in bytes: an id is a DNS label (endpoints appear in host names) and part of object keys.
const ID_MAX_BYTES: usize = 63;

/// An id that is not 1 to 63 of `a-z`, `0-9` and inner `-`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {kind} id (1 to 63 characters of a-z, 0-9 and inner hyphens): {text:?}")]
pub struct IdError {
    kind: &'static str,
    text: String,
}

fn check(kind: &'static str, text: &str) -> Result<SmolStr, IdError> {
    let plain = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    let good = plain && (1..=ID_MAX_BYTES).contains(&text.len()) && !text.starts_with('-') && !text.ends_with('-');
    if good { Ok(SmolStr::new(text)) } else { Err(IdError { kind, text: text.chars().take(80).collect() }) }
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(SmolStr);

        impl $name {
            /// Checks and keeps an id. Errors when it is not a DNS label in lower case.
            pub fn new(text: &str) -> Result<Self, IdError> {
                check($kind, text).map(Self)
            }
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }
        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                Self::new(&text)
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.into()
            }
        }
    };
}

text_id!(
    /// A project: the tenant inside storage.
    ProjectId,
    "project"
);
text_id!(
    /// A branch: a timeline of WAL inside storage.
    BranchId,
    "branch"
);
text_id!(
    /// An endpoint: the name under which a branch's compute is reached.
    EndpointId,
    "endpoint"
);

/// A branch of a project: what every storage call is about.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BranchRef {
    /// The project that owns the branch.
    pub project: ProjectId,
    /// The branch.
    pub branch: BranchId,
}

impl fmt::Display for BranchRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.project, self.branch)
    }
}

impl fmt::Debug for BranchRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

number_id!(
    /// A term of the consensus: each compute start takes a higher one and so fences the compute before it.
    Term,
    u64
);
number_id!(
    /// Which attachment of a branch to a pageserver wrote an object. Handed out by the control plane, only ever grows.
    Generation,
    u32
);
number_id!(
    /// A safekeeper's number, unique in the installation.
    NodeId,
    u64
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_dns_labels() {
        for good in ["a", "br-quiet-sea-1", &"x".repeat(63)] {
            assert_eq!(ProjectId::new(good).expect("valid").as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a/b", "..", "a.b", "a b", "é", &"x".repeat(64)] {
            assert!(BranchId::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn deserialising_checks_too() {
        assert!(EndpointId::try_from("../x".to_owned()).is_err());
    }
}
