//! What a path in the data directory names: pure.

use page_cache::types::{BlockNumber, ForkNumber, Oid, REL_SEGMENT_BLOCKS, RelTag, oids};

/// A file or directory that the shim treats specially.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// A segment file of a relation's fork.
    Segment(Segment),
    /// A WAL segment file.
    Wal,
    /// A directory with relations in it: tablespace and database.
    Database(Oid, Oid),
    /// Nothing special.
    Other,
}

/// One of the files (of at most 1 GiB) that Postgres cuts a fork into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The fork.
    pub rel: RelTag,
    /// The segment's index.
    pub number: u32,
}

impl Segment {
    /// Most segments of a fork: block numbers have 32 bits.
    const COUNT: u32 = 1 << 15;

    /// Block number of the segment's first block.
    pub fn first_block(&self) -> BlockNumber {
        self.number * REL_SEGMENT_BLOCKS
    }
}

/// Longest path by components: `pg_tblspc/<oid>/PG_15_202209061/<db>/<file>`.
const MAX_COMPONENTS: usize = 5;

/// What a path relative to the data directory names.
pub fn parse(relative: &[u8]) -> Named {
    let mut components: [&[u8]; MAX_COMPONENTS] = [&[]; MAX_COMPONENTS];
    let mut count = 0;
    for part in relative.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".") {
        if count == MAX_COMPONENTS || part == b".." {
            return Named::Other;
        }
        components[count] = part;
        count += 1;
    }
    parse_components(&components[..count]).unwrap_or(Named::Other)
}

fn parse_components(components: &[&[u8]]) -> Option<Named> {
    Some(match components {
        [b"global"] => Named::Database(oids::GLOBAL_TABLESPACE, 0),
        [b"global", file] => segment(oids::GLOBAL_TABLESPACE, 0, file)?,
        [b"base", db] => Named::Database(oids::DEFAULT_TABLESPACE, number(db)?),
        [b"base", db, file] => segment(oids::DEFAULT_TABLESPACE, number(db)?, file)?,
        [b"pg_tblspc", spc, version, db] if version.starts_with(b"PG_") => Named::Database(number(spc)?, number(db)?),
        [b"pg_tblspc", spc, version, db, file] if version.starts_with(b"PG_") => {
            segment(number(spc)?, number(db)?, file)?
        }
        [b"pg_wal", file] if file.len() == 24 && file.iter().all(u8::is_ascii_hexdigit) => Named::Wal,
        _ => Named::Other,
    })
}

/// `<rel>[_fsm|_vm|_init][.<segment>]`; everything else (`pg_filenode.map`, `t3_16384`, `PG_VERSION`) is a real file.
fn segment(spc: Oid, db: Oid, file: &[u8]) -> Option<Named> {
    let (file, segment_number) = match file.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&file[..dot], number(&file[dot + 1..]).filter(|n| (1..Segment::COUNT).contains(n))?),
        None => (file, 0),
    };
    let (rel, suffix) = file.split_at(file.iter().position(|byte| *byte == b'_').unwrap_or(file.len()));
    let fork = ForkNumber::ALL.into_iter().find(|fork| fork.suffix().as_bytes() == suffix)?;
    let rel = RelTag { spc, db, rel: number(rel)?, fork };
    Some(Named::Segment(Segment { rel, number: segment_number }))
}

/// A positive decimal number as Postgres prints it.
fn number(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text[0] == b'0' {
        return None;
    }
    text.iter().try_fold(0u32, |value, byte| {
        let digit = byte.is_ascii_digit().then(|| u32::from(byte - b'0'))?;
        value.checked_mul(10)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rel(spc: Oid, db: Oid, rel: Oid, fork: ForkNumber, number: u32) -> Named {
        Named::Segment(Segment { rel: RelTag { spc, db, rel, fork }, number })
    }

    #[test]
    fn relation_files_are_found() {
        assert_eq!(parse(b"base/5/16384"), rel(1663, 5, 16384, ForkNumber::Main, 0));
        assert_eq!(parse(b"./base//5/16384_fsm.3"), rel(1663, 5, 16384, ForkNumber::Fsm, 3));
        assert_eq!(parse(b"global/1262_vm"), rel(1664, 0, 1262, ForkNumber::Vm, 0));
        assert_eq!(parse(b"pg_tblspc/9/PG_15_202209061/5/4294967295_init"), rel(9, 5, u32::MAX, ForkNumber::Init, 0));
    }

    #[test]
    fn directories_and_wal_are_found() {
        assert_eq!(parse(b"base/5/"), Named::Database(1663, 5));
        assert_eq!(parse(b"./global"), Named::Database(1664, 0));
        assert_eq!(parse(b"pg_tblspc/9/PG_15_202209061/5"), Named::Database(9, 5));
        assert_eq!(parse(b"pg_wal/000000010000000000000001"), Named::Wal);
    }

    #[test]
    fn everything_else_is_a_real_file() {
        for path in [
            "base/5/t3_16384",
            "base/5/pg_filenode.map",
            "base/5/PG_VERSION",
            "base/5/16384.0",
            "base/5/16384.01",
            "base/5/16384.32768",
            "base/5/16384_foo",
            "base/5/16384_fsm_vm",
            "base/5/016384",
            "base/5/4294967296",
            "base/5/",
            "base/../base/5/16384",
            "base/pgsql_tmp/pgsql_tmp123.0",
            "global/pg_control",
            "pg_wal/xlogtemp.123",
            "pg_wal/000000010000000000000001.partial",
            "pg_wal/archive_status/000000010000000000000001",
            "pg_tblspc/9",
            "base",
            "",
            "5/16384",
        ] {
            assert!(!matches!(parse(path.as_bytes()), Named::Segment(_) | Named::Wal), "{path}");
        }
    }
}
