//! Little memory, small caches, crashes: pages are evicted, dropped and read back all the time, and the books balance.

use std::time::Duration;

use anyhow::Context;
use e2e::{Cluster, ClusterOptions, Project, processes, sql};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn books_balance_with_little_memory() -> anyhow::Result<()> {
    let arguments = ["--page-cache-mib", "2", "--kept-pages-mib", "64"].map(str::to_owned).into();
    let mut cluster = Cluster::start(ClusterOptions { arguments, ..ClusterOptions::default() }).await?;
    let outcome = balance(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn balance(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("books").await?;
    let path = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
    let settings = json!({"endpoint": {"settings": {"pg_settings": {
        "shared_buffers": "1MB", "autovacuum_naptime": "1s", "autovacuum_vacuum_cost_delay": "0", "max_wal_size": "32MB"
    }}}});
    api.wait_state(&project.id, &project.endpoint, "active", Duration::from_secs(30)).await?;
    api.ok("PATCH".parse()?, &path, Some(settings)).await?;
    api.suspend(&project.id, &project.endpoint).await?;
    assert_eq!(sql::ask(&project.uri, "show shared_buffers").await?, "1MB", "a setting of the endpoint");
    sql::pgbench(&project.uri, &["-i", "-q", "-s", "2", "-I", "dtgvp"]).await?;
    check_books(cluster, &project).await?;
    for round in 0..3 {
        let uri = project.uri.clone();
        let bench = tokio::spawn(async move { sql::pgbench(&uri, &["-c", "6", "-j", "2", "-T", "4", "-n"]).await });
        if round % 2 == 0 {
            bench.await?.with_context(|| format!("pgbench in round {round}"))?;
            check_books(cluster, &project).await?;
            api.suspend(&project.id, &project.endpoint).await?;
        } else {
            tokio::time::sleep(Duration::from_secs(2)).await;
            let running = processes::postgres_below(&cluster.runtime_dir());
            let postmaster = running.iter().find(|p| p.command.contains(" -D ")).context("no postmaster")?;
            processes::kill_hard(postmaster.parent)?;
            let _ = processes::kill_hard(postmaster.pid);
            // A backend that waits for a dead one's lock would hold its client for ever.
            let old = running.iter().map(|p| p.pid).collect::<Vec<_>>();
            let gone = || processes::postgres_below(&cluster.runtime_dir()).iter().all(|p| !old.contains(&p.pid));
            processes::wait_until("all backends to end", Duration::from_secs(10), gone).await?;
            assert!(bench.await?.is_err(), "pgbench lost its server");
        }
        check_books(cluster, &project).await?;
    }
    Ok(())
}

/// pgbench's invariants, index against heap, and amcheck.
async fn check_books(cluster: &Cluster, project: &Project) -> anyhow::Result<()> {
    let sums = "select concat_ws(' ', (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches),
        (select sum(tbalance) from pgbench_tellers), (select coalesce(sum(delta), 0) from pgbench_history))";
    let answer = sql::ask(&project.uri, sums).await?;
    let mut parts = answer.split(' ');
    let first = parts.next().context("no sums")?;
    assert!(parts.clone().count() == 3 && parts.all(|sum| sum == first), "the books do not balance: {answer}");
    let by_index = "set enable_seqscan = off; set enable_bitmapscan = off;
        select count(*) from pgbench_accounts where aid between 1 and 200000";
    assert_eq!(sql::ask(&project.uri, by_index).await?, "200000", "an index-only scan finds each account once");
    let client = cluster.superuser(&project.endpoint, "dormouse").await?;
    client.batch_execute("create extension if not exists amcheck").await?;
    let checks = "select coalesce((select string_agg(v.msg, '; ') from pg_class c, verify_heapam(c.oid) v
            where c.relkind = 'r' and c.relname like 'pgbench%'), 'sound') ||
        (select count(bt_index_check(c.oid, true)::text) from pg_class c join pg_am a on a.oid = c.relam
            where a.amname = 'btree' and c.relname like 'pgbench%')";
    assert_eq!(sql::value(&client, checks).await?, "sound3");
    Ok(())
}
