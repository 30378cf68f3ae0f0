//! What ordinary SQL leaves behind is the same before a sleep, after it, and in a branch.

use e2e::{Cluster, ClusterOptions, sql};
use serde_json::json;

/// Scripts, each with a question whose answer must not change.
const BATTERY: &[(&str, &str)] = &[
    (
        "create table plain(id serial primary key, a int, b text);
         insert into plain(a, b) select g % 97, md5(g::text) from generate_series(1, 30000) g;
         update plain set a = a + 1 where id % 3 = 0; delete from plain where id % 7 = 0; vacuum plain;
         update plain set b = b || 'x' where id % 5 = 0; vacuum (freeze, analyze) plain;
         insert into plain(a, b) select g, 'again' from generate_series(1, 2000) g",
        "select md5(string_agg(t::text, ',' order by id)) from plain t",
    ),
    (
        "create table wide(id int, v text); alter table wide alter v set storage external;
         insert into wide select g, repeat(md5(g::text), 400) from generate_series(1, 200) g;
         update wide set v = v || 'tail' where id % 2 = 0",
        "select md5(string_agg(md5(v), ',' order by id)) from wide",
    ),
    (
        "create table indexed(id int, j jsonb, p point, r int4range, t text);
         insert into indexed select g, jsonb_build_object('k', g % 50, 'l', array[g, g + 1]), point(g % 100, g / 100),
           int4range(g, g + 10), md5(g::text) from generate_series(1, 8000) g;
         create index on indexed(id); create index on indexed using hash(t); create index on indexed using gin(j);
         create index on indexed using gist(p); create index on indexed using spgist(t);
         create index on indexed using brin(id); create index on indexed using gist(r);
         insert into indexed select g, jsonb_build_object('k', g % 50), point(g % 100, g / 100), int4range(g, g + 10),
           md5(g::text) from generate_series(8001, 12000) g;
         delete from indexed where id % 11 = 0; vacuum indexed;
         insert into indexed select g, jsonb_build_object('k', g % 50), point(g % 100, g / 100), int4range(g, g + 10),
           md5(g::text) from generate_series(12001, 14000) g",
        "set enable_seqscan = off; select concat_ws(' ',
           (select count(*) from indexed where j @> '{\"k\": 7}'), (select count(*) from indexed where p <@ box '(3,3),(40,40)'),
           (select count(*) from indexed where t = md5('777')), (select count(*) from indexed where t ^@ 'ab'),
           (select count(*) from indexed where r @> 500), (select count(*) from indexed where id between 900 and 9000))",
    ),
    (
        "create unlogged table scratch(a int primary key); insert into scratch select generate_series(1, 1000)",
        "select 'an unlogged table can be read: ' || (count(*) >= 0) from scratch",
    ),
    (
        "create table parted(k int, v text) partition by range(k);
         create table parted_1 partition of parted for values from (0) to (1000);
         create table parted_2 partition of parted for values from (1000) to (2000);
         insert into parted select g, g::text from generate_series(0, 1999) g;
         create materialized view summary as select k % 10 d, count(*) n from parted group by 1;
         create function twice(int) returns int language sql as 'select $1 * 2';
         create type mood as enum('sad', 'ok'); alter type mood add value 'happy'",
        "select md5(string_agg(s::text, ',' order by d)) || twice(21) || 'happy'::mood from summary s",
    ),
    (
        "create table locked(id int primary key, v int); insert into locked select g, 0 from generate_series(1, 100) g;
         do $$ begin for i in 1..100 loop
           begin update locked set v = v + 1 where id = i; if i % 4 = 0 then raise exception 'undo'; end if;
           exception when others then null; end; end loop; end $$;
         begin; savepoint a; update locked set v = 50 where id = 1; rollback to a; update locked set v = 60 where id = 2; commit;
         insert into locked values (1, 7) on conflict (id) do update set v = excluded.v",
        "select md5(string_agg(l::text, ',' order by id)) from locked l",
    ),
    (
        "create table rewritten(id int, v text); insert into rewritten select g, g::text from generate_series(1, 5000) g;
         create index rewritten_id on rewritten(id); cluster rewritten using rewritten_id; vacuum full rewritten;
         alter table rewritten add column w int default 5; alter table rewritten alter id type bigint; reindex table rewritten;
         create table truncated as select * from rewritten; truncate truncated; insert into truncated values (1, 'one', 1);
         drop table if exists never; create table dropped as select 1; drop table dropped",
        "select md5(string_agg(r::text, ',' order by id)) || (select count(*) from truncated) from rewritten r",
    ),
    (
        "create table prepared(a int); begin; insert into prepared values (1); prepare transaction 'kept';
         begin; insert into prepared values (2); prepare transaction 'done'; commit prepared 'done'",
        "select (select string_agg(gid, ',') from pg_prepared_xacts) || (select string_agg(a::text, ',') from prepared)",
    ),
    (
        "create extension if not exists pg_trgm; create table words(w text);
         insert into words select md5(g::text) from generate_series(1, 3000) g;
         create index on words using gin(w gin_trgm_ops)",
        "set enable_seqscan = off; select count(*) from words where w like '%abc%'",
    ),
    (
        "select lo_from_bytea(4711, decode(repeat('ab', 10000), 'hex'))",
        "select md5(lo_get(4711))",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sql_leaves_the_same_behind() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = battery(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn answers(uri: &str) -> anyhow::Result<Vec<String>> {
    let mut all = Vec::new();
    for (_, question) in BATTERY {
        all.push(sql::ask(uri, question).await.map_err(|error| error.context(*question))?);
    }
    all.push(sql::ask(uri, "select string_agg(datname, ',' order by datname) from pg_database").await?);
    Ok(all)
}

async fn battery(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("battery").await?;
    // The owner may not use every extension; the battery's trusted ones are made by the database's owner.
    for (script, _) in BATTERY {
        run_script(&project.uri, script).await?;
    }
    for strategy in ["wal_log", "file_copy"] {
        sql::psql(&project.uri, &format!("create database copy_{strategy} strategy {strategy}")).await?;
    }
    let copy = |strategy: &str| other_database(&project.uri, &format!("copy_{strategy}"));
    sql::psql(&copy("file_copy"), "create table inside as select 42 a").await?;
    sql::psql(&project.uri, "create database passing").await?;
    sql::psql(&project.uri, "drop database passing").await?;
    let sequence = "select nextval('plain_id_seq')";
    let before_value: i64 = sql::ask(&project.uri, sequence).await?.parse()?;
    let before = answers(&project.uri).await?;

    api.suspend(&project.id, &project.endpoint).await?;
    let after = answers(&project.uri).await?;
    assert_eq!(after, before, "after a sleep");
    let after_value: i64 = sql::ask(&project.uri, sequence).await?.parse()?;
    assert_eq!(after_value, before_value + 1, "a sequence goes on without a gap");
    assert_eq!(sql::ask(&copy("file_copy"), "select a from inside").await?, "42", "another database");
    assert_eq!(sql::ask(&copy("wal_log"), "select 1").await?, "1", "a database copied through WAL");

    check_with_amcheck(cluster, &project.endpoint, &database_of(&project.uri)).await?;

    let branch = api.create_branch(&project.id, json!({"parent_id": project.branch})).await?;
    assert_eq!(answers(&branch.uri).await?, before, "in a branch");
    sql::psql(&branch.uri, "commit prepared 'kept'").await?;
    let rows = "select count(*) from prepared";
    assert_eq!(sql::ask(&branch.uri, rows).await?, "2", "a prepared transaction commits in the branch");
    assert_eq!(sql::ask(&project.uri, rows).await?, "1", "and stays prepared in the parent");
    Ok(())
}

/// Postgres's own checks of every heap and every B-tree of a database, as its superuser.
async fn check_with_amcheck(cluster: &Cluster, endpoint: &str, database: &str) -> anyhow::Result<()> {
    let client = cluster.superuser(endpoint, database).await?;
    client.batch_execute("create extension if not exists amcheck").await?;
    let btrees =
        "select count(bt_index_parent_check(c.oid, true)::text) from pg_class c join pg_am a on a.oid = c.relam
        where a.amname = 'btree' and c.relkind = 'i' and c.relpersistence = 'p'";
    let checked: i64 = sql::value(&client, btrees).await?.parse()?;
    assert!(checked > 100, "only {checked} B-trees were checked");
    let heaps = "select string_agg(c.relname || ': ' || v.msg, '; ') from pg_class c, verify_heapam(c.oid) v
        where c.relkind in ('r', 't', 'm') and c.relpersistence = 'p'";
    assert_eq!(sql::value(&client, heaps).await?, "", "heaps are sound");
    Ok(())
}

/// The database in a connection string.
fn database_of(uri: &str) -> String {
    let address = uri.split('?').next().unwrap_or_default();
    address.rsplit('/').next().unwrap_or_default().to_owned()
}

/// Each statement on its own, as psql would send a file.
async fn run_script(uri: &str, script: &str) -> anyhow::Result<()> {
    let mut arguments = Vec::new();
    let mut statement = String::new();
    let mut quoted = false;
    for part in script.split(';') {
        quoted ^= part.matches("$$").count() % 2 == 1;
        statement.push_str(part);
        if quoted {
            statement.push(';');
            continue;
        }
        arguments.push(std::mem::take(&mut statement));
    }
    let client = sql::connect(uri).await?;
    for statement in arguments {
        let outcome = client.simple_query(&statement).await;
        outcome.map_err(|error| anyhow::anyhow!("{error:?} in {statement}"))?;
    }
    Ok(())
}

/// The same connection string for another database.
fn other_database(uri: &str, name: &str) -> String {
    let (address, options) = uri.split_once('?').unwrap_or((uri, ""));
    let (server, _) = address.rsplit_once('/').unwrap_or((address, ""));
    format!("{server}/{name}?{options}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statistics_survive_a_sleep() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = keep_statistics(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn keep_statistics(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("statistics").await?;
    let path = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
    let settings =
        json!({"endpoint": {"settings": {"pg_settings": {"shared_preload_libraries": "pg_stat_statements"}}}});
    api.wait_state(&project.id, &project.endpoint, "active", std::time::Duration::from_secs(60)).await?;
    api.ok("PATCH".parse()?, &path, Some(settings)).await?;
    api.suspend(&project.id, &project.endpoint).await?;
    sql::ask(&project.uri, "select 1").await?;
    let admin = cluster.superuser(&project.endpoint, "dormouse").await?;
    admin.batch_execute("create extension pg_stat_statements; create table counted (a int)").await?;
    for _ in 0..7 {
        admin.batch_execute("insert into counted values (1)").await?;
    }
    drop(admin);
    let calls = "select sum(calls) from pg_stat_statements where query like 'insert into counted%'";
    let rows = "select n_tup_ins from pg_stat_user_tables where relname = 'counted'";
    for round in 0..3 {
        api.suspend(&project.id, &project.endpoint).await?;
        sql::ask(&project.uri, "select 1").await?;
        let admin = cluster.superuser(&project.endpoint, "dormouse").await?;
        assert_eq!(sql::value(&admin, calls).await?, "7", "statements, after sleep {round}");
        assert_eq!(sql::value(&admin, rows).await?, "7", "rows, after sleep {round}");
    }
    Ok(())
}
