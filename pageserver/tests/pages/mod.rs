//! When two versions of a page count as the same, and what a database holds.
//!
//! A page made from WAL is not byte for byte the one in the server's buffers: hint bits, command ids and free space are not
//! logged. What Postgres itself leaves out when it compares (`access/common/bufmask.c` and each access method's mask
//! function) is left out here for heaps and b-trees; of other access methods the hole and the line pointers' flags.

use std::collections::BTreeMap;

use types::{ForkNumber, PAGE_BYTES, PageTag, RelTag};

use crate::cluster::Cluster;

/// What relations of a cluster are, by file.
pub struct Contents {
    kinds: BTreeMap<(u32, u32), (String, String)>,
}

impl Contents {
    pub fn of(cluster: &Cluster, databases: &[&str]) -> Contents {
        let mut kinds = BTreeMap::new();
        for database in databases {
            let rows = cluster.sql(
                database,
                "select case when relisshared then 0 else (select oid from pg_database where datname = current_database()) end,
                    pg_relation_filenode(c.oid), relkind::text || ' ' || coalesce(amname, ''), relname
                    from pg_class c left join pg_am a on a.oid = relam where pg_relation_filenode(c.oid) is not null",
            );
            for row in rows.lines() {
                let fields: Vec<&str> = row.split('|').collect();
                let key = (fields[0].parse().expect("oid"), fields[1].parse().expect("filenode"));
                kinds.insert(key, (fields[2].to_owned(), fields[3].to_owned()));
            }
        }
        Contents { kinds }
    }

    fn kind(&self, rel: RelTag) -> &str {
        self.kinds.get(&(rel.db, rel.rel)).map_or("", |(kind, _)| kind)
    }

    pub fn is_sequence(&self, rel: RelTag) -> bool {
        self.kind(rel).starts_with('S')
    }

    /// Initialised, without items.
    pub fn is_empty_page(&self, page: &[u8]) -> bool {
        number(page, 12) == 24
    }

    pub fn describe(&self, differing: &BTreeMap<RelTag, Vec<u32>>) -> String {
        let lines = differing.iter().map(|(rel, blocks)| {
            let name = self.kinds.get(&(rel.db, rel.rel));
            format!("{rel} {name:?}: {} pages, first {:?}", blocks.len(), &blocks[..blocks.len().min(8)])
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    pub fn same_page(&self, tag: PageTag, ours: &[u8], theirs: &[u8]) -> bool {
        let kind = self.kind(tag.rel);
        // An SP-GiST metapage caches pages with room, which is not logged.
        if ours == theirs || (kind.ends_with("spgist") && tag.block == 0) {
            return true;
        }
        let (mut ours, mut theirs) = (ours.to_vec(), theirs.to_vec());
        for page in [&mut ours, &mut theirs] {
            mask(page, tag.rel.fork, kind);
        }
        ours == theirs || (is_blank(&ours) && is_blank(&theirs))
    }
}

/// Zeroes, or initialised without items: what an extension that was not logged leaves.
fn is_blank(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0) || number(page, 12) == 24
}

fn number(page: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes([page[at], page[at + 1]]))
}

fn mask(page: &mut [u8], fork: ForkNumber, kind: &str) {
    let (lower, upper, special) = (number(page, 12), number(page, 14), number(page, 16));
    if fork == ForkNumber::Vm {
        page[..8].fill(0);
        return;
    }
    if lower < 24 || lower > upper || upper > special || special > PAGE_BYTES {
        return;
    }
    if fork == ForkNumber::Init {
        // `ambuildempty` writes the page before it logs it.
        page[..8].fill(0);
    }
    // pd_checksum, the hint flags and "all visible" of pd_flags, pd_prune_xid, the hole.
    page[8..10].fill(0);
    page[10] &= !7;
    page[20..24].fill(0);
    page[lower..upper].fill(0);
    if kind.ends_with("heap") || kind.starts_with('t') {
        mask_heap_items(page, lower);
    } else if kind.ends_with("btree") {
        mask_btree(page, lower, special);
    } else {
        const GIN_DELETED: u8 = 4;
        if kind.ends_with("gin") && page[PAGE_BYTES - 2] & GIN_DELETED != 0 {
            // Redo makes a deleted page anew.
            page[24..PAGE_BYTES - 2].fill(0);
            page[12..16].fill(0);
            return;
        }
        mask_dead_items(page, lower);
    }
}

fn items(page: &[u8], lower: usize) -> Vec<(usize, usize, usize, usize)> {
    let pointers = (24..lower / 4 * 4).step_by(4).map(|at| {
        let pointer = u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
        (at, (pointer & 0x7fff) as usize, (pointer >> 15 & 3) as usize, (pointer >> 17) as usize)
    });
    pointers.collect()
}

fn mask_heap_items(page: &mut [u8], lower: usize) {
    for (_, offset, flags, length) in items(page, lower) {
        if flags != 1 || length < 23 {
            continue;
        }
        let tuple = &mut page[offset..];
        // t_cid; of t_infomask the bits about visibility, except that frozen stays frozen.
        tuple[8..12].fill(0);
        let infomask = u16::from_le_bytes([tuple[20], tuple[21]]);
        let frozen = infomask & 0x0300 == 0x0300;
        let masked = if frozen { infomask & !(0xFFF0 & !0x0300) } else { infomask & !0xFFF0 };
        tuple[20..22].copy_from_slice(&masked.to_le_bytes());
        // Bytes that pad the item.
        let padded = length.next_multiple_of(8).min(tuple.len());
        tuple[length..padded].fill(0);
    }
}

fn mask_dead_items(page: &mut [u8], lower: usize) {
    for (at, ..) in items(page, lower) {
        // The two flag bits of the line pointer: 15 and 16.
        page[at + 1] &= !0x80;
        page[at + 2] &= !0x01;
    }
}

fn mask_btree(page: &mut [u8], lower: usize, special: usize) {
    const LEAF: u8 = 1;
    const DELETED: u8 = 4;
    const HAS_GARBAGE: u8 = 0x40;
    if special + 16 != PAGE_BYTES {
        return;
    }
    let flags = page[special + 12];
    if flags & DELETED != 0 {
        page[24..special].fill(0);
    } else if flags & LEAF != 0 {
        mask_dead_items(page, lower);
    }
    page[special + 12] &= !HAS_GARBAGE;
    page[special + 14..].fill(0);
}

/// One line per table: its rows, in no order, digested. Left out are sequences, which may have gaps, and what autovacuum
/// writes.
pub fn digests(cluster: &Cluster, database: &str) -> String {
    let tables = cluster.sql(
        database,
        "select quote_ident(nspname) || '.' || quote_ident(relname) from pg_class c join pg_namespace n on n.oid = relnamespace
            where relkind in ('r', 'm') and relpersistence = 'p' and relname not in
            ('pg_statistic', 'pg_class', 'pg_database') order by 1",
    );
    let digest = |table: &str| {
        let sql = format!(
            "select '{table}', count(*), coalesce(sum(('x' || substr(md5(t::text), 1, 15))::bit(60)::bigint), 0) from {table} t"
        );
        cluster.sql(database, &sql)
    };
    tables.lines().map(digest).collect()
}

/// Checks every b-tree against its heap, and every heap.
pub fn check_indexes(cluster: &Cluster, databases: &[&str]) {
    for database in databases {
        cluster.sql(database, "create extension if not exists amcheck");
        cluster.sql(
            database,
            "select bt_index_parent_check(c.oid, true) from pg_class c join pg_index i on i.indexrelid = c.oid
                where relam = (select oid from pg_am where amname = 'btree') and relpersistence = 'p' and indisvalid",
        );
        let damaged = cluster.sql(
            database,
            "select c.relname, v.* from pg_class c, verify_heapam(c.oid) v where relkind in ('r', 't', 'm') and relpersistence = 'p'",
        );
        assert_eq!(damaged, "", "{database}");
    }
}
