//! Comparing what a suite's tests came to on two servers.

use std::{path::Path, process::Command};

use super::Outcomes;

/// Lines of a difference that are shown.
const SHOWN_LINES: usize = 30;

/// The figures of one or several suites, run in two ways.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// Tests that passed in the way that is the measure, such as on the stock server.
    pub peer_passed: usize,
    /// Tests that passed in the way that is under test, such as on a compute.
    pub passed: usize,
    /// Tests with another verdict, and tests that failed in both ways with another output.
    pub differing: Vec<String>,
}

impl std::ops::AddAssign for Comparison {
    fn add_assign(&mut self, other: Comparison) {
        self.peer_passed += other.peer_passed;
        self.passed += other.passed;
        self.differing.extend(other.differing);
    }
}

/// Counts, and shows how tests differ.
pub fn compare(suite: &str, (peer_name, peer): (&str, &Outcomes), (name, tested): (&str, &Outcomes)) -> Comparison {
    let passed = |outcomes: &Outcomes| outcomes.passed.values().filter(|passed| **passed).count();
    let mut comparison = Comparison { peer_passed: passed(peer), passed: passed(tested), differing: Vec::new() };
    let tests = peer.passed.keys().chain(tested.passed.keys().filter(|test| !peer.passed.contains_key(*test)));
    for test in tests {
        let verdicts = (peer.passed.get(test), tested.passed.get(test));
        let same = match verdicts {
            // Right as the suite has it: several expected files may be right.
            (Some(true), Some(true)) => true,
            (Some(false), Some(false)) => difference(test, &peer.results, &tested.results).is_none(),
            _ => false,
        };
        if !same {
            comparison.differing.push(test.clone());
            println!("DIFFERS {suite}/{test}: passed on {peer_name} {:?}, on {name} {:?}", verdicts.0, verdicts.1);
            println!("{}", difference(test, &peer.results, &tested.results).unwrap_or_default());
        }
    }
    comparison
}

fn difference(test: &str, peer: &Path, tested: &Path) -> Option<String> {
    let file = format!("{test}.out");
    let output = Command::new("diff").arg("-u").arg(peer.join(&file)).arg(tested.join(&file)).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (!output.status.success()).then(|| text.lines().take(SHOWN_LINES).collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcomes(dir: &Path, passed: bool, output: &str) -> Outcomes {
        std::fs::create_dir_all(dir).expect("mkdir");
        std::fs::write(dir.join("t.out"), output).expect("write");
        Outcomes { passed: [("t".to_owned(), passed)].into(), results: dir.to_owned() }
    }

    #[test]
    fn other_verdicts_and_other_failures_count() {
        let dir = tempfile::tempdir().expect("directory");
        let stock = outcomes(&dir.path().join("a"), false, "one\n");
        let same = outcomes(&dir.path().join("b"), false, "one\n");
        let other = outcomes(&dir.path().join("c"), false, "two\n");
        let right = outcomes(&dir.path().join("d"), true, "one\n");
        let compare = |peer: &Outcomes, tested: &Outcomes| compare("s", ("peer", peer), ("tested", tested));
        assert!(compare(&stock, &same).differing.is_empty());
        assert_eq!(compare(&stock, &other).differing, ["t"]);
        let missing = Outcomes { results: stock.results.clone(), ..Outcomes::default() };
        assert_eq!(compare(&stock, &missing).differing, ["t"]);
        assert_eq!(compare(&missing, &stock).differing, ["t"]);
        let wanted = Comparison { peer_passed: 0, passed: 1, differing: vec!["t".to_owned()] };
        assert_eq!(compare(&stock, &right), wanted);
    }
}
