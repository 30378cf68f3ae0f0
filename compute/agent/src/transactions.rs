//! Which transactions are in progress, and where the oldest of them wrote its first record.

use std::collections::{BTreeSet, HashMap};

use types::Lsn;
use wal::{
    DecodedRecord,
    v15::{
        rmgr,
        state::{RunningXacts, standby},
        xact,
    },
};

/// Transactions that have written WAL and not ended, by the WAL shipped so far.
///
/// Subtransactions count on their own: each has its own id in WAL, and the record that ends their parent names them.
/// The compute's first record comes behind the end of every earlier transaction, so it starts empty.
#[derive(Debug, Default)]
pub struct Transactions {
    first_record: HashMap<u32, Lsn>,
    by_position: BTreeSet<(Lsn, u32)>,
}

/// What a record says about transactions, besides that its own (`xl_xid`) is in progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TransactionEvent {
    /// Nothing.
    None,
    /// These have ended or are prepared: no backend has them as its own any more.
    Ended(Vec<u32>),
    /// All older than this one have ended (`xl_running_xacts.oldestRunningXid`).
    OldestRunning(u32),
}

impl Transactions {
    /// Takes note of a record. Records come in WAL order.
    pub fn observe(&mut self, start: Lsn, xid: u32, event: &TransactionEvent) {
        if xid != 0 && !self.first_record.contains_key(&xid) {
            self.first_record.insert(xid, start);
            self.by_position.insert((start, xid));
        }
        match event {
            TransactionEvent::None => {}
            TransactionEvent::Ended(xids) => xids.iter().for_each(|xid| self.remove(*xid)),
            TransactionEvent::OldestRunning(oldest) => self.remove_before(*oldest),
        }
    }

    /// Start of the first record of the oldest transaction in progress; `shipped_end` when there is none.
    pub fn horizon(&self, shipped_end: Lsn) -> Lsn {
        self.by_position.first().map_or(shipped_end, |(start, _)| *start)
    }

    fn remove(&mut self, xid: u32) {
        if let Some(start) = self.first_record.remove(&xid) {
            self.by_position.remove(&(start, xid));
        }
    }

    fn remove_before(&mut self, oldest: u32) {
        let ended: Vec<u32> = self.first_record.keys().copied().filter(|xid| precedes(*xid, oldest)).collect();
        ended.into_iter().for_each(|xid| self.remove(xid));
    }
}

/// Transaction ids wrap around: the earlier of two is at most 2^31 behind (`TransactionIdPrecedes`).
fn precedes(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl TransactionEvent {
    /// What a record says. Errors when it is about a transaction's end and malformed.
    pub fn of(record: &DecodedRecord<'_>) -> Result<TransactionEvent, &'static str> {
        if let Some(end) = xact::parse_end(record)? {
            return Ok(TransactionEvent::Ended(with(end.xid, end.subxacts)));
        }
        if let Some(prepared) = xact::parse_prepare(record)? {
            return Ok(TransactionEvent::Ended(with(prepared.xid, prepared.subxacts)));
        }
        if record.rmgr == rmgr::STANDBY && record.rmgr_info() == standby::RUNNING_XACTS {
            let running = RunningXacts::from_prefix(record.main_data).ok_or("running transactions cut short")?;
            return Ok(TransactionEvent::OldestRunning(running.oldest_running_xid));
        }
        Ok(TransactionEvent::None)
    }
}

fn with(xid: u32, mut others: Vec<u32>) -> Vec<u32> {
    others.push(xid);
    others
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: TransactionEvent = TransactionEvent::None;

    #[test]
    fn horizon_is_the_oldest_open_start() {
        let mut open = Transactions::default();
        assert_eq!(open.horizon(Lsn(50)), Lsn(50));
        open.observe(Lsn(100), 7, &NONE);
        open.observe(Lsn(200), 8, &NONE);
        open.observe(Lsn(300), 7, &NONE);
        assert_eq!(open.horizon(Lsn(400)), Lsn(100));
        open.observe(Lsn(400), 7, &TransactionEvent::Ended(vec![7]));
        assert_eq!(open.horizon(Lsn(500)), Lsn(200));
        open.observe(Lsn(500), 8, &TransactionEvent::Ended(vec![8]));
        assert_eq!(open.horizon(Lsn(600)), Lsn(600));
    }

    #[test]
    fn subtransactions_end_with_their_parent_or_alone() {
        let mut open = Transactions::default();
        open.observe(Lsn(100), 11, &NONE);
        open.observe(Lsn(200), 12, &NONE);
        // The subtransaction rolls back by itself.
        open.observe(Lsn(300), 11, &TransactionEvent::Ended(vec![11]));
        assert_eq!(open.horizon(Lsn(400)), Lsn(200));
        open.observe(Lsn(400), 10, &TransactionEvent::Ended(vec![10, 12]));
        assert_eq!(open.horizon(Lsn(500)), Lsn(500));
    }

    #[test]
    fn a_record_without_a_transaction_changes_nothing() {
        let mut open = Transactions::default();
        open.observe(Lsn(100), 0, &NONE);
        assert_eq!(open.horizon(Lsn(200)), Lsn(200));
    }

    #[test]
    fn running_transactions_clear_what_ended_unseen_across_wraparound() {
        let mut open = Transactions::default();
        open.observe(Lsn(100), u32::MAX - 1, &NONE);
        open.observe(Lsn(200), 5, &NONE);
        open.observe(Lsn(300), 0, &TransactionEvent::OldestRunning(5));
        assert_eq!(open.horizon(Lsn(400)), Lsn(200));
    }
}
