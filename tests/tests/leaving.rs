//! Leaving is easy: what stock tools make of a running compute is an ordinary cluster, and its WAL and sizes are ordinary.

use anyhow::{Context, ensure};
use e2e::{
    Cluster, ClusterOptions, Project,
    regress::{Dump, Target, amcheck},
    sql,
    stock::{StockServer, as_postgres, run},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_backup_of_a_running_compute_is_a_stock_cluster() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = leave(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

const OBJECTS: &str = "
    create table plain (id serial primary key, m text);
    insert into plain (m) select md5(i::text) from generate_series(1, 50000) i;
    create index on plain (m); create index on plain using gin (to_tsvector('simple', m));
    create table parted (a int, b text) partition by range (a);
    create table parted_1 partition of parted for values from (0) to (100);
    create materialized view mat as select count(*) from plain;
    select lo_from_bytea(0, 'large');
    create table wide as select string_agg(md5(i::text), '') w from generate_series(1, 20000) i;
    create unlogged table fast as select 1 a";

async fn leave(cluster: &Cluster) -> anyhow::Result<()> {
    let project = cluster.api()?.create_project("leaving").await?;
    sql::psql(&project.uri, OBJECTS).await?;
    // Some of it comes from the pageserver, some is only in memory.
    cluster.api()?.suspend(&project.id, &project.endpoint).await?;
    sql::psql(&project.uri, "update plain set m = m || 'x' where id % 3 = 0").await?;
    sql::psql(&project.uri, "vacuum plain").await?;

    let compute = Target::local("compute", cluster.runtime_dir().join(&project.endpoint));
    let mut stock = StockServer::on(|data| {
        run(compute.client("pg_basebackup")?.args(["-X", "stream", "-c", "fast", "-D"]).arg(data))?;
        run(as_postgres(e2e::pg_bin_dir().join("pg_verifybackup"))?.arg(data)).map(drop)
    })?;
    stock.start().await?;
    let copy = Target::local("copy", stock.socket_dir());
    let dumps = tempfile::tempdir()?;
    let left = Dump::take(&compute, &dumps.path().join("compute.sql"))?;
    let right = Dump::take(&copy, &dumps.path().join("copy.sql"))?;
    ensure!(left.difference(&right)?.is_none(), "{:?}", left.difference(&right)?);
    ensure!(std::fs::metadata(dumps.path().join("copy.sql"))?.len() > 1_000_000, "the dump holds the rows");

    sizes(cluster, &project, &stock).await?;
    wal(cluster, &project, &compute).await?;
    for target in [&copy, &compute] {
        let found = amcheck(target)?;
        ensure!(found.is_empty(), "{}: {found}", target.name);
    }
    stock.stop()
}

/// Every relation has the size that it has on the stock server, by each way of asking.
async fn sizes(cluster: &Cluster, project: &Project, stock: &StockServer) -> anyhow::Result<()> {
    let relations = "select string_agg(concat_ws(' ', relname, pg_relation_size(oid), pg_table_size(oid), pg_total_relation_size(oid),
            (select size from pg_stat_file(pg_relation_filepath(oid)))), e'\\n' order by relname)
        from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'i', 'm', 'S') and relpersistence = 'p'";
    let compute = cluster.superuser(&project.endpoint, "dormouse").await?;
    let copy = stock.connect("dormouse").await?;
    let (left, right) = (sql::value(&compute, relations).await?, sql::value(&copy, relations).await?);
    ensure!(left == right && left.contains("plain_pkey"), "on the compute:\n{left}\non the copy:\n{right}");
    // Not all files of the directory are relations: the copy has its relation cache file, say.
    let database = "select pg_database_size('dormouse')";
    let (left, right) = (sql::value(&compute, database).await?, sql::value(&copy, database).await?);
    let (left, right): (f64, f64) = (left.parse()?, right.parse()?);
    ensure!((left / right - 1.0).abs() < 0.03, "the database has {left} bytes on the compute, {right} on the copy");
    Ok(())
}

/// `pg_waldump` reads what the compute has just written, to the record.
async fn wal(cluster: &Cluster, project: &Project, compute: &Target) -> anyhow::Result<()> {
    let client = cluster.superuser(&project.endpoint, "dormouse").await?;
    let position = "select pg_current_wal_insert_lsn()";
    let from = sql::value(&client, position).await?;
    client.batch_execute("insert into plain (m) select 'waldump' from generate_series(1, 300)").await?;
    let to = sql::value(&client, position).await?;
    let mut waldump = as_postgres(e2e::pg_bin_dir().join("pg_waldump"))?;
    waldump.arg("-p").arg(compute.host.join("pgdata/pg_wal")).args(["-s", &from, "-e", &to]);
    let said = run(&mut waldump).context("pg_waldump")?;
    let inserts = said.lines().filter(|line| line.contains("rmgr: Heap") && line.contains("INSERT")).count();
    ensure!(inserts == 300 && said.contains("rmgr: Transaction") && said.contains("COMMIT"), "{inserts} inserts");
    Ok(())
}
