//! Pooled clients over real Postgres: what they share, and what they must not notice.

mod support;

use std::time::{Duration, Instant};

use futures::{SinkExt, StreamExt, TryStreamExt, future::join_all, pin_mut};
use support::{PASSWORD, World};
use tokio::time::sleep;
use tokio_postgres::{AsyncMessage, Client, NoTls, error::SqlState, types::Type};

const POOLED: &str = "endpoint=ep-a-pooler";

async fn pooled(world: &World) -> Client {
    world.connect(POOLED).await.expect("connected")
}

async fn text(client: &Client, sql: &str) -> String {
    let messages = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let rows = messages.into_iter().filter_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    rows.last().unwrap_or_default()
}

async fn pid(client: &Client) -> String {
    text(client, "select pg_backend_pid()").await
}

async fn state(error: Result<impl Sized, tokio_postgres::Error>) -> String {
    error.err().and_then(|error| error.code().map(|code| code.code().to_owned())).unwrap_or_default()
}

#[tokio::test]
async fn many_clients_share_few_connections() {
    let world = World::start(&["--pool-size", "3"]).await;
    let clients = join_all((0..40).map(|_| pooled(&world))).await;
    let pids = join_all(clients.iter().map(|client| async {
        for _ in 0..5 {
            client.query("select pg_sleep(0.001), $1::int", &[&7]).await.expect("answered");
        }
        pid(client).await
    }))
    .await;
    let different: std::collections::BTreeSet<_> = pids.iter().collect();
    assert!(different.len() <= 3, "{different:?}");
}

/// The end of an answer may come while there is no room for it, and nothing more comes after it to wake for.
#[tokio::test]
async fn answers_of_about_the_room_for_them_come_whole() {
    let world = World::start(&["--pool-size", "1"]).await;
    let client = pooled(&world).await;
    for rows in (100..300).chain([2000, 20_000]) {
        let sql = format!("select repeat('x', 500) from generate_series(1, {rows})");
        let answer = tokio::time::timeout(Duration::from_secs(20), client.query(&sql, &[])).await;
        let answer = answer.unwrap_or_else(|_| panic!("the end of {rows} rows does not come")).expect("answered");
        assert_eq!(answer.len(), rows);
    }
}

/// The same for what a client sends, all at once, and then waits.
#[tokio::test]
async fn parameters_of_about_the_room_for_them_are_taken_whole() {
    let world = World::start(&["--pool-size", "1"]).await;
    let client = pooled(&world).await;
    for length in (65_000..66_000).step_by(25).chain([70_000, 98_000, 131_000, 1_000_000]) {
        let parameter = "x".repeat(length);
        let answer = async { client.query_typed("select length($1)", &[(&parameter, Type::TEXT)]).await };
        let answer = tokio::time::timeout(Duration::from_secs(20), answer).await;
        let answer = answer.unwrap_or_else(|_| panic!("{length} bytes get no answer")).expect("answered");
        assert_eq!(answer[0].get::<_, i32>(0) as usize, length);
    }
}

#[tokio::test]
async fn settings_follow_their_client() {
    let world = World::start(&["--pool-size", "1"]).await;
    let (one, two) = (pooled(&world).await, pooled(&world).await);
    one.batch_execute("set timezone = 'Asia/Tokyo'; set work_mem = '5MB'; set app.tenant = 'it''s one'")
        .await
        .expect("set");
    assert_eq!(text(&two, "show timezone").await, text(&pooled(&world).await, "show timezone").await);
    assert_ne!(text(&two, "show timezone").await, "Asia/Tokyo");
    assert_eq!(text(&two, "select coalesce(current_setting('app.tenant', true), '')").await, "");
    two.batch_execute("select set_config('app.tenant', 'two', false)").await.expect("set");
    assert_eq!(text(&one, "show timezone").await, "Asia/Tokyo");
    assert_eq!(text(&one, "show work_mem").await, "5MB");
    assert_eq!(text(&one, "select current_setting('app.tenant')").await, "it's one");
    assert_eq!(text(&two, "select current_setting('app.tenant')").await, "two");
    one.batch_execute("reset timezone").await.expect("reset");
    assert_ne!(text(&one, "show timezone").await, "Asia/Tokyo");
    assert_eq!(pid(&one).await, pid(&two).await, "nothing is tied to its connection");
    // A transaction that fails takes its settings back.
    assert!(one.batch_execute("begin; set work_mem = '6MB'; select 1/0").await.is_err());
    one.batch_execute("rollback").await.expect("rolled back");
    assert_eq!(text(&one, "show work_mem").await, "5MB");
    one.batch_execute("begin; set local work_mem = '7MB'; commit").await.expect("set");
    assert_eq!(text(&one, "show work_mem").await, "5MB");
    two.batch_execute("do $$ begin perform set_config('work_mem', '9MB', false); end $$").await.expect("done");
    assert_eq!(text(&one, "show work_mem").await, "5MB");
    assert_eq!(text(&two, "show work_mem").await, "9MB", "what a function has set");
}

#[tokio::test]
async fn each_client_keeps_its_name_and_role() {
    let world = World::start(&["--pool-size", "1"]).await;
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(world.address.port()).user("alice").password(PASSWORD).dbname("postgres");
    config.options(POOLED);
    let (one, connection) = config.clone().application_name("one").connect(NoTls).await.expect("connected");
    tokio::spawn(connection);
    let (two, connection) = config.application_name("two").connect(NoTls).await.expect("connected");
    tokio::spawn(connection);
    one.batch_execute("set role pg_read_server_files").await.expect("set");
    for _ in 0..3 {
        assert_eq!(
            text(&one, "select current_user || current_setting('application_name')").await,
            "pg_read_server_filesone"
        );
        assert_eq!(text(&two, "select current_user || current_setting('application_name')").await, "alicetwo");
    }
    one.batch_execute("reset all; set session authorization default").await.expect("reset");
    assert_eq!(text(&one, "show application_name").await, "one", "what it began with");
}

/// Whom a session acts as is in no list of settings, and `RESET ALL` leaves it.
#[tokio::test]
async fn nobody_acts_as_what_another_client_has_become() {
    let world = World::start(&["--pool-size", "1"]).await;
    let (one, two) = (pooled(&world).await, pooled(&world).await);
    let user = "select session_user || ' ' || current_user";
    one.batch_execute("set role pg_read_server_files").await.expect("set");
    one.batch_execute("do $$ begin perform 1; end $$").await.expect("done");
    assert_eq!(text(&two, user).await, "alice alice", "after a DO of one with a role");
    assert_eq!(text(&one, user).await, "alice pg_read_server_files");
    two.batch_execute("do $$ begin set role pg_read_server_files; end $$").await.expect("done");
    assert_eq!(text(&pooled(&world).await, user).await, "alice alice", "after a DO that takes a role");
    assert_eq!(text(&two, user).await, "alice pg_read_server_files");

    let dave = async || world.connect_as("dave", POOLED).await.expect("connected");
    let (one, two) = (dave().await, dave().await);
    one.batch_execute("set session authorization alice").await.expect("set");
    assert_eq!(text(&two, user).await, "dave dave");
    assert_eq!(text(&one, user).await, "alice alice");
    one.batch_execute("set role pg_read_server_files").await.expect("set");
    assert_eq!(text(&two, user).await, "dave dave");
    assert_eq!(text(&one, user).await, "alice pg_read_server_files");
    one.batch_execute("do $$ begin perform 1; end $$").await.expect("done");
    assert_eq!(text(&two, user).await, "dave dave");
    one.batch_execute("set session authorization default").await.expect("set");
    assert_eq!(text(&one, user).await, "dave dave");
    assert_eq!(pid(&one).await, pid(&two).await, "nothing is tied to its connection");
}

#[tokio::test]
async fn prepared_statements_work_on_every_connection() {
    let world = World::start(&["--pool-size", "2"]).await;
    let (one, two, blocker) = (pooled(&world).await, pooled(&world).await, pooled(&world).await);
    let add = one.prepare("select $1::int + 1").await.expect("prepared");
    let same = two.prepare("select $1::int + 1").await.expect("prepared");
    let other = two.prepare("select $1::text || 'x'").await.expect("prepared");
    blocker.batch_execute("begin").await.expect("begun");
    let held = pid(&blocker).await;
    for round in 0..4 {
        assert_eq!(one.query_one(&add, &[&round]).await.expect("row").get::<_, i32>(0), round + 1);
        assert_eq!(two.query_one(&same, &[&round]).await.expect("row").get::<_, i32>(0), round + 1);
        assert_eq!(two.query_one(&other, &[&"a"]).await.expect("row").get::<_, String>(0), "ax");
    }
    blocker.batch_execute("commit").await.expect("done");
    one.batch_execute("begin").await.expect("begun");
    assert_eq!(pid(&one).await, held, "the one used last");
    assert_eq!(one.query_one(&add, &[&1]).await.expect("row").get::<_, i32>(0), 2);
    one.batch_execute("commit").await.expect("done");
    one.batch_execute("discard all").await.expect("discarded");
    let error = one.query_one(&add, &[&1]).await.expect_err("gone, as on a connection of its own");
    assert_eq!(error.code(), Some(&SqlState::INVALID_SQL_STATEMENT_NAME));
    assert_eq!(two.query_one(&same, &[&1]).await.expect("row").get::<_, i32>(0), 2, "others keep theirs");
}

#[tokio::test]
async fn more_statements_than_a_connection_keeps() {
    let world = World::start(&["--pool-size", "1"]).await;
    let client = pooled(&world).await;
    let mut statements = Vec::new();
    for number in 0..600 {
        statements.push(client.prepare(&format!("select {number}")).await.expect("prepared"));
    }
    for (number, statement) in statements.iter().enumerate().chain(statements.iter().enumerate().rev()) {
        assert_eq!(client.query_one(statement, &[]).await.expect("row").get::<_, i32>(0) as usize, number);
    }
    let kept: i64 = client.query_one("select count(*) from pg_prepared_statements", &[]).await.expect("row").get(0);
    assert!(kept <= 251, "{kept}");
}

#[tokio::test]
async fn an_error_in_a_pipeline_skips_no_more_than_it_must() {
    let world = World::start(&["--pool-size", "1"]).await;
    let client = pooled(&world).await;
    let divide = client.prepare("select 1 / $1::int").await.expect("prepared");
    for _ in 0..20 {
        let answers = join_all([1, 0, 1, 0, 1].iter().map(|by| async { client.query_one(&divide, &[by]).await })).await;
        let good: Vec<bool> = answers.iter().map(Result::is_ok).collect();
        assert_eq!(good, [true, false, true, false, true]);
    }
    // A statement that fails to be prepared leaves no name behind.
    let answers = join_all(["select 1", "selec 1", "select 2"].map(|sql| client.prepare(sql))).await;
    assert_eq!(answers.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, true]);
}

#[tokio::test]
async fn what_ties_a_session_ties_it_for_as_long_as_needed() {
    let world = World::start(&["--pool-size", "2"]).await;
    let (one, two) = (pooled(&world).await, pooled(&world).await);
    for (tie, check, untie) in [
        ("create temp table t as select 1 as a", "select a from t", "drop table t"),
        (
            "select pg_advisory_lock(4)",
            "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
            "select pg_advisory_unlock(4)",
        ),
        (
            "begin; declare c cursor with hold for select 1 from generate_series(1, 1000); commit",
            "fetch 1 from c",
            "close c",
        ),
        ("prepare p as select 1", "execute p", "deallocate p"),
    ] {
        one.batch_execute(tie).await.expect(tie);
        let tied = pid(&one).await;
        for _ in 0..3 {
            assert_ne!(pid(&two).await, tied, "{tie}");
            assert_eq!(text(&one, check).await, "1", "{tie}");
        }
        one.batch_execute(untie).await.expect(untie);
        two.batch_execute("begin").await.expect("begun");
        let other = pid(&two).await;
        assert_ne!(pid(&one).await, other);
        two.batch_execute("commit").await.expect("done");
        let three = pooled(&world).await;
        three.batch_execute("begin").await.expect("begun");
        two.batch_execute("begin").await.expect("both connections are free: {tie}");
        two.batch_execute("commit").await.expect("done");
        three.batch_execute("commit").await.expect("done");
    }
}

#[tokio::test]
async fn notifications_come_to_whoever_listens() {
    let world = World::start(&["--pool-size", "2"]).await;
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(world.address.port()).user("alice").password(PASSWORD).dbname("postgres");
    let (listener, mut connection) = config.options(POOLED).connect(NoTls).await.expect("connected");
    let (sender, mut heard) = futures::channel::mpsc::unbounded();
    let messages = futures::stream::poll_fn(move |context| connection.poll_message(context));
    tokio::spawn(async move {
        pin_mut!(messages);
        while let Some(Ok(message)) = messages.next().await {
            let _ = sender.unbounded_send(message);
        }
    });
    listener.batch_execute("listen news").await.expect("listening");
    let other = pooled(&world).await;
    other.batch_execute("notify news, 'fresh'").await.expect("notified");
    let message = tokio::time::timeout(Duration::from_secs(10), heard.next()).await.expect("in time");
    assert!(matches!(message, Some(AsyncMessage::Notification(news)) if news.payload() == "fresh"));
    listener.batch_execute("unlisten *").await.expect("not listening");
}

#[tokio::test]
async fn copy_works_both_ways_and_fails_in_order() {
    let world = World::start(&["--pool-size", "1"]).await;
    let client = pooled(&world).await;
    client.batch_execute("create table if not exists pool_copy (a int); truncate pool_copy").await.expect("made");
    for round in 1..=3_i64 {
        let sink = client.copy_in("copy pool_copy from stdin").await.expect("begun");
        pin_mut!(sink);
        for number in 0..20_000 {
            sink.send(bytes::Bytes::from(format!("{number}\n"))).await.expect("sent");
        }
        assert_eq!(sink.finish().await.expect("done"), 20_000);
        let count: i64 = client.query_one("select count(*) from pool_copy", &[]).await.expect("row").get(0);
        assert_eq!(count, 20_000 * round);
    }
    let out: Vec<_> =
        client.copy_out("copy pool_copy to stdout").await.expect("begun").try_collect().await.expect("all");
    assert_eq!(out.iter().map(|chunk| chunk.iter().filter(|byte| **byte == b'\n').count()).sum::<usize>(), 60_000);
    let sink = client.copy_in::<_, bytes::Bytes>("copy pool_copy from stdin").await.expect("begun");
    pin_mut!(sink);
    let _ = sink.send("not a number\n1\n".into()).await;
    assert!(sink.finish().await.is_err());
    assert_eq!(text(&client, "select count(*) from pool_copy").await, "60000");
    let psql =
        |sql: &'static str| async { world.psql(&format!("sslmode=require options='{POOLED}'"), PASSWORD, sql).await };
    assert_eq!(psql("copy (select 1) to stdout").await.as_deref(), Ok("1"));
    client.batch_execute("drop table pool_copy").await.expect("dropped");
}

#[tokio::test]
async fn cancelling_hits_the_right_statement() {
    let world = World::start(&["--pool-size", "1"]).await;
    let (one, two) = (pooled(&world).await, pooled(&world).await);
    for _ in 0..5 {
        let token = one.cancel_token();
        let (slept, ()) = tokio::join!(one.batch_execute("select pg_sleep(30)"), async {
            sleep(Duration::from_millis(50)).await;
            token.cancel_query(NoTls).await.expect("cancelled");
        });
        assert_eq!(state(slept).await, "57014");
        assert_eq!(text(&two, "select 1").await, "1");
        // One that comes too late must not hit whoever has the connection now.
        one.cancel_token().cancel_query(NoTls).await.expect("ignored");
        assert_eq!(text(&two, "select 'x' from pg_sleep(0.02)").await, "x");
    }
    two.batch_execute("begin").await.expect("begun");
    let token = one.cancel_token();
    let (waited, ()) = tokio::join!(one.query("select 1", &[]), async {
        sleep(Duration::from_millis(50)).await;
        token.cancel_query(NoTls).await.expect("cancelled");
    });
    assert_eq!(state(waited).await, "57014", "while it waits for a connection");
    two.batch_execute("commit").await.expect("done");
    assert_eq!(text(&one, "select 1").await, "1", "and goes on");
}

#[tokio::test]
async fn waiting_for_a_connection_has_an_end() {
    let world = World::start(&["--pool-size", "1", "--pool-queue-timeout", "300ms"]).await;
    let (one, two) = (pooled(&world).await, pooled(&world).await);
    one.batch_execute("begin").await.expect("begun");
    let begun = Instant::now();
    assert_eq!(state(two.simple_query("select 1").await).await, "53300");
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(text(&one, "select 1").await, "1");
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_transaction_along() {
    let world = World::start(&["--pool-size", "1"]).await;
    let (one, two) = (pooled(&world).await, pooled(&world).await);
    one.batch_execute("create table if not exists pool_left (a int)").await.expect("made");
    one.batch_execute("begin; insert into pool_left values (1)").await.expect("done");
    drop(one);
    assert_eq!(text(&two, "select count(*) from pool_left").await, "0");
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(world.address.port()).user("alice").password(PASSWORD).dbname("postgres");
    let (three, connection) = config.options(POOLED).connect(NoTls).await.expect("connected");
    let connection = tokio::spawn(connection);
    let running = tokio::spawn(async move { three.batch_execute("select pg_sleep(60)").await });
    sleep(Duration::from_millis(100)).await;
    // Closes the socket without a goodbye.
    connection.abort();
    assert!(running.await.expect("no panic").is_err());
    let begun = Instant::now();
    two.batch_execute("drop table pool_left").await.expect("dropped");
    assert!(begun.elapsed() < Duration::from_secs(20), "what it ran is stopped");
    let sleeping = "select count(*) from pg_stat_activity where query = 'select pg_sleep(60)' and state = 'active'";
    for _ in 0..100 {
        if text(&two, sleeping).await == "0" {
            return;
        }
        sleep(Duration::from_millis(50)).await;
    }
    panic!("the statement of a client that left still runs");
}

#[tokio::test]
async fn idle_clients_outlive_their_compute() {
    let world = World::start(&["--pool-size", "2"]).await;
    // A role of its own: other tests' sessions must go on.
    let carol = || async { world.connect_as("carol", POOLED).await.expect("connected") };
    let clients = join_all((0..4).map(|_| carol())).await;
    clients[0].batch_execute("set work_mem = '5MB'").await.expect("set");
    let statement = clients[0].prepare("select 4").await.expect("prepared");
    for _ in 0..3 {
        world.postgres.terminate_backends_of("carol");
        assert_eq!(clients[0].query_one(&statement, &[]).await.expect("row").get::<_, i32>(0), 4);
        assert_eq!(text(&clients[0], "show work_mem").await, "5MB");
        for client in &clients {
            assert_eq!(text(client, "select 1").await, "1");
        }
    }
    let busy = &clients[1];
    busy.batch_execute("begin").await.expect("begun");
    world.postgres.terminate_backends_of("carol");
    assert_eq!(state(busy.simple_query("select 1").await).await, "57P01", "a transaction is lost, and that is said");
}

#[tokio::test]
async fn one_wake_serves_all_and_idle_clients_need_none() {
    let world = World::start(&["--pool-size", "2"]).await;
    let clients = join_all((0..30).map(|_| pooled(&world))).await;
    assert!(world.wakes() <= 2, "{} wakes", world.wakes());
    drop(clients);
}

#[tokio::test]
async fn session_mode_keeps_the_connection() {
    let world = World::start(&["--pool-size", "2"]).await;
    let options = "endpoint=ep-a-pooler pool_mode=session";
    let one = world.connect(options).await.expect("connected");
    let own = pid(&one).await;
    one.batch_execute("set work_mem = '5MB'; create temp table t (a int); prepare p as select 1; listen x")
        .await
        .expect("set");
    let other = pooled(&world).await;
    for _ in 0..3 {
        assert_ne!(pid(&other).await, own);
        assert_eq!(pid(&one).await, own);
    }
    assert_eq!(text(&one, "execute p").await, "1");
    let statement = one.prepare("select $1::int").await.expect("prepared");
    assert_eq!(one.query_one(&statement, &[&3]).await.expect("row").get::<_, i32>(0), 3);
}

#[tokio::test]
async fn what_cannot_work_is_refused_with_a_way_out() {
    let world = World::start(&["--pool-size", "1"]).await;
    let client = pooled(&world).await;
    client.batch_execute("create sequence if not exists pool_seq").await.expect("made");
    client.batch_execute("select nextval('pool_seq')").await.expect("next");
    for refused in
        [client.simple_query("select lastval()").await.map(drop), client.query("select lastval()", &[]).await.map(drop)]
    {
        let error = refused.expect_err("refused");
        let error = error.as_db_error().expect("of the server's kind");
        assert_eq!(error.code().code(), "0A000");
        assert!(error.hint().is_some_and(|hint| hint.contains("RETURNING")), "{error:?}");
    }
    client
        .batch_execute("begin; select nextval('pool_seq'); select lastval(); commit")
        .await
        .expect("in a transaction");
    assert_eq!(text(&client, "select 1").await, "1", "and it goes on");
    client.batch_execute("drop sequence pool_seq").await.expect("dropped");
    let replication =
        world.psql("sslmode=disable replication=database options=endpoint=ep-a-pooler", PASSWORD, "select 1").await;
    assert!(replication.expect_err("refused").contains("without -pooler"));
}
