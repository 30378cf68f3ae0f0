//! Who gets in, by which way, and that nobody else wakes anything.

mod support;

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use support::{PASSWORD, World};

const TLS_TO_A: &str = "sslmode=require options=endpoint%3Dep-a";

#[tokio::test]
async fn a_good_login_by_options() {
    let world = World::start(&[]).await;
    let who = "SELECT current_user || '/' || current_database()";
    assert_eq!(world.psql(TLS_TO_A, PASSWORD, who).await.as_deref(), Ok("alice/postgres"));
    assert_eq!(
        world.psql("sslmode=disable options=endpoint=ep-a", PASSWORD, who).await.as_deref(),
        Ok("alice/postgres"),
        "without TLS"
    );
    assert_eq!(world.wakes(), 2);
    assert_eq!(world.endpoint("ep-b").wakes.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn other_parameters_are_passed_on() {
    let world = World::start(&[]).await;
    let info =
        "sslmode=require application_name=tea options='-c work_mem=5MB -c endpoint=ep-a -c search_path=a,\\\\ b'";
    let sql = "SELECT current_setting('application_name'), current_setting('work_mem'), current_setting('search_path')";
    assert_eq!(world.psql(info, PASSWORD, sql).await.as_deref(), Ok("tea|5MB|a, b"));
}

#[tokio::test]
async fn bad_logins_wake_nothing_and_look_alike() {
    let world = World::start(&[]).await;
    let wrong = world.psql(TLS_TO_A, "wrong", "SELECT 1").await.expect_err("refused");
    assert!(wrong.contains("FATAL:  password authentication failed for user \"alice\""), "{wrong}");
    for user in ["nobody", "bob", "white rabbit/../x", ".."] {
        let info = format!("{TLS_TO_A} user='{user}'");
        let refused = world.psql(&info, "wrong", "SELECT 1").await.expect_err("refused");
        assert!(refused.contains(&format!("password authentication failed for user \"{user}\"")), "{refused}");
        assert_eq!(refused, wrong.replace("\"alice\"", &format!("\"{user}\"")));
    }
    let unknown = world.psql("sslmode=require options=endpoint%3Dep-x", PASSWORD, "SELECT 1").await;
    assert_eq!(unknown.as_ref(), Err(&wrong), "an endpoint that does not exist");
    let unknown = world.psql("sslmode=require", &format!("endpoint=ep-x;{PASSWORD}"), "SELECT 1").await;
    assert_eq!(unknown.as_ref(), Err(&wrong), "nor by a password in clear text");
    assert_eq!(world.wakes(), 0);
}

#[tokio::test]
async fn no_endpoint_is_explained() {
    let world = World::start(&["--domain", "db.example.com"]).await;
    for info in ["sslmode=require", "sslmode=disable"] {
        let refused = world.psql(info, PASSWORD, "SELECT 1").await.expect_err("refused");
        for part in ["does not say which endpoint", "<endpoint>.db.example.com", "options=", "password"] {
            assert!(refused.contains(part), "{refused}");
        }
    }
    let both = "sslmode=require host=ep-a.localhost options=endpoint%3Dep-b";
    let refused = world.psql(both, PASSWORD, "SELECT 1").await.expect_err("refused");
    assert!(refused.contains("the host name says endpoint \"ep-a\""), "{refused}");
    assert_eq!(world.wakes(), 0);
}

#[tokio::test]
async fn the_host_name_leads_to_the_endpoint() {
    let world = World::start(&["--domain", "db.example.com"]).await;
    let ca = world.tls_dir.path().join("ca.pem");
    for host in ["ep-b.localhost", "ep-b.db.example.com", "ep-b-pooler.localhost"] {
        let info = format!("host={host} sslmode=verify-full sslrootcert={}", ca.display());
        assert_eq!(world.psql(&info, PASSWORD, "SELECT 1").await.as_deref(), Ok("1"), "{host}");
    }
    assert_eq!(world.endpoint("ep-b").wakes.load(Ordering::SeqCst), 3);
    assert_eq!(world.wakes(), 3);
}

#[tokio::test]
async fn a_password_may_name_the_endpoint() {
    let world = World::start(&[]).await;
    for separator in [";", "$"] {
        let password = format!("endpoint=ep-a{separator}{PASSWORD}");
        assert_eq!(world.psql("sslmode=require", &password, "SELECT 1").await.as_deref(), Ok("1"));
    }
    assert_eq!(world.wakes(), 2);
    for bad in ["endpoint=ep-a;wrong", "endpoint=ep-x;x", "wrong"] {
        assert!(world.psql("sslmode=require", bad, "SELECT 1").await.is_err());
    }
    assert!(world.psql("sslmode=require user=nobody", "endpoint=ep-a;wrong", "SELECT 1").await.is_err());
    let plain = world.psql("sslmode=disable", &format!("endpoint=ep-a;{PASSWORD}"), "SELECT 1").await;
    assert!(plain.expect_err("refused").contains("does not say which endpoint"));
    assert_eq!(world.wakes(), 2);
}

#[tokio::test]
async fn clear_text_without_tls_must_be_allowed() {
    let world = World::start(&["--allow-cleartext"]).await;
    let password = format!("endpoint=ep-a;{PASSWORD}");
    assert_eq!(world.psql("sslmode=disable", &password, "SELECT 1").await.as_deref(), Ok("1"));
}

#[tokio::test]
async fn channel_binding_works() {
    let world = World::start(&[]).await;
    let bound = format!("{TLS_TO_A} channel_binding=require");
    assert_eq!(world.psql(&bound, PASSWORD, "SELECT 1").await.as_deref(), Ok("1"));
    let unbound = format!("{TLS_TO_A} channel_binding=disable");
    assert_eq!(world.psql(&unbound, PASSWORD, "SELECT 1").await.as_deref(), Ok("1"));
    assert!(world.psql(&bound, "wrong", "SELECT 1").await.is_err());
}

#[tokio::test]
async fn a_new_password_counts_at_once() {
    let world = World::start(&[]).await;
    assert!(world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await.is_ok());
    world.endpoint("ep-a").set_password("alice", "new");
    assert_eq!(world.psql(TLS_TO_A, "new", "SELECT 1").await.as_deref(), Ok("1"));
    assert!(world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await.is_err());
}

#[tokio::test]
async fn a_remembered_verifier_is_asked_for_again_when_it_fails() {
    let world = World::start(&["--auth-cache", "1h"]).await;
    let endpoint = world.endpoint("ep-a");
    for _ in 0..3 {
        assert!(world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await.is_ok());
    }
    assert_eq!(endpoint.role_lookups.load(Ordering::SeqCst), 1);
    endpoint.set_password("alice", "new");
    assert_eq!(world.psql("sslmode=require", "endpoint=ep-a;new", "SELECT 1").await.as_deref(), Ok("1"), "at once");
    endpoint.set_password("alice", "newer");
    assert!(world.psql(TLS_TO_A, "newer", "SELECT 1").await.is_err(), "SCRAM has sent the old salt by then");
    assert_eq!(world.psql(TLS_TO_A, "newer", "SELECT 1").await.as_deref(), Ok("1"), "but the next one");
}

#[tokio::test]
async fn logins_outlive_the_control_plane() {
    let world = World::start(&[]).await;
    assert!(world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await.is_ok());
    world.control.fail(true);
    assert_eq!(world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await.as_deref(), Ok("1"), "down");
    assert!(world.psql(TLS_TO_A, "wrong", "SELECT 1").await.is_err());
    let other = world.psql("sslmode=require options=endpoint%3Dep-b", PASSWORD, "SELECT 1").await;
    assert!(other.expect_err("never seen").contains("control plane gives no answer"));
    world.control.fail(false);
    world.control.hang(true);
    let begun = Instant::now();
    assert_eq!(world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await.as_deref(), Ok("1"), "slow");
    assert!(begun.elapsed() < Duration::from_secs(5));
    world.control.hang(false);
}

#[tokio::test]
async fn a_disabled_endpoint_says_so_after_the_login() {
    let world = World::start(&[]).await;
    world.endpoint("ep-a").enabled.store(false, Ordering::SeqCst);
    let refused = world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await.expect_err("refused");
    assert!(refused.contains("endpoint \"ep-a\" is disabled"), "{refused}");
    let refused = world.psql(TLS_TO_A, "wrong", "SELECT 1").await.expect_err("refused");
    assert!(refused.contains("password authentication failed"), "{refused}");
    assert_eq!(world.wakes(), 0);
}
