//! What a database takes in the object store, and what is written there: after a load, and after ten rewrites of every row
//! with no history kept. Beside it the stock server's own data directory.

use std::path::Path;

use pageserver::branch::Tuning;

use crate::{
    ingest::Storage,
    redo::{Recorded, client, mb},
};

const REWRITES: usize = 10;

/// Prints `space_ratio= load_ratio= write_amp=`: bytes stored by byte of database at the end and after the load, and bytes
/// written by byte of WAL.
pub async fn run(scale: u32) -> anyhow::Result<()> {
    let scale = scale.to_string();
    let load = |home: &Path| client(home, "pgbench", &["-i", "-q", "-s", &scale]);
    let mut stock_bytes = 0;
    let recorded = Recorded::make(&[], |home| {
        load(home)?;
        for _ in 0..REWRITES {
            let sql = ["-c", "update pgbench_accounts set abalance = abalance + 1", "-c", "vacuum pgbench_accounts"];
            client(home, "psql", &[&["-X", "-q", "-v", "ON_ERROR_STOP=1"], &sql[..]].concat())?;
        }
        stock_bytes = bytes_below(&home.join("data/base"))? + bytes_below(&home.join("data/global"))?;
        Ok(())
    })
    .await?;
    let directory = tempfile::tempdir()?;
    let tuning = Tuning { removal_delay: std::time::Duration::ZERO, ..Tuning::default() };
    let storage = Storage::over(&recorded, directory.path(), tuning).await?;
    let (template_bytes, put_before) = (bytes_below(directory.path())?, storage.remote.put_bytes());
    let mut wal_bytes = 0;
    let pieces = recorded.wal(storage.start)?;
    let loaded_at = pieces.len() / (REWRITES + 1);
    let mut load_ratio = 0.0;
    for (number, (at, piece)) in pieces.iter().enumerate() {
        storage.branch.ingest_wal(*at, piece).await?;
        wal_bytes += piece.len() as u64;
        if number == loaded_at {
            load_ratio = settle(&storage, directory.path(), template_bytes).await?;
        }
    }
    let ratio = settle(&storage, directory.path(), template_bytes).await?;
    let put = storage.remote.put_bytes() - put_before;
    println!(
        "stock data directory {:.0} MB; {:.0} MB of WAL, {:.0} MB written",
        mb(stock_bytes),
        mb(wal_bytes),
        mb(put)
    );
    println!("space_ratio={ratio:.2} load_ratio={load_ratio:.2} write_amp={:.2}", put as f64 / wal_bytes as f64);
    Ok(())
}

/// Writes everything out, drops all history; bytes stored for the branch by byte of its database.
async fn settle(storage: &Storage, store: &Path, template_bytes: u64) -> anyhow::Result<f64> {
    let lsn = storage.branch.flush().await?;
    storage.branch.compact().await?;
    let collected = storage.branch.collect_garbage(lsn, &[], &[]).await?;
    let database = storage.branch.logical_bytes().await?;
    let stored = bytes_below(store)? - template_bytes;
    println!("database {:.0} MB, stored {:.0} MB ({} layers collected)", mb(database), mb(stored), collected.layers);
    Ok(stored as f64 / database as f64)
}

fn bytes_below(directory: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { bytes_below(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}
