//! Broken versions of the redo library: each with one line changed, built from a copy of the sources.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, ensure};

use crate::{repository, stock::run};

/// One line of redo, and what it becomes.
pub struct Mutant {
    /// What goes wrong.
    pub name: &'static str,
    /// Below `wal-redo/src`.
    file: &'static str,
    /// Occurs once in the file.
    sound: &'static str,
    broken: &'static str,
}

impl Mutant {
    /// The file's text with the line broken.
    fn break_in(&self, sound: &str) -> anyhow::Result<String> {
        let found = sound.matches(self.sound).count();
        ensure!(found == 1, "{}: {:?} is there {found} times: this mutant needs a new line", self.file, self.sound);
        Ok(sound.replace(self.sound, self.broken))
    }
}

/// The copy of the sources.
pub struct Mutants {
    home: tempfile::TempDir,
}

/// The crates that redo and its judge are made of.
const CRATES: [&str; 3] = ["types", "wal", "wal-redo"];

impl Mutants {
    /// Each must be caught.
    pub const ALL: [Mutant; 15] = [
        Mutant {
            name: "a deleted tuple does not get its xmax",
            file: "page/heap.rs",
            sound: "        tuple.set_xmax(xmax);",
            broken: "        let _ = xmax;",
        },
        Mutant {
            name: "a locked tuple keeps its old xmax",
            file: "page/heap.rs",
            sound: "    tuple.set_xmax(locking_xid);",
            broken: "    let _ = locking_xid;",
        },
        Mutant {
            name: "an update's new tuple points to the slot behind it",
            file: "page/heap.rs",
            sound: "let new_ctid = item_pointer(new_block.block, header.new_offnum);",
            broken: "let new_ctid = item_pointer(new_block.block, header.new_offnum + 1);",
        },
        Mutant {
            name: "an update's new tuple lacks the end that it shares with the old one",
            file: "page/heap.rs",
            sound: "    page.copy_within(suffix, rest_at + rest.len())?;",
            broken: "    let _ = suffix;",
        },
        Mutant {
            name: "a packed page's items end up one byte off",
            file: "page/page_ops.rs",
            sound: "            self.data.copy_within(start..start + source.len(), to);",
            broken: "            self.data.copy_within(start + 1..start + source.len(), to);",
        },
        Mutant {
            name: "an item that stays in its place keeps its old number",
            file: "page/page_ops.rs",
            sound: "            self.set_item_id(number, *id)?;",
            broken: "            let _: (u16, _) = (number, id);",
        },
        Mutant {
            name: "a frozen tuple keeps its infomask",
            file: "page/heap2.rs",
            sound: "        tuple.set_infomask(plan.t_infomask);",
            broken: "",
        },
        Mutant {
            name: "the visibility map keeps bits that a change cleared",
            file: "page/visibility_map.rs",
            sound: "        page.bytes_mut()[at] &= !(bits << shift);",
            broken: "        let _ = (at, bits << shift);",
        },
        Mutant {
            name: "a B-tree page keeps the items that were deleted",
            file: "page/nbtree.rs",
            sound: "    page.index_multi_delete(&deleted)?;",
            broken: "    let _ = deleted;",
        },
        Mutant {
            name: "a hash page's flags cannot be cleared",
            file: "page/hash.rs",
            sound: "    set_flags(page, flags & !flag)",
            broken: "    set_flags(page, flags | flag)",
        },
        Mutant {
            name: "a GIN page counts one item too many",
            file: "page/gin.rs",
            sound: "    page.set_u16_at(special + 4, count)",
            broken: "    page.set_u16_at(special + 4, count + 1)",
        },
        Mutant {
            name: "a GiST split never ends",
            file: "page/gist.rs",
            sound: "    change_flags(page, FOLLOW_RIGHT, 0)\n",
            broken: "    change_flags(page, LEAF, 0)\n",
        },
        Mutant {
            name: "a BRIN range's pointer lands in the next range's place",
            file: "page/brin.rs",
            sound: "(range % REVMAP_ITEMS) as usize * 6",
            broken: "((range + 1) % REVMAP_ITEMS) as usize * 6",
        },
        Mutant {
            name: "an aborted transaction is taken for committed",
            file: "slru.rs",
            sound: "let status = if end.committed { COMMITTED } else { ABORTED };",
            broken: "let status = COMMITTED;",
        },
        Mutant {
            name: "subtransactions are forgotten",
            file: "slru.rs",
            sound: ".chain(end.subxacts.iter().copied())",
            broken: ".chain(end.subxacts.iter().copied().take(1))",
        },
    ];

    /// Copies the sources.
    pub fn prepare() -> anyhow::Result<Mutants> {
        let home = tempfile::Builder::new().prefix("mutants-").tempdir()?;
        let repository = repository();
        for part in CRATES {
            run(Command::new("cp").arg("-r").arg(repository.join(part)).arg(home.path()))?;
        }
        std::fs::copy(repository.join("Cargo.lock"), home.path().join("Cargo.lock"))?;
        let manifest = std::fs::read_to_string(repository.join("Cargo.toml"))?;
        std::fs::write(home.path().join("Cargo.toml"), only_redo(&manifest)?)?;
        Ok(Mutants { home })
    }

    /// The judge with the library as it is.
    pub fn build_sound(&self) -> anyhow::Result<PathBuf> {
        // A directory of their own, kept: dependencies are built once.
        let target = repository().join("target/mutants");
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["build", "--release", "--offline", "-p", "dormouse-redo-oracle", "--target-dir"]).arg(&target);
        // A broken line may leave a value unused.
        run(cargo.current_dir(self.home.path()).env("RUSTFLAGS", "-Awarnings"))?;
        Ok(target.join("release/redo-oracle"))
    }

    /// The judge with a broken library.
    pub fn build(&self, mutant: &Mutant) -> anyhow::Result<PathBuf> {
        let path = self.home.path().join("wal-redo/src").join(mutant.file);
        let sound = std::fs::read_to_string(&path)?;
        std::fs::write(&path, mutant.break_in(&sound)?)?;
        let built = self.build_sound();
        std::fs::write(&path, sound)?;
        built.with_context(|| format!("building the mutant: {}", mutant.name))
    }
}

/// The workspace's manifest with no members but those that were copied.
fn only_redo(manifest: &str) -> anyhow::Result<String> {
    let (before, rest) = manifest.split_once("members = [").context("the workspace has members")?;
    let (_members, after) = rest.split_once(']').context("the list of members ends")?;
    let (between, rest) = after.split_once("default-members = [").context("the workspace has default members")?;
    let (_members, after) = rest.split_once(']').context("the list of default members ends")?;
    Ok(format!("{before}members = [\"types\", \"wal\", \"wal-redo\", \"wal-redo/oracle\"]{between}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mutant_finds_its_line() -> anyhow::Result<()> {
        for mutant in &Mutants::ALL {
            mutant.break_in(&std::fs::read_to_string(repository().join("wal-redo/src").join(mutant.file))?)?;
        }
        Ok(())
    }
}
