//! What branches should hold, kept as a plain list of records; the simplest thing that can be right.
#![allow(dead_code)]

use std::time::Duration;

use dormouse_pageserver::{
    branch::{Branch, Put, Tip, Tuning},
    compaction::PlanLimits,
    storage::{Key, Value},
};
use types::{BranchRef, ForkNumber, Lsn, PAGE_BYTES, PageTag, RelTag};

/// Where the root's history starts.
pub const START: Lsn = Lsn(800);
/// From here on the relation has its size and pages.
pub const READY: Lsn = Lsn(808);
/// The one relation.
pub const REL: RelTag = RelTag { spc: 1663, db: 1, rel: 1, fork: ForkNumber::Main };
/// Numbers of keys: the first half are single values, the others pages.
pub const KEYS: u8 = 12;

/// Contents by key number.
pub type Values = Vec<(u8, Option<u8>)>;

/// The key of a number.
pub fn key(number: u8) -> Key {
    if number < KEYS / 2 { Key::two_phase(u32::from(number)) } else { Key::page(page_tag(number)) }
}

/// The page of a number of the second half.
pub fn page_tag(number: u8) -> PageTag {
    PageTag { rel: REL, block: u32::from(number - KEYS / 2) }
}

fn value(number: u8, content: Option<u8>) -> Value {
    match content {
        Some(byte) if number < KEYS / 2 => Value::Image(vec![byte].into()),
        None if number < KEYS / 2 => Value::Tombstone,
        Some(byte) => Value::Image(vec![byte; PAGE_BYTES].into()),
        None => Value::ZERO_PAGE,
    }
}

pub fn tip(lsn: Lsn) -> Tip {
    Tip { last_record_lsn: lsn, prev_record_lsn: Lsn(lsn.0 - 32), last_commit_us: None }
}

/// Applies one record.
pub fn apply(branch: &Branch, lsn: Lsn, values: &[(u8, Option<u8>)]) {
    let mut puts: Vec<Put> = values
        .iter()
        .map(|(number, content)| Put { key: key(*number), lsn, value: value(*number, *content) })
        .collect();
    if lsn == READY {
        puts.push(Put { key: Key::rel_size(REL), lsn, value: Value::rel_size(100) });
    }
    branch.apply(puts, tip(lsn));
}

/// The root's first record: the size, and every page.
pub fn first_record() -> (Lsn, Values) {
    (READY, (KEYS / 2..KEYS).map(|number| (number, None)).collect())
}

pub struct ModelBranch {
    pub name: BranchRef,
    pub parent: Option<(usize, Lsn)>,
    pub start: Lsn,
    /// Nothing before it is asked for, but by children.
    pub cutoff: Lsn,
    pub records: Vec<(Lsn, Values)>,
}

impl ModelBranch {
    pub fn root(name: BranchRef) -> ModelBranch {
        ModelBranch { name, parent: None, start: START, cutoff: START, records: vec![first_record()] }
    }

    pub fn child(name: BranchRef, parent: usize, at: Lsn) -> ModelBranch {
        ModelBranch { name, parent: Some((parent, at)), start: at, cutoff: at, records: Vec::new() }
    }

    pub fn tip(&self) -> Lsn {
        self.records.last().map_or(self.start, |(lsn, _)| *lsn)
    }

    /// The position `back` records before the end, at earliest the start.
    pub fn position(&self, back: usize) -> Lsn {
        let at = self.records.len().checked_sub(back + 1);
        at.map_or(self.start, |at| self.records[at].0).max(READY).max(self.cutoff)
    }
}

#[derive(Default)]
pub struct Model {
    pub branches: Vec<ModelBranch>,
}

impl Model {
    pub fn read(&self, branch: usize, key: u8, at: Lsn) -> Option<u8> {
        self.newest(branch, key, at).flatten()
    }

    fn newest(&self, branch: usize, key: u8, at: Lsn) -> Option<Option<u8>> {
        let branch = &self.branches[branch];
        for (_, values) in branch.records.iter().rev().filter(|(lsn, _)| *lsn <= at) {
            if let Some((_, content)) = values.iter().rev().find(|(known, _)| *known == key) {
                return Some(*content);
            }
        }
        branch.parent.and_then(|(parent, lsn)| self.newest(parent, key, at.min(lsn)))
    }

    /// Where children left the branch.
    pub fn child_lsns(&self, index: usize) -> Vec<Lsn> {
        let parents = self.branches.iter().filter_map(|branch| branch.parent);
        parents.filter(|(parent, _)| *parent == index).map(|(_, lsn)| lsn).collect()
    }
}

/// Small, so that little work makes many layers, cells and images; removed objects go at once.
pub fn tuning() -> Tuning {
    Tuning {
        plan: PlanLimits { deltas_per_merge: 2, image_min_bytes: 300, cell_bytes: 600 },
        layer_bytes: 300,
        wal_wait: Duration::from_millis(10),
        removal_delay: Duration::ZERO,
        ..Tuning::default()
    }
}
