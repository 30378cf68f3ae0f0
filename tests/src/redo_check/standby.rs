//! A stock standby that starts from the primary's files from before and replays all that the primary wrote.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use crate::stock::{StockServer, give_to_postgres, run};

/// How long all the WAL may take.
const LIMIT: Duration = Duration::from_secs(3600);

/// It has replayed everything and was stopped.
pub struct Standby {
    server: StockServer,
}

impl Standby {
    /// Replays the WAL of a stopped primary, up to its last checkpoint, on a copy of `before`.
    pub async fn replay(before: &Path, primary: &StockServer) -> anyhow::Result<Standby> {
        let wal_dir = primary.data_dir().join("pg_wal");
        let mut server = StockServer::on(|data_dir| {
            run(Command::new("cp").arg("-a").arg(before).arg(data_dir))?;
            let signal = data_dir.join("standby.signal");
            std::fs::write(&signal, "")?;
            give_to_postgres(&signal)?;
            let conf = data_dir.join("postgresql.conf");
            let mut settings = std::fs::read_to_string(&conf)?;
            settings.push_str(&format!("restore_command = 'cp \"{}/%f\" \"%p\"'\n", wal_dir.display()));
            // Whoever asks how far it is must not hold it up.
            settings.push_str("max_standby_archive_delay = 0\n");
            std::fs::write(&conf, settings)?;
            Ok(())
        })?;
        server.start().await?;
        let end = redo_oracle::control_file(&primary.data_dir()).checkpoint_lsn();
        let deadline = Instant::now() + LIMIT;
        // Records that drop a database or a tablespace cut connections: each question gets one of its own.
        while !has_replayed(&server, &end.to_string()).await.unwrap_or(false) {
            ensure!(Instant::now() < deadline, "the standby did not come to {end}:\n{}", server.log());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        // A restart point writes all that it has.
        server.stop().context("stopping the standby")?;
        Ok(Standby { server })
    }

    /// Its data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.server.data_dir()
    }
}

async fn has_replayed(server: &StockServer, lsn: &str) -> anyhow::Result<bool> {
    let client = server.connect("postgres").await?;
    let row = client.query_one(&format!("select pg_last_wal_replay_lsn() > '{lsn}'::pg_lsn"), &[]).await?;
    Ok(row.get(0))
}
