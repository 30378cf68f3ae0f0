//! Much data at once, beside a stock server with a cold file cache: a sequential scan of a table that only the pageserver has,
//! `COPY` in, an index build.

use std::time::{Duration, Instant};

use e2e::{regress::Target, stock};

use crate::peer::{Copies, Pair, median};

const SETTINGS: &[(&str, &str)] =
    &[("shared_buffers", "128MB"), ("max_wal_size", "2GB"), ("maintenance_work_mem", "64MB")];

/// Rows of about a kilobyte.
const ROWS_PER_MIB: u32 = 1000;

/// Runs it with a table of so many MiB, the scan `rounds` times.
pub async fn run(rounds: usize, mib: u32) -> anyhow::Result<()> {
    println!("scan: a table of {mib} MiB on a compute and on a stock server with a cold file cache");
    let mut pair = Pair::start(SETTINGS, Copies::One).await?;
    let rows = mib * ROWS_PER_MIB;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("rows");
    write_rows(&file, rows / 4)?;
    std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let (mut copied, mut indexed) = ([0.0; 2], [0.0; 2]);
    for (index, target) in pair.targets().iter().enumerate() {
        let fill =
            format!("create table t as select i a, repeat(md5(i::text), 30) b from generate_series(1, {rows}) i");
        sql(target, &fill)?;
        sql(target, "create table c (a int, b text)")?;
        copied[index] = sql(target, &format!("copy c from '{}'", file.display()))?.as_secs_f64();
        sql(target, "vacuum t")?;
    }
    let copy_ratio = copied[0] / copied[1];
    println!("copy: stock {:.2} s, dormouse {:.2} s", copied[0], copied[1]);
    let mut ratios = Vec::new();
    for round in 1..=rounds {
        pair.sleep_and_wake().await?;
        pair.restart_cold().await?;
        let [left, right] = pair.targets();
        let scan = "select count(*) from t where b <> ''";
        let (stock, dormouse) = (sql(&left, scan)?, sql(&right, scan)?);
        println!("scan round {round}: stock {:.2} s, dormouse {:.2} s", stock.as_secs_f64(), dormouse.as_secs_f64());
        ratios.push(stock.as_secs_f64() / dormouse.as_secs_f64());
    }
    pair.restart_cold().await?;
    pair.sleep_and_wake().await?;
    for (index, target) in pair.targets().iter().enumerate() {
        indexed[index] = sql(target, "create index on t (b, a)")?.as_secs_f64();
    }
    println!("index: stock {:.2} s, dormouse {:.2} s", indexed[0], indexed[1]);
    let index_ratio = indexed[0] / indexed[1];
    pair.stop().await?;
    println!("scan_ratio={:.2} copy_ratio={copy_ratio:.2} index_ratio={index_ratio:.2}", median(ratios));
    Ok(())
}

fn sql(target: &Target, statement: &str) -> anyhow::Result<Duration> {
    let start = Instant::now();
    stock::run(target.client("psql")?.args(["-qXAt", "-v", "ON_ERROR_STOP=1", "-c", statement]))?;
    Ok(start.elapsed())
}

fn write_rows(path: &std::path::Path, rows: u32) -> anyhow::Result<()> {
    use std::io::Write;
    let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
    for row in 0..rows {
        writeln!(file, "{row}\t{}", format!("{row:032}").repeat(30))?;
    }
    file.flush()?;
    Ok(())
}
