//! Several layers read as one, in order, with little of each in memory.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use types::Lsn;

use super::{Layer, StoredBlock};
use crate::{error::StorageError, remote::Remote, storage::Key};

/// How much of a layer is read at a time.
const READ_BYTES: u64 = 512 << 10;

/// The entries of several layers, for a range of keys, in (key, LSN) order. Of entries that several layers have for the same
/// key and LSN, the one of the layer that was given first.
pub struct MergeStream {
    sources: Vec<Source>,
}

/// An entry as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// Under which key.
    pub key: Key,
    /// As of where.
    pub lsn: Lsn,
    /// [`Value`](crate::storage::Value), encoded.
    pub value: Bytes,
}

struct Source {
    layer: Arc<Layer>,
    last: Key,
    next_block: usize,
    blocks: VecDeque<StoredBlock>,
    /// Of the first block.
    entry: usize,
    head: Option<(Key, Lsn)>,
}

impl MergeStream {
    /// Over layers for the keys `first..=last`.
    pub async fn open(
        remote: &Remote,
        layers: impl IntoIterator<Item = Arc<Layer>>,
        first: Key,
        last: Key,
    ) -> Result<MergeStream, StorageError> {
        let mut sources = Vec::new();
        for layer in layers {
            if layer.meta.first_key <= last && layer.meta.last_key >= first {
                sources.push(Source::open(remote, layer, first, last).await?);
            }
        }
        Ok(MergeStream { sources })
    }

    /// The next entry; `None` at the end.
    pub async fn next(&mut self, remote: &Remote) -> Result<Option<Merged>, StorageError> {
        let Some((key, lsn)) = self.sources.iter().filter_map(|source| source.head).min() else { return Ok(None) };
        let mut value = None;
        for source in self.sources.iter_mut().filter(|source| source.head == Some((key, lsn))) {
            let own = source.take(remote).await?;
            value = value.or(own);
        }
        Ok(value.map(|value| Merged { key, lsn, value }))
    }

    /// The next block of a layer, whole, when nothing of another layer comes before the end of it and of the `run - 1` blocks
    /// that follow it. Goes on behind it.
    pub async fn next_block(&mut self, remote: &Remote, run: usize) -> Result<Option<StoredBlock>, StorageError> {
        let heads = || self.sources.iter().enumerate().filter_map(|(at, source)| Some((source.head?, at)));
        let Some((_, at)) = heads().min() else { return Ok(None) };
        let source = &self.sources[at];
        let run_end = source.blocks.get(run - 1).and_then(|block| block.block.last());
        let Some(end) = run_end.filter(|end| source.entry == 0 && end.0 <= source.last) else { return Ok(None) };
        if heads().any(|(head, other)| other != at && head <= end) {
            return Ok(None);
        }
        let source = &mut self.sources[at];
        let block = source.blocks.pop_front();
        source.load(remote).await?;
        Ok(block)
    }
}

impl Source {
    async fn open(remote: &Remote, layer: Arc<Layer>, first: Key, last: Key) -> Result<Source, StorageError> {
        let next_block = layer.first_block(remote, first).await?;
        let mut source = Source { layer, last, next_block, blocks: VecDeque::new(), entry: 0, head: None };
        source.load(remote).await?;
        while source.head.is_some_and(|(key, _)| key < first) {
            source.step(remote).await?;
        }
        Ok(source)
    }

    /// The value at the head; goes on to the next.
    async fn take(&mut self, remote: &Remote) -> Result<Option<Bytes>, StorageError> {
        let value = self.blocks.front().map(|block| block.block.encoded_value(self.entry));
        self.step(remote).await?;
        Ok(value)
    }

    async fn step(&mut self, remote: &Remote) -> Result<(), StorageError> {
        self.entry += 1;
        self.load(remote).await
    }

    /// Sets the head, from the next block where this one ends.
    async fn load(&mut self, remote: &Remote) -> Result<(), StorageError> {
        loop {
            match self.blocks.front() {
                Some(StoredBlock { block, .. }) if self.entry < block.len() => {
                    self.head = Some(block.position(self.entry)).filter(|(key, _)| *key <= self.last);
                    return Ok(());
                }
                Some(_) => {
                    self.blocks.pop_front();
                    self.entry = 0;
                }
                None => {
                    let more = self.layer.read_ahead(remote, self.next_block, self.last, READ_BYTES).await?;
                    if more.is_empty() {
                        self.head = None;
                        return Ok(());
                    }
                    self.next_block += more.len();
                    self.blocks = more.into();
                }
            }
        }
    }
}
