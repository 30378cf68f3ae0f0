//! A checker of list-append histories, as Elle's: what transactions that append to lists and read them can tell of isolation.
//!
//! Each value is appended once, so that a read shows which transactions came before it on its list. From that follow
//! dependencies between transactions: `b` overwrote `a` (ww), `b` read what `a` wrote (wr), `b` wrote what `a` did not see yet
//! (rw), `a` had ended before `b` began (real time). At repeatable read, which in Postgres is snapshot isolation, a cycle must
//! have two rw edges; any other is an anomaly.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// One step of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Appends a value, which nobody else ever appends, to a list.
    Append { list: u32, value: u64 },
    /// Reads a list.
    Read { list: u32, values: Vec<u64> },
}

/// How a transaction ended, as its client knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The server has acknowledged it.
    Committed,
    /// The server has refused it.
    Aborted,
    /// The connection broke before an answer came.
    Unknown,
}

/// One transaction, by its client's account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transaction {
    /// What it did, in order.
    pub steps: Vec<Step>,
    /// How it ended.
    pub outcome: Outcome,
    /// When it began, on a clock that all clients share.
    pub began: u64,
    /// When its end was known.
    pub ended: u64,
}

/// What must not be. Transactions are named by their index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Anomaly {
    /// Two reads of a list that don't begin alike.
    #[error("list {list} was read in two orders, by transactions {first} and {second}")]
    TwoOrders { list: u32, first: usize, second: usize },
    /// A value is in a list twice.
    #[error("value {value} is in list {list} twice")]
    Twice { list: u32, value: u64 },
    /// A value that a transaction appended which had been refused, or that nobody appended.
    #[error("transaction {reader} read value {value}, which was never committed")]
    NeverCommitted { reader: usize, value: u64 },
    /// A transaction did not see what it had appended itself.
    #[error("transaction {0} does not see its own append")]
    OwnAppendMissing(usize),
    /// A committed append is missing from what the last read shows: lost.
    #[error("value {value} was committed by transaction {writer} and is in no list at the end")]
    Lost { writer: usize, value: u64 },
    /// A cycle with less than two rw edges: a lost update, a stale read, or reads and writes in a circle.
    #[error("transactions depend on each other in a circle: {0:?}")]
    Cycle(Vec<usize>),
}

/// Looks for the first anomaly. The last transaction that reads a list must have begun after all others ended, if lost appends
/// are to be found ([`Anomaly::Lost`]).
pub fn check(history: &[Transaction]) -> Result<(), Anomaly> {
    let history = &decided(history)[..];
    let writers = writers(history);
    let orders = orders(history)?;
    for (reader, transaction) in history.iter().enumerate().filter(|(_, t)| t.outcome != Outcome::Aborted) {
        check_reads(reader, transaction, history, &writers)?;
    }
    check_lost(history, &writers, &orders)?;
    Graph::of(history, &writers, &orders).check()
}

/// The history in which those whose end is unknown count as refused, unless somebody committed has seen what they appended:
/// they may have read their own appends, which then went.
fn decided(history: &[Transaction]) -> Vec<Transaction> {
    let committed = history.iter().filter(|transaction| transaction.outcome == Outcome::Committed);
    let seen: BTreeSet<u64> = committed.flat_map(|transaction| &transaction.steps).flat_map(values_read).collect();
    let happened = |transaction: &Transaction| match transaction.outcome {
        Outcome::Committed => true,
        Outcome::Aborted => false,
        Outcome::Unknown => {
            transaction.steps.iter().any(|s| matches!(s, Step::Append { value, .. } if seen.contains(value)))
        }
    };
    let decide = |transaction: &Transaction| match happened(transaction) {
        true => transaction.clone(),
        false => Transaction { outcome: Outcome::Aborted, ..transaction.clone() },
    };
    history.iter().map(decide).collect()
}

fn values_read(step: &Step) -> Vec<u64> {
    match step {
        Step::Read { values, .. } => values.clone(),
        Step::Append { .. } => Vec::new(),
    }
}

type Writers = BTreeMap<u64, usize>;
type Orders = BTreeMap<u32, Vec<u64>>;

fn writers(history: &[Transaction]) -> Writers {
    let appends = history.iter().enumerate().flat_map(|(index, transaction)| {
        transaction.steps.iter().filter_map(move |step| match step {
            Step::Append { value, .. } => Some((*value, index)),
            Step::Read { .. } => None,
        })
    });
    appends.collect()
}

/// The longest read of each list; all others begin like it.
fn orders(history: &[Transaction]) -> Result<Orders, Anomaly> {
    let mut longest: BTreeMap<u32, (usize, &Vec<u64>)> = BTreeMap::new();
    for (index, list, values) in reads(history) {
        let (other, known) = *longest.get(&list).unwrap_or(&(index, values));
        let common = known.len().min(values.len());
        if known[..common] != values[..common] {
            return Err(Anomaly::TwoOrders { list, first: other, second: index });
        }
        if values.len() >= known.len() {
            longest.insert(list, (index, values));
        }
    }
    for (list, (_, values)) in &longest {
        let mut seen = BTreeSet::new();
        if let Some(value) = values.iter().find(|value| !seen.insert(**value)) {
            return Err(Anomaly::Twice { list: *list, value: *value });
        }
    }
    Ok(longest.into_iter().map(|(list, (_, values))| (list, values.clone())).collect())
}

fn reads(history: &[Transaction]) -> impl Iterator<Item = (usize, u32, &Vec<u64>)> {
    let counts = history.iter().enumerate().filter(|(_, transaction)| transaction.outcome != Outcome::Aborted);
    counts.flat_map(|(index, transaction)| {
        transaction.steps.iter().filter_map(move |step| match step {
            Step::Read { list, values } => Some((index, *list, values)),
            Step::Append { .. } => None,
        })
    })
}

fn check_reads(
    reader: usize,
    transaction: &Transaction,
    history: &[Transaction],
    writers: &Writers,
) -> Result<(), Anomaly> {
    let mut own: BTreeMap<u32, u64> = BTreeMap::new();
    for step in &transaction.steps {
        match step {
            Step::Append { list, value } => drop(own.insert(*list, *value)),
            Step::Read { list, values } => {
                let foreign = |value: &&u64| {
                    writers.get(*value).is_none_or(|writer| history[*writer].outcome == Outcome::Aborted)
                };
                if let Some(value) = values.iter().find(foreign) {
                    return Err(Anomaly::NeverCommitted { reader, value: *value });
                }
                if own.get(list).is_some_and(|value| values.last() != Some(value)) {
                    return Err(Anomaly::OwnAppendMissing(reader));
                }
            }
        }
    }
    Ok(())
}

fn check_lost(history: &[Transaction], writers: &Writers, orders: &Orders) -> Result<(), Anomaly> {
    let there: BTreeSet<u64> = orders.values().flatten().copied().collect();
    let missing = |value: u64, writer: usize| history[writer].outcome == Outcome::Committed && !there.contains(&value);
    match writers.iter().find(|(value, writer)| missing(**value, **writer)) {
        Some((value, writer)) => Err(Anomaly::Lost { writer: *writer, value: *value }),
        None => Ok(()),
    }
}

/// Dependencies. Nodes below `transactions` are transactions; the others are moments, which make real time a chain.
struct Graph {
    transactions: usize,
    /// Without rw edges.
    edges: Vec<BTreeSet<usize>>,
    rw: BTreeSet<(usize, usize)>,
}

impl Graph {
    fn of(history: &[Transaction], writers: &Writers, orders: &Orders) -> Graph {
        let transactions = history.len();
        let mut graph = Graph { transactions, edges: vec![BTreeSet::new(); transactions], rw: BTreeSet::new() };
        for order in orders.values() {
            order.windows(2).for_each(|pair| graph.edge(writers.get(&pair[0]), writers.get(&pair[1])));
        }
        for (reader, list, values) in reads(history) {
            graph.edge(values.last().and_then(|value| writers.get(value)), Some(&reader));
            let next = orders.get(&list).and_then(|order| order.get(values.len()));
            if let Some(writer) = next.and_then(|value| writers.get(value)).filter(|writer| **writer != reader) {
                graph.rw.insert((reader, *writer));
            }
        }
        graph.add_real_time(history);
        graph
    }

    fn edge(&mut self, from: Option<&usize>, to: Option<&usize>) {
        if let (Some(from), Some(to)) = (from, to)
            && from != to
        {
            self.edges[*from].insert(*to);
        }
    }

    /// A moment follows each end that is known; what begins later follows on it.
    fn add_real_time(&mut self, history: &[Transaction]) {
        let committed = |transaction: &Transaction| transaction.outcome == Outcome::Committed;
        let mut ends: Vec<(u64, usize)> = Vec::new();
        ends.extend(history.iter().enumerate().filter(|(_, t)| committed(t)).map(|(index, t)| (t.ended, index)));
        ends.sort_unstable();
        for (place, (_, index)) in ends.iter().enumerate() {
            let moment = self.edges.len();
            self.edges.push(BTreeSet::new());
            self.edges[*index].insert(moment);
            if place > 0 {
                self.edges[moment - 1].insert(moment);
            }
        }
        for (index, transaction) in history.iter().enumerate().filter(|(_, t)| t.outcome != Outcome::Aborted) {
            let before = ends.partition_point(|(ended, _)| *ended < transaction.began);
            if before > 0 {
                self.edges[self.transactions + before - 1].insert(index);
            }
        }
    }

    fn check(&self) -> Result<(), Anomaly> {
        let places = self.places();
        for start in (0..self.transactions).filter(|node| places[*node] == usize::MAX) {
            self.refuse_path(start, start, &places)?;
        }
        let possible = self.rw.iter().filter(|(from, to)| places[*to] < places[*from]);
        possible.into_iter().try_for_each(|(from, to)| self.refuse_path(*to, *from, &places))
    }

    /// Each node's place in an order that follows all edges; `usize::MAX` in and behind circles.
    fn places(&self) -> Vec<usize> {
        let mut incoming = vec![0usize; self.edges.len()];
        self.edges.iter().flatten().for_each(|to| incoming[*to] += 1);
        let mut open: VecDeque<usize> = (0..incoming.len()).filter(|node| incoming[*node] == 0).collect();
        let mut places = vec![usize::MAX; incoming.len()];
        for place in 0.. {
            let Some(node) = open.pop_front() else { break };
            places[node] = place;
            for next in &self.edges[node] {
                incoming[*next] -= 1;
                if incoming[*next] == 0 {
                    open.push_back(*next);
                }
            }
        }
        places
    }

    /// A path without rw edges from here to there closes a circle. It never leads beyond the place of its end.
    fn refuse_path(&self, from: usize, to: usize, places: &[usize]) -> Result<(), Anomaly> {
        let mut before: BTreeMap<usize, usize> = BTreeMap::new();
        let mut open = VecDeque::from([from]);
        while let Some(node) = open.pop_front() {
            for next in &self.edges[node] {
                if before.contains_key(next) || places[*next] > places[to] {
                    continue;
                }
                before.insert(*next, node);
                if *next == to {
                    return Err(Anomaly::Cycle(self.trace(from, to, &before)));
                }
                open.push_back(*next);
            }
        }
        Ok(())
    }

    fn trace(&self, from: usize, to: usize, before: &BTreeMap<usize, usize>) -> Vec<usize> {
        let mut path = vec![to];
        let mut at = before[&to];
        while at != from {
            path.push(at);
            at = before[&at];
        }
        path.push(from);
        path.reverse();
        path.retain(|node| *node < self.transactions);
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(list: u32, value: u64) -> Step {
        Step::Append { list, value }
    }

    fn read(list: u32, values: &[u64]) -> Step {
        Step::Read { list, values: values.to_vec() }
    }

    fn committed(began: u64, ended: u64, steps: &[Step]) -> Transaction {
        Transaction { steps: steps.to_vec(), outcome: Outcome::Committed, began, ended }
    }

    #[test]
    fn one_after_the_other_is_fine() {
        let history = [
            committed(0, 1, &[append(1, 10), append(2, 20)]),
            committed(2, 3, &[read(1, &[10]), append(1, 11)]),
            committed(4, 5, &[read(1, &[10, 11]), read(2, &[20])]),
        ];
        assert_eq!(check(&history), Ok(()));
    }

    #[test]
    fn write_skew_is_allowed() {
        let history = [
            committed(0, 9, &[read(1, &[]), append(2, 20)]),
            committed(0, 9, &[read(2, &[]), append(1, 10)]),
            committed(10, 11, &[read(1, &[10]), read(2, &[20])]),
        ];
        assert_eq!(check(&history), Ok(()));
    }

    #[test]
    fn a_lost_update_is_found() {
        let history = [
            committed(0, 9, &[read(1, &[]), append(1, 10)]),
            committed(0, 9, &[read(1, &[]), append(1, 11)]),
            committed(10, 11, &[read(1, &[10, 11])]),
        ];
        assert!(matches!(check(&history), Err(Anomaly::Cycle(_))), "{:?}", check(&history));
        let lost = [history[0].clone(), history[1].clone(), committed(10, 11, &[read(1, &[11])])];
        assert_eq!(check(&lost), Err(Anomaly::Lost { writer: 0, value: 10 }));
    }

    #[test]
    fn a_stale_read_is_found() {
        let history =
            [committed(0, 1, &[append(1, 10)]), committed(2, 3, &[read(1, &[])]), committed(4, 5, &[read(1, &[10])])];
        assert!(matches!(check(&history), Err(Anomaly::Cycle(_))));
        let at_once = [history[0].clone(), committed(0, 3, &[read(1, &[])]), history[2].clone()];
        assert_eq!(check(&at_once), Ok(()));
    }

    #[test]
    fn circular_information_is_found() {
        let history =
            [committed(0, 9, &[append(1, 10), read(2, &[20])]), committed(0, 9, &[append(2, 20), read(1, &[10])])];
        assert!(matches!(check(&history), Err(Anomaly::Cycle(_))));
    }

    #[test]
    fn refused_appends_must_not_be_seen_and_unknown_ones_may() {
        let writer = |outcome| Transaction { outcome, ..committed(0, 1, &[append(1, 10)]) };
        let reader = committed(2, 3, &[read(1, &[10])]);
        let refused = [writer(Outcome::Aborted), reader.clone()];
        assert_eq!(check(&refused), Err(Anomaly::NeverCommitted { reader: 1, value: 10 }));
        assert_eq!(check(&[writer(Outcome::Unknown), reader]), Ok(()));
        assert_eq!(check(&[writer(Outcome::Unknown), committed(2, 3, &[read(1, &[])])]), Ok(()));
    }

    #[test]
    fn what_an_undecided_transaction_read_of_itself_may_go() {
        let undecided = Transaction { outcome: Outcome::Unknown, ..committed(0, 1, &[append(1, 10), read(1, &[10])]) };
        assert_eq!(check(&[undecided, committed(2, 3, &[append(1, 11), read(1, &[11])])]), Ok(()));
    }

    #[test]
    fn orders_doubles_and_own_appends_are_checked() {
        let base = committed(0, 1, &[append(1, 10), append(1, 11)]);
        let with = |steps: &[Step]| check(&[base.clone(), committed(2, 3, steps)]);
        assert_eq!(with(&[read(1, &[10, 10])]), Err(Anomaly::Twice { list: 1, value: 10 }));
        assert_eq!(
            with(&[read(1, &[10, 11]), read(1, &[11])]),
            Err(Anomaly::TwoOrders { list: 1, first: 1, second: 1 })
        );
        assert_eq!(with(&[append(1, 12), read(1, &[10, 11])]), Err(Anomaly::OwnAppendMissing(1)));
    }
}
