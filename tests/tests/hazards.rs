//! What a page rebuilt from WAL does not have, and what a cache far smaller than the data could get wrong: one test each.
//!
//! Taking a rule out makes its test fail: the horizon of transactions in progress, sequences at a stop, segment numbers; without the
//! rule for pages of a build the test does not end. Two rules close gaps that no statement here falls into: the end of WAL at
//! the moment a page is written, and truncations that storage has not seen. Those are held by `page-cache`'s own tests.

use std::time::Duration;

use anyhow::Context;
use e2e::{Cluster, ClusterOptions, Project, processes, sql};
use serde_json::json;
use tokio_postgres::Client;

/// Clean pages, evicted pages that must stay, shared buffers: all far below what the tests write.
const CLEAN_MIB: &str = "1";
const SHARED_BUFFERS: &str = "1MB";

struct World {
    cluster: Cluster,
    project: Project,
}

impl World {
    async fn start(kept_mib: &str) -> anyhow::Result<World> {
        let arguments = ["--page-cache-mib", CLEAN_MIB, "--kept-pages-mib", kept_mib].map(str::to_owned).into();
        let cluster = Cluster::start(ClusterOptions { arguments, ..ClusterOptions::default() }).await?;
        let api = cluster.api()?;
        let project = api.create_project("hazards").await?;
        let path = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
        let settings = json!({"endpoint": {"settings": {"pg_settings": {
            "shared_buffers": SHARED_BUFFERS, "autovacuum": "off", "max_parallel_maintenance_workers": "0"
        }}}});
        api.wait_state(&project.id, &project.endpoint, "active", Duration::from_secs(60)).await?;
        api.ok("PATCH".parse()?, &path, Some(settings)).await?;
        let world = World { cluster, project };
        world.sleep().await?;
        Ok(world)
    }

    /// As the superuser, awake.
    async fn client(&self) -> anyhow::Result<Client> {
        sql::ask(&self.project.uri, "select 1").await?;
        self.cluster.superuser(&self.project.endpoint, "dormouse").await
    }

    /// From here on every page comes from the pageserver.
    async fn sleep(&self) -> anyhow::Result<()> {
        self.cluster.api()?.suspend(&self.project.id, &self.project.endpoint).await
    }

    /// SIGKILL for the agent and its Postgres.
    async fn crash(&self) -> anyhow::Result<()> {
        let running = processes::postgres_below(&self.cluster.runtime_dir());
        let postmaster = running.iter().find(|p| p.command.contains(" -D ")).context("no postmaster")?;
        processes::kill_hard(postmaster.parent)?;
        let _ = processes::kill_hard(postmaster.pid);
        let gone = || processes::postgres_below(&self.cluster.runtime_dir()).is_empty();
        processes::wait_until("all backends to end", Duration::from_secs(10), gone).await
    }
}

/// Runs `body`, with the services' logs where it fails.
async fn within<F>(kept_mib: &str, body: impl FnOnce(std::sync::Arc<World>) -> F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let world = std::sync::Arc::new(World::start(kept_mib).await?);
    body(world.clone()).await.map_err(|error| error.context(world.cluster.log()))
}

async fn expect(client: &Client, query: &str, wanted: &str) -> anyhow::Result<()> {
    let got = sql::value(client, query).await.with_context(|| query.to_owned())?;
    anyhow::ensure!(got == wanted, "{query}: {got}, not {wanted}");
    Ok(())
}

/// Long enough that every page which may be dropped has been: the agent looks for them each second.
const UNTIL_SWEPT: &str = "select pg_sleep(2.5)";

/// Each statement on its own: `VACUUM` refuses company.
async fn one_by_one(client: &Client, script: &str) -> anyhow::Result<()> {
    for statement in script.split(';') {
        client.batch_execute(statement).await.with_context(|| statement.to_owned())?;
    }
    Ok(())
}

/// Fills the budget of kept pages with what may go, so that later evictions make room by dropping.
async fn fill_kept_pages(client: &Client) -> anyhow::Result<()> {
    client.batch_execute("create table if not exists filler (a int, b text)").await?;
    for _ in 0..4 {
        client.batch_execute("insert into filler select i, repeat('f', 900) from generate_series(1, 10000) i").await?;
    }
    Ok(())
}

/// A tuple's command id is in no WAL record: pages of a running transaction must not come back from storage.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_does_not_see_its_own_rows() -> anyhow::Result<()> {
    within("40", |world| async move {
        let client = world.client().await?;
        client.batch_execute("create table t (a int, b text)").await?;
        client.batch_execute("begin; insert into t select i, repeat('x', 400) from generate_series(1, 8000) i").await?;
        client.batch_execute(UNTIL_SWEPT).await?;
        client.batch_execute("declare before cursor for select a from t").await?;
        expect(&client, "fetch 1 from before", "1").await?;
        // Reads its own table to the end while it appends to it.
        client.batch_execute("insert into t select a + 8000, b from t").await?;
        client.batch_execute(UNTIL_SWEPT).await?;
        expect(&client, "select count(*) from t", "16000").await?;
        // Combo command ids: made and changed by the same transaction, seen by a cursor from in between.
        client.batch_execute("declare between cursor for select b from t").await?;
        client
            .batch_execute("update t set b = 'new' where a % 2 = 0; savepoint s; delete from t where a % 4 = 1")
            .await?;
        client.batch_execute(UNTIL_SWEPT).await?;
        expect(&client, "select count(*) from t", "12000").await?;
        expect(&client, "select count(*) from t where b = 'new'", "8000").await?;
        client.batch_execute("rollback to s").await?;
        expect(&client, "select count(*) from t", "16000").await?;
        let rows = client.simple_query("fetch all from before").await?;
        anyhow::ensure!(count(&rows) == 7999, "the first cursor saw {} rows more", count(&rows));
        let rows = client.simple_query("fetch all from between").await?;
        let old =
            rows.iter().filter(|m| matches!(m, tokio_postgres::SimpleQueryMessage::Row(r) if r.get(0) != Some("new")));
        anyhow::ensure!(old.count() == 16000, "the second cursor saw a later command's rows");
        client.batch_execute("commit").await?;
        expect(&client, "select count(*) from t where b = 'new'", "8000").await?;
        drop(client);
        world.sleep().await?;
        expect(
            &world.client().await?,
            "select concat_ws(' ', count(*), sum(a), sum((b = 'new')::int)) from t",
            "16000 128008000 8000",
        )
        .await
    })
    .await
}

fn count(messages: &[tokio_postgres::SimpleQueryMessage]) -> usize {
    messages.iter().filter(|message| matches!(message, tokio_postgres::SimpleQueryMessage::Row(_))).count()
}

/// Index builds write pages long before they log them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn indexes_ten_times_the_cache_are_built_and_right() -> anyhow::Result<()> {
    within("300", |world| async move {
        let client = world.client().await?;
        client
            .batch_execute(
                "create table t (a int, p point, w tsvector, n text);
                 insert into t select i, point(i % 1000, i / 1000), to_tsvector('simple', md5(i::text) || ' ' || md5((i / 7)::text) || ' all'),
                     md5((i % 50000)::text) from generate_series(1, 340000) i;
                 set maintenance_work_mem = '1MB'",
            )
            .await?;
        for (name, definition) in INDEXES {
            client.batch_execute(&format!("create index {name} on t using {definition}")).await?;
        }
        // A BRIN index is small by nature; the others are ten times the clean cache and the buffers.
        let sizes = "select coalesce(string_agg(relname || ' ' || pg_relation_size(oid), ', '), 'large') from pg_class
            where relname in ('t_btree', 't_gist', 't_gin', 't_spgist', 't_hash') and pg_relation_size(oid) < 10 * (1 << 20)";
        expect(&client, sizes, "large").await?;
        by_each_index(&client).await?;
        drop(client);
        world.sleep().await?;
        let client = world.client().await?;
        by_each_index(&client).await?;
        client.batch_execute("create extension amcheck").await?;
        expect(&client, "select bt_index_parent_check('t_btree', true, true)::text", "").await
    })
    .await
}

const INDEXES: &[(&str, &str)] = &[
    ("t_btree", "btree (n, a)"),
    ("t_gist", "gist (p)"),
    ("t_gin", "gin (w)"),
    ("t_spgist", "spgist (p)"),
    ("t_hash", "hash (n)"),
    ("t_brin", "brin (a) with (pages_per_range = 4)"),
];

/// What each index finds is what a sequential scan finds.
async fn by_each_index(client: &Client) -> anyhow::Result<()> {
    let queries = [
        ("t_btree", "select md5(string_agg(a::text, ',' order by a)) from t where n between '3' and '5'"),
        ("t_gist", "select md5(string_agg(a::text, ',' order by a)) from t where p <@ box '(100,20),(220,180)'"),
        (
            "t_gin",
            "select md5(string_agg(a::text, ',' order by a)) from t where w @@ to_tsquery('simple', md5('4242') || ' | ' || md5('17'))",
        ),
        ("t_spgist", "select md5(string_agg(a::text, ',' order by a)) from t where p <@ box '(300,50),(420,180)'"),
        ("t_hash", "select md5(string_agg(a::text, ',' order by a)) from t where n = md5('4711')"),
        ("t_brin", "select md5(string_agg(a::text, ',' order by a)) from t where a between 70000 and 90000"),
    ];
    for (index, query) in queries {
        client.batch_execute("set enable_seqscan = on; set enable_indexscan = off; set enable_bitmapscan = off; set enable_indexonlyscan = off").await?;
        let wanted = sql::value(client, query).await?;
        // Only this one may be used: the others are invisible while the transaction lasts.
        client.batch_execute("reset enable_indexscan; reset enable_bitmapscan; reset enable_indexonlyscan; set enable_seqscan = off; begin").await?;
        for (other, _) in INDEXES.iter().filter(|(other, _)| *other != index) {
            client.batch_execute(&format!("drop index {other}")).await?;
        }
        let plan = client.simple_query(&format!("explain {query}")).await?;
        let uses = plan.iter().any(
            |m| matches!(m, tokio_postgres::SimpleQueryMessage::Row(r) if r.get(0).is_some_and(|l| l.contains(index))),
        );
        anyhow::ensure!(uses, "{query} does not use {index}");
        expect(client, query, &wanted).await.with_context(|| index.to_owned())?;
        client.batch_execute("rollback").await?;
    }
    Ok(())
}

/// WAL is up to 32 values ahead of a sequence; a sleep loses none, a crash may skip some and repeats none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequences_go_on_after_a_sleep_and_never_back_after_a_crash() -> anyhow::Result<()> {
    within("64", |world| async move {
        let client = world.client().await?;
        client.batch_execute("create sequence s; create sequence c cache 10; create sequence d increment -3; create table used (v bigint primary key)").await?;
        client.batch_execute("select setval('s', 1000); select nextval('d'); select nextval('c')").await?;
        let mut last: i64 = 1000;
        for round in 0..6 {
            let client = world.client().await?;
            for _ in 0..5 {
                let value: i64 = sql::value(&client, "insert into used values (nextval('s')) returning v").await?.parse()?;
                // After a crash at most what WAL was ahead is skipped.
                let expected = if round % 2 == 1 || round == 0 { last + 1..=last + 1 } else { last + 1..=last + 33 };
                anyhow::ensure!(expected.contains(&value), "round {round}: {value} after {last}");
                last = value;
            }
            fill_kept_pages(&client).await?;
            drop(client);
            if round % 2 == 0 { world.sleep().await? } else { world.crash().await? }
            // The first value after a crash is checked with the crash's allowance, the rest are dense.
            if round % 2 == 1 {
                let client = world.client().await?;
                let value: i64 = sql::value(&client, "insert into used values (nextval('s')) returning v").await?.parse()?;
                anyhow::ensure!((last + 1..=last + 33).contains(&value), "after a crash: {value} after {last}");
                last = value;
            }
        }
        expect(&world.client().await?, "select nextval('d') <= -4 and nextval('c') >= 11", "t").await
    })
    .await
}

/// Clearing and setting of visibility bits moves no page's LSN.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn index_only_scans_trust_a_right_visibility_map() -> anyhow::Result<()> {
    within("40", |world| async move {
        let client = world.client().await?;
        client
            .batch_execute(
                "create extension pg_visibility; create table t (a int primary key, b text);
                 insert into t select i, repeat('v', 200) from generate_series(1, 60000) i",
            )
            .await?;
        one_by_one(&client, "vacuum freeze t").await?;
        for round in 1..=3 {
            client.batch_execute(&format!("delete from t where a % 100 = {round}")).await?;
            client.batch_execute(&format!("update t set b = 'u' where a % 100 = {}", round + 50)).await?;
            fill_kept_pages(&client).await?;
            check_visibility(&client, 60000 - round * 600).await?;
            one_by_one(&client, "vacuum t").await?;
            fill_kept_pages(&client).await?;
            check_visibility(&client, 60000 - round * 600).await?;
        }
        drop(client);
        world.crash().await?;
        let client = world.client().await?;
        check_visibility(&client, 58200).await?;
        one_by_one(&client, "delete from t where a % 100 = 9; vacuum t").await?;
        drop(client);
        world.sleep().await?;
        check_visibility(&world.client().await?, 57600).await
    })
    .await
}

async fn check_visibility(client: &Client, rows: u32) -> anyhow::Result<()> {
    client.batch_execute("set enable_seqscan = off; set enable_bitmapscan = off").await?;
    expect(client, "select count(*) from t where a > 0", &rows.to_string()).await?;
    client.batch_execute("reset enable_seqscan; reset enable_bitmapscan").await?;
    expect(client, "select count(*) from t where b <> ''", &rows.to_string()).await?;
    expect(client, "select count(*) from pg_check_visible('t')", "0").await?;
    expect(client, "select count(*) from pg_check_frozen('t')", "0").await
}

/// A block that was cut off and comes back holds nothing of its former life.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncated_blocks_come_back_empty() -> anyhow::Result<()> {
    within("40", |world| async move {
        let client = world.client().await?;
        client.batch_execute("create table t (a int, b text); create index on t (a)").await?;
        let mut rows = 0;
        for round in 1..=3 {
            client
                .batch_execute(&format!(
                    "insert into t select {round}, repeat('t', 600) from generate_series(1, 12000)"
                ))
                .await?;
            fill_kept_pages(&client).await?;
            // Most of the table's end goes, by vacuum; then it grows again, by a few pages at a time.
            client
                .batch_execute(&format!("delete from t where a = {round} and ctid > '({},0)'", rows / 12 + 20))
                .await?;
            one_by_one(&client, "vacuum (truncate) t").await?;
            rows = sql::value(&client, "select count(*) from t").await?.parse()?;
            client.batch_execute("insert into t select 100, repeat('u', 600) from generate_series(1, 500)").await?;
            rows += 500;
            expect(&client, "select count(*) from t", &rows.to_string()).await?;
            if round == 2 {
                drop(client);
                world.crash().await?;
                return truncated_further(&world, rows).await;
            }
        }
        Ok(())
    })
    .await
}

async fn truncated_further(world: &World, rows: u32) -> anyhow::Result<()> {
    let client = world.client().await?;
    expect(&client, "select count(*) from t", &rows.to_string()).await?;
    client
        .batch_execute("begin; truncate t; insert into t select 7, 'x' from generate_series(1, 10000); rollback")
        .await?;
    expect(&client, "select count(*) from t", &rows.to_string()).await?;
    client.batch_execute("truncate t; insert into t select 8, 'y' from generate_series(1, 30000)").await?;
    one_by_one(
        &client,
        "delete from t where ctid > '(3,0)'; vacuum t; insert into t select 9, 'z' from generate_series(1, 20000)",
    )
    .await?;
    let counts = "select concat_ws(' ', count(*) filter (where a = 9), count(*) filter (where a = 7 or b <> all (array['y', 'z'])),
        pg_relation_size('t') / 8192 < 150) from t";
    expect(&client, counts, "20000 0 t").await?;
    drop(client);
    world.sleep().await?;
    let client = world.client().await?;
    expect(&client, counts, "20000 0 t").await?;
    client.batch_execute("set enable_seqscan = off").await?;
    expect(&client, "select count(*) from t where a = 9", "20000").await
}

/// A table of two segments: written, read, cut back to one, extended again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_past_one_gibibyte_has_its_segments() -> anyhow::Result<()> {
    within("2000", |world| async move {
        let client = world.client().await?;
        // One small row to a page: the table is large, its WAL is not.
        client.batch_execute("create table t (a int, b text) with (fillfactor = 10)").await?;
        client.batch_execute("alter table t alter b set storage plain").await?;
        client.batch_execute("insert into t select i, repeat('g', 780) from generate_series(1, 133000) i").await?;
        expect(&client, "select pg_relation_size('t') > 1 << 30", "t").await?;
        let file = "select (pg_stat_file(pg_relation_filepath('t') || '.1')).size =
            pg_relation_size('t') - (1 << 30) and (pg_stat_file(pg_relation_filepath('t'))).size = 1 << 30";
        expect(&client, file, "t").await?;
        let sum = "select concat_ws(' ', count(*), sum(a), min(length(b))) from t";
        expect(&client, sum, "133000 8844566500 780").await?;
        drop(client);
        world.sleep().await?;
        let client = world.client().await?;
        expect(&client, file, "t").await?;
        expect(&client, "select a from t where ctid = '(131071,1)'", "131072").await?;
        expect(&client, "select a from t where ctid = '(131072,1)'", "131073").await?;
        one_by_one(&client, "delete from t where a > 131000; vacuum t").await?;
        expect(&client, "select pg_relation_size('t') / 8192", "131000").await?;
        expect(&client, "select count(*) from pg_stat_file(pg_relation_filepath('t') || '.1', true) s where s.size is not null and s.size > 0", "0").await?;
        client.batch_execute("insert into t select i, repeat('h', 780) from generate_series(131001, 131500) i").await?;
        expect(&client, "select concat_ws(' ', count(*), sum((b like 'h%')::int), pg_relation_size('t') / 8192) from t", "131500 500 131500").await
    })
    .await
}

/// An extension of the distribution's packages with types and index methods of its own, where it is installed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgis_is_loaded_and_indexed() -> anyhow::Result<()> {
    within("200", |world| async move {
        let client = world.client().await?;
        let available = "select count(*) from pg_available_extensions where name = 'postgis'";
        if sql::value(&client, available).await? == "0" {
            eprintln!("skipped: postgresql-15-postgis-3 is not installed");
            return Ok(());
        }
        client.batch_execute("create extension postgis; create table places (id int primary key, at geometry(Point, 4326), area geometry)").await?;
        client
            .batch_execute(
                "insert into places select i, st_setsrid(st_makepoint(i % 1000 / 10.0, i / 1000 / 5.0), 4326),
                     st_buffer(st_setsrid(st_makepoint(i % 1000 / 10.0, i / 1000 / 5.0), 4326), 0.05, 2)
                 from generate_series(1, 60000) i",
            )
            .await?;
        client.batch_execute("create index on places using gist (at); create index on places using spgist (at); create index on places using gist (area)").await?;
        let near = "select md5(string_agg(id::text, ',' order by id)) from places
            where st_dwithin(at, st_setsrid(st_makepoint(50, 5), 4326), 3) and st_intersects(area, st_makeenvelope(48, 4, 52, 6, 4326))";
        let nearest = "select string_agg(id::text, ',') from (select id from places order by at <-> st_setsrid(st_makepoint(12.34, 5.67), 4326), id limit 5) n";
        client.batch_execute("set enable_indexscan = off; set enable_bitmapscan = off").await?;
        let (found, closest) = (sql::value(&client, near).await?, sql::value(&client, nearest).await?);
        anyhow::ensure!(found.len() == 32, "nothing was found by the sequential scan");
        drop(client);
        for round in 0..2 {
            let client = world.client().await?;
            client.batch_execute("set enable_seqscan = off").await?;
            expect(&client, near, &found).await.with_context(|| format!("round {round}"))?;
            expect(&client, nearest, &closest).await?;
            drop(client);
            world.sleep().await?;
        }
        Ok(())
    })
    .await
}
