//! Clients that write whatever happens, and remember outside the database what they were told.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio_postgres::error::Severity;

use super::history::{Outcome, Step, Transaction};
use crate::sql;

/// Lists that transactions append to at a time.
const LISTS: u32 = 8;
/// After so long new lists are begun: they stay short.
const LISTS_FOR: Duration = Duration::from_secs(20);
const PATIENCE: Duration = Duration::from_secs(20);

/// What one installation's clients share.
#[derive(Debug)]
pub struct Ledger {
    began: Instant,
    stop: AtomicBool,
    /// Numbers by how their insertion ended.
    numbers: Mutex<Numbers>,
    history: Mutex<Vec<Transaction>>,
}

/// Numbers that were inserted.
#[derive(Debug, Clone, Default)]
pub struct Numbers {
    /// Acknowledged.
    pub acknowledged: BTreeSet<i64>,
    /// The connection broke before an answer came.
    pub unknown: BTreeSet<i64>,
    /// Refused, and what the server said.
    pub refused: BTreeMap<i64, String>,
}

impl Ledger {
    /// An empty one.
    pub fn new() -> Arc<Ledger> {
        let (stop, numbers, history) = (AtomicBool::new(false), Mutex::default(), Mutex::default());
        Arc::new(Ledger { began: Instant::now(), stop, numbers, history })
    }

    /// Has clients end after what they are doing.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    /// How many commits were acknowledged.
    pub fn commits(&self) -> usize {
        let transactions = self.history().iter().filter(|t| t.outcome == Outcome::Committed).count();
        self.numbers().acknowledged.len() + transactions
    }

    /// How many numbers below this one were acknowledged.
    pub fn acknowledged_below(&self, number: i64) -> usize {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).acknowledged.range(..number).count()
    }

    /// What was inserted.
    pub fn numbers(&self) -> Numbers {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All transactions on lists.
    pub fn history(&self) -> Vec<Transaction> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    /// The first of the lists of this moment.
    fn first_list(&self) -> u32 {
        (self.began.elapsed().as_secs() / LISTS_FOR.as_secs()) as u32 * LISTS
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Notes a transaction.
    pub fn note(&self, transaction: Transaction) {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).push(transaction);
    }

    /// Reads all lists, once nobody writes any more, and notes it as one transaction.
    pub async fn read_all(&self, uri: &str) -> anyhow::Result<()> {
        let client = sql::connect(uri).await?;
        let began = self.now();
        let mut steps = Vec::new();
        for list in 0..self.first_list() + LISTS {
            steps.push(Step::Read { list, values: read(&client, list).await? });
        }
        self.note(Transaction { steps, outcome: Outcome::Committed, began, ended: self.now() });
        Ok(())
    }
}

/// How a client comes to a compute.
#[derive(Clone)]
pub enum Door {
    /// By the proxy, which finds the right one.
    Proxy(String),
    /// By one compute's own socket, whatever has become of it.
    Socket {
        /// The directory of the socket.
        directory: PathBuf,
        /// The database.
        database: String,
        /// Set once that compute has ended.
        closed: Arc<AtomicBool>,
    },
}

impl Door {
    fn is_closed(&self) -> bool {
        match self {
            Door::Proxy(_) => false,
            Door::Socket { closed, .. } => closed.load(Ordering::SeqCst),
        }
    }

    async fn open(&self) -> anyhow::Result<tokio_postgres::Client> {
        match self {
            Door::Proxy(uri) => sql::connect(uri).await,
            Door::Socket { directory, database, .. } => sql::superuser(directory, database).await,
        }
    }
}

async fn connect(door: &Door) -> Option<tokio_postgres::Client> {
    let connected = tokio::time::timeout(PATIENCE, door.open()).await;
    if let Ok(Ok(client)) = connected {
        return Some(client);
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    None
}

/// Inserts numbers of its own, one per transaction; how many were acknowledged.
pub async fn insert_numbers(ledger: Arc<Ledger>, door: Door, writer: i64) -> usize {
    let (mut number, mut acknowledged) = (writer << 32, 0);
    let is_over = || ledger.stopped() || door.is_closed();
    while !is_over() {
        let Some(client) = connect(&door).await else { continue };
        while !is_over() {
            number += 1;
            let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 1] = [&number];
            let insert = client.execute("insert into numbers values ($1)", &parameters);
            let ended = tokio::time::timeout(PATIENCE, insert).await;
            let mut numbers = ledger.numbers.lock().unwrap_or_else(PoisonError::into_inner);
            match ended {
                Ok(Ok(_)) => acknowledged += usize::from(numbers.acknowledged.insert(number)),
                // Refused by the server, which says so with a code: not there, and it must not be.
                Ok(Err(error)) if was_refused(&error) => drop(numbers.refused.insert(number, said(&error))),
                Ok(Err(_)) | Err(_) => {
                    numbers.unknown.insert(number);
                    break;
                }
            }
        }
    }
    acknowledged
}

/// Transactions that read and append to lists, at repeatable read; how many were acknowledged.
pub async fn append_to_lists(ledger: Arc<Ledger>, door: Door, writer: u64) -> usize {
    let (mut next, mut acknowledged) = (writer << 32, 0);
    let is_over = || ledger.stopped() || door.is_closed();
    while !is_over() {
        let Some(client) = connect(&door).await else { continue };
        while !is_over() {
            next += 1;
            let began = ledger.now();
            let mut steps = Vec::new();
            let ended =
                tokio::time::timeout(PATIENCE, transaction(&client, ledger.first_list(), next, &mut steps)).await;
            let outcome = match ended {
                Ok(Ok(())) => Outcome::Committed,
                Ok(Err(error)) if was_refused(&error) => Outcome::Aborted,
                Ok(Err(_)) | Err(_) => Outcome::Unknown,
            };
            ledger.note(Transaction { steps, outcome, began, ended: ledger.now() });
            match outcome {
                Outcome::Committed => acknowledged += 1,
                Outcome::Aborted if client.batch_execute("rollback").await.is_ok() => {}
                Outcome::Aborted | Outcome::Unknown => break,
            }
            // Few enough for the checker.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    acknowledged
}

async fn transaction(
    client: &tokio_postgres::Client,
    first_list: u32,
    value: u64,
    steps: &mut Vec<Step>,
) -> Result<(), tokio_postgres::Error> {
    let list = |chosen: u64| first_list + (chosen % u64::from(LISTS)) as u32;
    let (first, second) = (list(value), list(value / 3));
    client.batch_execute("begin isolation level repeatable read").await?;
    steps.push(Step::Read { list: first, values: read(client, first).await? });
    steps.push(Step::Append { list: second, value });
    let append = "insert into lists values ($2, array[$1::int8]) \
                  on conflict (list) do update set items = lists.items || excluded.items";
    client.execute(append, &[&(value as i64), &(second as i32)]).await?;
    steps.push(Step::Read { list: second, values: read(client, second).await? });
    client.batch_execute("commit").await
}

async fn read(client: &tokio_postgres::Client, list: u32) -> Result<Vec<u64>, tokio_postgres::Error> {
    let row = client.query_opt("select items from lists where list = $1", &[&(list as i32)]).await?;
    let items = row.map(|row| row.get::<_, Vec<i64>>(0)).unwrap_or_default();
    Ok(items.into_iter().map(|value| value as u64).collect())
}

/// True when the server answered that the statement failed and the session goes on: the transaction is rolled back. A server that
/// ends the session instead may have committed before: a commit whose record is written and not yet acknowledged by a quorum when
/// its agent dies ends with a PANIC, since the flush failed, and the record is there.
fn was_refused(error: &tokio_postgres::Error) -> bool {
    error.as_db_error().is_some_and(|error| {
        error.parsed_severity() == Some(Severity::Error)
            && !error.code().code().starts_with("57")
            && !error.code().code().starts_with("08")
    })
}

/// What the server said, with all that it gives.
fn said(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), |error| format!("{error:?}"))
}

/// Makes the tables.
pub async fn prepare(uri: &str) -> anyhow::Result<()> {
    let tables = "create table numbers (n int8 primary key); \
                  create table lists (list int primary key, items int8[] not null)";
    Ok(sql::connect(uri).await?.batch_execute(tables).await?)
}
