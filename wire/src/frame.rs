//! Frames: length (u32, little-endian), CRC32C of the body (u32, little-endian), body (postcard).

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest body that is sent or accepted.
pub const MAX_FRAME_BYTES: usize = 64 * 1024 * 1024;

/// Largest body of a message that is read before the peer has shown a good token; see [`FrameReader::recv_limited`].
pub const MAX_GREETING_BYTES: usize = 16 * 1024;

const HEADER_BYTES: usize = 8;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection failed or was closed inside a frame.
    #[error("connection: {0}")]
    Io(#[from] std::io::Error),
    /// The frame's length is over [`MAX_FRAME_BYTES`], or over the limit that was asked for.
    #[error("frame of {length} bytes is over the limit of {limit}")]
    TooLarge { length: usize, limit: usize },
    /// The body is not what was sent.
    #[error("frame checksum mismatch: expected {expected:08x}, got {actual:08x}")]
    Checksum { expected: u32, actual: u32 },
    /// The body is not the expected message.
    #[error("malformed message: {0}")]
    Malformed(#[from] postcard::Error),
}

/// Reads messages from a byte stream.
pub struct FrameReader<R> {
    inner: tokio::io::BufReader<R>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Buffers `inner`.
    pub fn new(inner: R) -> Self {
        Self { inner: tokio::io::BufReader::with_capacity(64 * 1024, inner) }
    }

    /// The next message; `None` when the peer closed between frames. Not cancel-safe.
    pub async fn recv<M: DeserializeOwned>(&mut self) -> Result<Option<M>, WireError> {
        self.recv_limited(MAX_FRAME_BYTES).await
    }

    /// The next message, refused when its body is larger than `max_bytes`: for peers that are not trusted yet. Not cancel-safe.
    pub async fn recv_limited<M: DeserializeOwned>(&mut self, max_bytes: usize) -> Result<Option<M>, WireError> {
        match self.recv_body_limited(max_bytes).await? {
            Some(body) => Ok(Some(postcard::from_bytes(&body)?)),
            None => Ok(None),
        }
    }

    /// The next body, checked but not decoded. Not cancel-safe.
    pub async fn recv_body(&mut self) -> Result<Option<Bytes>, WireError> {
        self.recv_body_limited(MAX_FRAME_BYTES).await
    }

    async fn recv_body_limited(&mut self, max_bytes: usize) -> Result<Option<Bytes>, WireError> {
        let limit = max_bytes.min(MAX_FRAME_BYTES);
        let mut header = [0u8; HEADER_BYTES];
        if self.inner.read(&mut header[..1]).await? == 0 {
            return Ok(None);
        }
        self.inner.read_exact(&mut header[1..]).await?;
        let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let expected = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        if length > limit {
            return Err(WireError::TooLarge { length, limit });
        }
        // Grown as bytes arrive: a hostile length alone reserves nothing.
        let mut body = BytesMut::with_capacity(length.min(64 * 1024));
        let mut limited = (&mut self.inner).take(length as u64);
        while body.len() < length {
            if limited.read_buf(&mut body).await? == 0 {
                return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
            }
        }
        let actual = crc32c::crc32c(&body);
        if actual != expected {
            return Err(WireError::Checksum { expected, actual });
        }
        Ok(Some(body.freeze()))
    }
}

/// Writes messages to a byte stream.
pub struct FrameWriter<W> {
    inner: W,
    buffer: BytesMut,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Sends into `inner`.
    pub fn new(inner: W) -> Self {
        Self { inner, buffer: BytesMut::new() }
    }

    /// Sends one message at once. Not cancel-safe.
    pub async fn send<M: Serialize>(&mut self, message: &M) -> Result<(), WireError> {
        self.queue(message)?;
        self.flush().await
    }

    /// Encodes a message behind those already queued; nothing is sent before [`FrameWriter::flush`].
    pub fn queue<M: Serialize>(&mut self, message: &M) -> Result<(), WireError> {
        let start = self.buffer.len();
        self.buffer.put_bytes(0, HEADER_BYTES);
        let encoded = postcard::to_io(message, (&mut self.buffer).writer()).map(|_| ());
        let length = self.buffer.len() - start - HEADER_BYTES;
        if let Err(error) = encoded {
            self.buffer.truncate(start);
            return Err(error.into());
        }
        if length > MAX_FRAME_BYTES {
            self.buffer.truncate(start);
            return Err(WireError::TooLarge { length, limit: MAX_FRAME_BYTES });
        }
        let crc = crc32c::crc32c(&self.buffer[start + HEADER_BYTES..]);
        self.buffer[start..start + 4].copy_from_slice(&(length as u32).to_le_bytes());
        self.buffer[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
        Ok(())
    }

    /// Sends what is queued. Not cancel-safe.
    pub async fn flush(&mut self) -> Result<(), WireError> {
        self.inner.write_all(&self.buffer).await?;
        self.buffer.clear();
        self.inner.flush().await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_round_trip_and_damage_is_found() {
        let mut out = FrameWriter::new(Vec::new());
        out.send(&(7u64, "seven".to_owned())).await.expect("send");
        let mut bytes = out.inner.clone();
        let mut reader = FrameReader::new(bytes.as_slice());
        assert_eq!(reader.recv().await.expect("recv"), Some((7u64, "seven".to_owned())));
        assert!(reader.recv::<u8>().await.expect("end").is_none());

        *bytes.last_mut().expect("body") ^= 1;
        let damaged = FrameReader::new(bytes.as_slice()).recv::<(u64, String)>().await;
        assert!(matches!(damaged, Err(WireError::Checksum { .. })));
        let cut = FrameReader::new(&bytes[..bytes.len() - 1]).recv::<(u64, String)>().await;
        assert!(matches!(cut, Err(WireError::Io(_))));
        let mut reader = FrameReader::new(bytes.as_slice());
        let limited = reader.recv_limited::<(u64, String)>(6).await;
        assert!(matches!(limited, Err(WireError::TooLarge { length: 7, limit: 6 })), "{limited:?}");
        let huge = FrameReader::new([0xFFu8; 8].as_slice()).recv::<u8>().await;
        assert!(matches!(huge, Err(WireError::TooLarge { limit: MAX_FRAME_BYTES, .. })));
    }
}
