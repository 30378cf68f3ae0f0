//! `dormouse storage`: whether what the object store has is whole.

use std::{process::ExitCode, time::Duration};

use anyhow::Context;
use clap::Subcommand;
use pageserver::{
    ObjectStoreConfig,
    check::{CheckReport, Repair, check_project},
    remote::{DiskCache, Remote},
};
use types::ProjectId;

use crate::logging::{self, LogFormat};

/// Memory for blocks; everything is read once.
const CACHE_BYTES: u64 = 1 << 20;

/// `dormouse storage …`.
#[derive(Subcommand)]
pub enum StorageCommand {
    /// Read everything that the object store has of a project: checksums, references, objects that nothing refers to
    #[command(
        after_help = "Ends with 1 when something is damaged. Orphans are no damage: a pageserver at work has some for a while.\n\nExamples:\n  dormouse storage check quiet-lake-12 --object-store ./store\n  dormouse storage check quiet-lake-12 --object-store s3://bucket/prefix --repair"
    )]
    Check(CheckArguments),
}

/// Settings of `dormouse storage check`.
#[derive(clap::Args)]
pub struct CheckArguments {
    /// The project's id
    project: ProjectId,
    /// A directory, or s3://bucket/prefix (with AWS_* environment variables)
    #[arg(long, env = "DORMOUSE_OBJECT_STORE")]
    object_store: String,
    /// Remove objects that nothing refers to and that are older than --safe-age
    #[arg(long)]
    repair: bool,
    /// How old an orphan must be to be removed; a pageserver may still be about to refer to a younger one
    #[arg(long, default_value = "1d", value_parser = humantime::parse_duration)]
    safe_age: Duration,
}

/// Runs a storage command.
pub fn main(command: StorageCommand, format: LogFormat) -> anyhow::Result<ExitCode> {
    logging::start(format, "warn");
    let StorageCommand::Check(arguments) = command;
    let store = ObjectStoreConfig::parse(&arguments.object_store).context("--object-store")?;
    let repair = if arguments.repair { Repair::OlderThan(arguments.safe_age) } else { Repair::No };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let report = runtime.block_on(async {
        let remote = Remote::open(&store, DiskCache::disabled(), CACHE_BYTES)?;
        Ok::<_, anyhow::Error>(check_project(&remote, &arguments.project, repair).await?)
    })?;
    anyhow::ensure!(
        report.branches > 0 || !report.damage.is_empty(),
        "the object store has no project {}",
        arguments.project
    );
    print(&report);
    Ok(if report.damage.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(report: &CheckReport) {
    let mib = report.bytes as f64 / f64::from(1 << 20);
    println!("{} branches, {} layers, {} values, {mib:.1} MiB read", report.branches, report.layers, report.values);
    if report.wal_objects > 0 {
        let mib = report.wal_bytes as f64 / f64::from(1 << 20);
        println!("{} pieces of WAL from safekeepers, {mib:.1} MiB", report.wal_objects);
    }
    report.damage.iter().for_each(|damage| println!("damaged: {damage}"));
    report.orphans.iter().for_each(|(object, bytes)| println!("orphan: {object} ({bytes} bytes)"));
    match (report.damage.len(), report.orphans.len()) {
        (0, 0) => println!("All is whole."),
        (damaged, orphans) => println!("{damaged} damaged, {orphans} orphans, {} of them removed.", report.removed),
    }
}
