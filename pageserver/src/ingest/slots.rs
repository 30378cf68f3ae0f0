//! Which WAL the branch's replication slots still need: computes fetch it from the safekeepers when they wake.

use std::collections::BTreeMap;

use types::Lsn;
use wal::v15::replication::SlotState;

/// The oldest WAL of each slot, by the path of its state file.
#[derive(Debug, Default)]
pub struct Slots(BTreeMap<Box<str>, Lsn>);

impl Slots {
    /// Takes note of a kept file; other files than slots' are none of ours. Empty content: the slot is gone. A file that
    /// cannot be read holds nothing back: no compute could use it.
    pub fn observe(&mut self, path: &str, content: &[u8]) {
        if !path.starts_with("pg_replslot/") {
            return;
        }
        match SlotState::parse(content).ok().and_then(|slot| slot.restart_lsn()) {
            Some(restart_lsn) => drop(self.0.insert(path.into(), restart_lsn)),
            None => drop(self.0.remove(path)),
        }
    }

    /// The oldest of all from `start` on: a slot of an ancestor is none of this branch's.
    pub fn oldest(&self, start: Lsn) -> Option<Lsn> {
        self.0.values().copied().filter(|restart_lsn| *restart_lsn >= start).min()
    }
}
