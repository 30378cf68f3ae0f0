//! Walking everything that the object store has of a project: every block's checksum, every reference, objects that nothing
//! refers to.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bucket::{BranchWal, WalObject};
use object_store::{ObjectMeta, path::Path};
use types::{BranchId, BranchRef, Generation, Lsn, ProjectId};

use crate::{
    error::StorageError,
    layer::{Layer, LayerMeta, MergeStream, Merged},
    remote::{BranchNames, Manifest, Remote},
    storage::{Key, Value},
};

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Branches whose newest manifest was read.
    pub branches: usize,
    /// Layers that were read whole.
    pub layers: usize,
    /// Their values.
    pub values: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Pieces of WAL, put there by safekeepers, that were read whole.
    pub wal_objects: usize,
    /// Their bytes.
    pub wal_bytes: u64,
    /// What is wrong, each with the object's name.
    pub damage: Vec<String>,
    /// Objects that nothing refers to, with their size. A pageserver at work has some for a while: they are no damage.
    pub orphans: Vec<(String, u64)>,
    /// Of those, how many were removed.
    pub removed: usize,
}

/// What to do about orphans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Only tell.
    No,
    /// Remove those that were written at least so long ago. Too short a time removes what a pageserver has uploaded and not
    /// yet named in its manifest: a day is safe.
    OlderThan(Duration),
}

/// Checks a project. Damage is told in the report; errors are of reading the object store itself.
pub async fn check_project(remote: &Remote, project: &ProjectId, repair: Repair) -> Result<CheckReport, StorageError> {
    let mut report = CheckReport::default();
    let root = Path::from_iter(["projects", project.as_str()]);
    let objects = remote.list_all(&root).await?;
    let mut by_branch: BTreeMap<String, Vec<ObjectMeta>> = BTreeMap::new();
    let mut orphans: Vec<ObjectMeta> = Vec::new();
    for object in objects {
        // projects/<project>/branches/<branch>/...
        match object.location.parts().nth(3) {
            Some(branch) => by_branch.entry(branch.as_ref().to_owned()).or_default().push(object),
            None => orphans.push(object),
        }
    }
    for (name, objects) in by_branch {
        let Ok(id) = BranchId::new(&name) else {
            orphans.extend(objects);
            continue;
        };
        let branch = BranchRef { project: project.clone(), branch: id };
        orphans.append(&mut check_branch(remote, &branch, objects, &mut report).await?);
    }
    for orphan in orphans {
        report.orphans.push((orphan.location.to_string(), orphan.size));
        if let Repair::OlderThan(age) = repair
            && is_older(&orphan, age)
        {
            remote.delete(&orphan.location).await?;
            report.removed += 1;
        }
    }
    Ok(report)
}

/// One branch; answers its orphans.
async fn check_branch(
    remote: &Remote,
    branch: &BranchRef,
    objects: Vec<ObjectMeta>,
    report: &mut CheckReport,
) -> Result<Vec<ObjectMeta>, StorageError> {
    let names = BranchNames::new(branch);
    let newest = objects.iter().filter_map(|object| BranchNames::generation_of_manifest(&object.location)).max();
    let manifest = match remote.manifest(branch).await {
        Ok(Some((_, manifest))) => manifest,
        // Nobody can read what a branch without manifest has.
        Ok(None) => return Ok(objects),
        Err(StorageError::Damaged { object, reason }) => {
            report.damage.push(format!("{object}: {reason}"));
            return Ok(Vec::new());
        }
        Err(error) => return Err(error),
    };
    report.branches += 1;
    check_ancestor(remote, branch, &manifest, report).await?;
    for meta in &manifest.layers {
        check_layer(remote, &names, meta, report).await?;
    }
    let named = manifest.layers.iter().map(|meta| &meta.name).chain(&manifest.doomed_layers);
    let layers: BTreeSet<Path> = named.map(|name| names.layer(name)).collect();
    let mut orphans = Vec::new();
    for object in objects {
        let kept = layers.contains(&object.location)
            || check_wal(remote, &names, &object, report).await?
            || object.location == names.manifest_copy()
            || is_current(&object.location, newest)
            || is_child(remote, branch, &object.location).await?;
        if !kept {
            orphans.push(object);
        }
    }
    Ok(orphans)
}

/// Reads a piece of WAL; false when the object is something else. None is an orphan while there is a manifest: safekeepers remove what
/// neither the pageserver nor a replication slot needs any more.
async fn check_wal(
    remote: &Remote,
    names: &BranchNames,
    object: &ObjectMeta,
    report: &mut CheckReport,
) -> Result<bool, StorageError> {
    let key = &object.location;
    if !key.prefix_matches(&BranchWal::prefix_of(names.root())) {
        return Ok(false);
    }
    let Some(wal) = WalObject::of(key) else { return Ok(false) };
    // One that was removed meanwhile is needed no more.
    let Some(bytes) = remote.get(key).await? else { return Ok(true) };
    report.wal_objects += 1;
    report.wal_bytes += object.size;
    report.damage.extend(wal.decode(&bytes).err().map(|reason| format!("{key}: {reason}")));
    Ok(true)
}

/// A manifest or claim of the newest generation that has a manifest, or of a newer one that is about to have one.
fn is_current(object: &Path, newest: Option<Generation>) -> bool {
    let generation = BranchNames::generation_of_manifest(object).or(BranchNames::generation_of_claim(object));
    generation.is_some_and(|generation| Some(generation) >= newest)
}

/// The registration of a branch that did leave this one there.
async fn is_child(remote: &Remote, branch: &BranchRef, object: &Path) -> Result<bool, StorageError> {
    let Some((child, lsn)) = BranchNames::child_of(object) else { return Ok(false) };
    match remote.manifest(&child).await {
        Ok(manifest) => {
            let ancestor = manifest.and_then(|(_, manifest)| manifest.ancestor);
            Ok(ancestor.is_some_and(|ancestor| ancestor.branch == *branch && ancestor.lsn == lsn))
        }
        // What it needs is not known: the registration stays.
        Err(StorageError::Damaged { .. }) => Ok(true),
        Err(error) => Err(error),
    }
}

async fn check_ancestor(
    remote: &Remote,
    branch: &BranchRef,
    manifest: &Manifest,
    report: &mut CheckReport,
) -> Result<(), StorageError> {
    let Some(ancestor) = &manifest.ancestor else { return Ok(()) };
    let wrong = match remote.manifest(&ancestor.branch).await {
        Ok(Some((_, parent))) if parent.gc_cutoff_lsn > ancestor.lsn && !parent.held_lsns.contains(&ancestor.lsn) => {
            format!(
                "its history starts at {}, behind where this branch left it, {}",
                parent.gc_cutoff_lsn, ancestor.lsn
            )
        }
        Ok(Some(_)) => return Ok(()),
        Ok(None) => "it does not exist".to_owned(),
        Err(StorageError::Damaged { reason, .. }) => reason,
        Err(error) => return Err(error),
    };
    report.damage.push(format!("{branch}: ancestor {}: {wrong}", ancestor.branch));
    Ok(())
}

/// Reads a layer whole: every block is checked, and every value lies where the manifest says.
async fn check_layer(
    remote: &Remote,
    names: &BranchNames,
    meta: &LayerMeta,
    report: &mut CheckReport,
) -> Result<(), StorageError> {
    let layer = Layer::new(meta.clone(), names.layer(&meta.name));
    report.layers += 1;
    report.bytes += meta.size_bytes;
    let damage = match read_layer(remote, layer).await {
        Ok(values) => {
            report.values += values;
            (values != meta.entries).then(|| format!("it holds {values} values, the manifest says {}", meta.entries))
        }
        Err(StorageError::Damaged { reason, .. }) => Some(reason),
        Err(error) => return Err(error),
    };
    report.damage.extend(damage.map(|reason| format!("{}: {reason}", names.layer(&meta.name))));
    Ok(())
}

async fn read_layer(remote: &Remote, layer: Arc<Layer>) -> Result<u64, StorageError> {
    let (meta, object) = (layer.meta.clone(), layer.object().to_string());
    let damaged = |reason: String| StorageError::Damaged { object: object.clone(), reason };
    // What was written at the very start of a delta is an image of what was there.
    let lsns = meta.start_lsn..=meta.end_lsn;
    let mut entries = MergeStream::open(remote, [layer], Key::MIN, Key::MAX).await?;
    let mut values = 0;
    let mut before: Option<(Key, Lsn)> = None;
    while let Some(Merged { key, lsn, value }) = entries.next(remote).await? {
        if before.is_some_and(|before| before >= (key, lsn)) {
            return Err(damaged(format!("{key} at {lsn} is out of order")));
        }
        if !meta.covers(&key) || !lsns.contains(&lsn) {
            return Err(damaged(format!("{key} at {lsn} is not in the range that the manifest says")));
        }
        if Value::decode(value).is_none() {
            return Err(damaged(format!("unknown value of {key} at {lsn}")));
        }
        before = Some((key, lsn));
        values += 1;
    }
    Ok(values)
}

fn is_older(object: &ObjectMeta, age: Duration) -> bool {
    let written = SystemTime::from(object.last_modified);
    SystemTime::now().duration_since(written).is_ok_and(|since| since >= age)
}
