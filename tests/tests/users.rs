//! What a project's user may do, and what he may not: nothing that reaches the host's files.

use anyhow::ensure;
use e2e::{Cluster, ClusterOptions, Project, sql};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_have_what_a_hosted_service_gives_and_no_more() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = check(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

const ALLOWED: &[&str] = &[
    "create role app login password 'a-long-password-1'",
    "create role reader",
    "grant pg_read_all_data to reader",
    "create database other",
    "create database copied strategy file_copy template template0",
    "drop database copied",
    "create extension pgcrypto",
    "create extension hstore",
    "create extension citext",
    "create extension pg_trgm",
    "create extension btree_gist",
    "create schema s create table t (a int primary key)",
    "create publication p for table s.t",
    "alter role current_user set work_mem = '8MB'",
    "select count(query) from pg_stat_activity",
    "select pg_database_size('postgres')",
    "begin; prepare transaction 'two-phase'",
    "rollback prepared 'two-phase'",
    "select pg_advisory_lock(1), pg_advisory_unlock(1)",
    "listen l",
    "notify l",
    "select lo_unlink(lo_from_bytea(0, 'x'))",
    "select pg_create_physical_replication_slot('s')",
    "select pg_drop_replication_slot('s')",
    "drop database other",
    "drop role app",
];

const REFUSED: &[&str] = &[
    "copy (select 1) to '/tmp/dormouse-escape'",
    "copy s.t from '/etc/passwd'",
    "copy s.t to program 'id'",
    "select pg_read_file('/etc/passwd')",
    "select pg_ls_dir('/')",
    "select lo_import('/etc/passwd')",
    "select lo_export(0, '/tmp/dormouse-escape')",
    "load '/tmp/x.so'",
    "create function f() returns int language c as '/tmp/x', 'f'",
    "create extension file_fdw",
    "create extension adminpack",
    "create tablespace escape location '/tmp'",
    "alter system set log_directory = '/tmp'",
    "create role mighty superuser",
    "alter role current_user superuser",
    "set role dormouse_admin",
    "grant dormouse_admin to current_user",
    "grant pg_execute_server_program to current_user",
    "grant pg_read_server_files to current_user",
    "grant pg_write_server_files to current_user",
    "create role thief in role pg_execute_server_program",
    "alter role dormouse_admin password 'mine-now-1234'",
    "alter role dormouse_superuser superuser",
    "set session_preload_libraries = '/tmp/x.so'",
    "update pg_authid set rolsuper = true where rolname = current_user",
];

async fn check(cluster: &Cluster) -> anyhow::Result<()> {
    let project = cluster.api()?.create_project("users").await?;
    let client = sql::connect(&project.uri).await?;
    ensure!(sql::value(&client, "select rolsuper from pg_roles where rolname = current_user").await? == "f");
    for statement in ALLOWED {
        let outcome = client.batch_execute(statement).await;
        ensure!(outcome.is_ok(), "{statement}: {outcome:?}");
    }
    for statement in REFUSED {
        let error = client.batch_execute(statement).await.err();
        let code = error.as_ref().and_then(|e| e.code().map(|code| code.code().to_owned()));
        // insufficient_privilege, and what stands for it in a few places.
        let refused = code.as_deref().is_some_and(|code| ["42501", "0LP01", "55P02"].contains(&code));
        ensure!(refused, "{statement}: {error:?}");
    }
    tablespaces(cluster, &project).await
}

/// Not even a superuser gets one: there is no other disk, and the error says so.
async fn tablespaces(cluster: &Cluster, project: &Project) -> anyhow::Result<()> {
    let admin = cluster.superuser(&project.endpoint, "postgres").await?;
    let directory = tempfile::tempdir()?;
    e2e::stock::give_to_postgres(directory.path())?;
    let statement = format!("create tablespace t location '{}'", directory.path().display());
    let error = admin.batch_execute(&statement).await.err();
    let message = error.as_ref().and_then(|e| e.as_db_error().map(|e| e.message().to_owned())).unwrap_or_default();
    ensure!(message.contains("symbolic link") && message.contains("not supported"), "{error:?}");
    ensure!(sql::value(&admin, "select count(*) from pg_tablespace").await? == "2");
    Ok(())
}
