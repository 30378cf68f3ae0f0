//! Pages as redo leaves them, on top of a data directory's copy from before.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use types::{BlockNumber, ForkNumber, Oid, PAGE_BYTES, PageTag, REL_SEGMENT_BLOCKS, RelTag, oids};

type Page = [u8; PAGE_BYTES];

/// Pages by tag. Those not written yet come from the data directory.
pub struct Store {
    base: PathBuf,
    written: BTreeMap<PageTag, Box<Page>>,
    /// Blocks of the data directory's copy that are still good; all of them where there is no entry.
    base_blocks: HashMap<RelTag, BlockNumber>,
    /// Databases made as copies, with the one in the data directory that they started as.
    copied_from: HashMap<(Oid, Oid), (Oid, Oid)>,
}

impl Store {
    pub fn new(base: &Path) -> Store {
        let base = base.to_owned();
        Store { base, written: BTreeMap::new(), base_blocks: HashMap::new(), copied_from: HashMap::new() }
    }

    /// The page; zeroes where there is none.
    pub fn read(&self, tag: &PageTag) -> Box<Page> {
        self.written.get(tag).cloned().unwrap_or_else(|| self.read_base(tag))
    }

    fn read_base(&self, tag: &PageTag) -> Box<Page> {
        if self.base_blocks.get(&tag.rel).is_some_and(|blocks| tag.block >= *blocks) {
            return Box::new([0; PAGE_BYTES]);
        }
        let (spc, db) = self.origin(tag.rel.spc, tag.rel.db);
        let tag = PageTag { rel: RelTag { spc, db, ..tag.rel }, block: tag.block };
        read_file_page(&self.base, &tag).unwrap_or_else(|| Box::new([0; PAGE_BYTES]))
    }

    fn origin(&self, spc: Oid, db: Oid) -> (Oid, Oid) {
        self.copied_from.get(&(spc, db)).copied().unwrap_or((spc, db))
    }

    pub fn write(&mut self, tag: PageTag, page: Box<Page>) {
        self.written.insert(tag, page);
    }

    /// The fork keeps its first `blocks` pages.
    pub fn truncate(&mut self, rel: RelTag, blocks: BlockNumber) {
        let range = PageTag { rel, block: blocks }..=PageTag { rel, block: BlockNumber::MAX };
        let gone: Vec<PageTag> = self.written.range(range).map(|(tag, _)| *tag).collect();
        gone.iter().for_each(|tag| drop(self.written.remove(tag)));
        let kept = self.base_blocks.entry(rel).or_insert(blocks);
        *kept = blocks.min(*kept);
    }

    /// All forks of the relation are gone.
    pub fn drop_rel(&mut self, rel: RelTag) {
        ForkNumber::ALL.into_iter().for_each(|fork| self.truncate(rel.with_fork(fork), 0));
    }

    /// A database starts as what another is now.
    pub fn copy_database(&mut self, source: (Oid, Oid), target: (Oid, Oid)) {
        let moved = |rel: RelTag| RelTag { spc: target.0, db: target.1, ..rel };
        let of_source = |rel: RelTag| (rel.spc, rel.db) == source;
        let pages: Vec<_> =
            self.written.iter().filter(|(tag, _)| of_source(tag.rel)).map(|(t, p)| (*t, p.clone())).collect();
        for (tag, page) in pages {
            self.written.insert(PageTag { rel: moved(tag.rel), ..tag }, page);
        }
        let blocks: Vec<_> =
            self.base_blocks.iter().filter(|(rel, _)| of_source(**rel)).map(|(r, b)| (*r, *b)).collect();
        for (rel, kept) in blocks {
            self.base_blocks.insert(moved(rel), kept);
        }
        self.copied_from.insert(target, self.origin(source.0, source.1));
    }

    /// All pages that redo has written.
    pub fn written(&self) -> impl Iterator<Item = (&PageTag, &Page)> {
        self.written.iter().map(|(tag, page)| (tag, &**page))
    }
}

/// The tablespaces beside the two that every cluster has, and the directory in which each has its databases.
pub fn tablespaces(data_dir: &Path) -> Vec<(Oid, PathBuf)> {
    let links = fs::read_dir(data_dir.join("pg_tblspc")).expect("pg_tblspc").flatten();
    let directory = |link: fs::DirEntry| {
        let oid = link.file_name().to_str()?.parse().ok()?;
        Some((oid, fs::read_dir(link.path()).ok()?.flatten().next()?.path()))
    };
    links.filter_map(directory).collect()
}

/// A page of a stopped server's data directory; `None` beyond the fork's end.
pub fn read_file_page(data_dir: &Path, tag: &PageTag) -> Option<Box<Page>> {
    let file = File::open(relation_path(data_dir, &tag.rel, tag.block / REL_SEGMENT_BLOCKS)?).ok()?;
    let mut page = Box::new([0; PAGE_BYTES]);
    let offset = u64::from(tag.block % REL_SEGMENT_BLOCKS) * PAGE_BYTES as u64;
    file.read_exact_at(&mut page[..], offset).ok()?;
    Some(page)
}

/// The file that holds this segment of a fork; `None` when its tablespace is not there.
pub fn relation_path(data_dir: &Path, rel: &RelTag, segment: u32) -> Option<PathBuf> {
    let RelTag { spc, db, rel, fork } = *rel;
    let directory = match spc {
        oids::GLOBAL_TABLESPACE => data_dir.join("global"),
        oids::DEFAULT_TABLESPACE => data_dir.join("base").join(db.to_string()),
        other => {
            let location = data_dir.join("pg_tblspc").join(other.to_string());
            let versions = fs::read_dir(location).ok()?;
            versions.flatten().next()?.path().join(db.to_string())
        }
    };
    let number = if segment == 0 { String::new() } else { format!(".{segment}") };
    Some(directory.join(format!("{rel}{}{number}", fork.suffix())))
}
