//! What is known of one server connection: the state that stays in it between transactions.

use std::{collections::HashMap, sync::Arc};

use crate::{
    session::{Reported, Settings},
    statement::{Statement, StatementId},
};

/// State of a server connection, as far as messages have told it. Goes with the connection from client to client.
pub struct ServerState {
    /// Settings of the session that differ from those that it was opened with.
    pub settings: Arc<Settings>,
    /// Parameters as Postgres reported them last.
    pub reported: Arc<Reported>,
    /// The unnamed statement; `None` when it is not known which it is.
    pub unnamed: Option<Arc<Statement>>,
    known: HashMap<StatementId, Known>,
    capacity: usize,
    /// Counts uses, for what was used least recently.
    uses: u64,
    /// Counts batches of messages up to a `Sync`.
    batch: u64,
}

struct Known {
    /// Keeps its definition and so its id from being given to another.
    _statement: Arc<Statement>,
    state: KnownState,
    used: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KnownState {
    /// Postgres has it.
    Ready,
    /// `Parse` was sent in this batch: it is there for the rest of it, and afterwards only if the batch got so far.
    Sent { batch: u64 },
    /// It may or may not be there.
    Unsure,
}

/// What must be sent before a statement can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// `Close` first: it may be there.
    pub close: bool,
    /// `Parse`.
    pub parse: bool,
    /// And `Close` of this one, to make room.
    pub evict: Option<StatementId>,
}

impl ServerState {
    /// A fresh connection that keeps at most `capacity` statements.
    pub fn new(reported: Arc<Reported>, capacity: usize) -> Self {
        Self {
            settings: Arc::default(),
            reported,
            unnamed: None,
            known: HashMap::new(),
            capacity: capacity.max(1),
            uses: 0,
            batch: 0,
        }
    }

    /// Says what to send before this statement is used, and takes note that it is sent.
    pub fn need(&mut self, statement: &Arc<Statement>, id: StatementId) -> Need {
        self.uses += 1;
        let batch = self.batch;
        let mut need = Need { close: false, parse: true, evict: None };
        if let Some(known) = self.known.get_mut(&id) {
            known.used = self.uses;
            match known.state {
                KnownState::Ready => need.parse = false,
                KnownState::Sent { batch: sent } if sent == batch => need.parse = false,
                KnownState::Sent { .. } | KnownState::Unsure => need.close = true,
            }
            if need.parse {
                known.state = KnownState::Sent { batch };
            }
            return need;
        }
        if self.known.len() >= self.capacity {
            // One that is already on its way out needs no second `Close`, but goes the same way.
            let oldest = self.known.iter().min_by_key(|(_, known)| known.used).map(|(id, _)| *id);
            need.evict = oldest;
            if let Some(known) = oldest.and_then(|oldest| self.known.get_mut(&oldest)) {
                (known.state, known.used) = (KnownState::Unsure, u64::MAX);
            }
        }
        let state = KnownState::Sent { batch };
        self.known.insert(id, Known { _statement: statement.clone(), state, used: self.uses });
        need
    }

    /// `ParseComplete` came.
    pub fn parsed(&mut self, id: StatementId) {
        if let Some(known) = self.known.get_mut(&id)
            && matches!(known.state, KnownState::Sent { .. })
        {
            known.state = KnownState::Ready;
        }
    }

    /// `CloseComplete` came.
    pub fn closed(&mut self, id: StatementId) {
        if self.known.get(&id).is_some_and(|known| known.state == KnownState::Unsure) {
            self.known.remove(&id);
        }
    }

    /// Messages about it were skipped, or its plan has gone bad.
    pub fn unsure(&mut self, id: StatementId) {
        if let Some(known) = self.known.get_mut(&id) {
            known.state = KnownState::Unsure;
        }
    }

    /// `DEALLOCATE ALL` or `DISCARD ALL` was done.
    pub fn forget_statements(&mut self) {
        self.known.clear();
        self.unnamed = None;
    }

    /// A `Sync` was sent: what was sent before may not have been done.
    pub fn end_batch(&mut self) {
        self.batch += 1;
    }

    /// Statements that it may have.
    pub fn statements(&self) -> usize {
        self.known.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statement::Interner;

    const NOTHING: Need = Need { close: false, parse: false, evict: None };
    const PARSE: Need = Need { close: false, parse: true, evict: None };

    fn ask(server: &mut ServerState, statement: &Arc<Statement>) -> Need {
        server.need(statement, statement.id().expect("named"))
    }

    #[test]
    fn a_statement_is_sent_once() {
        let (interner, mut server) = (Interner::default(), ServerState::new(Arc::default(), 10));
        let one = interner.intern(b"1");
        assert_eq!(ask(&mut server, &one), PARSE);
        assert_eq!(ask(&mut server, &one), NOTHING, "in the same batch");
        server.parsed(one.id().expect("named"));
        server.end_batch();
        assert_eq!(ask(&mut server, &one), NOTHING);
    }

    #[test]
    fn what_a_batch_may_not_have_reached_is_sent_again() {
        let (interner, mut server) = (Interner::default(), ServerState::new(Arc::default(), 10));
        let one = interner.intern(b"1");
        ask(&mut server, &one);
        server.end_batch();
        assert_eq!(ask(&mut server, &one), Need { close: true, ..PARSE });
        let id = one.id().expect("named");
        server.closed(id);
        server.parsed(id);
        assert_eq!(ask(&mut server, &one), NOTHING);
        server.unsure(id);
        assert_eq!(ask(&mut server, &one), Need { close: true, ..PARSE });
    }

    #[test]
    fn the_one_used_least_recently_makes_room() {
        let (interner, mut server) = (Interner::default(), ServerState::new(Arc::default(), 2));
        let [one, two, three] = [b"1", b"2", b"3"].map(|text| interner.intern(text));
        for statement in [&one, &two, &one] {
            ask(&mut server, statement);
            server.parsed(statement.id().expect("named"));
        }
        assert_eq!(ask(&mut server, &three).evict, two.id());
        assert_eq!(server.statements(), 3, "until Postgres says so");
        server.closed(two.id().expect("named"));
        assert_eq!(server.statements(), 2);
        assert_eq!(ask(&mut server, &two), Need { evict: one.id(), ..PARSE });
        assert!(server.statements() <= 3);
    }
}
