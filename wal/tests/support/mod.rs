//! A stock PostgreSQL server for tests: made, started, queried, stopped, removed.
//!
//! Its programs come from `PG_BIN_DIR` (default `/usr/lib/postgresql/15/bin`). As root they run as user `postgres`.
#![allow(dead_code)]

use std::{
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

/// A cluster in a directory of its own; its server, if it runs, is stopped when this is dropped.
pub struct Cluster {
    dir: TempDir,
    running: bool,
}

impl Cluster {
    /// `initdb`, as Dormouse makes its template.
    pub fn init() -> Cluster {
        let cluster = Cluster::empty();
        let options = ["--no-sync", "-U", "postgres", "--encoding=UTF8", "--locale=C.UTF-8", "-A", "trust", "-D"];
        succeed(program("initdb").args(options).arg(cluster.data()));
        cluster
    }

    /// A directory for a cluster that is yet to be filled.
    pub fn empty() -> Cluster {
        let dir = tempfile::Builder::new().prefix("dormouse-wal-").tempdir_in("/tmp").expect("a directory below /tmp");
        if is_root() {
            succeed(Command::new("chown").arg("postgres:").arg(dir.path()));
        }
        Cluster { dir, running: false }
    }

    /// A copy of this (stopped) cluster.
    pub fn copy(&self) -> Cluster {
        assert!(!self.running, "only a stopped cluster is copied");
        let copy = Cluster::empty();
        succeed(Command::new("cp").arg("-a").arg(self.data()).arg(copy.data()));
        copy
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn wal_dir(&self) -> PathBuf {
        self.data().join("pg_wal")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Adds lines to `postgresql.conf`.
    pub fn configure(&self, lines: &str) {
        let path = self.data().join("postgresql.conf");
        let mut file = fs::OpenOptions::new().append(true).open(path).expect("postgresql.conf");
        writeln!(file, "{lines}").expect("written");
    }

    /// Writes a file of the data directory, owned as the server wants it.
    pub fn write(&self, path: &str, content: &[u8]) {
        let path = self.data().join(path);
        fs::write(&path, content).expect("written");
        if is_root() {
            succeed(Command::new("chown").arg("postgres:").arg(&path));
        }
    }

    pub fn start(&mut self) {
        let options = format!("-c listen_addresses= -c unix_socket_directories={}", self.dir.path().display());
        let log = self.dir.path().join("log");
        let mut command = program("pg_ctl");
        command.args(["start", "-w", "-t", "60", "-o", &options, "-l"]).arg(&log).arg("-D").arg(self.data());
        // The server keeps its standard streams open: it must not inherit a pipe that someone reads to its end.
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("pg_ctl runs");
        assert!(status.success(), "the server did not start: {}", self.log());
        self.running = true;
    }

    /// `mode` is `fast` or `immediate`.
    pub fn stop(&mut self, mode: &str) {
        self.running = false;
        succeed(program("pg_ctl").args(["stop", "-w", "-m", mode, "-D"]).arg(self.data()));
    }

    /// Runs SQL in one session, statement by statement, and returns what it prints, unaligned and without headers.
    pub fn sql(&self, sql: &str) -> String {
        self.sql_in("postgres", sql)
    }

    pub fn sql_in(&self, database: &str, sql: &str) -> String {
        let mut child = self
            .client("psql")
            .args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-d", database])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("psql runs");
        child.stdin.take().expect("piped").write_all(sql.as_bytes()).expect("psql reads");
        let output = child.wait_with_output().expect("psql ends");
        checked("psql", output)
    }

    /// A client program that connects to this server.
    pub fn client(&self, name: &str) -> Command {
        let mut command = program(name);
        command.env("PGHOST", self.dir.path()).env("PGUSER", "postgres");
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.running {
            let mut command = program("pg_ctl");
            let _ = command.args(["stop", "-w", "-m", "immediate", "-D"]).arg(self.data()).output();
        }
    }
}

/// A program of PostgreSQL, to be run as a user that a server accepts.
pub fn program(name: &str) -> Command {
    let bin = std::env::var("PG_BIN_DIR").unwrap_or_else(|_| "/usr/lib/postgresql/15/bin".to_owned());
    let path = Path::new(&bin).join(name);
    assert!(path.exists(), "{} is missing: install PostgreSQL 15 or set PG_BIN_DIR", path.display());
    let mut command = if is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(path);
        command
    } else {
        Command::new(path)
    };
    command.current_dir("/tmp").env("LC_ALL", "C.UTF-8");
    command
}

/// Runs a command that must succeed and returns its standard output.
pub fn succeed(command: &mut Command) -> String {
    let output = command.output().expect("the program runs");
    checked(&format!("{command:?}"), output)
}

fn checked(what: &str, output: Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what} failed: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// The segment files of a `pg_wal`, by name.
pub fn segments(wal_dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(wal_dir)
        .expect("a pg_wal")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.file_name().is_some_and(|name| name.len() == 24))
        .collect();
    files.sort();
    files
}

/// SQL that writes most kinds of WAL records: every index type, long rows, dropped and truncated tables, sequences, subtransactions,
/// prepared transactions, multixacts, databases by both strategies, tables moved and rewritten, statistics dropped.
/// The server needs `max_prepared_transactions`.
pub const WORKLOAD: &str = r#"
CREATE TABLE t (id serial PRIMARY KEY, k int, v text, box box, arr int[], p point);
INSERT INTO t (k, v, box, arr, p)
  SELECT i % 100, repeat('x', i % 300), box(point(i, i), point(i + 1, i + 1)), ARRAY[i % 7, i % 11], point(i % 50, i)
  FROM generate_series(1, 3000) i;
CREATE INDEX t_k ON t (k);
CREATE INDEX t_gin ON t USING gin (arr);
CREATE INDEX t_gist ON t USING gist (box);
CREATE INDEX t_spgist ON t USING spgist (p);
CREATE INDEX t_hash ON t USING hash (v);
CREATE INDEX t_brin ON t USING brin (k) WITH (pages_per_range = 2);
CREATE TABLE long_rows (id int PRIMARY KEY, body text);
ALTER TABLE long_rows ALTER body SET STORAGE EXTERNAL;
INSERT INTO long_rows SELECT i, repeat(md5(i::text), 4000) FROM generate_series(1, 40) i;
SET wal_compression = pglz;
CHECKPOINT;
UPDATE t SET v = v || 'y' WHERE id % 3 = 0;
SET wal_compression = lz4;
CHECKPOINT;
UPDATE t SET k = k + 1 WHERE id % 5 = 0;
SET wal_compression = zstd;
CHECKPOINT;
UPDATE long_rows SET body = body || 'z' WHERE id < 10;
RESET wal_compression;
VACUUM (FREEZE) t;
UPDATE t SET v = 'again' WHERE id < 50;
SELECT count(*) FROM (SELECT * FROM t WHERE id < 20 FOR UPDATE) x;
DELETE FROM t WHERE id > 1500;
VACUUM t;
INSERT INTO t (k, v, box, arr, p)
  SELECT i % 100, repeat('q', i % 300), box(point(i, i), point(i + 1, i + 1)), ARRAY[i % 7, i % 11], point(i % 50, i)
  FROM generate_series(1, 1000) i;
BEGIN;
SAVEPOINT a; INSERT INTO t (k) VALUES (1);
SAVEPOINT b; INSERT INTO t (k) VALUES (2);
ROLLBACK TO a;
INSERT INTO t (k) VALUES (3);
COMMIT;
DO $$ BEGIN FOR i IN 1..200 LOOP BEGIN INSERT INTO t (k) VALUES (i);
  IF i % 4 = 0 THEN RAISE EXCEPTION 'no'; END IF; EXCEPTION WHEN OTHERS THEN NULL; END; END LOOP; END $$;
BEGIN; INSERT INTO t (k) VALUES (4); ROLLBACK;
BEGIN; CREATE TABLE made_in_2pc (a int); SAVEPOINT s; INSERT INTO made_in_2pc VALUES (1); PREPARE TRANSACTION 'kept';
BEGIN; INSERT INTO t (k) VALUES (5); PREPARE TRANSACTION 'committed';
BEGIN; CREATE TABLE gone (a int); INSERT INTO gone VALUES (1); PREPARE TRANSACTION 'aborted';
CHECKPOINT;
COMMIT PREPARED 'committed';
ROLLBACK PREPARED 'aborted';
CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child (id int REFERENCES parent);
INSERT INTO parent SELECT generate_series(1, 300);
BEGIN; SELECT count(*) FROM (SELECT * FROM parent FOR KEY SHARE) x; SAVEPOINT s;
UPDATE parent SET id = id WHERE id <= 200; COMMIT;
CREATE TABLE dropped (a int PRIMARY KEY, b text); INSERT INTO dropped SELECT i, 'b' FROM generate_series(1, 500) i; DROP TABLE dropped;
CREATE TABLE cut (a int); INSERT INTO cut SELECT generate_series(1, 50000); DELETE FROM cut WHERE a > 1000; VACUUM (TRUNCATE) cut;
TRUNCATE cut;
CREATE UNLOGGED TABLE unlogged (a int); INSERT INTO unlogged VALUES (1);
CREATE SEQUENCE s; SELECT nextval('s'); SELECT setval('s', 1000);
CLUSTER t USING t_pkey;
REINDEX TABLE t;
VACUUM FULL pg_class;
CREATE MATERIALIZED VIEW m AS SELECT * FROM t; REFRESH MATERIALIZED VIEW m;
SELECT 1 FROM pg_logical_emit_message(false, 'prefix', 'message');
SELECT 1 FROM pg_logical_emit_message(false, 'dormouse-file:forged', 'message');
SELECT pg_create_restore_point('here');
CREATE DATABASE by_wal STRATEGY wal_log;
CREATE DATABASE by_copy STRATEGY file_copy;
CREATE DATABASE short_lived; DROP DATABASE short_lived;
SELECT pg_switch_wal();
INSERT INTO t (k) SELECT generate_series(1, 100);
"#;
