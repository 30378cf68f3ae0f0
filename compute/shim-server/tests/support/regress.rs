//! The core regression suite. Needs PostgreSQL's sources (`DORMOUSE_TEST_PGSRC`), a C compiler and minutes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::{Server, give_to_postgres, postgres_bin, run};

/// Runs the suite on both servers; every test must say the same on both, right or wrong.
pub fn compare(dir: &Path, plain: &Server, shimmed: &Server) {
    let suite = prepare(dir);
    let (left, right) = (results(dir, &suite, plain, "out-plain"), results(dir, &suite, shimmed, "out-shimmed"));
    let mut differing = Vec::new();
    for entry in fs::read_dir(&left).expect("results") {
        let name = entry.expect("entry").file_name();
        let diff = Command::new("diff").arg("-u").arg(left.join(&name)).arg(right.join(&name)).output().expect("diff");
        if !diff.status.success() {
            let text = String::from_utf8_lossy(&diff.stdout);
            eprintln!("{}", text.lines().take(40).collect::<Vec<_>>().join("\n"));
            differing.push(name);
        }
    }
    assert!(differing.is_empty(), "{differing:?}");
}

/// The suite's files and its library, where Postgres's user can use them.
fn prepare(dir: &Path) -> PathBuf {
    let sources = std::env::var("DORMOUSE_TEST_PGSRC").expect("DORMOUSE_TEST_PGSRC names PostgreSQL's sources");
    let suite = dir.join("regress");
    run(Command::new("cp").arg("-r").arg(Path::new(&sources).join("src/test/regress")).arg(&suite));
    let include = run(Command::new("pg_config").arg("--includedir-server"));
    let files = [suite.join("regress.so"), suite.join("regress.c")];
    run(Command::new("cc").args(["-shared", "-fPIC", "-O1", "-I", include.trim(), "-o"]).args(files));
    for name in ["refint.so", "autoinc.so"] {
        run(Command::new("cp").arg(postgres_bin("../lib").join(name)).arg(&suite));
    }
    run(Command::new("chown").args(["-R", "postgres"]).arg(&suite));
    suite
}

fn results(dir: &Path, suite: &Path, server: &Server, name: &str) -> PathBuf {
    let out = dir.join(name);
    fs::create_dir(&out).expect("mkdir");
    give_to_postgres(&out);
    server.sql("create database regression template template0");
    let output = server
        .client("../lib/pgxs/src/test/regress/pg_regress")
        .args(["--use-existing", "--dbname=regression", "--max-connections=10", "--user=dormouse_admin"])
        .arg(format!("--bindir={}", postgres_bin("").display()))
        .arg(format!("--dlpath={}", suite.display()))
        .arg(format!("--inputdir={}", suite.display()))
        .arg(format!("--outputdir={}", out.display()))
        .arg(format!("--schedule={}", suite.join("parallel_schedule").display()))
        .arg(format!("--host={}", server.dir.display()))
        .output()
        .expect("pg_regress");
    let said = String::from_utf8_lossy(&output.stdout);
    let summary = said.lines().find(|line| line.contains(" tests ")).unwrap_or("no summary");
    eprintln!("{name}: {summary}");
    out.join("results")
}
