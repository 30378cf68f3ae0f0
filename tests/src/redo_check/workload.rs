//! What PostgreSQL's own tests write too little of: every index type at some size, maintenance, databases, two-phase commits, ids
//! past the ends of their pages, and `pgbench` with all its scripts.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};

use crate::{
    regress::Target,
    stock::{SUPERUSER, run},
};

const SCRIPTS: [(&str, &str); 5] = [
    ("heap", include_str!("../../../wal-redo/tests/sql/heap.sql")),
    ("btree", include_str!("../../../wal-redo/tests/sql/btree.sql")),
    ("indexes", include_str!("../../../wal-redo/tests/sql/indexes.sql")),
    ("many ids", include_str!("../../../wal-redo/tests/sql/many_ids.sql")),
    ("maintenance", include_str!("maintenance.sql")),
];

/// Runs it on a server.
pub struct Workload<'t> {
    target: &'t Target,
}

impl Workload<'_> {
    /// For this server, which must allow prepared transactions.
    pub fn new(target: &Target) -> Workload<'_> {
        Workload { target }
    }

    /// All of it.
    pub fn run(&self) -> anyhow::Result<()> {
        for (name, script) in SCRIPTS {
            self.sql(script).with_context(|| format!("the script {name}"))?;
        }
        run(self.target.client("vacuumdb")?.args(["--all", "--freeze", "--quiet"]))?;
        self.pgbench(&["-i", "-q", "-s", "2", "-I", "dtgvpf"])?;
        for script in ["tpcb-like", "simple-update", "select-only"] {
            self.pgbench(&["-n", "-c", "8", "-j", "2", "-t", "400", "-b", script])?;
        }
        self.sql(
            "VACUUM; REINDEX DATABASE postgres; VACUUM FULL; CLUSTER pgbench_accounts USING pgbench_accounts_pkey;
             CHECKPOINT; UPDATE pgbench_tellers SET tbalance = 1; VACUUM FREEZE;
             BEGIN; INSERT INTO cut VALUES (6); PREPARE TRANSACTION 'open at the end';",
        )
    }

    fn pgbench(&self, arguments: &[&str]) -> anyhow::Result<()> {
        run(self.target.client("pgbench")?.args(arguments)).map(drop)
    }

    /// Any error in the script is one here.
    fn sql(&self, script: &str) -> anyhow::Result<()> {
        let mut psql: Command = self.target.client("psql")?;
        psql.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-U", SUPERUSER, "-f", "-"]);
        let mut child = psql.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("piped")?.write_all(script.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}
