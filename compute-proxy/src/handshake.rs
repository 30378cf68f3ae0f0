//! What a client sends before it logs in: pure parsing of start-up packets, bounded, never panicking.
//!
//! Formats: PostgreSQL's `src/include/libpq/pqcomm.h` and `ProcessStartupPacket` in `src/backend/postmaster/postmaster.c`.

use std::fmt;

/// Bytes that a start-up packet may have, its length word included (`MAX_STARTUP_PACKET_LENGTH`).
pub const STARTUP_MAX_BYTES: usize = 10_000;

/// Bytes of a SASL message, as Postgres limits it (`PG_MAX_SASL_MESSAGE_LENGTH`).
pub const SASL_MAX_BYTES: usize = 1024;

/// Bytes of a password, with room for an endpoint's prefix.
pub const PASSWORD_MAX_BYTES: usize = 8192;

/// First byte of a TLS handshake record: a client that begins with TLS at once. No packet length begins with it.
pub const TLS_HANDSHAKE_BYTE: u8 = 0x16;

const CANCEL_CODE: u32 = 1234 << 16 | 5678;
const SSL_CODE: u32 = 1234 << 16 | 5679;
const GSS_CODE: u32 = 1234 << 16 | 5680;

/// The protocol that is spoken: 3.0.
pub const PROTOCOL: u32 = 3 << 16;

/// Bytes of the longest role or database name (`NAMEDATALEN` less its zero).
pub const NAME_MAX_BYTES: usize = 63;

/// One packet before the login.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// The client wants TLS.
    Ssl,
    /// The client wants GSSAPI encryption.
    GssEnc,
    /// Cancel what another session runs.
    Cancel(CancelRequest),
    /// Begin a session.
    Startup(Startup),
}

impl Packet {
    /// Parses what follows a packet's length word.
    pub fn parse(body: &[u8]) -> Result<Self, HandshakeError> {
        let (code, rest) = body.split_first_chunk::<4>().ok_or(HandshakeError::Length)?;
        match u32::from_be_bytes(*code) {
            SSL_CODE if rest.is_empty() => Ok(Self::Ssl),
            GSS_CODE if rest.is_empty() => Ok(Self::GssEnc),
            SSL_CODE | GSS_CODE => Err(HandshakeError::Layout),
            CANCEL_CODE => CancelRequest::parse(rest).map(Self::Cancel),
            version => Startup::parse(version, rest).map(Self::Startup),
        }
    }
}

/// The number of bytes that follow a packet's length word.
pub fn body_bytes(length_word: [u8; 4]) -> Result<usize, HandshakeError> {
    let bytes = usize::try_from(u32::from_be_bytes(length_word)).map_err(|_| HandshakeError::Length)?;
    if (8..=STARTUP_MAX_BYTES).contains(&bytes) { Ok(bytes - 4) } else { Err(HandshakeError::Length) }
}

/// Names a session by what its `BackendKeyData` said.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CancelRequest {
    /// The process id that the session was told.
    pub process_id: i32,
    /// Its secret. Never logged.
    pub secret: i32,
}

impl CancelRequest {
    /// A longer key, as protocol 3.2 allows, was never given out here: it fails as a wrong one.
    fn parse(rest: &[u8]) -> Result<Self, HandshakeError> {
        let words: &[u8; 8] = rest.try_into().map_err(|_| HandshakeError::Layout)?;
        let word = |at: usize| i32::from_be_bytes([words[at], words[at + 1], words[at + 2], words[at + 3]]);
        Ok(Self { process_id: word(0), secret: word(4) })
    }
}

impl fmt::Debug for CancelRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CancelRequest").field("process_id", &self.process_id).finish_non_exhaustive()
    }
}

/// A `StartupMessage` of protocol 3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Startup {
    /// The minor version that the client asks for; above 0 it must be told that 3.0 is spoken.
    pub minor_version: u16,
    /// The role. Never empty.
    pub user: String,
    /// The database; the role's name when the client named none.
    pub database: String,
    /// `options`, as sent.
    pub options: Option<String>,
    /// All other parameters, in order.
    pub parameters: Vec<(String, String)>,
    /// Names beginning with `_pq_.`: extensions of the protocol, none of which is known here.
    pub unknown_extensions: Vec<String>,
}

impl Startup {
    fn parse(version: u32, mut rest: &[u8]) -> Result<Self, HandshakeError> {
        if version >> 16 != 3 {
            return Err(HandshakeError::Version { major: (version >> 16) as u16, minor: version as u16 });
        }
        let (mut user, mut database, mut options) = (None, None, None);
        let (mut parameters, mut unknown_extensions) = (Vec::new(), Vec::new());
        loop {
            let name = take_text(&mut rest)?;
            if name.is_empty() {
                break;
            }
            let value = take_text(&mut rest)?;
            match name.as_str() {
                "user" => user = Some(value),
                "database" => database = Some(value),
                "options" => options = Some(value),
                extension if extension.starts_with("_pq_.") => unknown_extensions.push(name),
                _ => parameters.push((name, value)),
            }
        }
        if !rest.is_empty() {
            return Err(HandshakeError::Layout);
        }
        let user = user.filter(|user| !user.is_empty()).ok_or(HandshakeError::NoUser)?;
        let database = database.filter(|name| !name.is_empty()).unwrap_or_else(|| user.clone());
        Ok(Self { minor_version: version as u16, user, database, options, parameters, unknown_extensions })
    }

    /// True when the client must be told which protocol is spoken before anything else.
    pub fn needs_negotiation(&self) -> bool {
        self.minor_version > 0 || !self.unknown_extensions.is_empty()
    }
}

/// A zero-terminated string from the front of `rest`.
fn take_text(rest: &mut &[u8]) -> Result<String, HandshakeError> {
    let end = rest.iter().position(|byte| *byte == 0).ok_or(HandshakeError::Layout)?;
    let text = std::str::from_utf8(&rest[..end]).map_err(|_| HandshakeError::Encoding)?.to_owned();
    *rest = &rest[end + 1..];
    Ok(text)
}

/// The client's choice of mechanism and its first message (`SASLInitialResponse`).
pub fn parse_sasl_initial(body: &[u8]) -> Result<(&str, &[u8]), HandshakeError> {
    let end = body.iter().position(|byte| *byte == 0).ok_or(HandshakeError::Layout)?;
    let mechanism = std::str::from_utf8(&body[..end]).map_err(|_| HandshakeError::Encoding)?;
    let (length, data) = body[end + 1..].split_first_chunk::<4>().ok_or(HandshakeError::Layout)?;
    let length = usize::try_from(i32::from_be_bytes(*length)).map_err(|_| HandshakeError::Layout)?;
    if length == data.len() { Ok((mechanism, data)) } else { Err(HandshakeError::Layout) }
}

/// The password of a `PasswordMessage`: one zero-terminated string.
pub fn parse_password(body: &[u8]) -> Result<&[u8], HandshakeError> {
    match body.split_last() {
        Some((0, password)) if !password.contains(&0) => Ok(password),
        Some(_) | None => Err(HandshakeError::Layout),
    }
}

/// What is wrong with a packet. The texts are for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Too short or too long.
    #[error("invalid length of startup packet")]
    Length,
    /// Strings or fields don't end where they must.
    #[error("invalid startup packet layout")]
    Layout,
    /// Names and values must be UTF-8.
    #[error("startup packet is not UTF-8 text")]
    Encoding,
    /// Another protocol.
    #[error("unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.0")]
    Version {
        /// Asked for.
        major: u16,
        /// Asked for.
        minor: u16,
    },
    /// `user` is missing or empty.
    #[error("no PostgreSQL user name specified in startup packet")]
    NoUser,
    /// A message of another kind than the step needs.
    #[error("expected a password or SASL message, got message type {0}")]
    UnexpectedMessage(u8),
    /// A second request for encryption, or one inside TLS.
    #[error("encryption was already negotiated")]
    EncryptionAgain,
}

impl HandshakeError {
    /// SQLSTATE for the client.
    pub fn sqlstate(&self) -> &'static str {
        match self {
            Self::Version { .. } => "0A000",
            Self::NoUser => "28000",
            Self::Length | Self::Layout | Self::Encoding | Self::UnexpectedMessage(_) | Self::EncryptionAgain => {
                "08P01"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn startup(version: u32, pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut body = version.to_be_bytes().to_vec();
        for (name, value) in pairs {
            body.extend_from_slice(name.as_bytes());
            body.push(0);
            body.extend_from_slice(value.as_bytes());
            body.push(0);
        }
        body.push(0);
        body
    }

    #[test]
    fn a_startup_message_is_taken_apart() {
        let body = startup(PROTOCOL, &[("user", "u"), ("options", "-c x=1"), ("application_name", "")]);
        let Ok(Packet::Startup(parsed)) = Packet::parse(&body) else { panic!("a start-up message") };
        assert_eq!((parsed.user.as_str(), parsed.database.as_str()), ("u", "u"));
        assert_eq!(parsed.options.as_deref(), Some("-c x=1"));
        assert_eq!(parsed.parameters, [("application_name".to_owned(), String::new())]);
        assert!(!parsed.needs_negotiation());
    }

    #[test]
    fn newer_minor_versions_and_extensions_are_negotiated() {
        let newer = startup(PROTOCOL | 2, &[("user", "u"), ("_pq_.grease", "x")]);
        let Ok(Packet::Startup(parsed)) = Packet::parse(&newer) else { panic!("a start-up message") };
        assert!(parsed.needs_negotiation());
        assert_eq!(parsed.unknown_extensions, ["_pq_.grease"]);
        assert!(parsed.parameters.is_empty());
    }

    #[test]
    fn broken_packets_are_told_apart() {
        assert_eq!(Packet::parse(&startup(PROTOCOL, &[("database", "d")])), Err(HandshakeError::NoUser));
        assert_eq!(Packet::parse(&startup(2 << 16, &[])), Err(HandshakeError::Version { major: 2, minor: 0 }));
        let mut trailing = startup(PROTOCOL, &[("user", "u")]);
        trailing.push(b'x');
        assert_eq!(Packet::parse(&trailing), Err(HandshakeError::Layout));
        assert_eq!(Packet::parse(&[]), Err(HandshakeError::Length));
        assert_eq!(body_bytes([0, 0, 0, 8]), Ok(4));
        for bad in [0, 7, 10_001, u32::MAX] {
            assert_eq!(body_bytes(bad.to_be_bytes()), Err(HandshakeError::Length));
        }
    }

    #[test]
    fn requests_without_a_session_are_known() {
        assert_eq!(Packet::parse(&SSL_CODE.to_be_bytes()), Ok(Packet::Ssl));
        assert_eq!(Packet::parse(&GSS_CODE.to_be_bytes()), Ok(Packet::GssEnc));
        let mut cancel = CANCEL_CODE.to_be_bytes().to_vec();
        cancel.extend_from_slice(&[0, 0, 0, 7, 0xff, 0xff, 0xff, 0xfe]);
        assert_eq!(Packet::parse(&cancel), Ok(Packet::Cancel(CancelRequest { process_id: 7, secret: -2 })));
        cancel.push(0);
        assert_eq!(Packet::parse(&cancel), Err(HandshakeError::Layout));
    }

    #[test]
    fn login_messages_are_exact() {
        assert_eq!(parse_sasl_initial(b"SCRAM-SHA-256\0\0\0\0\x02ab"), Ok(("SCRAM-SHA-256", &b"ab"[..])));
        assert_eq!(parse_sasl_initial(b"SCRAM-SHA-256\0\0\0\0\x03ab"), Err(HandshakeError::Layout));
        assert_eq!(parse_sasl_initial(b"SCRAM-SHA-256\0\xff\xff\xff\xff"), Err(HandshakeError::Layout));
        assert_eq!(parse_password(b"pw\0"), Ok(&b"pw"[..]));
        assert_eq!(parse_password(b"p\0w\0"), Err(HandshakeError::Layout));
        assert_eq!(parse_password(b""), Err(HandshakeError::Layout));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(body: Vec<u8>, word: [u8; 4]) {
            let _ = Packet::parse(&body);
            let _ = parse_sasl_initial(&body);
            let _ = parse_password(&body);
            if let Ok(bytes) = body_bytes(word) {
                prop_assert!((4..STARTUP_MAX_BYTES).contains(&bytes));
            }
        }

        #[test]
        fn garbage_behind_a_good_version_never_panics(rest: Vec<u8>) {
            let mut body = PROTOCOL.to_be_bytes().to_vec();
            body.extend_from_slice(&rest);
            if let Ok(Packet::Startup(parsed)) = Packet::parse(&body) {
                prop_assert!(!parsed.user.is_empty() && !parsed.database.is_empty());
            }
        }
    }
}
