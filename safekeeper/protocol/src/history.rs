//! Which term wrote which part of a log.

use serde::{Deserialize, Serialize};
use types::{Lsn, Term};

/// Most entries in a history: what a safekeeper is willing to keep as control state. Every start of a compute adds one,
/// and those wholly below what the object store holds are dropped.
pub const MAX_HISTORY_ENTRIES: usize = 2000;

/// Where a term's WAL starts. The entry itself counts as the term's first, empty log entry: a log that reaches
/// `start_lsn` under this history has the term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TermStart {
    /// The term.
    pub term: Term,
    /// Where its WAL starts; always the end of a whole record.
    pub start_lsn: Lsn,
}

/// Terms of a log in order, with where each one's WAL starts. Old entries may be missing at the front.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TermHistory {
    entries: Vec<TermStart>,
}

/// A term history that no proposer would have made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// Terms must grow, and no term may start before an earlier one.
    #[error("term history is not in order at entry {0}")]
    NotInOrder(usize),
    /// Over [`MAX_HISTORY_ENTRIES`].
    #[error(
        "term history has {0} entries, over the limit of {MAX_HISTORY_ENTRIES}: the branch's WAL is not reaching the object store"
    )]
    TooLong(usize),
}

impl TermHistory {
    /// From entries in order; [`TermHistory::check`] says whether they are.
    pub fn new(entries: Vec<TermStart>) -> TermHistory {
        TermHistory { entries }
    }

    /// The entries in order.
    pub fn entries(&self) -> &[TermStart] {
        &self.entries
    }

    /// Refuses a history that is out of order or too long.
    pub fn check(&self) -> Result<(), HistoryError> {
        if self.entries.len() > MAX_HISTORY_ENTRIES {
            return Err(HistoryError::TooLong(self.entries.len()));
        }
        let wrong = self.entries.windows(2).position(|w| w[1].term <= w[0].term || w[1].start_lsn < w[0].start_lsn);
        wrong.map_or(Ok(()), |at| Err(HistoryError::NotInOrder(at + 1)))
    }

    /// The last term; zero when there is none.
    pub fn last_term(&self) -> Term {
        self.entries.last().map_or(Term(0), |entry| entry.term)
    }

    /// The terms that a log which ends at `end` really has.
    pub fn up_to(&self, end: Lsn) -> TermHistory {
        let entries = self.entries.iter().take_while(|entry| entry.start_lsn <= end).copied().collect();
        TermHistory { entries }
    }

    /// This history with a further term.
    pub fn with(mut self, term: Term, start_lsn: Lsn) -> TermHistory {
        self.entries.push(TermStart { term, start_lsn });
        self
    }

    /// Drops terms that ended at or below `horizon`, up to which everything is committed and in the object store.
    pub fn without_terms_below(mut self, horizon: Lsn) -> TermHistory {
        let ended = self.entries.windows(2).take_while(|pair| pair[1].start_lsn <= horizon).count();
        self.entries.drain(..ended);
        self
    }

    /// Up to where two logs are the same: they agree as far as the last term that both have goes in both. `None` when they
    /// share no term. Each log is given by its history and its end.
    pub fn common_end(&self, end: Lsn, other: &TermHistory, other_end: Lsn) -> Option<Lsn> {
        let shared = self.entries.iter().rev().find(|entry| {
            entry.start_lsn <= end && entry.start_lsn <= other_end && other.entries.iter().any(|o| o.term == entry.term)
        })?;
        Some(self.end_of(shared.term, end).min(other.end_of(shared.term, other_end)))
    }

    fn end_of(&self, term: Term, log_end: Lsn) -> Lsn {
        self.entries.iter().find(|entry| entry.term > term).map_or(log_end, |next| next.start_lsn.min(log_end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(entries: &[(u64, u64)]) -> TermHistory {
        TermHistory::new(entries.iter().map(|&(t, l)| TermStart { term: Term(t), start_lsn: Lsn(l) }).collect())
    }

    #[test]
    fn logs_part_where_the_last_shared_term_ends() {
        let leader = history(&[(1, 10), (3, 50), (5, 80)]);
        let common = |other: &[(u64, u64)], end| leader.common_end(Lsn(80), &history(other), Lsn(end));
        assert_eq!(common(&[(1, 10)], 40), Some(Lsn(40)), "a prefix");
        assert_eq!(common(&[(1, 10)], 70), Some(Lsn(50)), "wrote on in term 1");
        assert_eq!(common(&[(1, 10), (2, 30)], 90), Some(Lsn(30)), "a term of its own");
        assert_eq!(common(&[(1, 10), (3, 50), (4, 60)], 70), Some(Lsn(60)));
        assert_eq!(common(&[(2, 10)], 70), None);
        assert_eq!(common(&[(3, 50)], 70), Some(Lsn(70)), "old entries forgotten");
        assert_eq!(common(&[(1, 10), (3, 50)], 45), Some(Lsn(45)), "took the history but not yet the WAL");
    }

    #[test]
    fn only_terms_that_ended_below_the_horizon_are_forgotten() {
        let all = history(&[(1, 10), (3, 50), (5, 80)]);
        assert_eq!(all.clone().without_terms_below(Lsn(49)), all);
        assert_eq!(all.clone().without_terms_below(Lsn(50)), history(&[(3, 50), (5, 80)]));
        assert_eq!(all.without_terms_below(Lsn(999)), history(&[(5, 80)]));
    }

    #[test]
    fn disorder_is_refused() {
        assert_eq!(history(&[(1, 10), (1, 20)]).check(), Err(HistoryError::NotInOrder(1)));
        assert_eq!(history(&[(1, 10), (2, 9)]).check(), Err(HistoryError::NotInOrder(1)));
        assert_eq!(history(&[(1, 10), (2, 10)]).check(), Ok(()));
    }
}
