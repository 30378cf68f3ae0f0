//! A short run of `make chaos NAME=quorum`.

use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_and_nothing_refused_appears() -> anyhow::Result<()> {
    let figures = e2e::chaos::run(Duration::from_secs(75), 1).await?;
    println!("{figures:?}");
    assert_eq!((figures.lost, figures.phantom), (0, 0));
    assert!(figures.commits > 50 && figures.kills > 5, "hardly anything happened: {figures:?}");
    assert!(
        figures.partitions > 0 && figures.second_commits > 0,
        "no cut has bitten, or no second compute: {figures:?}"
    );
    Ok(())
}
