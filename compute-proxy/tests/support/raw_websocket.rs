//! A WebSocket by hand: frames as they should not be.

use std::time::Duration;

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::{PASSWORD, World};

/// How long the proxy may take for anything here.
const PATIENCE: Duration = Duration::from_secs(20);

/// A frame's first byte: whole, and binary.
pub const BINARY: u8 = 0x82;

/// A client that masks its frames, as it must, with zeroes.
pub struct RawWebSocket<S = TcpStream> {
    pub stream: S,
    /// Bytes of Postgres's protocol that came and were not yet read.
    inside: Vec<u8>,
}

/// What comes from the proxy.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    Binary(Vec<u8>),
    Pong(Vec<u8>),
    /// With its status code; 1005 for none, as RFC 6455 has it.
    Close(u16),
    /// The connection ended.
    End,
}

/// A frame of a client; `first` is its first byte.
pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    [&header(first, payload.len())[..], payload].concat()
}

/// The header of a frame with so many bytes.
pub fn header(first: u8, bytes: usize) -> Vec<u8> {
    const MASKED: u8 = 0x80;
    let mut header = vec![first];
    match bytes {
        0..=125 => header.push(MASKED | bytes as u8),
        126..=0xffff => {
            header.push(MASKED | 126);
            header.extend_from_slice(&(bytes as u16).to_be_bytes());
        }
        _ => {
            header.push(MASKED | 127);
            header.extend_from_slice(&(bytes as u64).to_be_bytes());
        }
    }
    header.extend_from_slice(&[0; 4]);
    header
}

/// A message of Postgres's protocol.
pub fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    [&[kind][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

/// A simple query.
pub fn query(text: &str) -> Vec<u8> {
    message(b'Q', &[text.as_bytes(), b"\0"].concat())
}

impl RawWebSocket {
    /// A WebSocket to a host, for a proxy with `--allow-cleartext`.
    pub async fn open(world: &World, host: &str) -> Self {
        let mut tcp = TcpStream::connect(world.http_address).await.expect("connected");
        let request = format!(
            "GET /v2 HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        tcp.write_all(request.as_bytes()).await.expect("sent");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(tcp.read_u8().await.expect("an answer"));
        }
        let head = String::from_utf8(head).expect("text");
        assert!(head.starts_with("HTTP/1.1 101") && head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        Self::over(tcp)
    }

    /// A session of `alice` that waits for a query.
    pub async fn log_in(world: &World, host: &str) -> Self {
        Self::open(world, host).await.logged_in().await
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> RawWebSocket<S> {
    /// A WebSocket whose handshake is done.
    pub fn over(stream: S) -> Self {
        Self { stream, inside: Vec::new() }
    }

    /// The session of `alice`, waiting for a query.
    pub async fn logged_in(mut self) -> Self {
        let mut startup = [&(3_u32 << 16).to_be_bytes()[..], b"user\0alice\0database\0postgres\0\0"].concat();
        startup.splice(0..0, (startup.len() as u32 + 4).to_be_bytes());
        let password = message(b'p', &[PASSWORD.as_bytes(), b"\0"].concat());
        self.send(&frame(BINARY, &[startup, password].concat())).await;
        assert_eq!(self.until_ready().await.last(), Some(&b'Z'));
        self
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        // The proxy may have hung up already.
        let _ = self.stream.write_all(bytes).await;
    }

    /// The next frame.
    pub async fn frame(&mut self) -> Frame {
        timeout(PATIENCE, self.read_frame()).await.expect("a frame in time").unwrap_or(Frame::End)
    }

    async fn read_frame(&mut self) -> std::io::Result<Frame> {
        let first = self.stream.read_u8().await?;
        let length = match self.stream.read_u8().await? {
            126 => u64::from(self.stream.read_u16().await?),
            127 => self.stream.read_u64().await?,
            short => u64::from(short),
        };
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload).await?;
        Ok(match first {
            BINARY => Frame::Binary(payload),
            0x8a => Frame::Pong(payload),
            0x88 => Frame::Close(payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code))),
            other => panic!("a frame that begins with {other:x}"),
        })
    }

    /// Types of Postgres's messages up to `ReadyForQuery` or an error that ends the session.
    pub async fn until_ready(&mut self) -> Vec<u8> {
        let mut kinds = Vec::new();
        while kinds.last() != Some(&b'Z') {
            match self.frame().await {
                Frame::Binary(payload) => self.inside.extend_from_slice(&payload),
                Frame::Pong(_) => {}
                Frame::Close(_) | Frame::End => return kinds,
            }
            while let Some(&[kind, a, b, c, d]) = self.inside.first_chunk::<5>() {
                let bytes = u32::from_be_bytes([a, b, c, d]) as usize + 1;
                if self.inside.len() < bytes {
                    break;
                }
                kinds.push(kind);
                self.inside.drain(..bytes);
            }
        }
        kinds
    }

    /// The status code with which the proxy closes, whatever comes before.
    pub async fn close_code(&mut self) -> Option<u16> {
        loop {
            match self.frame().await {
                Frame::Close(code) => return Some(code),
                Frame::End => return None,
                Frame::Binary(_) | Frame::Pong(_) => {}
            }
        }
    }
}
