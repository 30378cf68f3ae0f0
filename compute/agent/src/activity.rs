//! Watches whether anybody uses the compute.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio_postgres::{Client, Statement};

use crate::{
    backend::AgentBackend,
    catalog::{ADMIN_DATABASE, connect},
};

/// How often Postgres is asked.
const PERIOD: Duration = Duration::from_secs(1);

/// Longest wait for its answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// One row: client connections, whether anything is active, milliseconds since the last change of any connection, how
/// many connections there ever were (so that one which came and went between two questions is seen), and two settings that
/// may be changed at run time: the page cache's limit, and how far the pageserver may be behind.
const QUESTION: &str = "\
SELECT count(*) FILTER (WHERE backend_type = 'client backend')::int8, \
  coalesce(bool_or(backend_type IN ('walsender', 'logical replication worker') \
    OR backend_type = 'client backend' AND state IS DISTINCT FROM 'idle'), false), \
  extract(epoch FROM clock_timestamp() - max(greatest(state_change, backend_start)) \
    FILTER (WHERE backend_type = 'client backend'))::float8 * 1000, \
  (SELECT coalesce(sum(sessions), 0)::int8 FROM pg_stat_database), \
  current_setting('dormouse.page_cache_mib', true), current_setting('dormouse.max_ingest_lag_mib', true) \
FROM pg_stat_activity WHERE pid <> pg_backend_pid()";

/// What Postgres said.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Observation {
    /// Client connections.
    pub connections: u32,
    /// A query, an open transaction or a replication is in progress.
    pub active: bool,
    /// Milliseconds since the last query's end or the last connection's start.
    pub quiet_ms: Option<f64>,
    /// Connections ever made.
    pub sessions: i64,
    /// `dormouse.page_cache_mib`, when it is a number.
    pub page_cache_mib: Option<u64>,
    /// `dormouse.max_ingest_lag_mib`, when it is a number.
    pub max_ingest_lag_mib: Option<u64>,
}

/// Answers how long the compute has been idle. Pure but for the moments it is given.
#[derive(Debug)]
pub struct Activity {
    last_active: Instant,
    active: bool,
    connections: u32,
    sessions: Option<i64>,
}

impl Activity {
    /// A compute that has just been started for somebody.
    pub fn new(now: Instant) -> Self {
        Self { last_active: now, active: false, connections: 0, sessions: None }
    }

    /// Takes note of an observation.
    pub fn observe(&mut self, now: Instant, seen: &Observation) {
        self.active = seen.active;
        self.connections = seen.connections;
        let came_and_went = self.sessions.is_some_and(|before| before != seen.sessions);
        self.sessions = Some(seen.sessions);
        if seen.active || came_and_went {
            self.last_active = now;
        } else if let Some(quiet_ms) = seen.quiet_ms {
            let quiet = Duration::from_millis(quiet_ms.max(0.0) as u64);
            let since = now.checked_sub(quiet).unwrap_or(self.last_active);
            self.last_active = self.last_active.max(since);
        }
    }

    /// Nothing is known for now: nobody must think that it is idle.
    pub fn unknown(&mut self, now: Instant) {
        self.last_active = now;
    }

    /// Milliseconds since the last activity, 0 while there is any.
    pub fn idle_ms(&self, now: Instant) -> u64 {
        if self.active { 0 } else { now.saturating_duration_since(self.last_active).as_millis() as u64 }
    }

    /// Client connections at the last look.
    pub fn connections(&self) -> u32 {
        self.connections
    }
}

/// Asks Postgres again and again. Ends only when it is dropped.
///
/// The page cache's limit, and how far the pageserver may be behind, are what Postgres's configuration says.
pub async fn watch(socket_dir: PathBuf, activity: Arc<Mutex<Activity>>, backend: Arc<AgentBackend>) {
    let cache = &backend.cache;
    let mut monitor = None;
    let mut damaged_pages = 0;
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let asked = tokio::time::timeout(ANSWER_LIMIT, ask(&socket_dir, monitor.take())).await;
        match asked {
            Ok(Ok((kept, seen))) => {
                monitor = Some(kept);
                activity.lock().observe(Instant::now(), &seen);
                if let Some(mib) = seen.page_cache_mib {
                    cache.set_clean_bytes(mib.saturating_mul(1024 * 1024));
                }
                if let Some(mib) = seen.max_ingest_lag_mib {
                    backend.shipper.backpressure().set_max_lag_bytes(mib.saturating_mul(1024 * 1024));
                }
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "cannot see who is connected");
                activity.lock().unknown(Instant::now());
            }
            Err(_) => activity.lock().unknown(Instant::now()),
        }
        let trimming = cache.clone();
        match tokio::task::spawn_blocking(move || trimming.trim()).await {
            Ok(Ok(pages)) if pages > 0 => tracing::debug!(pages, "the page cache was cut back to its limit"),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "cutting the page cache back"),
            Err(error) => tracing::warn!(%error, "cutting the page cache back"),
        }
        let now_damaged = cache.stats().damaged_pages;
        if now_damaged > damaged_pages {
            tracing::error!(pages = now_damaged - damaged_pages, "pages in the page cache's file were damaged");
            damaged_pages = now_damaged;
        }
    }
}

type Monitor = (Client, Statement);

async fn ask(
    socket_dir: &std::path::Path,
    kept: Option<Monitor>,
) -> Result<(Monitor, Observation), tokio_postgres::Error> {
    let (client, statement) = match kept {
        Some(monitor) => monitor,
        None => {
            let client = connect(socket_dir, ADMIN_DATABASE, "dormouse_monitor").await?;
            let statement = client.prepare(QUESTION).await?;
            (client, statement)
        }
    };
    let row = client.query_one(&statement, &[]).await?;
    let number = |column| row.get::<_, Option<String>>(column).and_then(|text| text.trim().parse().ok());
    let seen = Observation {
        connections: u32::try_from(row.get::<_, i64>(0)).unwrap_or(u32::MAX),
        active: row.get(1),
        quiet_ms: row.get(2),
        sessions: row.get(3),
        page_cache_mib: number(4),
        max_ingest_lag_mib: number(5),
    };
    Ok(((client, statement), seen))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiet(quiet_ms: Option<f64>, sessions: i64) -> Observation {
        Observation {
            connections: 1,
            active: false,
            quiet_ms,
            sessions,
            page_cache_mib: None,
            max_ingest_lag_mib: None,
        }
    }

    #[test]
    fn idle_time_counts_from_the_last_activity() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut activity = Activity::new(start);
        assert_eq!(activity.idle_ms(at(5)), 5_000);
        activity.observe(at(5), &quiet(Some(2_000.0), 1));
        assert_eq!(activity.idle_ms(at(5)), 2_000);
        activity.observe(at(6), &Observation { active: true, ..quiet(Some(0.0), 1) });
        assert_eq!(activity.idle_ms(at(60)), 0);
        activity.observe(at(61), &quiet(None, 1));
        assert_eq!(activity.idle_ms(at(63)), 57_000);
    }

    #[test]
    fn a_connection_between_two_looks_is_seen() {
        let start = Instant::now();
        let mut activity = Activity::new(start);
        let later = start + Duration::from_secs(10);
        activity.observe(start, &quiet(None, 4));
        activity.observe(later, &quiet(None, 4));
        assert_eq!(activity.idle_ms(later), 10_000);
        activity.observe(later, &quiet(None, 5));
        assert_eq!(activity.idle_ms(later), 0);
    }

    #[test]
    fn what_is_not_known_is_not_idle() {
        let start = Instant::now();
        let mut activity = Activity::new(start);
        let later = start + Duration::from_secs(10);
        activity.unknown(later);
        assert_eq!(activity.idle_ms(later), 0);
    }
}
