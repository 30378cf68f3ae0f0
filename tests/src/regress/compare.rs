//! Comparing what a suite's tests came to on two servers.

use std::{path::Path, process::Command};

use super::Outcomes;

/// Lines of a difference that are shown.
const SHOWN_LINES: usize = 30;

/// The figures of one or several suites.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Comparison {
    /// Tests that passed on the stock server.
    pub stock_passed: usize,
    /// Tests that passed on the compute.
    pub dormouse_passed: usize,
    /// Tests with another verdict, and tests that failed on both with another output.
    pub differing: usize,
}

impl std::ops::AddAssign for Comparison {
    fn add_assign(&mut self, other: Comparison) {
        self.stock_passed += other.stock_passed;
        self.dormouse_passed += other.dormouse_passed;
        self.differing += other.differing;
    }
}

/// Counts, and shows how tests differ.
pub fn compare(suite: &str, stock: &Outcomes, dormouse: &Outcomes) -> Comparison {
    let passed = |outcomes: &Outcomes| outcomes.passed.values().filter(|passed| **passed).count();
    let mut comparison = Comparison { stock_passed: passed(stock), dormouse_passed: passed(dormouse), differing: 0 };
    let names = stock.passed.keys().chain(dormouse.passed.keys().filter(|name| !stock.passed.contains_key(*name)));
    for name in names {
        let verdicts = (stock.passed.get(name), dormouse.passed.get(name));
        let same = match verdicts {
            // Right as the suite has it: several expected files may be right.
            (Some(true), Some(true)) => true,
            (Some(false), Some(false)) => difference(name, &stock.results, &dormouse.results).is_none(),
            _ => false,
        };
        if !same {
            comparison.differing += 1;
            println!("DIFFERS {suite}/{name}: passed on stock {:?}, on dormouse {:?}", verdicts.0, verdicts.1);
            println!("{}", difference(name, &stock.results, &dormouse.results).unwrap_or_default());
        }
    }
    comparison
}

fn difference(test: &str, stock: &Path, dormouse: &Path) -> Option<String> {
    let file = format!("{test}.out");
    let output = Command::new("diff").arg("-u").arg(stock.join(&file)).arg(dormouse.join(&file)).output().ok()?;
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
        assert_eq!(compare("s", &stock, &same).differing, 0);
        assert_eq!(compare("s", &stock, &other).differing, 1);
        let missing = Outcomes { results: stock.results.clone(), ..Outcomes::default() };
        assert_eq!(compare("s", &stock, &missing).differing, 1);
        assert_eq!(compare("s", &missing, &stock).differing, 1);
        let wanted = Comparison { stock_passed: 0, dormouse_passed: 1, differing: 1 };
        assert_eq!(compare("s", &stock, &right), wanted);
    }
}
