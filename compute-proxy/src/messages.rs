//! The few messages that the proxy itself writes to a client. Formats: Postgres's manual, "Message Formats".

use bytes::{BufMut, Bytes, BytesMut};

use crate::handshake::PROTOCOL;

/// Answer to an SSLRequest: go on with TLS.
pub const ACCEPT_ENCRYPTION: u8 = b'S';

/// Answer to a request for encryption that is not to be had.
pub const REFUSE_ENCRYPTION: u8 = b'N';

/// A fatal error: the connection ends with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FatalError {
    /// Five characters.
    pub sqlstate: &'static str,
    /// What happened.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl FatalError {
    /// An error without a hint.
    pub fn new(sqlstate: &'static str, message: impl Into<String>) -> Self {
        Self { sqlstate, message: message.into(), hint: None }
    }

    /// The `ErrorResponse`.
    pub fn encode(&self) -> Bytes {
        self.encode_as("FATAL")
    }

    /// The `ErrorResponse` with another severity: after an `ERROR` the connection goes on.
    pub fn encode_as(&self, severity: &str) -> Bytes {
        message(b'E', |body| {
            for (field, text) in [(b'S', severity), (b'V', severity), (b'C', self.sqlstate), (b'M', &self.message)] {
                body.put_u8(field);
                put_text(body, text);
            }
            if let Some(hint) = &self.hint {
                body.put_u8(b'H');
                put_text(body, hint);
            }
            body.put_u8(0);
        })
    }
}

/// `AuthenticationSASL`: the mechanisms on offer.
pub fn sasl_mechanisms(names: &[&str]) -> Bytes {
    authentication(10, |body| {
        names.iter().for_each(|name| put_text(body, name));
        body.put_u8(0);
    })
}

/// `AuthenticationSASLContinue`.
pub fn sasl_continue(data: &str) -> Bytes {
    authentication(11, |body| body.put_slice(data.as_bytes()))
}

/// `AuthenticationSASLFinal`.
pub fn sasl_final(data: &str) -> Bytes {
    authentication(12, |body| body.put_slice(data.as_bytes()))
}

/// `AuthenticationCleartextPassword`.
pub fn ask_cleartext_password() -> Bytes {
    authentication(3, |_| ())
}

/// `NegotiateProtocolVersion`: 3.0, and none of these extensions.
pub fn negotiate_protocol_version(unknown_extensions: &[String]) -> Bytes {
    message(b'v', |body| {
        body.put_u32(PROTOCOL);
        body.put_u32(unknown_extensions.len() as u32);
        unknown_extensions.iter().for_each(|name| put_text(body, name));
    })
}

/// `AuthenticationOk`.
pub fn authentication_ok() -> Bytes {
    authentication(0, |_| ())
}

/// `ParameterStatus`.
pub fn parameter_status(name: &str, value: &str) -> Bytes {
    message(b'S', |body| {
        put_text(body, name);
        put_text(body, value);
    })
}

/// `ReadyForQuery`, in no transaction.
pub fn ready_for_query() -> Bytes {
    message(b'Z', |body| body.put_u8(b'I'))
}

/// `BackendKeyData`.
pub fn backend_key_data(process_id: i32, secret: i32) -> Bytes {
    message(b'K', |body| {
        body.put_i32(process_id);
        body.put_i32(secret);
    })
}

fn authentication(code: i32, fill: impl FnOnce(&mut BytesMut)) -> Bytes {
    message(b'R', |body| {
        body.put_i32(code);
        fill(body);
    })
}

fn message(kind: u8, fill: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut buffer = BytesMut::with_capacity(64);
    buffer.put_u8(kind);
    buffer.put_u32(0);
    fill(&mut buffer);
    let bytes = buffer.len() as u32 - 1;
    buffer[1..5].copy_from_slice(&bytes.to_be_bytes());
    buffer.freeze()
}

/// A zero inside would end the text early: it is left out.
fn put_text(body: &mut BytesMut, text: &str) {
    body.extend(text.bytes().filter(|byte| *byte != 0));
    body.put_u8(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_framed() {
        assert_eq!(&ask_cleartext_password()[..], b"R\0\0\0\x08\0\0\0\x03");
        assert_eq!(&sasl_mechanisms(&["A"])[..], b"R\0\0\0\x0b\0\0\0\x0aA\0\0");
        assert_eq!(&backend_key_data(1, -1)[..], b"K\0\0\0\x0c\0\0\0\x01\xff\xff\xff\xff");
        assert_eq!(&negotiate_protocol_version(&["_pq_.x".into()])[..], b"v\0\0\0\x13\0\x03\0\0\0\0\0\x01_pq_.x\0");
    }

    #[test]
    fn an_error_has_its_fields() {
        let error = FatalError { hint: Some("do".into()), ..FatalError::new("28P01", "no\0t so") };
        assert_eq!(&error.encode()[5..], b"SFATAL\0VFATAL\0C28P01\0Mnot so\0Hdo\0\0");
    }
}
