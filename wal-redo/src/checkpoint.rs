//! The counters of the `CheckPoint` struct, advanced record by record as recovery would (`xlog_redo`, `xact_redo` and others).

use wal::{
    CheckPoint, DecodedRecord,
    v15::{
        rmgr,
        state::{
            ClogTruncate, CommitTsTruncate, MultiXactCreate, MultiXactTruncate, ParameterChange, RunningXacts, clog,
            commit_ts, multixact, standby,
        },
        xact::{self, ParsedEnd, info},
        xlog,
    },
};

use crate::slru::tracks_commit_ts;

/// `FirstNormalTransactionId`: lower ids are special and never handed out.
const FIRST_NORMAL_XID: u32 = 3;

/// Brings the counters past a record. True when any of them changed. `redo` and the timelines are left alone: they belong to
/// whoever writes the next checkpoint. Malformed records change nothing here: [`crate::changes`] refuses them.
#[inline]
pub fn advance(checkpoint: &mut CheckPoint, record: &DecodedRecord<'_>) -> bool {
    let next_xid = checkpoint.next_xid;
    pass_xid(checkpoint, record.xid);
    let passed = checkpoint.next_xid != next_xid;
    match record.rmgr {
        rmgr::XLOG | rmgr::XACT | rmgr::MULTIXACT | rmgr::CLOG | rmgr::COMMIT_TS | rmgr::STANDBY => {
            advance_others(checkpoint, record) || passed
        }
        _no_counters => passed,
    }
}

/// The counters that are in the record's data.
fn advance_others(checkpoint: &mut CheckPoint, record: &DecodedRecord<'_>) -> bool {
    let before = *checkpoint;
    match record.rmgr {
        rmgr::XLOG => advance_xlog(checkpoint, record),
        rmgr::XACT => advance_xact(checkpoint, record),
        rmgr::MULTIXACT => advance_multixact(checkpoint, record),
        rmgr::CLOG if record.rmgr_info() == clog::TRUNCATE => {
            if let Some(truncate) = ClogTruncate::from_prefix(record.main_data) {
                raise_oldest_xid(checkpoint, truncate.oldest_xact, truncate.oldest_xact_db);
            }
        }
        rmgr::COMMIT_TS if record.rmgr_info() == commit_ts::TRUNCATE => {
            if let Some(truncate) = CommitTsTruncate::from_prefix(record.main_data)
                && tracks_commit_ts(checkpoint)
                && xid_precedes(checkpoint.oldest_commit_ts_xid, truncate.oldest_xid)
            {
                checkpoint.oldest_commit_ts_xid = truncate.oldest_xid;
            }
        }
        rmgr::STANDBY if record.rmgr_info() == standby::RUNNING_XACTS => {
            if let Some(running) = RunningXacts::from_prefix(record.main_data) {
                pass_xid(checkpoint, xid_before(running.next_xid));
            }
        }
        _no_counters => {}
    }
    before != *checkpoint
}

fn advance_xlog(checkpoint: &mut CheckPoint, record: &DecodedRecord<'_>) {
    let data = record.main_data;
    match record.rmgr_info() {
        xlog::CHECKPOINT_SHUTDOWN => {
            // Nothing ran while it was written: its counters are exact.
            if let Some(written) = CheckPoint::from_prefix(data) {
                let CheckPoint { redo, this_timeline, prev_timeline, .. } = *checkpoint;
                *checkpoint = CheckPoint { redo, this_timeline, prev_timeline, ..written };
            }
        }
        xlog::CHECKPOINT_ONLINE => {
            if let Some(written) = CheckPoint::from_prefix(data) {
                advance_online(checkpoint, &written);
            }
        }
        xlog::NEXTOID => {
            // Believed as it is: the counter may have wrapped around.
            if let Some(oid) = data.first_chunk() {
                checkpoint.next_oid = u32::from_le_bytes(*oid);
            }
        }
        xlog::FPW_CHANGE => {
            if let Some(on) = data.first() {
                checkpoint.full_page_writes = u8::from(*on != 0);
            }
        }
        xlog::PARAMETER_CHANGE => {
            if let Some(change) = ParameterChange::from_prefix(data) {
                switch_commit_ts(checkpoint, change.track_commit_timestamp != 0);
            }
        }
        _no_counters => {}
    }
}

/// The counters of an online checkpoint were taken when it began: they are minimums, and the OID is not looked at.
fn advance_online(checkpoint: &mut CheckPoint, written: &CheckPoint) {
    checkpoint.next_xid = checkpoint.next_xid.max(written.next_xid);
    raise_next_multi(checkpoint, written.next_multi, written.next_multi_offset);
    raise_oldest_multi(checkpoint, written.oldest_multi, written.oldest_multi_db);
    raise_oldest_xid(checkpoint, written.oldest_xid, written.oldest_xid_db);
    checkpoint.time = written.time;
    checkpoint.full_page_writes = written.full_page_writes;
    if !tracks_commit_ts(checkpoint) {
        checkpoint.oldest_commit_ts_xid = written.oldest_commit_ts_xid;
        checkpoint.newest_commit_ts_xid = written.newest_commit_ts_xid;
    }
}

fn advance_xact(checkpoint: &mut CheckPoint, record: &DecodedRecord<'_>) {
    match record.info & info::OPMASK {
        info::ASSIGNMENT => {
            // The top transaction, a count, the subtransactions.
            let xids = record.main_data.chunks_exact(4).enumerate().filter(|(index, _)| *index != 1);
            for (_, xid) in xids {
                pass_xid(checkpoint, u32::from_le_bytes([xid[0], xid[1], xid[2], xid[3]]));
            }
        }
        info::PREPARE => {
            if let Ok(Some(prepare)) = xact::parse_prepare(record) {
                pass_xid(checkpoint, prepare.xid);
                prepare.subxacts.iter().for_each(|xid| pass_xid(checkpoint, *xid));
            }
        }
        _end_or_nothing => {
            if let Ok(Some(end)) = xact::parse_end(record) {
                pass_xid(checkpoint, end.xid);
                end.subxacts.iter().for_each(|xid| pass_xid(checkpoint, *xid));
                raise_newest_commit_ts(checkpoint, &end);
            }
        }
    }
}

fn raise_newest_commit_ts(checkpoint: &mut CheckPoint, end: &ParsedEnd) {
    let newest = end.subxacts.last().copied().unwrap_or(end.xid);
    if end.committed && tracks_commit_ts(checkpoint) && xid_precedes(checkpoint.newest_commit_ts_xid, newest) {
        checkpoint.newest_commit_ts_xid = newest;
    }
}

fn advance_multixact(checkpoint: &mut CheckPoint, record: &DecodedRecord<'_>) {
    match record.rmgr_info() {
        multixact::CREATE_ID => {
            if let Some((create, members)) = MultiXactCreate::members(record.main_data) {
                let next_offset = create.moff.wrapping_add(create.nmembers);
                raise_next_multi(checkpoint, create.mid.wrapping_add(1), next_offset);
                members.iter().for_each(|member| pass_xid(checkpoint, member.xid));
            }
        }
        multixact::TRUNCATE_ID => {
            if let Some(truncate) = MultiXactTruncate::from_prefix(record.main_data) {
                raise_oldest_multi(checkpoint, truncate.end_trunc_off, truncate.oldest_multi_db);
            }
        }
        _zero_page => {}
    }
}

/// Makes `next_xid` come after this xid (`AdvanceNextFullTransactionIdPastXid`). Ids in WAL have 32 bits; none is half the range away
/// from the next one, so a lower number than the next one's that follows it belongs to the next epoch.
#[inline]
fn pass_xid(checkpoint: &mut CheckPoint, xid: u32) {
    let next = checkpoint.next_xid as u32;
    if xid < FIRST_NORMAL_XID || xid_precedes(xid, next) {
        return;
    }
    let after = xid.wrapping_add(1).max(FIRST_NORMAL_XID);
    let epoch = (checkpoint.next_xid >> 32) + u64::from(after < next);
    checkpoint.next_xid = epoch << 32 | u64::from(after);
}

/// `ActivateCommitTs`, `DeactivateCommitTs`.
fn switch_commit_ts(checkpoint: &mut CheckPoint, on: bool) {
    if !on {
        checkpoint.oldest_commit_ts_xid = 0;
        checkpoint.newest_commit_ts_xid = 0;
    } else if !tracks_commit_ts(checkpoint) {
        checkpoint.oldest_commit_ts_xid = checkpoint.next_xid as u32;
        checkpoint.newest_commit_ts_xid = checkpoint.next_xid as u32;
    }
}

fn raise_oldest_xid(checkpoint: &mut CheckPoint, oldest: u32, db: u32) {
    if xid_precedes(checkpoint.oldest_xid, oldest) {
        checkpoint.oldest_xid = oldest;
        checkpoint.oldest_xid_db = db;
    }
}

fn raise_oldest_multi(checkpoint: &mut CheckPoint, oldest: u32, db: u32) {
    if circular_precedes(checkpoint.oldest_multi, oldest) {
        checkpoint.oldest_multi = oldest;
        checkpoint.oldest_multi_db = db;
    }
}

fn raise_next_multi(checkpoint: &mut CheckPoint, multi: u32, offset: u32) {
    if circular_precedes(checkpoint.next_multi, multi) {
        checkpoint.next_multi = multi;
    }
    if circular_precedes(checkpoint.next_multi_offset, offset) {
        checkpoint.next_multi_offset = offset;
    }
}

fn xid_before(xid: u32) -> u32 {
    let before = xid.wrapping_sub(1);
    if before < FIRST_NORMAL_XID { u32::MAX } else { before }
}

/// `TransactionIdPrecedes`.
fn xid_precedes(left: u32, right: u32) -> bool {
    if left < FIRST_NORMAL_XID || right < FIRST_NORMAL_XID { left < right } else { circular_precedes(left, right) }
}

/// `MultiXactIdPrecedes`.
fn circular_precedes(left: u32, right: u32) -> bool {
    (left.wrapping_sub(right) as i32) < 0
}

#[cfg(test)]
mod tests;
