//! The suites: what they consist of, and running one on a server with `pg_regress`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};

use crate::stock::{SUPERUSER, as_postgres, give_to_postgres, host_user, run};

/// Contrib modules whose tests cannot be right on either server, and why.
const LEFT_OUT: &[(&str, &str)] = &[
    ("basic_archive", "archiving is not a compute's business"),
    ("sepgsql", "needs SELinux"),
    ("start-scripts", "no module"),
];

/// Sessions at a time: with 128 buffers, more would now and then find all of them pinned, on either server.
const MAX_SESSIONS: &str = "10";

/// PostgreSQL's source, copied to where the servers' user can read and write it.
pub struct Sources {
    root: tempfile::TempDir,
}

/// A server under test.
pub struct Target {
    /// Such as `stock`.
    pub name: &'static str,
    /// Where its socket is, or the host that it listens on.
    pub host: PathBuf,
    /// Its port.
    pub port: u16,
    /// What else libpq needs to know, as environment variables.
    pub environment: Vec<(&'static str, String)>,
    /// Who runs the core suite, and dumps: a superuser.
    pub superuser: String,
}

/// Tests that are run by one call of `pg_regress` or `pg_isolation_regress`.
#[derive(Debug, Clone)]
pub struct Suite {
    /// Such as `core` or `contrib/ltree`.
    pub name: String,
    program: &'static str,
    directory: PathBuf,
    tests: Vec<String>,
    options: Vec<String>,
    database: String,
    /// By default the superuser.
    user: Option<String>,
}

/// What a suite's tests came to on one server.
#[derive(Debug, Default)]
pub struct Outcomes {
    /// By test: whether it passed.
    pub passed: BTreeMap<String, bool>,
    /// Where their outputs are.
    pub results: PathBuf,
}

impl Target {
    /// A server by its socket, as the superuser of Dormouse's computes.
    pub fn local(name: &'static str, socket_dir: PathBuf) -> Target {
        Target { name, host: socket_dir, port: 5432, environment: Vec::new(), superuser: SUPERUSER.to_owned() }
    }

    /// One of PostgreSQL's programs, as the superuser's client of this server.
    pub fn client(&self, program: impl AsRef<Path>) -> anyhow::Result<Command> {
        let mut command = as_postgres(crate::pg_bin_dir().join(program))?;
        command.env("PGHOST", &self.host).env("PGPORT", self.port.to_string());
        command.env("PGUSER", &self.superuser).env("PGDATABASE", "postgres");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }
}

impl Sources {
    /// Copies the tests and builds the library that the core suite loads.
    pub fn prepare(source: &Path) -> anyhow::Result<Sources> {
        let root = tempfile::Builder::new().prefix("regress-").tempdir()?;
        std::fs::set_permissions(root.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        for part in ["src/test/regress", "src/test/isolation", "contrib"] {
            let to = root.path().join(part);
            std::fs::create_dir_all(to.parent().context("a path")?)?;
            run(Command::new("cp").arg("-r").arg(source.join(part)).arg(&to))?;
        }
        let sources = Sources { root };
        let regress = sources.regress();
        let include = run(Command::new("pg_config").arg("--includedir-server"))?;
        let files = [regress.join("regress.so"), regress.join("regress.c")];
        run(Command::new("cc").args(["-shared", "-fPIC", "-O1", "-I", include.trim(), "-o"]).args(files))?;
        for library in ["refint.so", "autoinc.so"] {
            std::fs::copy(crate::pg_bin_dir().join("../lib").join(library), regress.join(library))?;
        }
        give_all_to_postgres(sources.root.path())?;
        Ok(sources)
    }

    fn regress(&self) -> PathBuf {
        self.root.path().join("src/test/regress")
    }

    /// The core regression schedule.
    pub fn core(&self) -> anyhow::Result<Suite> {
        Suite::scheduled("core", "regress", self.regress(), "parallel_schedule")
    }

    /// The isolation schedule.
    pub fn isolation(&self) -> anyhow::Result<Suite> {
        Suite::scheduled("isolation", "isolation", self.root.path().join("src/test/isolation"), "isolation_schedule")
    }

    /// Each contrib module's regression tests, and its isolation tests.
    pub fn contrib(&self) -> anyhow::Result<Vec<Suite>> {
        let mut names: Vec<String> = Vec::new();
        for entry in std::fs::read_dir(self.root.path().join("contrib"))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let left_out = LEFT_OUT.iter().any(|(other, _)| *other == name);
            if entry.path().join("Makefile").exists() && !left_out {
                names.push(name);
            }
        }
        names.sort();
        let mut suites = Vec::new();
        for name in names {
            let directory = self.root.path().join("contrib").join(&name);
            for (variable, options, program) in
                [("REGRESS", "REGRESS_OPTS", "regress"), ("ISOLATION", "ISOLATION_OPTS", "isolation")]
            {
                let tests = make_variable(&directory, variable)?;
                if tests.is_empty() {
                    continue;
                }
                // Settings come from the server; a library is looked for where ours is.
                let mut options = make_variable(&directory, options)?;
                options.retain(|option| option.starts_with("--load-extension") || option.starts_with("--encoding"));
                let kind = if program == "isolation" { "_isolation" } else { "" };
                suites.push(Suite {
                    name: format!("contrib/{name}{kind}"),
                    program,
                    directory: directory.clone(),
                    tests,
                    options,
                    database: format!("contrib_regression_{name}{kind}"),
                    user: Some(host_user()?),
                });
            }
        }
        Ok(suites)
    }

    /// Runs a suite; its outputs are moved to `keep`.
    pub fn run(&self, suite: &Suite, target: &Target, keep: &Path) -> anyhow::Result<Outcomes> {
        // Both servers see the same paths: outputs name them.
        let output_dir = self.root.path().join("output");
        std::fs::create_dir(&output_dir)?;
        give_to_postgres(&output_dir)?;
        let program = format!("pg_{}", suite.program.replace("isolation", "isolation_regress"));
        let mut command = target.client(Path::new("../lib/pgxs/src/test").join(suite.program).join(program))?;
        command
            .current_dir(&suite.directory)
            .arg(format!("--bindir={}", crate::pg_bin_dir().display()))
            .arg(format!("--dlpath={}", self.regress().display()))
            .arg(format!("--inputdir={}", suite.directory.display()))
            .arg(format!("--outputdir={}", output_dir.display()))
            .arg(format!("--host={}", target.host.display()))
            .arg(format!("--port={}", target.port))
            .arg(format!("--user={}", suite.user.as_deref().unwrap_or(&target.superuser)))
            .arg(format!("--dbname={}", suite.database))
            .arg(format!("--max-connections={MAX_SESSIONS}"))
            .args(&suite.options)
            .args(&suite.tests);
        let output = command.output().with_context(|| format!("running {}", suite.name))?;
        let said = String::from_utf8_lossy(&output.stdout);
        let passed = verdicts(&said);
        ensure!(
            !passed.is_empty(),
            "{} on {}: no tests were run\n{said}\n{}",
            suite.name,
            target.name,
            String::from_utf8_lossy(&output.stderr)
        );
        let kept = keep.join(target.name).join(&suite.name);
        std::fs::create_dir_all(kept.parent().context("a path")?)?;
        run(Command::new("mv").arg(&output_dir).arg(&kept))?;
        std::fs::write(kept.join("said"), said.as_bytes())?;
        Ok(Outcomes { passed, results: kept.join("results") })
    }
}

impl Suite {
    fn scheduled(name: &str, program: &'static str, directory: PathBuf, schedule: &str) -> anyhow::Result<Suite> {
        Ok(Suite {
            name: name.to_owned(),
            program,
            options: vec![format!("--schedule={}", directory.join(schedule).display())],
            directory,
            tests: Vec::new(),
            database: if name == "core" { "regression".to_owned() } else { format!("{name}_regression") },
            user: None,
        })
    }
}

/// The words of a variable in a module's Makefile.
fn make_variable(directory: &Path, variable: &str) -> anyhow::Result<Vec<String>> {
    let mut make = Command::new("make");
    make.args(["-s", "USE_PGXS=1", "--eval", &format!("print-words: ; @echo '$({variable})'"), "print-words"]);
    let words = run(make.arg("-C").arg(directory))?;
    Ok(words.split_whitespace().map(str::to_owned).collect())
}

/// What `pg_regress` says of each test: `name ... ok   12 ms`, with `test` before it when it runs alone.
fn verdicts(said: &str) -> BTreeMap<String, bool> {
    let mut verdicts = BTreeMap::new();
    for line in said.lines() {
        let Some((name, verdict)) = line.split_once(" ... ") else { continue };
        let name = name.trim().trim_start_matches("test ").trim();
        let (ok, failed) = (verdict.starts_with("ok "), verdict.to_lowercase().starts_with("failed"));
        if !name.is_empty() && !name.contains(' ') && (ok || failed) {
            verdicts.insert(name.to_owned(), ok);
        }
    }
    verdicts
}

fn give_all_to_postgres(path: &Path) -> anyhow::Result<()> {
    give_to_postgres(path)?;
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            give_all_to_postgres(&entry.path())?;
        } else {
            give_to_postgres(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_read_from_lone_and_parallel_tests() {
        let said = "parallel group (2 tests):  boolean char\n     boolean                      ... ok           54 ms\n\
                    \u{20}    char                         ... FAILED       12 ms\ntest tablespace                   ... ok          220 ms\n\
                    \n 2 of 3 tests passed.\n";
        let wanted = [("boolean", true), ("char", false), ("tablespace", true)];
        assert_eq!(verdicts(said), wanted.map(|(name, ok)| (name.to_owned(), ok)).into());
    }
}
