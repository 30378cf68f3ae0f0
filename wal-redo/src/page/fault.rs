//! Why a record could not be applied: inside the redo routines without, and for callers with, the page and record named.

use std::{borrow::Cow, fmt};

use types::{Lsn, PageTag};
use wal::{DecodedRecord, RmgrId, v15::rmgr};

/// A record could not be applied to a page. The page's content is unspecified afterwards.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedoError {
    /// The record, or the page it was applied to, is not what the record's redo needs: damaged, or a wrong page version.
    #[error("cannot apply the {record} to page {tag}: {reason}")]
    Invalid {
        /// The page.
        tag: PageTag,
        /// The record.
        record: RecordName,
        /// What was wrong.
        reason: String,
    },
    /// This kind of record is not implemented, and no full-page image stood in for it.
    #[error("cannot apply the {record} to page {tag}: {operation} is not implemented")]
    Unsupported {
        /// The page.
        tag: PageTag,
        /// The record.
        record: RecordName,
        /// The operation's name.
        operation: &'static str,
    },
    /// The record does not change this page.
    #[error("the {record} does not change page {tag}")]
    NotTouched {
        /// The page.
        tag: PageTag,
        /// The record.
        record: RecordName,
    },
    /// A full-page image cannot be unpacked.
    #[error("the full-page image of page {tag} is damaged: {reason}")]
    Image {
        /// The page.
        tag: PageTag,
        /// What was wrong.
        reason: String,
    },
}

/// Enough of a record to find it with `pg_waldump`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordName {
    /// Where it starts.
    pub start_lsn: Lsn,
    /// Where it ends.
    pub end_lsn: Lsn,
    /// Its resource manager.
    pub rmgr: RmgrId,
    /// Its `xl_info`, the resource manager's four bits.
    pub info: u8,
}

impl RecordName {
    /// The name of this record.
    pub fn of(record: &DecodedRecord<'_>) -> RecordName {
        RecordName { start_lsn: record.start_lsn, end_lsn: record.end_lsn, rmgr: record.rmgr, info: record.rmgr_info() }
    }
}

impl fmt::Display for RecordName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rmgr = rmgr::name(self.rmgr).unwrap_or("custom");
        write!(f, "{rmgr} record {:#04x} at {} (end {})", self.info, self.start_lsn, self.end_lsn)
    }
}

/// A redo routine's failure, before page and record are named.
#[derive(Debug)]
pub(super) enum Fault {
    Invalid(Cow<'static, str>),
    Unsupported(&'static str),
}

impl Fault {
    pub(super) fn named(self, tag: &PageTag, record: &DecodedRecord<'_>) -> RedoError {
        let (tag, record) = (*tag, RecordName::of(record));
        match self {
            Fault::Invalid(reason) => RedoError::Invalid { tag, record, reason: reason.into_owned() },
            Fault::Unsupported(operation) => RedoError::Unsupported { tag, record, operation },
        }
    }
}

impl From<&'static str> for Fault {
    fn from(reason: &'static str) -> Fault {
        Fault::Invalid(Cow::Borrowed(reason))
    }
}

impl From<String> for Fault {
    fn from(reason: String) -> Fault {
        Fault::Invalid(Cow::Owned(reason))
    }
}

/// A struct read from a record's data by its `from_prefix`.
pub(super) fn whole<T>(read: Option<T>) -> Result<T, Fault> {
    read.ok_or_else(|| "the record's data is shorter than its struct".into())
}
