//! Whole servers compared by `pg_dumpall`, and checked by `pg_amcheck`.

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::Command,
};

use super::Target;
use crate::stock::run;

/// Lines of a difference that are shown.
const SHOWN_LINES: usize = 60;

/// Tables of the suites whose rows are others each time, on any server.
const OF_THE_MOMENT: &[(&str, &str)] = &[
    ("public.d4_pid", "a process id"),
    ("public.random_tbl", "numbers by chance"),
    ("public.tab_core_types", "the time"),
];

/// What `pg_dumpall` said, in a file.
pub struct Dump {
    path: PathBuf,
}

impl Dump {
    /// Dumps a server with all its databases.
    pub fn take(target: &Target, path: &Path) -> anyhow::Result<Dump> {
        let raw = path.with_extension("raw");
        let mut dump = target.client("pg_dumpall")?;
        // Verifiers have a random salt; unlogged tables are empty after a sleep, as after a crash.
        dump.args(["--no-role-passwords", "--no-unlogged-table-data"]);
        let output = dump.stdout(std::fs::File::create(&raw)?).output()?;
        anyhow::ensure!(output.status.success(), "pg_dumpall: {}", String::from_utf8_lossy(&output.stderr));
        let mut to = std::io::BufWriter::new(std::fs::File::create(path)?);
        for line in BufReader::new(std::fs::File::open(&raw)?).split(b'\n') {
            let line = line?;
            // psql's guard against injected meta-commands: a key that is new each time.
            if !line.starts_with(b"\\restrict ") && !line.starts_with(b"\\unrestrict ") {
                to.write_all(&line)?;
                to.write_all(b"\n")?;
            }
        }
        to.flush()?;
        std::fs::remove_file(&raw)?;
        Ok(Dump { path: path.to_owned() })
    }

    /// How the two differ, if they do.
    pub fn difference(&self, other: &Dump) -> anyhow::Result<Option<String>> {
        let output = Command::new("diff").arg("-u").arg(&self.path).arg(&other.path).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok((!output.status.success()).then(|| text.lines().take(SHOWN_LINES).collect::<Vec<_>>().join("\n")))
    }

    /// What two servers on which the same was run have in common: each table's rows in order, since where a row lies depends on
    /// what ran beside it; no object numbers in names; nothing of tables that hold the time or chance.
    pub fn comparable(&self) -> anyhow::Result<Dump> {
        let path = self.path.with_extension("comparable");
        let mut to = std::io::BufWriter::new(std::fs::File::create(&path)?);
        let mut rows: Option<(bool, Vec<Vec<u8>>)> = None;
        for line in BufReader::new(std::fs::File::open(&self.path)?).split(b'\n') {
            let mut line = line?;
            line.push(b'\n');
            match &mut rows {
                Some((shown, collected)) if line == b"\\.\n" => {
                    collected.sort();
                    if *shown {
                        collected.iter().try_for_each(|row| to.write_all(row))?;
                    }
                    to.write_all(&line)?;
                    rows = None;
                }
                Some((_, collected)) => collected.push(without_object_numbers(line)),
                None => {
                    let table = String::from_utf8_lossy(&line);
                    if let Some(table) = table.strip_prefix("COPY ").filter(|_| line.ends_with(b" FROM stdin;\n")) {
                        let by_chance = OF_THE_MOMENT.iter().any(|(name, _)| table.starts_with(&format!("{name} ")));
                        rows = Some((!by_chance, Vec::new()));
                    }
                    to.write_all(&without_object_numbers(line))?;
                }
            }
        }
        to.flush()?;
        Ok(Dump { path })
    }
}

/// The line with `N` for the numbers of large objects and of TOAST tables.
fn without_object_numbers(line: Vec<u8>) -> Vec<u8> {
    let Ok(text) = std::str::from_utf8(&line) else { return line };
    let large_object = ["LARGE OBJECT ", "pg_catalog.lo_", "; Type: BLOB"].iter().any(|mark| text.contains(mark));
    if !large_object && !text.contains("pg_toast_") {
        return line;
    }
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        let (before, digits) = rest.split_at(at);
        let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        shown.push_str(before);
        let number = end >= 5 && (large_object || before.ends_with("pg_toast_"));
        shown.push_str(if number { "N" } else { &digits[..end] });
        rest = &digits[end..];
    }
    shown.push_str(rest);
    shown.into_bytes()
}

/// Checks every table and every index of every database; what was found, empty when all is sound.
pub fn amcheck(target: &Target) -> anyhow::Result<String> {
    let mut check = target.client("pg_amcheck")?;
    check.args(["--all", "--heapallindexed", "--rootdescend", "--install-missing", "--jobs=2"]);
    match run(&mut check) {
        Ok(said) => Ok(said.trim().to_owned()),
        Err(error) => Ok(format!("{error:#}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump(dir: &Path, name: &str, text: &str) -> Dump {
        let path = dir.join(name);
        std::fs::write(&path, text).expect("write");
        Dump { path }
    }

    #[test]
    fn order_and_object_numbers_do_not_count_but_rows_do() {
        let dir = tempfile::tempdir().expect("directory");
        let one = "COPY public.t (a) FROM stdin;\n2\n1\n\\.\nSELECT pg_catalog.lo_create('16412');\n\
                   COPY public.random_tbl (random) FROM stdin;\n7\n\\.\n";
        let other = "COPY public.t (a) FROM stdin;\n1\n2\n\\.\nSELECT pg_catalog.lo_create('17001');\n\
                   COPY public.random_tbl (random) FROM stdin;\n8\n\\.\n";
        let (one, other) = (dump(dir.path(), "one", one), dump(dir.path(), "other", other));
        let same = |left: &Dump, right: &Dump| left.difference(right).expect("diff").is_none();
        assert!(!same(&one, &other));
        assert!(same(&one.comparable().expect("comparable"), &other.comparable().expect("comparable")));
        let third = dump(dir.path(), "third", "COPY public.t (a) FROM stdin;\n1\n3\n\\.\n");
        assert!(!same(&one.comparable().expect("comparable"), &third.comparable().expect("comparable")));
    }
}
