//! Frames on the socket. The messages are `pgwire`'s; that every length is looked at before anything is read or decoded is ours.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pgwire::{
    error::PgWireError,
    messages::{
        Message,
        data::{DataRow, FieldDescription, RowDescription},
        response::{CommandComplete, ReadyForQuery, TransactionStatus},
    },
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

use super::refusal::Refusal;

/// As Postgres has it (`MAX_STARTUP_PACKET_LENGTH`); a length counts itself.
const MAX_STARTUP_BYTES: usize = 10_000;
/// Commands, passwords and feedback are shorter.
const MAX_MESSAGE_BYTES: usize = 10_000;
const LENGTH_BYTES: usize = 4;
/// Read at once from a socket.
const READ_BYTES: usize = 8 * 1024;

/// A connection to a client, both ways.
pub(super) struct Wire<S> {
    pub reader: MessageReader<ReadHalf<S>>,
    pub writer: MessageWriter<WriteHalf<S>>,
}

/// What was wrong with a connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireFault {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Message(#[from] PgWireError),
    #[error("a message of {0} bytes")]
    Length(usize),
}

/// A message from a client: its type and all of it, as `pgwire` decodes it.
pub(super) struct Frame {
    pub kind: u8,
    pub bytes: BytesMut,
}

impl<S: AsyncRead + AsyncWrite> Wire<S> {
    pub fn new(stream: S) -> Wire<S> {
        let (read, write) = tokio::io::split(stream);
        let reader = MessageReader { read, buffer: BytesMut::new() };
        Wire { reader, writer: MessageWriter { write, buffer: BytesMut::new() } }
    }

    /// The socket again; `None` when the client has sent more than it may before it has an answer.
    pub fn into_stream(self) -> Option<S>
    where
        S: Unpin,
    {
        self.reader.buffer.is_empty().then(|| self.reader.read.unsplit(self.writer.write))
    }

    /// Says why the connection ends.
    pub async fn refuse_finally(&mut self, refusal: &Refusal) -> Result<(), WireFault> {
        self.writer.put(&refusal.response("FATAL"))?;
        self.writer.flush().await?;
        Ok(self.writer.write.shutdown().await?)
    }
}

pub(super) struct MessageReader<R> {
    read: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> MessageReader<R> {
    /// The next message without a type: a start-up packet or a request for encryption, length and all. `None`: the client has left.
    pub async fn startup(&mut self) -> Result<Option<BytesMut>, WireFault> {
        self.take(0, MAX_STARTUP_BYTES).await
    }

    /// The next message; `None`: the client has left. Cancel-safe.
    pub async fn message(&mut self) -> Result<Option<Frame>, WireFault> {
        let bytes = self.take(1, MAX_MESSAGE_BYTES).await?;
        Ok(bytes.map(|bytes| Frame { kind: bytes[0], bytes }))
    }

    async fn take(&mut self, type_bytes: usize, max_bytes: usize) -> Result<Option<BytesMut>, WireFault> {
        loop {
            if let Some(whole) = whole_message(&self.buffer, type_bytes, max_bytes)? {
                return Ok(Some(self.buffer.split_to(whole)));
            }
            self.buffer.reserve(READ_BYTES);
            if self.read.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }
}

/// Bytes of the message at the start of the buffer, once all of it is there.
fn whole_message(buffer: &[u8], type_bytes: usize, max_bytes: usize) -> Result<Option<usize>, WireFault> {
    let Some(length) = buffer.get(type_bytes..).and_then(|rest| rest.first_chunk::<LENGTH_BYTES>()) else {
        return Ok(None);
    };
    let length = u32::from_be_bytes(*length) as usize;
    if !(LENGTH_BYTES..=max_bytes).contains(&length) {
        return Err(WireFault::Length(length));
    }
    Ok(Some(type_bytes + length).filter(|whole| *whole <= buffer.len()))
}

impl Frame {
    /// What is behind type and length.
    pub fn body(mut self) -> Bytes {
        self.bytes.advance(1 + LENGTH_BYTES);
        self.bytes.freeze()
    }
}

pub(super) struct MessageWriter<W> {
    write: W,
    buffer: BytesMut,
}

impl<W: AsyncWrite + Unpin> MessageWriter<W> {
    /// Adds a message to what goes out with the next flush.
    pub fn put(&mut self, message: &impl Message) -> Result<(), WireFault> {
        Ok(message.encode(&mut self.buffer)?)
    }

    /// Adds a `CopyData` of these parts.
    pub fn put_copy_data(&mut self, parts: [&[u8]; 2]) {
        let length = LENGTH_BYTES + parts.iter().map(|part| part.len()).sum::<usize>();
        self.buffer.reserve(1 + length);
        self.buffer.put_u8(b'd');
        self.buffer.put_u32(length as u32);
        parts.iter().for_each(|part| self.buffer.put_slice(part));
    }

    /// Adds a single byte: an answer to a request for encryption.
    pub fn put_byte(&mut self, byte: u8) {
        self.buffer.put_u8(byte);
    }

    /// Adds a table of one row, all text, and the end of the command.
    pub fn put_row(&mut self, columns: &[(&str, Option<String>)], tag: &str) -> Result<(), WireFault> {
        const TEXT: u32 = 25;
        let field = |name: &str| FieldDescription::new(name.to_owned(), 0, 0, TEXT, -1, -1, 0);
        let mut row = BytesMut::new();
        for (_, value) in columns {
            row.put_i32(value.as_ref().map_or(-1, |value| value.len() as i32));
            row.put_slice(value.as_deref().unwrap_or_default().as_bytes());
        }
        self.put(&RowDescription::new(columns.iter().map(|(name, _)| field(name)).collect()))?;
        self.put(&DataRow::new(row, columns.len() as i16))?;
        self.put(&CommandComplete::new(tag.to_owned()))
    }

    /// Adds that the next command may come, and sends all.
    pub async fn ready(&mut self) -> Result<(), WireFault> {
        self.put(&ReadyForQuery::new(TransactionStatus::Idle))?;
        self.flush().await
    }

    /// Sends what was put. Not cancel-safe: a connection that was given up here is over.
    pub async fn flush(&mut self) -> Result<(), WireFault> {
        let sent = self.write.write_all_buf(&mut self.buffer).await;
        self.buffer.clear();
        sent?;
        Ok(self.write.flush().await?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lengths_are_bounded_before_anything_else() {
        let whole = |buffer: &[u8]| whole_message(buffer, 1, 100).ok();
        assert_eq!(whole(b""), Some(None));
        assert_eq!(whole(b"Q\0\0\0"), Some(None));
        assert_eq!(whole(b"Q\0\0\0\x06x"), Some(None));
        assert_eq!(whole(b"Q\0\0\0\x06x\0more"), Some(Some(7)));
        for bad in [0, 3, 101, u32::MAX] {
            assert_eq!(whole(&[b"Q", &bad.to_be_bytes()[..]].concat()), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(buffer: Vec<u8>, type_bytes in 0..2usize) {
            if let Ok(Some(whole)) = whole_message(&buffer, type_bytes, 1000) {
                prop_assert!(whole <= buffer.len() && whole >= 4);
            }
        }
    }
}
