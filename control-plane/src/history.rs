//! A branch's history: how far back its project keeps it, where in it a position or a time is, and leases that keep a
//! position longer.

use std::time::Duration;

use control_plane_api::v2::{BranchFields, BranchHistory, Lease, LeaseFields};
use time::{OffsetDateTime, format_description::well_known::Rfc3339, macros::datetime};
use types::{BranchRef, Lsn};

use crate::{
    app::App,
    problem::Problem,
    store::{
        branches::{self, BranchRow},
        leases::{self, LeaseRow},
        projects,
    },
};

/// Storage that has not answered by then may be waiting for WAL that nobody tells it about.
const STORAGE_PATIENCE: Duration = Duration::from_secs(1);
/// WAL counts microseconds from here.
const POSTGRES_EPOCH: OffsetDateTime = datetime!(2000-01-01 0:00 UTC);
/// How long a lease holds unless it says so: an hour.
const DEFAULT_LEASE_SECONDS: u64 = 3600;
/// Longest time that a lease holds: as long as the longest history window.
const MAX_LEASE_SECONDS: u64 = 30 * 86_400;

/// Where on a branch something is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// Its newest state.
    Head,
    /// A position.
    Lsn(Lsn),
    /// Microseconds since 2000.
    Time(i64),
}

impl Point {
    /// Of a request for a branch.
    pub fn of_branch(fields: &BranchFields) -> Result<Point, Problem> {
        Point::new(
            ("parent_lsn", fields.parent_lsn.as_deref()),
            ("parent_timestamp", fields.parent_timestamp.as_deref()),
        )
    }

    /// From a request's two fields, of which at most one may be given.
    pub fn new(lsn: (&str, Option<&str>), timestamp: (&str, Option<&str>)) -> Result<Point, Problem> {
        match (lsn, timestamp) {
            ((_, None), (_, None)) => Ok(Point::Head),
            ((lsn, Some(_)), (timestamp, Some(_))) => {
                Err(Problem::Invalid(format!("give {lsn} or {timestamp}, not both")))
            }
            ((name, Some(text)), _) => {
                text.parse().map(Point::Lsn).map_err(|e| Problem::Invalid(format!("{name}: {e}")))
            }
            (_, (name, Some(text))) => {
                let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| {
                    let example = "such as 2024-05-01T12:00:00Z";
                    Problem::Invalid(format!("{name} must be an RFC 3339 time {example}"))
                })?;
                if time > OffsetDateTime::now_utc() {
                    return Err(Problem::Invalid(format!("{name} is in the future")));
                }
                wal_time(time).map(Point::Time).ok_or_else(|| Problem::Invalid(format!("{name} is too old")))
            }
        }
    }
}

/// Microseconds since 2000, as in WAL.
fn wal_time(time: OffsetDateTime) -> Option<i64> {
    i64::try_from((time - POSTGRES_EPOCH).whole_microseconds()).ok()
}

/// A time of WAL as the API shows it.
fn shown_time(timestamp_us: i64) -> String {
    let time = POSTGRES_EPOCH + time::Duration::microseconds(timestamp_us);
    time.format(&Rfc3339).unwrap_or_default()
}

/// How far back a project keeps its history.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    retention_seconds: u64,
    /// Microseconds since 2000.
    since_us: i64,
}

impl Window {
    /// Of a project, as of now.
    pub async fn of(app: &App, branch: &BranchRef) -> Result<Window, Problem> {
        let project = branch.project.clone();
        let retention_seconds = app.store.call(move |db| projects::get(db, &project)).await?.history_retention_seconds;
        Ok(Window::new(retention_seconds))
    }

    /// Its first moment, microseconds since 2000.
    pub fn since_us(self) -> i64 {
        self.since_us
    }

    /// No shorter than so many seconds: what is being read right now must stay, though a project wants no history.
    pub fn at_least(self, seconds: u64) -> Window {
        if self.retention_seconds >= seconds { self } else { Window::new(seconds) }
    }

    /// That ends now.
    pub fn new(retention_seconds: u64) -> Window {
        let now_us = wal_time(OffsetDateTime::now_utc()).unwrap_or(i64::MAX);
        let retention_us = i64::try_from(retention_seconds).unwrap_or(i64::MAX).saturating_mul(1_000_000);
        Window { retention_seconds, since_us: now_us.saturating_sub(retention_us) }
    }

    /// What lies before it is refused with the window's length and start.
    fn outside(&self, what: &str) -> Problem {
        let (kept, since) = (shown_duration(self.retention_seconds), shown_time(self.since_us));
        Problem::Invalid(format!(
            "{what} is outside the history window: this project keeps {kept} (history_retention_seconds is {}), so its \
             history can be used from {since} on",
            self.retention_seconds
        ))
    }
}

/// In the largest unit that fits.
fn shown_duration(seconds: u64) -> String {
    let (count, unit) = match seconds {
        0 => return "no history".to_owned(),
        s if s.is_multiple_of(86_400) => (s / 86_400, "day"),
        s if s.is_multiple_of(3600) => (s / 3600, "hour"),
        s if s.is_multiple_of(60) => (s / 60, "minute"),
        s => (s, "second"),
    };
    if count == 1 { format!("1 {unit}") } else { format!("{count} {unit}s") }
}

/// A position, and the branch in whose own history it is: the one that was asked about or one that it comes from.
#[derive(Debug, Clone)]
pub struct Position {
    /// The branch that has it.
    pub branch: BranchRow,
    /// Where.
    pub lsn: Lsn,
}

/// Finds a point in a branch's history, which ends at `head`. Refused outside the project's window, unless a lease holds
/// exactly this position.
pub async fn locate(app: &App, branch: BranchRow, head: Lsn, point: Point) -> Result<Position, Problem> {
    let window = Window::of(app, &branch.branch).await?;
    match point {
        Point::Head => Ok(Position { branch, lsn: head }),
        Point::Time(timestamp_us) => {
            if timestamp_us < window.since_us {
                return Err(window.outside(&format!("the time {}", shown_time(timestamp_us))));
            }
            at_time(app, branch, head, timestamp_us).await
        }
        Point::Lsn(lsn) => {
            let position = at_lsn(app, branch.clone(), head, lsn).await?;
            if lsn >= oldest(app, branch, head, window).await? || is_leased(app, &position).await? {
                return Ok(position);
            }
            Err(window.outside(&format!("the position {lsn}")))
        }
    }
}

/// The first position of the window; the start of the history when that is younger.
async fn oldest(app: &App, branch: BranchRow, head: Lsn, window: Window) -> Result<Lsn, Problem> {
    let mut root = branch.clone();
    while let Some(parent) = parent_of(app, &root).await? {
        root = parent;
    }
    match made_us(&root) {
        Some(made_us) if made_us >= window.since_us => Ok(root.start_lsn),
        Some(_) | None => Ok(at_time(app, branch, head, window.since_us).await?.lsn),
    }
}

async fn is_leased(app: &App, position: &Position) -> Result<bool, Problem> {
    let (branch, lsn) = (position.branch.branch.clone(), position.lsn);
    Ok(app.store.call(move |db| leases::held(db, &branch)).await?.contains(&lsn))
}

/// The branch in whose own history `lsn` is.
async fn at_lsn(app: &App, branch: BranchRow, head: Lsn, lsn: Lsn) -> Result<Position, Problem> {
    if lsn > head {
        return Err(Problem::Invalid(format!("{lsn} is after the end of the branch's history, {head}")));
    }
    let mut ancestor = branch;
    while lsn < ancestor.start_lsn {
        let start = ancestor.start_lsn;
        let too_old = || Problem::Invalid(format!("{lsn} is before the start of the history, {start}"));
        ancestor = parent_of(app, &ancestor).await?.ok_or_else(too_old)?;
    }
    Ok(Position { branch: ancestor, lsn })
}

async fn at_time(app: &App, branch: BranchRow, head: Lsn, timestamp_us: i64) -> Result<Position, Problem> {
    let (mut ancestor, mut end) = (branch, head);
    loop {
        refuse_before_root(&ancestor, timestamp_us)?;
        let search = app.storage.lsn_by_timestamp(&ancestor.timeline, timestamp_us, end);
        let found = patiently(app, &ancestor.branch, search).await;
        let reason = match found {
            Ok(lsn) if lsn >= ancestor.start_lsn => return Ok(Position { branch: ancestor, lsn: lsn.min(end) }),
            Ok(lsn) => format!("its state is that of {lsn}, in the history of its own parent"),
            Err(Problem::Invalid(reason)) => reason,
            Err(problem) => return Err(problem),
        };
        // Before this branch was made it was its parent, up to where it left it.
        end = ancestor.start_lsn;
        ancestor = parent_of(app, &ancestor)
            .await?
            .ok_or_else(|| Problem::Invalid(format!("that time is not in the branch's history: {reason}")))?;
    }
}

/// A root branch has no commits from before it was made: the template's state is not a point of its history.
fn refuse_before_root(branch: &BranchRow, timestamp_us: i64) -> Result<(), Problem> {
    match made_us(branch).filter(|_| branch.parent.is_none()) {
        Some(made_us) if timestamp_us < made_us => {
            Err(Problem::Invalid(format!("that time is before the start of the history, {}", branch.created_at)))
        }
        Some(_) | None => Ok(()),
    }
}

fn made_us(branch: &BranchRow) -> Option<i64> {
    OffsetDateTime::parse(&branch.created_at, &Rfc3339).ok().and_then(wal_time)
}

async fn parent_of(app: &App, row: &BranchRow) -> Result<Option<BranchRow>, Problem> {
    let Some(parent) = row.parent.clone() else { return Ok(None) };
    let project = row.branch.project.clone();
    app.store.call(move |db| branches::get(db, &project, &parent).map(Some)).await
}

/// Waits for storage, which may be waiting for WAL of a sleeping branch: after a while its end is settled again.
pub async fn patiently<T>(
    app: &App,
    branch: &BranchRef,
    request: impl Future<Output = Result<T, Problem>>,
) -> Result<T, Problem> {
    let nudge = async {
        tokio::time::sleep(STORAGE_PATIENCE).await;
        if let Err(error) = app.computes.settle_again(branch).await {
            tracing::warn!(%branch, %error, "settling a branch whose WAL does not arrive");
        }
        std::future::pending().await
    };
    tokio::select! {
        done = request => done,
        never = nudge => never,
    }
}

/// How far the branch's history reaches, and where in it `point` is. Wakes nothing.
pub async fn show(app: &App, branch: BranchRef, point: Point) -> Result<BranchHistory, Problem> {
    let wanted = branch.clone();
    let row = app.store.call(move |db| branches::get(db, &wanted.project, &wanted.branch)).await?;
    let window = Window::of(app, &branch).await?;
    let head = app.computes.head(&branch).await?;
    let oldest = oldest(app, row.clone(), head, window).await?;
    let position = locate(app, row.clone(), head, point).await?;
    let time_of = async |position: &Position| {
        let search = app.storage.timestamp_by_lsn(&position.branch.timeline, position.lsn);
        let found = patiently(app, &position.branch.branch, search).await?;
        Ok::<_, Problem>(found.map(shown_time))
    };
    Ok(BranchHistory {
        branch_id: row.branch.branch.clone(),
        history_retention_seconds: window.retention_seconds,
        start_lsn: Some(oldest),
        end_lsn: Some(head),
        end_timestamp: time_of(&Position { branch: row, lsn: head }).await?,
        lsn: Some(position.lsn),
        timestamp: time_of(&position).await?,
        lsn_branch_id: position.branch.branch.branch,
    })
}

/// Holds a position of the branch's history for some time, though it may fall out of the window.
pub async fn lease(app: &App, branch: BranchRef, fields: LeaseFields) -> Result<Lease, Problem> {
    let point = Point::new(("lsn", fields.lsn.as_deref()), ("timestamp", fields.timestamp.as_deref()))?;
    let seconds = fields.seconds.unwrap_or(DEFAULT_LEASE_SECONDS);
    if !(1..=MAX_LEASE_SECONDS).contains(&seconds) {
        return Err(Problem::Invalid(format!("seconds must be 1 to {MAX_LEASE_SECONDS}")));
    }
    let wanted = branch.clone();
    let row = app.store.call(move |db| branches::get(db, &wanted.project, &wanted.branch)).await?;
    let head = app.computes.head(&branch).await?;
    let position = locate(app, row, head, point).await?;
    let made = app.store.call(move |db| leases::insert(db, &position.branch.branch, position.lsn, seconds)).await?;
    Ok(shown_lease(made))
}

/// A lease as the API shows it.
pub fn shown_lease(row: LeaseRow) -> Lease {
    Lease { id: row.id, branch_id: row.branch.branch, lsn: Some(row.lsn), expires_at: row.expires_at }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_checked() {
        let point = |lsn: Option<&str>, time: Option<&str>| Point::new(("lsn", lsn), ("timestamp", time));
        assert_eq!(point(None, None), Ok(Point::Head));
        assert_eq!(point(Some("0/10"), None), Ok(Point::Lsn(Lsn(16))));
        assert_eq!(point(None, Some("2000-01-01T00:00:01Z")), Ok(Point::Time(1_000_000)));
        assert_eq!(point(None, Some("2000-01-01T02:00:00+02:00")), Ok(Point::Time(0)));
        for (lsn, time) in [(Some("x"), None), (None, Some("yesterday")), (None, Some("2999-01-01T00:00:00Z"))] {
            assert!(point(lsn, time).is_err());
        }
        assert!(point(Some("0/10"), Some("2000-01-01T00:00:01Z")).is_err());
    }

    #[test]
    fn the_refusal_states_the_window() {
        let said = Window::new(7 * 86_400).outside("the position 0/10").to_string();
        assert!(said.contains("0/10") && said.contains("7 days") && said.contains("604800"), "{said}");
        for (seconds, shown) in
            [(0, "no history"), (1, "1 second"), (90, "90 seconds"), (3600, "1 hour"), (7200, "2 hours")]
        {
            assert_eq!(shown_duration(seconds), shown);
        }
    }
}
