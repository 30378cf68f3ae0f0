//! A stock server on plain files, without the shim: the other end of logical replication.

use std::{path::PathBuf, process::Command};

use super::{BIN_DIR, World, as_postgres};

/// A running stock server; stopped when dropped.
pub struct Stock {
    pgdata: PathBuf,
    /// Where its socket is.
    pub directory: PathBuf,
}

impl World {
    /// Starts a stock server on a copy of the template's directory.
    pub fn stock(&self, settings: &str) -> Stock {
        let directory = self.runtime.path().join("stock");
        let pgdata = self.disk.path().join("stock");
        let template = self.disk.path().join("template/pgdata");
        std::fs::create_dir(&directory).expect("directory");
        run(Command::new("cp").arg("-a").arg(template).arg(&pgdata));
        run(Command::new("chown").arg("postgres").arg(&directory));
        let conf = format!(
            "listen_addresses = ''\nunix_socket_directories = '{}'\nwal_level = logical\nfsync = off\n\
             wal_retrieve_retry_interval = 200ms\n{settings}\n",
            directory.display()
        );
        std::fs::write(pgdata.join("postgresql.conf"), conf).expect("conf");
        let log = self.disk.path().join("template/stock.log");
        run(as_postgres(&PathBuf::from(BIN_DIR).join("pg_ctl"))
            .args(["-w", "-t", "60", "-D"])
            .arg(&pgdata)
            .arg("-l")
            .arg(log)
            .arg("start"));
        Stock { pgdata, directory }
    }
}

impl Stock {
    /// Connects as the superuser.
    pub async fn connect(&self) -> tokio_postgres::Client {
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.directory).port(5432).user("dormouse_admin").dbname("postgres");
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.expect("connect");
        tokio::spawn(connection);
        client
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        let mut stop = as_postgres(&PathBuf::from(BIN_DIR).join("pg_ctl"));
        let _ = stop.args(["-m", "immediate", "-D"]).arg(&self.pgdata).arg("stop").output();
    }
}

fn run(command: &mut Command) {
    // Not captured: the server that pg_ctl starts would keep a pipe open.
    let status = command.stdout(std::process::Stdio::null()).status().expect("run");
    assert!(status.success(), "{command:?}");
}
