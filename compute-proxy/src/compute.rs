//! The connection to a compute's Postgres, up to its first `ReadyForQuery`.

use std::{io, path::Path};

use bytes::{Bytes, BytesMut};
use connection_pool::session::Answer;
use postgres_protocol::message::frontend;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::handshake::{CancelRequest, Startup};

/// Bytes that Postgres may send before it is ready: parameters and perhaps a notice.
const GREETING_MAX_BYTES: usize = 256 * 1024;

/// A session with Postgres that waits for its first query.
pub struct Opened {
    /// The connection.
    pub stream: UnixStream,
    /// What the client is to get before its key.
    pub before_key: Bytes,
    /// The backend's own key.
    pub key: Option<CancelRequest>,
    /// What the client is to get after its key, up to `ReadyForQuery` or beyond.
    pub after_key: Bytes,
}

/// Connects and waits until Postgres is ready. `startup` comes from [`encode_startup`].
pub async fn open(socket: &Path, startup: &[u8]) -> Result<Opened, OpenError> {
    let mut stream = UnixStream::connect(socket).await.map_err(OpenError::Connect)?;
    stream.write_all(startup).await.map_err(OpenError::Lost)?;
    let mut greeting = Greeting::default();
    let mut input = BytesMut::with_capacity(4096);
    loop {
        while let Some((kind, frame)) = take_frame(&mut input)? {
            if greeting.take(kind, &frame)? {
                greeting.output.extend_from_slice(&input);
                return Ok(greeting.opened(stream));
            }
        }
        if greeting.output.len() + input.len() > GREETING_MAX_BYTES {
            return Err(OpenError::Unexpected("more than a greeting".to_owned()));
        }
        if stream.read_buf(&mut input).await.map_err(OpenError::Lost)? == 0 {
            return Err(OpenError::Lost(io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// Asks Postgres one question whose rows are (kind, name, value), on a session where nothing else goes on.
pub async fn ask(stream: &mut UnixStream, question: &str) -> Result<Answer, OpenError> {
    let mut message = BytesMut::new();
    frontend::query(question, &mut message).map_err(OpenError::Lost)?;
    stream.write_all(&message).await.map_err(OpenError::Lost)?;
    let (mut answer, mut input) = (Answer::default(), BytesMut::new());
    loop {
        while let Some((kind, frame)) = take_frame(&mut input)? {
            match kind {
                b'Z' => return Ok(answer),
                b'D' => {
                    answer.take_row(&frame[5..]).ok_or_else(|| OpenError::Unexpected("a strange row".to_owned()))?
                }
                b'E' => {
                    let response = Bytes::copy_from_slice(&frame);
                    return Err(OpenError::Refused { sqlstate: sqlstate(&frame[5..]), response });
                }
                _ => {}
            }
        }
        if stream.read_buf(&mut input).await.map_err(OpenError::Lost)? == 0 {
            return Err(OpenError::Lost(io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// The start-up message for the compute: the client's, with `options` as they are left without the endpoint.
pub fn encode_startup(startup: &Startup, options: Option<&str>) -> io::Result<Bytes> {
    let fixed = [("user", startup.user.as_str()), ("database", startup.database.as_str())];
    let options = options.map(|options| ("options", options));
    let others = startup.parameters.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let mut message = BytesMut::new();
    frontend::startup_message(fixed.into_iter().chain(options).chain(others), &mut message)?;
    Ok(message.freeze())
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nobody listens: the compute sleeps.
    #[error("cannot connect to the compute: {0}")]
    Connect(io::Error),
    /// The connection broke before Postgres was ready: the compute stops.
    #[error("the compute closed the connection: {0}")]
    Lost(io::Error),
    /// Postgres said no.
    #[error("the compute refused the session with SQLSTATE {sqlstate}")]
    Refused {
        /// Its code.
        sqlstate: String,
        /// Its `ErrorResponse`, for the client.
        response: Bytes,
    },
    /// Not what Postgres says to a client that it trusts.
    #[error("the compute sent {0}")]
    Unexpected(String),
}

impl OpenError {
    /// True when the compute sleeps, starts or stops, so that waking it may help.
    pub fn is_asleep(&self) -> bool {
        match self {
            Self::Connect(_) | Self::Lost(_) => true,
            // cannot_connect_now, admin_shutdown.
            Self::Refused { sqlstate, .. } => matches!(sqlstate.as_str(), "57P03" | "57P01"),
            Self::Unexpected(_) => false,
        }
    }
}

#[derive(Default)]
struct Greeting {
    before_key: Bytes,
    key: Option<CancelRequest>,
    output: BytesMut,
}

impl Greeting {
    /// Takes one message; true when Postgres is ready.
    fn take(&mut self, kind: u8, frame: &[u8]) -> Result<bool, OpenError> {
        let body = &frame[5..];
        match kind {
            b'R' if body == [0; 4] => {}
            b'R' => return Err(OpenError::Unexpected("a request for a password".to_owned())),
            b'E' => {
                let response = Bytes::copy_from_slice(frame);
                return Err(OpenError::Refused { sqlstate: sqlstate(body), response });
            }
            b'K' => {
                let words: &[u8; 8] =
                    body.try_into().map_err(|_| OpenError::Unexpected("a cancel key of another length".to_owned()))?;
                let [a, b, c, d, e, f, g, h] = *words;
                let (process_id, secret) = (i32::from_be_bytes([a, b, c, d]), i32::from_be_bytes([e, f, g, h]));
                self.key = Some(CancelRequest { process_id, secret });
                self.before_key = self.output.split().freeze();
                return Ok(false);
            }
            b'S' | b'N' | b'Z' => {}
            other => return Err(OpenError::Unexpected(format!("a message of type {:?}", char::from(other)))),
        }
        self.output.extend_from_slice(frame);
        Ok(kind == b'Z')
    }

    fn opened(self, stream: UnixStream) -> Opened {
        Opened { stream, before_key: self.before_key, key: self.key, after_key: self.output.freeze() }
    }
}

/// One whole message from the front of `input`, header included; `None`: it is not all there yet.
fn take_frame(input: &mut BytesMut) -> Result<Option<(u8, BytesMut)>, OpenError> {
    let Some(&[kind, a, b, c, d]) = input.first_chunk::<5>() else { return Ok(None) };
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if !(4..=GREETING_MAX_BYTES).contains(&length) {
        return Err(OpenError::Unexpected(format!("a message of {length} bytes")));
    }
    if input.len() <= length { Ok(None) } else { Ok(Some((kind, input.split_to(length + 1)))) }
}

/// The code in an `ErrorResponse`; empty when there is none.
fn sqlstate(body: &[u8]) -> String {
    let fields = body.split(|byte| *byte == 0);
    let code = fields.filter_map(|field| field.strip_prefix(b"C")).next().unwrap_or_default();
    String::from_utf8_lossy(code).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_code_of_an_error_is_found() {
        assert_eq!(sqlstate(b"SFATAL\0VFATAL\0C57P03\0Mno\0\0"), "57P03");
        assert_eq!(sqlstate(b""), "");
    }

    #[test]
    fn frames_are_taken_whole() {
        let mut input = BytesMut::from(&b"Z\0\0\0\x05IS\0\0"[..]);
        let (kind, frame) = take_frame(&mut input).expect("good").expect("whole");
        assert_eq!((kind, &frame[..], &input[..]), (b'Z', &b"Z\0\0\0\x05I"[..], &b"S\0\0"[..]));
        assert!(take_frame(&mut input).expect("good").is_none());
        assert!(take_frame(&mut BytesMut::from(&b"S\0\0\0\x03"[..])).is_err());
        assert!(take_frame(&mut BytesMut::from(&b"S\xff\xff\xff\xff"[..])).is_err());
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes: Vec<u8>) {
            let mut input = BytesMut::from(&bytes[..]);
            let mut greeting = Greeting::default();
            while let Ok(Some((kind, frame))) = take_frame(&mut input) {
                let _ = greeting.take(kind, &frame);
            }
        }
    }
}
