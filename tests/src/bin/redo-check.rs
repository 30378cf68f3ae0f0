//! `make redo-check`: everything that PostgreSQL's own tests write to WAL, through the redo library, with Postgres as the judge.
//!
//! In stages, each on a new stock server with `wal_consistency_checking=all`. After a stage every record is applied by the
//! library and each page it touched compared with the image that Postgres put into the record; then all pages, SLRU pages,
//! maps and counters with the stopped server's files; then all of it with a stock standby that replayed the same WAL. At last
//! redo is broken in ten places, one at a time, and each must be caught.

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context, ensure};
use clap::Parser;
use e2e::{
    redo_check::{Mutants, NEVER_SEEN, RECORD_TYPES, Standby, Workload},
    regress::{Sources, Suite, Target},
    stock::{StockServer, host_user, run},
};
use redo_oracle::{Report, check_with_standby};

/// Settings of every stage.
const SETTINGS: &[(&str, &str)] = &[
    ("wal_consistency_checking", "all"),
    ("wal_level", "logical"),
    ("wal_compression", "lz4"),
    ("wal_keep_size", "200GB"),
    ("max_wal_size", "20GB"),
    ("max_prepared_transactions", "100"),
    ("max_replication_slots", "4"),
    ("track_commit_timestamp", "on"),
    ("shared_buffers", "512MB"),
    ("max_locks_per_transaction", "128"),
    ("fsync", "off"),
    ("timezone", "UTC"),
    ("datestyle", "iso, mdy"),
    ("compute_query_id", "regress"),
];

/// Contrib modules with index or WAL behaviour of their own.
const CONTRIB: &[&str] = &[
    "amcheck",
    "bloom",
    "btree_gin",
    "btree_gist",
    "cube",
    "hstore",
    "intarray",
    "ltree",
    "pageinspect",
    "pg_surgery",
    "pg_trgm",
    "pg_visibility",
    "pgrowlocks",
    "pgstattuple",
    "seg",
    "test_decoding",
];

#[derive(Parser)]
struct Arguments {
    /// PostgreSQL's source, as `scripts/postgres-source.sh` prints it.
    #[arg(long)]
    source: PathBuf,
    /// Run only stages whose name starts like this: core, isolation, contrib, workload, mutants.
    #[arg(long, default_value = "")]
    only: String,
    /// Where outputs of the tests are left.
    #[arg(long, default_value = "target/redo-check")]
    keep: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match all(&arguments).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("redo-check failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn all(arguments: &Arguments) -> anyhow::Result<bool> {
    e2e::emptied_directory(&arguments.keep)?;
    let sources = Sources::prepare(&arguments.source)?;
    let mut total = Report::default();
    let contrib: Vec<Suite> = sources.contrib()?;
    let of_interest = |suite: &Suite| {
        let module = suite.name.trim_start_matches("contrib/").trim_end_matches("_isolation");
        CONTRIB.contains(&module)
    };
    let stages: [(&str, Vec<Suite>); 3] = [
        ("core", vec![sources.core()?]),
        ("isolation", vec![sources.isolation()?]),
        ("contrib", contrib.into_iter().filter(of_interest).collect()),
    ];
    for (name, suites) in &stages {
        if name.starts_with(&arguments.only) {
            // Several contrib modules' tests want to find dead rows where they left them.
            let autovacuum = if *name == "contrib" { "off" } else { "on" };
            total.add(
                stage(name, &[("autovacuum", autovacuum)], |target| {
                    run_suites(&sources, suites, target, &arguments.keep)
                })
                .await?,
            );
        }
    }
    if "workload".starts_with(&arguments.only) {
        // Without full-page images, every change goes through redo.
        // With them, hints are logged too.
        for images in ["off", "on"] {
            let settings = [("full_page_writes", images), ("wal_log_hints", images), ("autovacuum", "off")];
            total.add(stage("workload", &settings, |target| Workload::new(target).run()).await?);
        }
    }
    let mut uncaught = 0;
    if "mutants".starts_with(&arguments.only) {
        uncaught = mutants().await?;
    }
    Ok(verdict(&total, uncaught, arguments.only.is_empty()))
}

/// Prints the outcome. True when nothing differed and, after a whole run, everything was seen.
fn verdict(total: &Report, uncaught: usize, whole: bool) -> bool {
    println!("\nin all:\n{total}");
    let unseen: Vec<&str> = RECORD_TYPES.iter().copied().filter(|kind| !total.kinds.contains_key(*kind)).collect();
    println!("never seen in these tests, as expected:");
    NEVER_SEEN.iter().for_each(|(kind, reason)| println!("  {kind}: {reason}"));
    if whole && !unseen.is_empty() {
        println!("not seen, although these tests write them: {unseen:?}");
    }
    let (records, types, mismatches) = (total.records(), total.kinds.len(), total.mismatches());
    println!("records={records} types={types} mismatches={mismatches} mutants_uncaught={uncaught}");
    mismatches == 0 && uncaught == 0 && (unseen.is_empty() || !whole)
}

/// Runs work on a new server and checks all that it wrote.
async fn stage(
    name: &str,
    settings: &[(&str, &str)],
    work: impl FnOnce(&Target) -> anyhow::Result<()>,
) -> anyhow::Result<Report> {
    let began = Instant::now();
    let recorded = Recorded::make(settings, work).await.with_context(|| format!("stage {name}"))?;
    let standby = Standby::replay(&recorded.before(), &recorded.server)
        .await
        .with_context(|| format!("standby of stage {name}"))?;
    println!("{name}: WAL was written and replayed by a standby, {:.0} s", began.elapsed().as_secs_f64());
    let (before, after, copy) = (recorded.before(), recorded.server.data_dir(), standby.data_dir());
    let report = tokio::task::spawn_blocking(move || check_with_standby(&before, &after, Some(&copy))).await?;
    println!("{name} ({:.0} s):\n{report}", began.elapsed().as_secs_f64());
    Ok(report)
}

/// A stopped server with all its WAL, and the copy of its data directory from before.
struct Recorded {
    server: StockServer,
    home: tempfile::TempDir,
}

impl Recorded {
    async fn make(
        settings: &[(&str, &str)],
        work: impl FnOnce(&Target) -> anyhow::Result<()>,
    ) -> anyhow::Result<Recorded> {
        let settings: Vec<_> = SETTINGS.iter().chain(settings).copied().collect();
        let mut server = StockServer::create(&settings)?;
        let recorded_in = tempfile::Builder::new().prefix("redo-check-").tempdir()?;
        std::fs::set_permissions(recorded_in.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        run(Command::new("cp").arg("-a").arg(server.data_dir()).arg(recorded_in.path().join("before")))?;
        server.start().await?;
        work(&Target::local("stock", server.socket_dir()))?;
        server.stop()?;
        Ok(Recorded { server, home: recorded_in })
    }

    fn before(&self) -> PathBuf {
        self.home.path().join("before")
    }
}

fn run_suites(sources: &Sources, suites: &[Suite], target: &Target, keep: &Path) -> anyhow::Result<()> {
    // Contrib modules' tests connect as the user that they run as.
    let role = format!("create role \"{}\" superuser login", host_user()?);
    run(target.client("psql")?.args(["-X", "-q", "-c", &role]))?;
    for suite in suites {
        let outcomes = sources.run(suite, target, keep)?;
        let passed = outcomes.passed.values().filter(|passed| **passed).count();
        println!("{}: {passed} of {} tests as the source's release expects", suite.name, outcomes.passed.len());
    }
    Ok(())
}

/// How many broken versions of redo went unnoticed.
async fn mutants() -> anyhow::Result<usize> {
    let settings = [("full_page_writes", "off"), ("autovacuum", "off")];
    let recorded = Recorded::make(&settings, |target| Workload::new(target).run()).await?;
    let mutants = Mutants::prepare()?;
    let caught = |oracle: &Path| -> anyhow::Result<bool> {
        let output = Command::new(oracle).arg(recorded.before()).arg(recorded.server.data_dir()).output()?;
        // Anything but success is a catch: a mutant may as well panic.
        Ok(!output.status.success())
    };
    ensure!(!caught(&mutants.build_sound()?)?, "redo as it is must pass");
    let mut uncaught = 0;
    for mutant in Mutants::ALL {
        let was_caught = caught(&mutants.build(&mutant)?)?;
        println!("mutant: {}: {}", mutant.name, if was_caught { "caught" } else { "NOT CAUGHT" });
        uncaught += usize::from(!was_caught);
    }
    Ok(uncaught)
}
