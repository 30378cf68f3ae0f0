//! The page cache over a clean sleep on the same host: used when nobody else wrote, thrown away in every other case.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::world::{self, Compute, ComputeOptions, World};

const WARM: ComputeOptions = ComputeOptions {
    settings: &[("shared_buffers", "4MB"), ("autovacuum", "off")],
    catalog: false,
    cache_bytes: None,
    disable_subscriptions: false,
    token: None,
    warm: true,
};

const MIB: u64 = 1 << 20;

/// The table has some 30 MB.
async fn make_table(sql: &tokio_postgres::Client) {
    let statements = [
        "CREATE TABLE t (i int, filler text)",
        "INSERT INTO t SELECT g, repeat('x', 980) FROM generate_series(1, 28000) g",
        "VACUUM t",
    ];
    for statement in statements {
        sql.batch_execute(statement).await.expect(statement);
    }
}

/// Reads the whole table: the sum of its numbers, and the MiB that the pageserver sent for it since the compute's start.
async fn wake_and_read(world: &World, name: &str) -> (Compute, i64, u64) {
    let before = world.bytes_served();
    let compute = world.compute(name, WARM).await;
    let sql = compute.connect("postgres").await;
    let sum = world::row(&sql, "SELECT sum(i) FROM t WHERE length(filler) = 980").await[0];
    (compute, sum, (world.bytes_served() - before) / MIB)
}

fn file_in(directory: &Path, ending: &str) -> Option<PathBuf> {
    let files = std::fs::read_dir(directory).ok()?.map(|file| file.expect("a file").path());
    files.into_iter().find(|path| path.extension().is_some_and(|found| found == ending))
}

const SUM: i64 = 28_000 * 28_001 / 2;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wake_on_the_same_host_is_warm_unless_somebody_wrote_or_it_crashed() {
    let world = World::start().await;
    let mut compute = world.compute("a", WARM).await;
    make_table(&compute.connect("postgres").await).await;
    compute.stop().await;
    let (mut compute, sum, mib) = wake_and_read(&world, "a").await;
    assert_eq!(sum, SUM);
    assert!(mib < 5, "{mib} MiB came from the pageserver");
    // Over a second sleep too, in which nothing was written but statistics.
    compute.stop().await;
    let (mut compute, sum, mib) = wake_and_read(&world, "a").await;
    assert_eq!(sum, SUM);
    assert!(mib < 5, "{mib} MiB came from the pageserver");

    // A crash throws it away.
    compute.kill().await;
    let (mut compute, sum, mib) = wake_and_read(&world, "a").await;
    assert_eq!(sum, SUM);
    assert!(mib > 20, "{mib} MiB came from the pageserver");
    compute.stop().await;

    // So does another compute that has the branch meanwhile.
    let mut other = world.compute("b", WARM).await;
    let sql = other.connect("postgres").await;
    sql.batch_execute("UPDATE t SET i = i + 1").await.expect("update");
    other.stop().await;
    let (mut compute, sum, mib) = wake_and_read(&world, "a").await;
    assert_eq!(sum, SUM + 28_000);
    assert!(mib > 20, "{mib} MiB came from the pageserver");
    compute.stop().await;
    assert!(file_in(&world.cache_dir("a"), "asleep").is_some());

    // Without the setting nothing stays.
    let mut compute = world.compute("a", ComputeOptions { warm: false, ..WARM }).await;
    compute.stop().await;
    assert!(!world.cache_dir("a").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_to_a_sleeping_cache_costs_warmth_only() {
    let world = World::start().await;
    let mut compute = world.compute("a", WARM).await;
    make_table(&compute.connect("postgres").await).await;
    compute.stop().await;
    // A byte of every page.
    let pages = file_in(&world.cache_dir("a"), "asleep").expect("the pages");
    let file = File::options().read(true).write(true).open(&pages).expect("open");
    for page in 0..file.metadata().expect("length").len() / 8192 {
        let mut byte = [0];
        file.read_exact_at(&mut byte, page * 8192 + 5000).expect("read");
        file.write_all_at(&[byte[0] ^ 1], page * 8192 + 5000).expect("write");
    }
    let (mut compute, sum, _) = wake_and_read(&world, "a").await;
    assert_eq!(sum, SUM);
    compute.stop().await;

    let list = file_in(&world.cache_dir("a"), "asleep-list").expect("the list");
    let mut content = std::fs::read(&list).expect("read");
    let middle = content.len() / 2;
    content[middle] ^= 1;
    std::fs::write(&list, content).expect("write");
    let (mut compute, sum, mib) = wake_and_read(&world, "a").await;
    assert_eq!(sum, SUM);
    assert!(mib > 20, "{mib} MiB came from the pageserver");
    compute.stop().await;

    // Pages without a list, as after a stop that was cut short.
    std::fs::remove_file(file_in(&world.cache_dir("a"), "asleep-list").expect("the list")).expect("remove");
    let (mut compute, sum, _) = wake_and_read(&world, "a").await;
    assert_eq!(sum, SUM);
    compute.kill().await;
}
