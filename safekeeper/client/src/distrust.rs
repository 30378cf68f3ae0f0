//! Which safekeepers have given bytes that are no WAL, so that others are asked for the same place.

use types::{Lsn, NodeId};

/// About one place of a branch's WAL: the end of the last good record. Safekeepers keep WAL as files, and files rot.
#[derive(Debug, Default)]
pub struct Distrust {
    at: Lsn,
    nodes: Vec<NodeId>,
    reason: String,
}

/// Bytes that are no WAL.
#[derive(Debug)]
pub struct BadWal {
    /// Who gave them, or some of them: whoever gave a part of the record that is not whole.
    pub givers: Vec<NodeId>,
    /// What is wrong with them.
    pub reason: String,
}

impl Distrust {
    /// Notes that what came behind `at` is no WAL. Where it is of several, it is not known whose is bad: none is avoided.
    pub fn note(&mut self, at: Lsn, BadWal { givers, reason }: BadWal) {
        if at > self.at {
            self.nodes.clear();
        }
        (self.at, self.reason) = (at, reason);
        if let [giver] = givers[..]
            && !self.nodes.contains(&giver)
        {
            self.nodes.push(giver);
        }
    }

    /// Whom not to ask.
    pub fn nodes(&self) -> &[NodeId] {
        &self.nodes
    }

    /// What to say of it, as long as there has been nothing better up to `tip`.
    pub fn complaint(&self, tip: Lsn) -> Option<String> {
        let nodes: Vec<String> = self.nodes.iter().map(NodeId::to_string).collect();
        (!nodes.is_empty() && tip <= self.at)
            .then(|| format!("{} (from safekeeper {}; no other has given better yet)", self.reason, nodes.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gave_bad_wal_is_avoided_until_there_is_better() {
        let mut distrust = Distrust::default();
        let bad =
            |givers: &[u64]| BadWal { givers: givers.iter().copied().map(NodeId).collect(), reason: "bad".to_owned() };
        assert_eq!(distrust.complaint(Lsn(0)), None);
        distrust.note(Lsn(10), bad(&[1]));
        distrust.note(Lsn(10), bad(&[3]));
        assert_eq!(distrust.nodes(), [NodeId(1), NodeId(3)]);
        assert!(distrust.complaint(Lsn(10)).is_some_and(|text| text.contains("1, 3")));
        assert_eq!(distrust.complaint(Lsn(11)), None);
        distrust.note(Lsn(20), bad(&[2]));
        assert_eq!(distrust.nodes(), [NodeId(2)], "at another place");
        distrust.note(Lsn(30), bad(&[1, 2]));
        assert_eq!(distrust.nodes(), [], "whose it was is not known");
    }
}
