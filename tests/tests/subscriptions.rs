//! A subscription is that of the branch on which it was made. Children and restored branches have it disabled before one of
//! their computes could take the publisher's changes away.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use e2e::{Cluster, ClusterOptions, Project, api::text, sql, stock::StockServer};
use reqwest::Method;
use serde_json::json;
use tokio_postgres::Client;

const A_WHILE: Duration = Duration::from_secs(60);
/// Many times what a compute with a subscription takes to ask its publisher for changes.
const LONG_ENOUGH: Duration = Duration::from_secs(3);
const SUBSCRIPTIONS: &str = "select string_agg(format('%s %s %s', subname, subenabled, subslotname), ', ' order by subname) from pg_subscription";
/// Of the publisher: who takes changes from which slot.
const SLOTS: &str = "select string_agg(format('%s %s %s %s', slot_name, active, active_pid, wal_status), ', ' order by slot_name) \
     from pg_replication_slots";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_stays_with_the_branch_on_which_it_was_made() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let mut stock = StockServer::create(&[("wal_level", "logical"), ("wal_retrieve_retry_interval", "500ms")])?;
    stock.start().await?;
    let outcome = story(&cluster, &stock).await;
    outcome.map_err(|error| error.context(stock.log()).context(cluster.log()))?;
    stock.stop()?;
    cluster.down().await
}

/// A project that subscribes to a stock server.
struct World<'a> {
    cluster: &'a Cluster,
    project: Project,
    database: String,
    publisher: Client,
    connection: String,
}

async fn story(cluster: &Cluster, stock: &StockServer) -> anyhow::Result<()> {
    let project = cluster.api()?.create_project_with("follower", &[("wal_retrieve_retry_interval", "200ms")]).await?;
    let database = sql::ask(&project.uri, "select current_database()").await?;
    let connection = format!("host={} user=dormouse_admin dbname=postgres", stock.socket_dir().display());
    let world = World { cluster, project, database, publisher: stock.connect("postgres").await?, connection };
    world.publisher.batch_execute("create table t (i int); create publication p for table t").await?;
    sql::psql(&world.project.uri, "create table t (i int)").await?;
    let lsn_before = world.subscribe(&world.project.endpoint, "theirs").await?;
    world.publish(1).await?;
    world.arrives(&world.project.uri, 1).await?;
    world.branch_off().await?;
    world.restore_in_place(&lsn_before).await
}

impl World<'_> {
    async fn admin(&self, endpoint: &str) -> anyhow::Result<Client> {
        self.cluster.superuser(endpoint, &self.database).await
    }

    /// PostgreSQL 15 lets only superusers do this. Returns a position behind it.
    async fn subscribe(&self, endpoint: &str, name: &str) -> anyhow::Result<String> {
        let admin = self.admin(endpoint).await?;
        let options = "with (copy_data = false)";
        admin
            .batch_execute(&format!(
                "create subscription {name} connection '{}' publication p {options}",
                self.connection
            ))
            .await?;
        sql::value(&admin, "select pg_current_wal_flush_lsn()").await
    }

    async fn publish(&self, row: i32) -> anyhow::Result<()> {
        Ok(self.publisher.batch_execute(&format!("insert into t values ({row})")).await?)
    }

    async fn arrives(&self, uri: &str, row: i32) -> anyhow::Result<()> {
        let began = Instant::now();
        while sql::ask(uri, &count(row)).await? != "1" {
            ensure!(
                began.elapsed() < A_WHILE,
                "row {row} does not arrive: {}",
                sql::value(&self.publisher, SLOTS).await?
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    async fn stays_away(&self, uri: &str, row: i32) -> anyhow::Result<()> {
        tokio::time::sleep(LONG_ENOUGH).await;
        let rows = sql::ask(uri, &count(row)).await?;
        ensure!(rows == "0", "row {row} arrived {rows} times in a branch that did not subscribe");
        Ok(())
    }

    async fn branch_off(&self) -> anyhow::Result<()> {
        let api = self.cluster.api()?;
        let slots = sql::value(&self.publisher, SLOTS).await?;
        ensure!(slots.starts_with("theirs t ") && slots.ends_with(" reserved"), "{slots}");
        let child = api.create_branch(&self.project.id, json!({"name": "child"})).await?;
        ensure!(sql::ask(&child.uri, SUBSCRIPTIONS).await? == "theirs f theirs", "the child goes on with its parent's");
        self.publish(2).await?;
        self.arrives(&self.project.uri, 2).await?;
        self.stays_away(&child.uri, 2).await?;
        api.suspend(&self.project.id, &child.endpoint).await?;
        ensure!(sql::ask(&child.uri, SUBSCRIPTIONS).await? == "theirs f theirs", "enabled by a sleep");
        // The very same walsender, never interrupted.
        ensure!(sql::value(&self.publisher, SLOTS).await? == slots, "the parent was disturbed");
        ensure!(sql::ask(&self.project.uri, SUBSCRIPTIONS).await? == "theirs t theirs");

        // Its own stays enabled, and the parent's slot outlives what the child drops.
        let admin = self.admin(&child.endpoint).await?;
        admin.batch_execute("alter subscription theirs set (slot_name = none)").await?;
        admin.batch_execute("drop subscription theirs").await?;
        drop(admin);
        self.subscribe(&child.endpoint, "own").await?;
        api.suspend(&self.project.id, &child.endpoint).await?;
        self.publish(3).await?;
        self.arrives(&child.uri, 3).await?;
        self.arrives(&self.project.uri, 3).await?;
        ensure!(sql::ask(&child.uri, SUBSCRIPTIONS).await? == "own t own", "disabled by a sleep");

        let grandchild = json!({"name": "grandchild", "parent_id": child.id});
        let grandchild = api.create_branch(&self.project.id, grandchild).await?;
        ensure!(sql::ask(&grandchild.uri, SUBSCRIPTIONS).await? == "own f own", "a branch of a branch is none");
        self.publish(4).await?;
        self.arrives(&child.uri, 4).await?;
        self.stays_away(&grandchild.uri, 4).await
    }

    /// The subscription goes on where the old state does.
    async fn restore_in_place(&self, lsn: &str) -> anyhow::Result<()> {
        let (api, id, main) = (self.cluster.api()?, &self.project.id, &self.project.branch);
        let body = json!({"source_branch_id": main, "source_lsn": lsn, "preserve_under_name": "old"});
        let restored = api.ok(Method::POST, &format!("/projects/{id}/branches/{main}/restore"), Some(body)).await?;
        let old = text(&restored, "/branch/parent_id").context("where the old state is")?;
        ensure!(sql::ask(&self.project.uri, SUBSCRIPTIONS).await? == "theirs f theirs", "the restored branch goes on");
        self.publish(5).await?;
        self.stays_away(&self.project.uri, 5).await?;
        let body = json!({"endpoint": {"branch_id": old, "type": "read_write"}});
        api.ok(Method::POST, &format!("/projects/{id}/endpoints"), Some(body)).await?;
        let uri = api.connection_uri(id, &old).await?;
        self.arrives(&uri, 5).await?;
        ensure!(sql::ask(&uri, SUBSCRIPTIONS).await? == "theirs t theirs");
        ensure!(sql::ask(&uri, &count(2)).await? == "1");
        Ok(())
    }
}

fn count(row: i32) -> String {
    format!("select count(*) from t where i = {row}")
}
