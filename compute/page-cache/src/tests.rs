//! Tests of the cache as several processes see it.

use std::{ffi::CString, sync::Arc};

use types::{ForkNumber, Lsn, PAGE_BYTES, PageTag, RelTag};

use crate::{Errno, Keep, Page, PageCache, PageCacheConfig, Shared};

const PAGE: u64 = PAGE_BYTES as u64;
const REL: RelTag = RelTag { spc: 1663, db: 5, rel: 7, fork: ForkNumber::Main };

fn tag(block: u32) -> PageTag {
    PageTag { rel: REL, block }
}

fn filled(byte: u8) -> Page {
    [byte; PAGE_BYTES]
}

/// A cache for so many clean and kept pages: the agent's handle and a backend's.
fn cache(clean: u64, kept: u64, rels: u32) -> (PageCache, Arc<Shared>) {
    let (owner, shared, _) = create(clean, kept, rels);
    (owner, shared)
}

/// As [`cache`], with the file of pages.
fn cache_with_file(clean: u64, kept: u64) -> (PageCache, Arc<Shared>, std::fs::File) {
    create(clean, kept, 16)
}

fn create(clean: u64, kept: u64, rels: u32) -> (PageCache, Arc<Shared>, std::fs::File) {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Relaxed);
    let path =
        |name: &str| std::env::temp_dir().join(format!("dormouse-page-cache-{}-{count}.{name}", std::process::id()));
    let config = PageCacheConfig {
        shm_path: path("index"),
        pages_path: path("pages"),
        clean_bytes: clean * PAGE,
        kept_bytes: kept * PAGE,
    };
    let owner = PageCache::create_with_max_rels(&config, rels).expect("cache");
    let c_path = |path: &std::path::Path| CString::new(path.to_str().expect("text")).expect("no NUL");
    let shared = Shared::open(&c_path(&config.shm_path), &c_path(&config.pages_path)).expect("opens");
    let file = std::fs::File::options().read(true).write(true).open(&config.pages_path).expect("opens");
    std::fs::remove_file(&config.shm_path).expect("remove");
    std::fs::remove_file(&config.pages_path).expect("remove");
    (owner, Arc::new(shared), file)
}

fn config(name: &str, clean: u64) -> PageCacheConfig {
    let path =
        |ending: &str| std::env::temp_dir().join(format!("dormouse-page-cache-{}-{name}.{ending}", std::process::id()));
    PageCacheConfig {
        shm_path: path("index"),
        pages_path: path("pages"),
        clean_bytes: clean * PAGE,
        kept_bytes: 8 * PAGE,
    }
}

#[test]
fn a_cache_that_slept_has_what_wal_tells_and_nothing_else() {
    let end = Lsn(1 << 30);
    let logged = Keep { lsn: end.0 - 8, insert: end.0 - 8, soft: false };
    let map = |block| PageTag { rel: REL.with_fork(ForkNumber::Fsm), block };
    let config = config("asleep", 16);
    let cache = PageCache::create(&config).expect("cache");
    let shared = cache.shared_for_test();
    for block in 0..4 {
        assert!(shared.deposit(&tag(block), &filled(block as u8 + 1), 0).expect("deposit"));
    }
    shared.keep(&tag(4), &filled(5), logged).expect("keep");
    shared.keep(&tag(5), &filled(6), Keep::FOR_EVER).expect("keep");
    shared.keep(&map(0), &filled(7), Keep { lsn: 0, insert: 0, soft: true }).expect("keep");
    assert!(shared.deposit(&map(1), &filled(8), 0).expect("deposit"));
    shared.discard(&tag(1)).expect("discard");
    let list = cache.fall_asleep(end, "b").expect("list");
    assert_eq!(crate::decode_asleep(&list).expect("valid").0, "b");
    drop((cache, shared));

    let cache = PageCache::wake(&config, &list).expect("wakes");
    let shared = cache.shared_for_test();
    let found: Vec<_> = (0..7).map(|block| read(&shared, block)).collect();
    assert_eq!(found, [Some(1), None, Some(3), Some(4), Some(5), None, None]);
    assert!(!shared.contains(&map(0)).expect("look") && shared.contains(&map(1)).expect("look"));
    // Slots in between are used again, those of its pages are not.
    for block in 10..20 {
        shared.deposit(&tag(block), &filled(block as u8), end.0).expect("deposit");
    }
    let found: Vec<_> = [0, 2, 3, 4].into_iter().filter_map(|block| read(&shared, block)).collect();
    assert!(found.iter().all(|byte| [1, 3, 4, 5].contains(byte)), "{found:?}");
    assert_eq!((10..20).filter(|block| read(&shared, *block) == Some(*block as u8)).count(), 10);

    // A smaller cache takes what there is room for.
    drop((cache, shared));
    let small = PageCacheConfig { clean_bytes: 2 * PAGE, ..config.clone() };
    let cache = PageCache::wake(&small, &list).expect("wakes");
    assert_eq!(cache.stats().clean_bytes, 2 * PAGE);
    for path in [&config.shm_path, &config.pages_path] {
        std::fs::remove_file(path).expect("remove");
    }
}

#[test]
fn a_list_with_impossible_slots_is_refused() {
    let config = config("impossible", 4);
    drop(PageCache::create(&config).expect("cache"));
    for slots in [[1, 1], [2, 1], [0, 1], [1, 1000]] {
        let entry = |(block, slot)| crate::asleep::Entry { tag: tag(block), slot, crc: 0 };
        let entries: Vec<_> = (0..).zip(slots).map(entry).collect();
        assert!(PageCache::wake(&config, &crate::asleep::encode("b", &entries)).is_err(), "{slots:?}");
    }
    for path in [&config.shm_path, &config.pages_path] {
        std::fs::remove_file(path).expect("remove");
    }
}

fn read(shared: &Shared, block: u32) -> Option<u8> {
    let mut page = filled(0);
    shared.read(&tag(block), &mut page).expect("readable").then(|| {
        assert!(page.iter().all(|byte| *byte == page[0]), "a torn page");
        page[0]
    })
}

#[test]
fn what_the_agent_deposits_a_backend_reads() {
    let (owner, shared) = cache(4, 4, 16);
    owner.prefill_page(tag(1), &filled(7)).expect("room");
    assert_eq!((read(&shared, 1), read(&shared, 2)), (Some(7), None));
    assert_eq!(owner.stats().clean_bytes, PAGE);
}

#[test]
fn clean_pages_make_way_and_kept_ones_do_not() {
    let (owner, shared) = cache(4, 4, 16);
    for block in 0..4 {
        shared.keep(&tag(block), &filled(1), Keep::FOR_EVER).expect("room");
    }
    for block in 10..30 {
        owner.prefill_page(tag(block), &filled(2)).expect("room");
    }
    assert!((0..4).all(|block| read(&shared, block) == Some(1)));
    assert_eq!((10..30).filter(|block| read(&shared, *block).is_some()).count(), 4);
    assert_eq!(shared.keep(&tag(5), &filled(1), Keep::FOR_EVER), Err(Errno(libc::ENOSPC)));
    shared.keep(&tag(0), &filled(3), Keep::FOR_EVER).expect("overwriting needs no room");
    assert_eq!((owner.stats().clean_bytes, owner.stats().kept_bytes), (4 * PAGE, 4 * PAGE));
}

#[test]
fn a_kept_page_goes_when_its_transactions_have_ended_and_storage_has_its_wal() {
    let (owner, shared) = cache(1, 2, 16);
    let keep = Keep { lsn: 100, insert: 200, soft: false };
    shared.keep(&tag(0), &filled(1), keep).expect("room");
    shared.keep(&tag(1), &filled(1), keep).expect("room");
    let more = |block| shared.keep(&tag(block), &filled(2), Keep::FOR_EVER);
    owner.set_horizon(Lsn(99));
    owner.set_shipped(Lsn(300));
    assert_eq!(more(2), Err(Errno(libc::ENOSPC)), "a transaction in progress may have written the page");
    owner.set_horizon(Lsn(100));
    assert_eq!(more(2), Ok(()));

    let (owner, shared) = cache(1, 1, 16);
    shared.keep(&tag(0), &filled(1), keep).expect("room");
    owner.set_horizon(Lsn(199));
    let more = |block| shared.keep(&tag(block), &filled(2), Keep::FOR_EVER);
    assert_eq!(more(2), Err(Errno(libc::ENOSPC)), "storage does not know what was logged before the page came");
    owner.set_shipped(Lsn(200));
    assert_eq!(more(2), Ok(()));
}

#[test]
fn soft_pages_go_only_when_nothing_else_can() {
    let (owner, shared) = cache(1, 2, 16);
    shared.keep(&tag(0), &filled(1), Keep { lsn: 0, insert: 0, soft: true }).expect("room");
    shared.keep(&tag(1), &filled(1), Keep { lsn: 5, insert: 5, soft: false }).expect("room");
    owner.set_horizon(Lsn(10));
    shared.keep(&tag(2), &filled(1), Keep::FOR_EVER).expect("the logged page goes");
    assert_eq!(owner.stats().kept_bytes, 2 * PAGE);
    shared.keep(&tag(3), &filled(1), Keep::FOR_EVER).expect("then the soft one");
    assert_eq!(shared.keep(&tag(4), &filled(1), Keep::FOR_EVER), Err(Errno(libc::ENOSPC)));
}

#[test]
fn an_older_version_than_the_dropped_one_is_refused() {
    let (owner, shared) = cache(1, 1, 16);
    shared.keep(&tag(0), &filled(1), Keep { lsn: 100, insert: 200, soft: false }).expect("room");
    owner.set_horizon(Lsn(300));
    shared.keep(&tag(1), &filled(1), Keep::FOR_EVER).expect("room");
    // Page 0 is clean now, and leaves for another.
    for block in 50..60 {
        shared.deposit(&tag(block), &filled(2), 300).expect("deposit");
    }
    assert_eq!(read(&shared, 0), None);
    assert_eq!(shared.deposit(&tag(0), &filled(9), 199), Ok(false), "asked for before the page was dropped");
    assert_eq!(shared.deposit(&tag(0), &filled(9), 200), Ok(true));
    assert_eq!(read(&shared, 0), Some(9));
}

#[test]
fn many_pages_are_deposited_as_single_ones_are() {
    let (owner, shared) = cache(8, 4, 16);
    shared.keep(&tag(3), &filled(1), Keep::FOR_EVER).expect("room");
    owner.prefill_page(tag(1), &filled(1)).expect("room");
    owner.prefill_page(tag(90), &filled(1)).expect("room");
    // Slots are used again where they have become free: not all that are to be had lie together.
    shared.discard_range(REL, 1, 2).expect("discards");
    let pages: Vec<Page> = (0..6).map(|block| filled(10 + block)).collect();
    let batch: Vec<(PageTag, &Page)> = [0, 3, 4, 5, 4, 6].into_iter().map(tag).zip(&pages).collect();
    assert_eq!(owner.deposit_many(&batch, Lsn(0)).expect("room"), 4, "one is kept, one comes twice");
    let all: Vec<Option<u8>> = (0..8).map(|block| read(&shared, block)).collect();
    assert_eq!(all[..4], [Some(10), None, None, Some(1)]);
    assert!(all[4] == Some(12) || all[4] == Some(14), "either is right: {all:?}");
    assert_eq!(all[5..], [Some(13), Some(15), None]);
    assert_eq!((read(&shared, 90), owner.stats().clean_bytes), (Some(1), 5 * PAGE));
    // More than there is room for.
    let pages: Vec<Page> = (0..40).map(filled).collect();
    let batch: Vec<(PageTag, &Page)> = (100..140).map(tag).zip(&pages).collect();
    assert!(owner.deposit_many(&batch, Lsn(0)).expect("room") >= 3);
    for block in 100..140 {
        let found = read(&shared, block);
        assert!(found.is_none() || found == Some((block - 100) as u8), "{block}: {found:?}");
    }
    assert!(owner.stats().clean_bytes <= 8 * PAGE && read(&shared, 3) == Some(1));
}

#[test]
fn of_many_pages_older_versions_than_the_dropped_ones_are_refused() {
    let (owner, shared) = cache(1, 1, 16);
    shared.keep(&tag(0), &filled(1), Keep { lsn: 100, insert: 200, soft: false }).expect("room");
    owner.set_horizon(Lsn(300));
    shared.keep(&tag(1), &filled(1), Keep::FOR_EVER).expect("room");
    // Page 0 is clean now, and leaves for another.
    let page = filled(2);
    for block in 50..60 {
        owner.deposit_many(&[(tag(block), &page)], Lsn(300)).expect("deposit");
    }
    assert_eq!(read(&shared, 0), None);
    let batch = [(tag(0), &page), (tag(70), &page)];
    owner.deposit_many(&batch, Lsn(199)).expect("deposit");
    assert_eq!(read(&shared, 0), None, "asked for before the page was dropped");
    assert_eq!(owner.deposit_many(&batch[..1], Lsn(200)).expect("deposit"), 1);
    assert_eq!(read(&shared, 0), Some(2));
}

#[test]
fn pages_beyond_a_cut_are_refused_until_storage_has_seen_it() {
    let (owner, shared) = cache(8, 8, 16);
    owner.prefill_rel_size(REL, Some(10)).expect("room");
    shared.keep(&tag(7), &filled(1), Keep::FOR_EVER).expect("room");
    shared.cut_rel(&REL, 5, 1000).expect("exists");
    shared.discard_range(REL, 5, 10).expect("discards");
    assert_eq!(read(&shared, 7), None);
    shared.grow_rel(&REL, 10, 1001).expect("exists");
    assert_eq!(shared.deposit(&tag(7), &filled(2), 999), Ok(false));
    assert_eq!(shared.deposit(&tag(12), &filled(2), 2000), Ok(false));
    assert_eq!(shared.deposit(&tag(7), &filled(2), 1000), Ok(true));
    let state = shared.rel_state(&REL).expect("known").expect("known").expect("no reset");
    assert_eq!((state.blocks, state.trunc_to, state.trunc_lsn), (Some(10), 5, 1000));
    // A second cut before storage knows of the first: both count.
    shared.cut_rel(&REL, 8, 1100).expect("exists");
    let state = shared.rel_state(&REL).expect("known").expect("known").expect("no reset");
    assert_eq!((state.blocks, state.trunc_to, state.trunc_lsn), (Some(8), 5, 1100));
}

#[test]
fn forks_that_storage_can_tell_of_make_way_for_others() {
    let (owner, shared) = cache(4, 4, 8);
    let rel = |number| RelTag { rel: number, ..REL };
    for number in 0..100 {
        owner.prefill_rel_size(rel(number), Some(number)).expect("unchanged ones make way");
    }
    for number in 200..208 {
        assert_eq!(shared.create_rel(&rel(number), 50), Ok(true));
    }
    assert_eq!(shared.create_rel(&rel(300), 50), Err(Errno(libc::ENOSPC)));
    shared.remove_rel(&rel(200), 60).expect("exists");
    assert_eq!(shared.create_rel(&rel(300), 50), Err(Errno(libc::ENOSPC)), "storage has not seen the removal");
    owner.set_shipped(Lsn(60));
    assert_eq!(shared.create_rel(&rel(300), 70), Ok(true));
    assert!(shared.rel_state(&rel(200)).expect("answers").is_none());
}

#[test]
fn an_unlogged_relation_waits_for_its_reset() {
    let (owner, shared) = cache(4, 4, 16);
    owner.set_unlogged(&[REL.with_fork(ForkNumber::Init)]).expect("room");
    assert!(shared.rel_state(&REL).expect("answers").expect("known").is_err());
    shared.finish_reset(&REL, 3).expect("exists");
    shared.finish_reset(&REL, 9).expect("a late one changes nothing");
    let state = shared.rel_state(&REL).expect("answers").expect("known").expect("reset");
    assert_eq!((state.blocks, state.unlogged), (Some(3), true));
    let fsm = REL.with_fork(ForkNumber::Fsm);
    shared.create_rel(&fsm, 5).expect("room");
    assert!(shared.rel_state(&fsm).expect("answers").expect("known").expect("reset").unlogged);
}

#[test]
fn many_at_once_neither_tear_pages_nor_lose_slots() {
    let (owner, shared) = cache(16, 48, 16);
    owner.set_horizon(Lsn(1000));
    let threads: Vec<_> = (0..4u32)
        .map(|thread| {
            let shared = shared.clone();
            std::thread::spawn(move || {
                for round in 0..3000u32 {
                    let block = (round * 7 + thread * 13) % 80;
                    let keep = Keep { lsn: 10, insert: 10, soft: false };
                    match round % 4 {
                        0 => shared.keep(&tag(block), &filled(thread as u8 + 1), keep).expect("room can be made"),
                        1 => assert!(shared.deposit(&tag(block), &filled(9), 2000).is_ok()),
                        2 => assert!(read(&shared, block).is_none_or(|byte| byte > 0)),
                        _ => shared.discard(&tag(block)).expect("discards"),
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    let cached = (0..80).filter(|block| read(&shared, *block).is_some()).count() as u64;
    let stats = owner.stats();
    assert_eq!(stats.clean_bytes + stats.kept_bytes, cached * PAGE);
    (0..80).for_each(|block| shared.discard(&tag(block)).expect("discards"));
    assert_eq!((owner.stats().clean_bytes, owner.stats().kept_bytes), (0, 0));
    for block in 0..48 {
        shared.keep(&tag(block), &filled(1), Keep::FOR_EVER).expect("all slots are there again");
    }
}

#[test]
fn slots_and_entries_beyond_the_first_chunks_are_given_storage() {
    use crate::layout::{REL_CHUNK, SLOT_CHUNK};
    let (pages, rels) = (SLOT_CHUNK + 100, REL_CHUNK + 100);
    let (owner, shared) = cache(u64::from(pages), 1, rels);
    for block in 0..pages {
        owner.prefill_page(tag(block), &filled(block as u8)).expect("room");
    }
    assert!((0..pages).all(|block| read(&shared, block) == Some(block as u8)));
    let rel = |number| RelTag { rel: number, ..REL };
    for number in 0..rels {
        assert_eq!(shared.create_rel(&rel(number), 50), Ok(true));
    }
    assert_eq!(owner.stats().rels, u64::from(rels));
    assert!((0..rels).all(|number| shared.rel_state(&rel(number)).expect("answers").is_some()));
}

#[test]
fn several_at_the_end_of_a_chunk_all_find_room() {
    let rels = 3 * crate::layout::REL_CHUNK;
    let (owner, shared) = cache(1, 1, rels);
    let threads: Vec<_> = (0..4u32)
        .map(|thread| {
            let shared = shared.clone();
            std::thread::spawn(move || {
                for number in 0..rels / 4 {
                    let rel = RelTag { rel: number * 4 + thread, ..REL };
                    assert_eq!(shared.create_rel(&rel, 50), Ok(true));
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    assert_eq!(owner.stats().rels, u64::from(rels));
}

#[test]
fn a_page_that_was_damaged_on_disk_is_never_read() {
    let (owner, shared, file) = cache_with_file(4, 8);
    let told_by_wal = Keep { lsn: 100, insert: 200, soft: false };
    owner.prefill_page(tag(1), &filled(1)).expect("room");
    shared.keep(&tag(2), &filled(2), told_by_wal).expect("room");
    shared.keep(&tag(3), &filled(3), Keep::FOR_EVER).expect("room");
    shared.keep(&tag(4), &filled(4), Keep { soft: true, ..told_by_wal }).expect("room");
    owner.set_horizon(Lsn(99));
    flip_a_bit_of_each_page(&file);

    assert_eq!(read(&shared, 1), None, "storage is asked again");
    let mut page = filled(0);
    for block in [2, 3] {
        assert_eq!(shared.read(&tag(block), &mut page), Err(Errno(libc::EIO)), "nobody else has block {block}");
    }
    owner.set_horizon(Lsn(200));
    assert_eq!((read(&shared, 2), read(&shared, 4)), (None, None), "by now WAL describes them");
    assert_eq!(shared.read(&tag(3), &mut page), Err(Errno(libc::EIO)));
    assert!(!shared.deposit(&tag(2), &filled(9), 199).expect("readable"), "an older version is refused");
    assert!(shared.deposit(&tag(2), &filled(5), 200).expect("room"));
    shared.keep(&tag(3), &filled(6), Keep::FOR_EVER).expect("written anew");
    assert_eq!((read(&shared, 2), read(&shared, 3)), (Some(5), Some(6)));
    assert_eq!(owner.stats().damaged_pages, 6);
    assert_eq!((owner.stats().clean_bytes, owner.stats().kept_bytes), (PAGE, PAGE));
}

fn flip_a_bit_of_each_page(file: &std::fs::File) {
    use std::os::unix::fs::FileExt;
    for slot in 0..file.metadata().expect("file").len() / PAGE {
        let mut byte = [0];
        file.read_exact_at(&mut byte, slot * PAGE + 4321).expect("read");
        file.write_all_at(&[byte[0] ^ 0x10], slot * PAGE + 4321).expect("write");
    }
}

#[test]
fn the_bound_of_clean_pages_moves_while_the_cache_is_used() {
    use std::os::unix::fs::MetadataExt;
    let (owner, shared, file) = cache_with_file(64, 8);
    (0..64).for_each(|block| owner.prefill_page(tag(block), &filled(1)).expect("room"));
    let full = file.metadata().expect("file").blocks();
    owner.set_clean_bytes(8 * PAGE);
    assert_eq!(owner.trim().expect("trimmed"), 56);
    assert_eq!(owner.stats().clean_bytes, 8 * PAGE);
    assert!(file.metadata().expect("file").blocks() < full / 2, "the room is given back");
    (100..164).for_each(|block| owner.prefill_page(tag(block), &filled(2)).expect("makes way"));
    assert_eq!(owner.stats().clean_bytes, 8 * PAGE);
    owner.set_clean_bytes(1 << 40);
    (200..500).for_each(|block| owner.prefill_page(tag(block), &filled(3)).expect("room"));
    assert_eq!(owner.stats().clean_bytes, 4 * 64 * PAGE, "four times as many as at first, never more");
    assert_eq!((300..500).filter(|block| read(&shared, *block) == Some(3)).count(), 200);
}

#[test]
fn what_need_not_be_kept_is_let_go_without_need() {
    let (owner, shared) = cache(2, 64, 16);
    let keep = Keep { lsn: 100, insert: 200, soft: false };
    (0..40).for_each(|block| shared.keep(&tag(block), &filled(1), keep).expect("room"));
    shared.keep(&tag(50), &filled(2), Keep::FOR_EVER).expect("room");
    shared.keep(&tag(51), &filled(3), Keep { soft: true, ..keep }).expect("room");
    owner.set_horizon(Lsn(99));
    assert_eq!(owner.trim().expect("trimmed"), 0);
    assert_eq!(owner.stats().kept_bytes, 42 * PAGE);
    owner.set_horizon(Lsn(200));
    assert_eq!(owner.trim().expect("trimmed"), 38);
    assert_eq!((owner.stats().clean_bytes, owner.stats().kept_bytes), (2 * PAGE, 2 * PAGE));
    assert_eq!((read(&shared, 50), read(&shared, 51)), (Some(2), Some(3)));
}
