//! What must always hold.

use std::collections::BTreeMap;

use types::{Lsn, Term};

use crate::{Disk, SimError};
use safekeeper_protocol::ProposerId;

/// The truth as an observer of everything knows it. A majority's holding something includes a copy that has rotted since, or that
/// its holder knows to have lost.
#[derive(Debug, Clone)]
pub(crate) struct Observer {
    start: Lsn,
    /// All WAL that was ever reported committed.
    committed: Vec<u8>,
    leaders: BTreeMap<Term, ProposerId>,
    /// Ends of records among the committed bytes.
    boundaries: Vec<Lsn>,
}

impl Observer {
    pub fn new(start: Lsn) -> Observer {
        Observer { start, committed: Vec::new(), leaders: BTreeMap::new(), boundaries: vec![start] }
    }

    pub fn committed_end(&self) -> Lsn {
        self.start + self.committed.len() as u64
    }

    /// Ends of committed records.
    pub fn boundaries(&self) -> &[Lsn] {
        &self.boundaries
    }

    /// A proposer leads a term from a position.
    pub fn started(&mut self, term: Term, leader: ProposerId, start_lsn: Lsn) -> Result<(), SimError> {
        let first = *self.leaders.entry(term).or_insert(leader);
        if first != leader {
            return Err(SimError::Diverged(format!("term {term} has two leaders: {first:?} and {leader:?}")));
        }
        if start_lsn < self.start {
            return Err(SimError::Lost(format!("term {term} starts at {start_lsn}, before the branch")));
        }
        Ok(())
    }

    /// A proposer, which started at `own_start` and wrote `own` since, says that WAL is committed up to `lsn` on a majority of
    /// each of these sets.
    pub fn committed(&mut self, lsn: Lsn, own_start: Lsn, own: &[u8], sets: &[Vec<&Disk>]) -> Result<(), SimError> {
        let begin = self.committed_end();
        if lsn > begin {
            let holds = |disk: &&&Disk| disk.flushed >= lsn && disk.start <= begin && !disk.has_rotted_in(begin, lsn);
            // Others may have a tail that was never committed: of each set, the one who has least company counts.
            let company = |bytes: &[u8]| {
                let alike =
                    |set: &Vec<&Disk>| set.iter().filter(holds).filter(|disk| disk.slice(begin, lsn) == bytes).count();
                sets.iter().map(alike).min()
            };
            let held = sets.iter().flatten().filter(holds).map(|disk| disk.slice(begin, lsn));
            let most = held.max_by_key(|bytes| company(bytes));
            let Some(more) = most else {
                return Err(SimError::Lost(format!("{lsn} committed, but nobody holds it")));
            };
            let more = more.to_vec();
            self.append(&more)?;
        }
        for (position, byte) in (own_start.0..lsn.0).zip(own) {
            if self.committed[(position - self.start.0) as usize] != *byte {
                return Err(SimError::Diverged(format!("committed WAL at {} is not its writer's", Lsn(position))));
            }
        }
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), SimError> {
        let mut rest = bytes;
        self.committed.extend_from_slice(bytes);
        let mut at = self.boundaries.last().copied().unwrap_or(self.start);
        while let Some(length) = rest.first() {
            at += u64::from(*length);
            rest = rest.get(usize::from(*length)..).ok_or_else(|| "a record was committed in part".to_owned())?;
            self.boundaries.push(at);
        }
        Ok(())
    }

    /// A majority holds everything committed, unchanged; or knows that it may have lost it.
    pub fn held(&self, disks: &[&Disk]) -> Result<(), SimError> {
        let end = self.committed_end();
        if self.committed.is_empty() {
            return Ok(());
        }
        // Who knows to have lost what it had is not asked until it has it again.
        let holds = |disk: &&&Disk| disk.control.doubtful || (disk.flushed >= end && self.agrees(disk, end));
        let holders = disks.iter().filter(holds).count();
        if holders < disks.len() / 2 + 1 {
            return Err(SimError::Lost(format!(
                "WAL was committed up to {end}, but only {holders} safekeepers hold it"
            )));
        }
        Ok(())
    }

    /// A safekeeper has the right bytes up to a position that it says is committed.
    pub fn knows_committed(&self, disk: &Disk, commit_lsn: Lsn) -> Result<(), SimError> {
        if commit_lsn > self.committed_end().max(self.start) {
            let end = self.committed_end();
            return Err(SimError::Diverged(format!("a safekeeper takes {commit_lsn} for committed, it is {end}")));
        }
        if self.agrees(disk, commit_lsn) {
            return Ok(());
        }
        Err(SimError::Diverged("a safekeeper has other committed WAL".to_owned()))
    }

    fn agrees(&self, disk: &Disk, end: Lsn) -> bool {
        let begin = disk.start.max(self.start);
        let end = end.min(disk.end());
        if begin >= end {
            return true;
        }
        let known = &self.committed[(begin.0 - self.start.0) as usize..(end.0 - self.start.0) as usize];
        let same = |(at, (known, held)): (u64, (&u8, &u8))| known == held || disk.has_rotted(Lsn(at));
        (begin.0..end.0).zip(known.iter().zip(disk.slice(begin, end))).all(same)
    }
}
