//! Logs: to standard error, filtered by `DORMOUSE_LOG`.

use std::{
    fmt::Display,
    io::{IsTerminal, Write},
};

use tracing_subscriber::EnvFilter;

/// Shape of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging; `default_filter` counts unless `DORMOUSE_LOG` says otherwise.
pub fn start(format: LogFormat, default_filter: &str) {
    let filter = EnvFilter::try_from_env("DORMOUSE_LOG").unwrap_or_else(|_| EnvFilter::new(default_filter));
    let colours = std::io::stderr().is_terminal();
    // Standard error may be a file on a full disk. By default a line that can't be written is reported with `eprintln!`,
    // which panics there, in whatever task had something to say.
    let builder = tracing_subscriber::fmt().log_internal_errors(false);
    let builder = builder.with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}

/// Tells the person at the terminal. One who no longer listens (a closed pipe, a file on a full disk) is no reason to stop.
pub fn tell(message: impl Display) {
    let _ = writeln!(std::io::stderr(), "{message}");
}
