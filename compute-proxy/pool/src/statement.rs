//! Prepared statements that many clients share: one name on every server connection for the same text and types.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use crate::sql::{self, Effects};

/// What the names of statements on server connections begin with.
pub const NAME_PREFIX: &str = "dormouse_";

/// Names a statement on every server connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StatementId(pub u64);

/// A text and its parameters' types, as `Parse` brings them.
#[derive(Debug)]
pub struct Statement {
    /// `None` for the unnamed one, which is not shared.
    id: Option<StatementId>,
    /// The body of `Parse` behind the name: text, zero, types.
    definition: Box<[u8]>,
    /// What running it may leave behind.
    effects: Effects,
}

impl Statement {
    /// An unnamed one.
    pub fn unnamed(definition: &[u8]) -> Self {
        Self { id: None, definition: definition.into(), effects: sql::effects(text(definition)) }
    }

    /// Its name on server connections; `None` for an unnamed one.
    pub fn id(&self) -> Option<StatementId> {
        self.id
    }

    /// What follows the name in `Parse`.
    pub fn definition(&self) -> &[u8] {
        &self.definition
    }

    /// What running it may leave behind.
    pub fn effects(&self) -> &Effects {
        &self.effects
    }

    /// Bytes that it keeps, roughly.
    pub fn bytes(&self) -> usize {
        self.definition.len() + size_of::<Self>()
    }
}

impl StatementId {
    /// Appends its name.
    pub fn write(self, output: &mut Vec<u8>) {
        output.extend_from_slice(NAME_PREFIX.as_bytes());
        let mut digits = [0; 20];
        let (mut rest, mut at) = (self.0, digits.len());
        loop {
            at -= 1;
            digits[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        output.extend_from_slice(&digits[at..]);
    }
}

/// The text in a definition.
pub fn text(definition: &[u8]) -> &[u8] {
    definition.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// All named statements that any client or server connection still knows.
#[derive(Default)]
pub struct Interner {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    by_definition: HashMap<Box<[u8]>, Weak<Statement>>,
    last_id: u64,
    /// Entries after the last sweep.
    swept_to: usize,
}

impl Interner {
    /// The one statement with this definition.
    pub fn intern(&self, definition: &[u8]) -> Arc<Statement> {
        let table = &mut *self.table.lock();
        if let Some(statement) = table.by_definition.get(definition).and_then(Weak::upgrade) {
            return statement;
        }
        table.last_id += 1;
        let effects = sql::effects(text(definition));
        let statement =
            Arc::new(Statement { id: Some(StatementId(table.last_id)), definition: definition.into(), effects });
        table.by_definition.insert(definition.into(), Arc::downgrade(&statement));
        // What nobody knows any more is swept out whenever the table has doubled.
        if table.by_definition.len() > 64 + 2 * table.swept_to {
            table.by_definition.retain(|_, statement| statement.strong_count() > 0);
            table.swept_to = table.by_definition.len();
        }
        statement
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_definition_is_the_same_statement() {
        let interner = Interner::default();
        let one = interner.intern(b"select 1\0\0\0");
        assert!(Arc::ptr_eq(&one, &interner.intern(b"select 1\0\0\0")));
        assert_ne!(one.id(), interner.intern(b"select 2\0\0\0").id());
        let mut name = Vec::new();
        StatementId(1020).write(&mut name);
        assert_eq!(name, b"dormouse_1020");
    }

    #[test]
    fn what_nobody_knows_is_swept_out() {
        let interner = Interner::default();
        let kept = interner.intern(b"kept\0\0\0");
        for number in 0..10_000_u32 {
            interner.intern(&number.to_be_bytes());
        }
        assert!(interner.table.lock().by_definition.len() < 200);
        assert!(Arc::ptr_eq(&kept, &interner.intern(b"kept\0\0\0")));
    }
}
