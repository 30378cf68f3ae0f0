//! Opening a connection to a safekeeper.

use std::time::Duration;

use safekeeper_protocol::message::{Request, RequestBody};
use tokio::{
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};
use types::BranchRef;
use wire::{FrameReader, FrameWriter, Hello, HelloReply, PROTOCOL_VERSION, WireError};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Why a connection could not be opened, or ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error("can't connect to safekeeper {address}: {source}")]
    Connect { address: String, source: std::io::Error },
    #[error("safekeeper {address}: {source}")]
    Wire { address: String, source: WireError },
    #[error("safekeeper {address} refused: {reason}")]
    Denied { address: String, reason: String },
    #[error("safekeeper {address} closed the connection")]
    Closed { address: String },
    #[error("safekeeper {address} did not answer in time")]
    Silent { address: String },
}

/// An open connection; the safekeeper's answer to `Hello` has not been read yet, see [`Connection::welcome`].
pub(crate) struct Connection {
    pub reader: FrameReader<OwnedReadHalf>,
    pub writer: FrameWriter<OwnedWriteHalf>,
}

impl Connection {
    /// Connects; greeting and request are queued and go out with the next flush.
    pub async fn open(
        address: &str,
        token: &str,
        branch: &BranchRef,
        body: RequestBody,
    ) -> Result<Connection, ConnectionError> {
        let failed = |source| ConnectionError::Connect { address: address.to_owned(), source };
        let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
            .map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        let (read, write) = stream.into_split();
        let mut writer = FrameWriter::new(write);
        let wire = |source| ConnectionError::Wire { address: address.to_owned(), source };
        writer.queue(&Hello { version: PROTOCOL_VERSION, token: token.to_owned() }).map_err(wire)?;
        writer.queue(&Request { branch: branch.clone(), body }).map_err(wire)?;
        Ok(Connection { reader: FrameReader::new(read), writer })
    }
}

/// Reads the answer to `Hello`.
pub(crate) async fn welcome(address: &str, reader: &mut FrameReader<OwnedReadHalf>) -> Result<(), ConnectionError> {
    let reply = timeout(CONNECT_TIMEOUT, reader.recv::<HelloReply>())
        .await
        .map_err(|_| ConnectionError::Silent { address: address.to_owned() })?
        .map_err(|source| ConnectionError::Wire { address: address.to_owned(), source })?;
    match reply {
        Some(HelloReply::Welcome) => Ok(()),
        Some(HelloReply::Denied(reason)) => Err(ConnectionError::Denied { address: address.to_owned(), reason }),
        None => Err(ConnectionError::Closed { address: address.to_owned() }),
    }
}
