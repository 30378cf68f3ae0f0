//! WAL bytes in, whole records out.

use bytes::{Buf, BytesMut};
use types::{Lsn, WAL_SEGMENT_BYTES, XLOG_PAGE_BYTES};

use crate::{
    decode::{decode_into, decode_record},
    record::DecodedRecord,
    v15::{
        rmgr,
        wal::{
            LongPageHeader, MAX_RECORD_BYTES, PageHeader, RECORD_HEADER_BYTES, RecordHeader, page_header_bytes,
            record_crc, xlp,
        },
        xlog,
    },
};

/// Finds the records in a run of WAL bytes. Pure: it is fed bytes and polled for records.
///
/// Contract: `new` with a position between two records, or `at_page` with any page's start, then `feed` bytes that continue at [`fed_until`](Self::fed_until),
/// and poll until `None` before feeding more (what is fed and not yet polled is buffered). An error stays until
/// [`rewind`](Self::rewind); `rewind` also serves a reader of a file that is still being written: it reads again from
/// [`position`](Self::position).
#[derive(Clone, Debug)]
pub struct WalStreamDecoder {
    /// End of the last whole record.
    position: Lsn,
    /// Start of the last whole record, which the next must name as its predecessor.
    last_record: Option<Lsn>,
    /// Bytes not yet looked at.
    buffer: BytesMut,
    /// Where `buffer` starts.
    buffer_at: Lsn,
    /// The next byte to look at, at or behind `buffer_at` (ahead of it by padding or by what a switch record skips).
    cursor: Lsn,
    partial: Option<Partial>,
    /// What there is of `partial`; of a record that lay whole on one page and in the buffer nothing is collected.
    collected: Vec<u8>,
    /// A page that may start inside a record whose beginning was never fed.
    joins_at: Option<Lsn>,
    failed: Option<WalDecodeError>,
}

/// Why no more records can be had from these bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalDecodeError {
    /// Zeroes where a record (or the page that continues one) should start: nothing has been written there yet.
    #[error("WAL ends at {at}")]
    EndOfWal {
        /// The place that holds zeroes.
        at: Lsn,
    },
    /// The record at this place is damaged, or not wholly written yet.
    #[error("WAL record at {at} has a wrong checksum")]
    BadCrc {
        /// Start of the record.
        at: Lsn,
    },
    /// No WAL of this branch can look like this.
    #[error("invalid WAL at {at}: {reason}")]
    Invalid {
        /// Start of the record or page.
        at: Lsn,
        /// What is wrong.
        reason: String,
    },
}

/// Why [`WalStreamDecoder::feed_each`] ended early.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForEachError<E> {
    /// No more records can be had.
    #[error(transparent)]
    Decode(#[from] WalDecodeError),
    /// The caller failed on a record.
    #[error("{0}")]
    Stopped(E),
}

/// A record whose bytes are being collected.
#[derive(Clone, Debug)]
struct Partial {
    start: Lsn,
    total: usize,
    header_checked: bool,
    /// It is the rest of a record that began before [`WalStreamDecoder::at_page`].
    is_rest: bool,
}

/// A whole record of good checksum.
struct Whole {
    start: Lsn,
    /// Behind it, padding and what a switch skips included.
    end: Lsn,
    /// Its length, when it stands at the buffer's start; else it has been collected.
    in_buffer: Option<usize>,
}

/// More than this is given back after a long record.
const COLLECTED_KEEP_BYTES: usize = 1 << 20;

/// How one step of the decoder ended.
enum Step {
    /// More can be done with what is buffered.
    Again,
    NeedBytes,
    Record(Whole),
}

impl WalStreamDecoder {
    /// A decoder that starts at `start`: the end of a whole record, or a place where a record may start (a branch's start).
    pub fn new(start: Lsn) -> Self {
        WalStreamDecoder {
            position: start.align_up(),
            last_record: None,
            buffer: BytesMut::new(),
            buffer_at: start,
            cursor: start.align_up(),
            partial: None,
            collected: Vec::new(),
            joins_at: None,
            failed: None,
        }
    }

    /// A decoder that starts at the start of a page. The rest of a record that began before is passed over, unchecked.
    pub fn at_page(page: Lsn) -> Self {
        WalStreamDecoder { joins_at: Some(page), ..WalStreamDecoder::new(page) }
    }

    /// Adds bytes, which must continue at [`fed_until`](Self::fed_until); if not, the next poll is an error.
    pub fn feed(&mut self, at: Lsn, bytes: &[u8]) {
        if at != self.fed_until() {
            let reason = format!("bytes fed for {at} where {} was due", self.fed_until());
            self.failed.get_or_insert(WalDecodeError::Invalid { at: self.position, reason });
        }
        if self.failed.is_some() {
            return;
        }
        self.skip_to_cursor();
        let gap = self.cursor.0 - self.buffer_at.0;
        if gap > 0 {
            // The buffer is empty here: the bytes up to the cursor are of no interest.
            let skipped = gap.min(bytes.len() as u64);
            self.buffer_at += skipped;
            self.buffer.extend_from_slice(&bytes[skipped as usize..]);
        } else {
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// The next whole record, which borrows the decoder's bytes. `None`: more bytes are needed. An error is final until
    /// [`rewind`](Self::rewind).
    pub fn poll_record(&mut self) -> Result<Option<DecodedRecord<'_>>, WalDecodeError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let whole = loop {
            self.skip_to_cursor();
            match self.step() {
                Ok(Step::Again) => {}
                Ok(Step::NeedBytes) => return Ok(None),
                Ok(Step::Record(whole)) => break whole,
                Err(error) => {
                    self.failed = Some(error.clone());
                    return Err(error);
                }
            }
        };
        let raw = match whole.in_buffer {
            Some(total) => &self.buffer[..total],
            None => &self.collected[..],
        };
        match decode_record(whole.start, whole.end, raw) {
            Ok(record) => {
                self.cursor = whole.end;
                self.position = whole.end;
                self.last_record = Some(whole.start);
                Ok(Some(record))
            }
            Err(reason) => {
                let error = WalDecodeError::Invalid { at: whole.start, reason };
                self.failed = Some(error.clone());
                Err(error)
            }
        }
    }

    /// [`feed`](Self::feed) and [`poll_record`](Self::poll_record) until there are no more, in less than half the time for short
    /// records: those that lie whole in `bytes` are not copied. After an error, the bytes from [`fed_until`](Self::fed_until) on
    /// have not been looked at. A record on which `f` fails counts as taken.
    pub fn feed_each<E>(
        &mut self,
        at: Lsn,
        bytes: &[u8],
        mut f: impl FnMut(&DecodedRecord<'_>) -> Result<(), E>,
    ) -> Result<(), ForEachError<E>> {
        let (mut rest_at, mut rest) = (at, bytes);
        loop {
            if rest_at == self.fed_until() {
                self.take_ordinary(rest, &mut f).map_err(ForEachError::Stopped)?;
                rest = &rest[(self.fed_until().0 - rest_at.0) as usize..];
                rest_at = self.fed_until();
            }
            let (piece, others) = rest.split_at(self.until_ordinary(rest_at, rest));
            self.feed(rest_at, piece);
            rest = others;
            rest_at += piece.len() as u64;
            while let Some(record) = self.poll_record()? {
                f(&record).map_err(ForEachError::Stopped)?;
            }
            if rest.is_empty() {
                return Ok(());
            }
        }
    }

    /// How many of these bytes [`take_ordinary`](Self::take_ordinary) can't have: those of a record that is being collected, of
    /// a page's header and the record that it continues, or the page's rest.
    fn until_ordinary(&self, at: Lsn, bytes: &[u8]) -> usize {
        let header = PageHeader::from_prefix(bytes).filter(|_| at.page_offset() == 0);
        let on_page = (XLOG_PAGE_BYTES - at.page_offset()) as usize;
        let wanted = header.map_or(on_page, |header| {
            let continued = Lsn(header.xlp_rem_len.into()).align_up().0 as usize;
            (page_header_bytes(at) + continued).min(on_page)
        });
        wanted.min(bytes.len())
    }

    /// Takes the ordinary records that lie whole in these bytes, which continue at [`fed_until`](Self::fed_until), on the page at
    /// the cursor; bytes that were taken count as fed. What is not ordinary is left for `poll_record`.
    fn take_ordinary<E>(
        &mut self,
        bytes: &[u8],
        f: &mut impl FnMut(&DecodedRecord<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.partial.is_some() || self.failed.is_some() || self.cursor.page_offset() == 0 {
            return Ok(());
        }
        self.skip_to_cursor();
        if !self.buffer.is_empty() {
            return Ok(());
        }
        let bytes_at = self.buffer_at;
        let bytes_end = bytes_at + bytes.len() as u64;
        let page_end = self.cursor.0 - self.cursor.page_offset() + XLOG_PAGE_BYTES;
        let page = &bytes[..bytes.len().min((page_end - bytes_at.0) as usize)];
        let mut record = DecodedRecord::blank();
        loop {
            self.buffer_at = self.cursor.min(bytes_end);
            let start = self.cursor;
            let rest = page.get((start.0 - bytes_at.0) as usize..).unwrap_or_default();
            let Some(header) = RecordHeader::from_prefix(rest) else { return Ok(()) };
            let Some(raw) = rest.get(..header.xl_tot_len as usize) else { return Ok(()) };
            let end = (start + raw.len() as u64).align_up();
            let is_ordinary = self.last_record == Some(Lsn(header.xl_prev))
                && header.xl_rmid != rmgr::XLOG.0
                && rmgr::is_valid(header.xl_rmid)
                && header.xl_crc == record_crc(raw);
            if !is_ordinary || decode_into(&mut record, start, end, raw).is_err() {
                return Ok(());
            }
            self.cursor = end;
            self.position = end;
            self.last_record = Some(start);
            if let Err(error) = f(&record) {
                self.buffer_at = end.min(bytes_end);
                return Err(error);
            }
        }
    }

    /// End of the last whole record (`EndRecPtr`), or the start when there was none. After a segment switch it may be
    /// ahead of [`fed_until`](Self::fed_until): the rest of the segment holds no records.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Where the next bytes to feed start.
    pub fn fed_until(&self) -> Lsn {
        self.buffer_at + self.buffer.len() as u64
    }

    /// Start of the last whole record: what a record written at [`position`](Self::position) names as its predecessor.
    /// `None` when there was none yet.
    pub fn last_record_start(&self) -> Option<Lsn> {
        self.last_record
    }

    /// Forgets an error and all bytes fed behind [`position`](Self::position); feeding goes on from there.
    pub fn rewind(&mut self) {
        self.buffer.clear();
        self.buffer_at = self.position;
        self.cursor = self.position;
        self.partial = None;
        self.collected.clear();
        self.failed = None;
    }

    /// Drops buffered bytes that lie before the cursor.
    fn skip_to_cursor(&mut self) {
        let skip = (self.cursor.0 - self.buffer_at.0).min(self.buffer.len() as u64);
        self.buffer.advance(skip as usize);
        self.buffer_at += skip;
    }

    fn step(&mut self) -> Result<Step, WalDecodeError> {
        if self.buffer.is_empty() {
            return Ok(Step::NeedBytes);
        }
        if self.cursor.page_offset() == 0 {
            return self.page_header();
        }
        let Some(partial) = &mut self.partial else { return self.begin_record() };
        let on_page = (XLOG_PAGE_BYTES - self.cursor.page_offset()) as usize;
        let taken = on_page.min(partial.total - self.collected.len()).min(self.buffer.len());
        self.collected.extend_from_slice(&self.buffer[..taken]);
        self.cursor += taken as u64;
        if !partial.header_checked && self.collected.len() >= RECORD_HEADER_BYTES {
            check_record_header(partial.start, &self.collected, self.last_record)?;
            partial.header_checked = true;
        }
        if self.collected.len() < partial.total {
            return Ok(Step::Again);
        }
        let (start, end, is_rest) = (partial.start, self.cursor, partial.is_rest);
        self.partial = None;
        if is_rest {
            self.cursor = end.align_up();
            self.position = self.cursor;
            return Ok(Step::Again);
        }
        finish_record(start, end, &self.collected, None)
    }

    /// Passes the header of the page at the cursor, between records or inside one.
    fn page_header(&mut self) -> Result<Step, WalDecodeError> {
        let at = self.cursor;
        let length = page_header_bytes(at);
        if self.buffer.len() < length {
            return Ok(Step::NeedBytes);
        }
        let bytes = &self.buffer[..length];
        if bytes.iter().all(|byte| *byte == 0) {
            return Err(WalDecodeError::EndOfWal { at });
        }
        let invalid = |reason: String| WalDecodeError::Invalid { at, reason };
        let header = check_page_header(at, bytes).map_err(invalid)?;
        let continues = header.xlp_info & xlp::FIRST_IS_CONTRECORD != 0;
        if header.xlp_info & xlp::FIRST_IS_OVERWRITE_CONTRECORD != 0 {
            // A recovery gave up the record that was begun before this page.
            self.partial = None;
        } else if let Some(partial) = &self.partial {
            let left = partial.total - self.collected.len();
            if !continues || header.xlp_rem_len as usize != left {
                let remaining = header.xlp_rem_len;
                return Err(invalid(format!("the page continues {remaining} bytes of a record that lacks {left}")));
            }
        }
        if self.partial.is_none() && continues {
            if self.joins_at != Some(at) {
                return Err(invalid("the page starts inside a record".to_owned()));
            }
            let total = header.xlp_rem_len as usize;
            self.collected.clear();
            self.partial = Some(Partial { start: at, total, header_checked: true, is_rest: true });
        }
        self.cursor += length as u64;
        Ok(Step::Again)
    }

    fn begin_record(&mut self) -> Result<Step, WalDecodeError> {
        let at = self.cursor;
        // Records start on multiples of 8, so that the length is never split between pages.
        let Some(total) = self.buffer.first_chunk().map(|length| u32::from_le_bytes(*length)) else {
            return Ok(Step::NeedBytes);
        };
        if total == 0 {
            return Err(WalDecodeError::EndOfWal { at });
        }
        let total = total as usize;
        if !(RECORD_HEADER_BYTES..=MAX_RECORD_BYTES).contains(&total) {
            return Err(WalDecodeError::Invalid { at, reason: format!("record length {total}") });
        }
        let on_page = (XLOG_PAGE_BYTES - at.page_offset()) as usize;
        if total <= on_page {
            if self.buffer.len() >= RECORD_HEADER_BYTES {
                check_record_header(at, &self.buffer, self.last_record)?;
            }
            if self.buffer.len() < total {
                return Ok(Step::NeedBytes);
            }
            return finish_record(at, at + total as u64, &self.buffer[..total], Some(total));
        }
        // A length is believed only as far as its bytes have come.
        self.collected.clear();
        self.collected.shrink_to(COLLECTED_KEEP_BYTES);
        self.partial = Some(Partial { start: at, total, header_checked: false, is_rest: false });
        Ok(Step::Again)
    }
}

/// Checks the checksum of the whole record at `start` and finds what follows it; its last byte is just before `end`.
fn finish_record(start: Lsn, end: Lsn, raw: &[u8], in_buffer: Option<usize>) -> Result<Step, WalDecodeError> {
    let header = RecordHeader::from_prefix(raw);
    if header.is_none_or(|header| header.xl_crc != record_crc(raw)) {
        return Err(WalDecodeError::BadCrc { at: start });
    }
    let mut end = end.align_up();
    let switches = header.is_some_and(|header| header.xl_rmid == rmgr::XLOG.0 && header.xl_info & 0xF0 == xlog::SWITCH);
    if switches && end.segment_offset() != 0 {
        end = end.segment_start() + WAL_SEGMENT_BYTES;
    }
    Ok(Step::Record(Whole { start, end, in_buffer }))
}

/// `XLogReaderValidatePageHeader`, for segments of 16 MiB.
fn check_page_header(at: Lsn, bytes: &[u8]) -> Result<PageHeader, String> {
    let header = PageHeader::from_prefix(bytes).ok_or("page header cut short")?;
    if header.xlp_magic != xlp::MAGIC {
        return Err(format!("WAL page magic {:04X}, not {:04X} of PostgreSQL 15", { header.xlp_magic }, xlp::MAGIC));
    }
    if header.xlp_info & !xlp::ALL_FLAGS != 0 {
        return Err(format!("WAL page flags {:#06x}", { header.xlp_info }));
    }
    if header.xlp_pageaddr != at.0 {
        return Err(format!("WAL page says it is {}", Lsn(header.xlp_pageaddr)));
    }
    let is_long = header.xlp_info & xlp::LONG_HEADER != 0;
    if is_long != (at.segment_offset() == 0) {
        return Err("long WAL page header elsewhere than at a segment's start, or missing there".to_owned());
    }
    if is_long {
        let long = LongPageHeader::from_prefix(bytes).ok_or("long page header cut short")?;
        if u64::from(long.xlp_seg_size) != WAL_SEGMENT_BYTES || u64::from(long.xlp_xlog_blcksz) != XLOG_PAGE_BYTES {
            return Err("WAL segment or page of another size".to_owned());
        }
    }
    Ok(header)
}

/// `ValidXLogRecordHeader`.
fn check_record_header(at: Lsn, raw: &[u8], last_record: Option<Lsn>) -> Result<(), WalDecodeError> {
    let invalid = |reason: String| WalDecodeError::Invalid { at, reason };
    let header = RecordHeader::from_prefix(raw).ok_or_else(|| invalid("record header cut short".to_owned()))?;
    if !rmgr::is_valid(header.xl_rmid) {
        return Err(invalid(format!("resource manager {}", header.xl_rmid)));
    }
    let prev = Lsn(header.xl_prev);
    let good = last_record.map_or(prev < at, |last| prev == last);
    if good { Ok(()) } else { Err(invalid(format!("the record before it is {last_record:?}, not {prev}"))) }
}
