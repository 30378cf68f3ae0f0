//! A branch's manifest: which layers it consists of and where it left its ancestor.
//!
//! One object per generation, overwritten at each upload: JSON, then a line with its CRC32C in hexadecimal.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use types::{BranchRef, Lsn};

use crate::{layer::LayerMeta, storage::Key};

const FORMAT_VERSION: u32 = 2;

/// Where a branch left another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    /// The other branch.
    pub branch: BranchRef,
    /// The last position they share.
    pub lsn: Lsn,
}

/// All that is known of a branch besides its layers' content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this format.
    pub format_version: u32,
    /// `None` for a template.
    pub ancestor: Option<Ancestor>,
    /// Where the branch's own history starts: the ancestor's LSN, or the template's.
    pub start_lsn: Lsn,
    /// Everything up to here is in the layers: end of a whole record.
    pub remote_consistent_lsn: Lsn,
    /// Start of the last record before [`Manifest::remote_consistent_lsn`]; invalid when not known.
    pub prev_record_lsn: Lsn,
    /// Time of the latest commit among the branch's own records, microseconds since 2000-01-01 UTC.
    pub last_commit_us: Option<i64>,
    /// Sum of all relations' sizes as of [`Manifest::remote_consistent_lsn`], bytes; `None` when nobody has looked yet.
    pub logical_bytes: Option<u64>,
    /// Every position from here on is readable; of those before it only the ones that children and leases keep.
    pub gc_cutoff_lsn: Lsn,
    /// The positions before the cutoff that children and leases keep.
    pub held_lsns: Vec<Lsn>,
    /// Where cells of keys begin that are compacted apart, ascending; see [`crate::compaction::plan`].
    pub cuts: Vec<Key>,
    /// The layers.
    pub layers: Vec<LayerMeta>,
    /// Names of layers that are not part of the branch any more and are to be deleted.
    pub doomed_layers: Vec<String>,
}

/// Bytes that are not a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The CRC is missing or wrong.
    #[error("manifest checksum mismatch")]
    Checksum,
    /// The JSON is not a manifest's.
    #[error("malformed manifest: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A copy of another object than the newest manifest.
    #[error("a copy of another manifest")]
    OtherObject,
    /// Written by a later program.
    #[error("manifest format {0}, this program reads {FORMAT_VERSION}")]
    Version(u32),
}

impl Manifest {
    /// Of a branch without layers.
    pub fn new(ancestor: Option<Ancestor>, start_lsn: Lsn, prev_record_lsn: Lsn) -> Manifest {
        Manifest {
            format_version: FORMAT_VERSION,
            ancestor,
            start_lsn,
            remote_consistent_lsn: start_lsn,
            prev_record_lsn,
            last_commit_us: None,
            logical_bytes: None,
            gc_cutoff_lsn: start_lsn,
            held_lsns: Vec::new(),
            cuts: Vec::new(),
            layers: Vec::new(),
            doomed_layers: Vec::new(),
        }
    }

    /// The object's content.
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        let crc = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(format!("\n{crc:08x}\n").as_bytes());
        Ok(bytes)
    }

    /// Reads what [`Manifest::encode`] gave.
    pub fn decode(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let (json, line) = bytes.split_at_checked(bytes.len().saturating_sub(10)).ok_or(ManifestError::Checksum)?;
        if line != format!("\n{:08x}\n", crc32c::crc32c(json)).as_bytes() {
            return Err(ManifestError::Checksum);
        }
        let version = serde_json::from_slice::<VersionOnly>(json)?.format_version;
        if version != FORMAT_VERSION {
            return Err(ManifestError::Version(version));
        }
        Ok(serde_json::from_slice(json)?)
    }
}

/// A copy of an encoded manifest: the entity tag of the object that it is a copy of, then its content.
pub(super) fn copy(tag: &str, manifest: &[u8]) -> Bytes {
    [tag.as_bytes(), b"\n", manifest].concat().into()
}

/// The manifest in a copy, if it is one of the object with this tag.
pub(super) fn copy_of(tag: &str, copy: &[u8]) -> Result<Manifest, ManifestError> {
    let content = copy.strip_prefix(tag.as_bytes()).and_then(|rest| rest.strip_prefix(b"\n"));
    Manifest::decode(content.ok_or(ManifestError::OtherObject)?)
}

#[derive(Deserialize)]
struct VersionOnly {
    format_version: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::LayerKind;

    fn sample() -> Manifest {
        let layer = LayerMeta {
            name: "x".to_owned(),
            kind: LayerKind::Delta,
            level: 0,
            first_key: Key::MIN,
            last_key: Key::MAX,
            start_lsn: Lsn(1),
            end_lsn: Lsn(2),
            size_bytes: 3,
            index_offset: 1,
            entries: 1,
        };
        Manifest { layers: vec![layer], ..Manifest::new(None, Lsn(8), Lsn(0)) }
    }

    #[test]
    fn it_round_trips_and_every_flipped_byte_is_found() {
        let bytes = sample().encode().expect("encode");
        assert_eq!(Manifest::decode(&bytes).expect("decode"), sample());
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(Manifest::decode(&damaged).is_err(), "byte {at}");
        }
        assert!(Manifest::decode(b"").is_err());
    }

    #[test]
    fn a_later_format_is_refused_by_name() {
        let later = Manifest { format_version: 3, ..sample() }.encode().expect("encode");
        assert!(matches!(Manifest::decode(&later), Err(ManifestError::Version(3))));
    }
}
