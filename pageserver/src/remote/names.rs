//! Names of a branch's objects, `projects/<project>/branches/<branch>/...`:
//!
//! - `manifest-<generation>`: see [`super::Manifest`]; a pageserver writes only that of its own generation.
//! - `manifest-copy`: a copy of the newest manifest, if it is not old: see [`super::Remote::manifest`]. Only saves a round trip.
//! - `claim-<generation>`: empty; put before a generation's first write, so that an older one learns that it is deposed.
//! - `layers/<name>`: layers; each name begins with the generation that wrote it.
//! - `wal/<begin>-<end>`: committed WAL that safekeepers put there: see [`bucket::BranchWal`].
//! - `children/<project>.<branch>.<lsn>`: empty; a branch that left this one, and where.

use bucket::MANIFEST_PREFIX;
use object_store::path::Path;
use types::{BranchRef, Generation, Lsn, ProjectId};

use crate::layer::LayerKind;

/// Makes names of one branch's objects.
pub struct BranchNames {
    root: Path,
}

impl BranchNames {
    /// For this branch.
    pub fn new(branch: &BranchRef) -> BranchNames {
        BranchNames { root: bucket::branch_root(branch) }
    }

    /// Where a project's branches are.
    pub fn all_of(project: &ProjectId) -> Path {
        Path::from_iter(["projects", project.as_str(), "branches"])
    }

    /// Everything of the branch is below it.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The generation's manifest.
    pub fn manifest(&self, generation: Generation) -> Path {
        self.root.clone().join(format!("{MANIFEST_PREFIX}{:08x}", generation.0))
    }

    /// A copy of the newest manifest, or of an older one.
    pub fn manifest_copy(&self) -> Path {
        self.root.clone().join("manifest-copy")
    }

    /// The generation of a manifest's name; `None` for other objects.
    pub fn generation_of_manifest(object: &Path) -> Option<Generation> {
        numbered(object, MANIFEST_PREFIX)
    }

    /// The generation's claim.
    pub fn claim(&self, generation: Generation) -> Path {
        self.root.clone().join(format!("claim-{:08x}", generation.0))
    }

    /// The generation of a claim's name; `None` for other objects.
    pub fn generation_of_claim(object: &Path) -> Option<Generation> {
        numbered(object, "claim-")
    }

    /// A layer by the name in its manifest.
    pub fn layer(&self, name: &str) -> Path {
        self.root.clone().join("layers").join(name)
    }

    /// True for the path of a layer file of the branch.
    pub fn is_layer(&self, object: &str) -> bool {
        Path::from(object).prefix_matches(&self.root.clone().join("layers"))
    }

    /// Where the children are registered.
    pub fn children(&self) -> Path {
        self.root.clone().join("children")
    }

    /// A child's registration.
    pub fn child(&self, child: &BranchRef, lsn: Lsn) -> Path {
        self.children().join(format!("{}.{}.{:016x}", child.project, child.branch, lsn.0))
    }

    /// Which child a registration is for, and where it left; `None` for other objects.
    pub fn child_of(object: &Path) -> Option<(BranchRef, Lsn)> {
        let mut parts = object.filename()?.splitn(3, '.');
        let (project, branch, lsn) = (parts.next()?, parts.next()?, parts.next()?);
        let lsn = Lsn(u64::from_str_radix(lsn, 16).ok().filter(|_| lsn.len() == 16)?);
        Some((BranchRef { project: project.parse().ok()?, branch: branch.parse().ok()? }, lsn))
    }
}

/// A new layer's name: no two layers of a branch have the same.
pub fn layer_name(generation: Generation, sequence: u64, kind: LayerKind, start: Lsn, end: Lsn) -> String {
    let kind = match kind {
        LayerKind::Delta => "delta",
        LayerKind::Image => "image",
    };
    format!("{:08x}-{sequence:08x}-{kind}-{:016x}-{:016x}", generation.0, start.0, end.0)
}

/// The generation that wrote a layer; `None` for other names.
pub fn layer_generation(layer_name: &str) -> Option<Generation> {
    let digits = layer_name.split('-').next()?;
    u32::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 8).map(Generation)
}

fn numbered(object: &Path, prefix: &str) -> Option<Generation> {
    let digits = object.filename()?.strip_prefix(prefix)?;
    u32::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 8).map(Generation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::BranchId;

    #[test]
    fn names_are_read_back() {
        let branch = |name: &str| BranchRef {
            project: ProjectId::new("p").expect("id"),
            branch: BranchId::new(name).expect("id"),
        };
        let names = BranchNames::new(&branch("b"));
        let manifest = names.manifest(Generation(0x1f));
        assert_eq!(manifest.as_ref(), "projects/p/branches/b/manifest-0000001f");
        assert_eq!(BranchNames::generation_of_manifest(&manifest), Some(Generation(0x1f)));
        assert_eq!(BranchNames::generation_of_claim(&manifest), None);
        let child = branch("c");
        assert_eq!(BranchNames::child_of(&names.child(&child, Lsn(0x10))), Some((child, Lsn(0x10))));
    }
}
