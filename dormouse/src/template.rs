//! The template: one `initdb`, once, in the object store. Every project's first branch is a child of it.

use std::{
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::Context;
use clap::Subcommand;
use control_plane::{host, storage};
use indicatif::{ProgressBar, ProgressStyle};
use nix::unistd::{Gid, Uid, User};
use pageserver::ObjectStoreConfig;

use crate::logging::{self, LogFormat, tell};

/// `dormouse template …`.
#[derive(Subcommand)]
pub enum TemplateCommand {
    /// Make the template of PostgreSQL 15 in an object store (initdb and upload); `dormouse up` does this by itself
    #[command(
        after_help = "Examples:\n  dormouse template create --object-store ./store\n  AWS_ENDPOINT_URL=http://127.0.0.1:9000 AWS_ALLOW_HTTP=true AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… \\\n    dormouse template create --object-store s3://bucket/prefix"
    )]
    Create(CreateArguments),
}

/// Settings of `dormouse template create`.
#[derive(clap::Args)]
pub struct CreateArguments {
    /// A directory, or s3://bucket/prefix (with AWS_* environment variables)
    #[arg(long, env = "DORMOUSE_OBJECT_STORE")]
    object_store: String,
    /// The directory of PostgreSQL 15's programs [default: Debian's, or what pg_config says]
    #[arg(long, env = "DORMOUSE_POSTGRES_BIN_DIR")]
    postgres_bin_dir: Option<PathBuf>,
    /// The user that Postgres runs as when Dormouse is root [default: postgres if there is one, else nobody]
    #[arg(long, env = "DORMOUSE_POSTGRES_USER")]
    postgres_user: Option<String>,
}

/// The database that a new project has unless it asks for another.
fn make_default_database(bin_dir: &Path, pgdata: &Path, user: Option<&str>) -> anyhow::Result<()> {
    let program = bin_dir.join("postgres");
    let mut command = Command::new(&program);
    command.args(["--single", "-F", "-j", "-D"]).arg(pgdata).arg("postgres");
    run_as(&mut command, user)?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let sql = format!("CREATE DATABASE {} STRATEGY file_copy\n", storage::DEFAULT_DATABASE);
    child.stdin.take().context("standard input")?.write_all(sql.as_bytes())?;
    let output = child.wait_with_output().with_context(|| format!("running {}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    // In single-user mode an error of a statement is printed and does not end the program badly.
    anyhow::ensure!(output.status.success() && !said.contains("ERROR"), "making the default database: {}", said.trim());
    Ok(())
}

/// Runs a template command.
pub fn main(command: TemplateCommand, format: LogFormat) -> anyhow::Result<ExitCode> {
    logging::start(format, "warn");
    let TemplateCommand::Create(arguments) = command;
    let store = ObjectStoreConfig::parse(&arguments.object_store).context("--object-store")?;
    let bin_dir = host::postgres_bin_dir(arguments.postgres_bin_dir.as_deref())?;
    let user = host::postgres_user(arguments.postgres_user.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let made = runtime.block_on(Box::pin(ensure(&store, &bin_dir, user.as_deref())))?;
    println!("{}", if made { "The template was made." } else { "The template is there already." });
    Ok(ExitCode::SUCCESS)
}

/// Makes the template unless the object store has it; true when it was made.
pub async fn ensure(store: &ObjectStoreConfig, bin_dir: &Path, user: Option<&str>) -> anyhow::Result<bool> {
    let branch = storage::template();
    let there =
        pageserver::template_exists(store, &branch).await.context("looking for the template in the object store")?;
    if there.is_some() {
        return Ok(false);
    }
    let scratch = Scratch::new(user)?;
    let pgdata = scratch.0.join("pgdata");
    tell("Making the template that new projects start from (once).");
    initdb(bin_dir, &pgdata, user)?;
    make_default_database(bin_dir, &pgdata, user)?;
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("  {wide_bar} {bytes}/{total_bytes}")?;
    bar.set_style(style);
    let shown = bar.clone();
    let imported = pageserver::import_template(store, &branch, &pgdata, move |done, total| {
        shown.set_length(total);
        shown.set_position(done);
    });
    let lsn = imported.await.context("importing the template")?;
    bar.finish_and_clear();
    tracing::info!(%lsn, "template was made");
    Ok(true)
}

fn initdb(bin_dir: &Path, pgdata: &Path, user: Option<&str>) -> anyhow::Result<()> {
    let program = bin_dir.join("initdb");
    let mut command = Command::new(&program);
    command.args(["--no-sync", "-U", "dormouse_admin", "--encoding=UTF8", "--locale=C.UTF-8", "-D"]).arg(pgdata);
    run_as(&mut command, user)?;
    let output = command.output().with_context(|| format!("running {}", program.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow::bail!("initdb failed ({}): {}", output.status, said.trim());
    }
    Ok(())
}

fn run_as(command: &mut Command, user: Option<&str>) -> anyhow::Result<()> {
    // Settings of the caller's own Postgres must not reach this one.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
        command.env_remove(name);
    }
    command.env("TZ", "UTC").current_dir("/").stdin(Stdio::null());
    if let Some((uid, gid)) = ids(user)? {
        command.uid(uid.as_raw()).gid(gid.as_raw());
    }
    Ok(())
}

fn ids(user: Option<&str>) -> anyhow::Result<Option<(Uid, Gid)>> {
    let Some(name) = user else { return Ok(None) };
    let user = User::from_name(name)?.with_context(|| format!("no user {name}"))?;
    Ok(Some((user.uid, user.gid)))
}

/// A temporary directory of Postgres's user, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(user: Option<&str>) -> anyhow::Result<Scratch> {
        let path = std::env::temp_dir().join(format!("dormouse-template-{:016x}", rand::random::<u64>()));
        std::fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        let scratch = Scratch(path);
        if let Some((uid, gid)) = ids(user)? {
            nix::unistd::chown(&scratch.0, Some(uid), Some(gid))?;
        }
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
