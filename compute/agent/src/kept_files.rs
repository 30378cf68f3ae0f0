//! Files of logical replication that outlive the compute: what WAL says of them, and how the data directory differs.
//!
//! While Postgres runs the shim keeps them (`compute/shim/src/kept_files.rs`). What a checkpointer changes during the shutdown,
//! and what the agent itself has left out at the start, is appended at the end.

use std::{collections::BTreeMap, io, path::Path};

use wire::pageserver::BaseFile;

/// Checksum and length of a file's content.
type Content = (u32, usize);

/// What the branch's WAL says.
#[derive(Debug, Clone, Default)]
pub struct KeptFiles(BTreeMap<String, Content>);

impl KeptFiles {
    /// As of the base files.
    pub fn of(files: &[BaseFile]) -> KeptFiles {
        let mut kept = KeptFiles::default();
        files.iter().for_each(|file| kept.observe(&file.path, &file.content));
        kept
    }

    /// Takes note of a file that WAL keeps; empty content removes it.
    pub fn observe(&mut self, path: &str, content: &[u8]) {
        if !is_of_replication(path) {
            return;
        }
        if content.is_empty() {
            self.0.remove(path);
        } else {
            self.0.insert(path.to_owned(), content_of(content));
        }
    }

    /// What is otherwise in `pgdata`, whose Postgres has ended: paths and contents, empty for files that are gone.
    pub fn differences(&self, pgdata: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
        let mut gone = self.0.clone();
        let mut different = Vec::new();
        for path in local_files(pgdata)? {
            let content = std::fs::read(pgdata.join(&path))?;
            if gone.remove(&path) != Some(content_of(&content)) {
                different.push((path, content));
            }
        }
        different.extend(gone.into_keys().map(|path| (path, Vec::new())));
        Ok(different)
    }
}

fn content_of(content: &[u8]) -> Content {
    (crc32c::crc32c(content), content.len())
}

fn is_of_replication(path: &str) -> bool {
    match path.split('/').collect::<Vec<_>>()[..] {
        ["pg_replslot", _, file] => file == "state",
        ["pg_logical", "snapshots", file] => file.ends_with(".snap"),
        ["pg_logical", "mappings", file] => file.starts_with("map-"),
        _ => false,
    }
}

fn local_files(pgdata: &Path) -> io::Result<Vec<String>> {
    let mut files = Vec::new();
    for slot in names_in(&pgdata.join("pg_replslot"))? {
        let state = format!("pg_replslot/{slot}/state");
        if pgdata.join(&state).is_file() {
            files.push(state);
        }
    }
    for directory in ["pg_logical/snapshots", "pg_logical/mappings"] {
        let names = names_in(&pgdata.join(directory))?;
        files.extend(names.into_iter().map(|name| format!("{directory}/{name}")));
    }
    files.retain(|path| is_of_replication(path));
    Ok(files)
}

fn names_in(directory: &Path) -> io::Result<Vec<String>> {
    let names = std::fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
    names.filter_map(Result::transpose).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn only_what_differs_is_told() {
        let pgdata = std::env::temp_dir().join(format!("dormouse-kept-files-{}", std::process::id()));
        for directory in ["pg_replslot/a", "pg_replslot/b", "pg_logical/snapshots", "pg_logical/mappings"] {
            std::fs::create_dir_all(pgdata.join(directory)).expect("mkdir");
        }
        let file = |path: &str, content: &'static str| BaseFile {
            path: path.to_owned(),
            content: Bytes::from_static(content.as_bytes()),
        };
        let mut kept = KeptFiles::of(&[
            file("pg_replslot/a/state", "one"),
            file("pg_logical/snapshots/0-10.snap", "snap"),
            file("pg_stat/pgstat.stat", "statistics are kept otherwise"),
        ]);
        kept.observe("pg_replslot/gone/state", b"x");
        kept.observe("pg_replslot/gone/state", b"");
        for (path, content) in [
            ("pg_replslot/a/state", "two"),
            ("pg_replslot/b/state", "new"),
            ("pg_replslot/b/xid-7.spill", "is of no use later"),
            ("pg_logical/snapshots/0-20.snap", "new"),
        ] {
            std::fs::write(pgdata.join(path), content).expect("write");
        }
        let different = kept.differences(&pgdata).expect("read");
        let mut paths: Vec<_> = different.iter().map(|(path, content)| (path.as_str(), content.len())).collect();
        paths.sort_unstable();
        let expected = [
            ("pg_logical/snapshots/0-10.snap", 0),
            ("pg_logical/snapshots/0-20.snap", 3),
            ("pg_replslot/a/state", 3),
            ("pg_replslot/b/state", 3),
        ];
        assert_eq!(paths, expected);
        for (path, content) in &different {
            kept.observe(path, content);
        }
        assert_eq!(kept.differences(&pgdata).expect("read"), []);
        std::fs::remove_dir_all(&pgdata).expect("clean up");
    }
}
