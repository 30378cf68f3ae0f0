//! Passes bytes between a client and its Postgres, both ways, without looking at them.

use std::time::Duration;

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use crate::end::EndReason;

/// Bytes read at a time from a client: one TLS record.
const FROM_CLIENT_BYTES: usize = 16 * 1024;

/// Bytes read at a time from Postgres. Idle sessions hold both buffers, so they are no larger.
const FROM_COMPUTE_BYTES: usize = 32 * 1024;

/// How long a session lasts when one side is gone and the other has been told.
const LINGER: Duration = if cfg!(test) { Duration::from_millis(50) } else { Duration::from_secs(5) };

/// Passes bytes until either side is done, or until `kill`.
///
/// When the client has closed its half, Postgres may still finish what it runs. When Postgres has closed, whatever it
/// said last is delivered, and the client has five seconds to close too.
pub async fn splice<C, P>(client: C, compute: P, kill: &CancellationToken) -> EndReason
where
    C: AsyncRead + AsyncWrite,
    P: AsyncRead + AsyncWrite,
{
    let (client_in, client_out) = tokio::io::split(client);
    let (compute_in, compute_out) = tokio::io::split(compute);
    let up = pump(client_in, compute_out, FROM_CLIENT_BYTES);
    let down = pump(compute_in, client_out, FROM_COMPUTE_BYTES);
    let (mut up, mut down) = (std::pin::pin!(up), std::pin::pin!(down));
    let first = tokio::select! {
        () = kill.cancelled() => return EndReason::Shutdown,
        end = &mut up => Side::Client(end),
        end = &mut down => Side::Compute(end),
    };
    match first {
        Side::Client(PumpEnd::Closed) => tokio::select! {
            () = kill.cancelled() => EndReason::Shutdown,
            _ = down => EndReason::ClientClosed,
        },
        // Postgres takes nothing more: it is going, and its last words may still be on their way.
        Side::Client(PumpEnd::WriteFailed) => tokio::select! {
            () = sleep(LINGER) => EndReason::ComputeClosed,
            _ = down => EndReason::ComputeClosed,
        },
        Side::Compute(PumpEnd::Closed) => tokio::select! {
            () = sleep(LINGER) => EndReason::ComputeClosed,
            _ = up => EndReason::ComputeClosed,
        },
        Side::Client(PumpEnd::ReadFailed) | Side::Compute(PumpEnd::WriteFailed) => EndReason::ClientLost,
        Side::Compute(PumpEnd::ReadFailed) => EndReason::ComputeClosed,
    }
}

enum Side {
    Client(PumpEnd),
    Compute(PumpEnd),
}

enum PumpEnd {
    /// All was read and passed on, and the other side was told.
    Closed,
    ReadFailed,
    WriteFailed,
}

async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, buffer_bytes: usize) -> PumpEnd {
    let mut buffer = vec![0; buffer_bytes];
    loop {
        let bytes = match from.read(&mut buffer).await {
            Ok(0) => break,
            Ok(bytes) => bytes,
            Err(_) => return PumpEnd::ReadFailed,
        };
        // TLS keeps back what the socket did not take at once: without a flush it might stay there.
        if to.write_all(&buffer[..bytes]).await.is_err() || to.flush().await.is_err() {
            return PumpEnd::WriteFailed;
        }
    }
    match to.shutdown().await {
        Ok(()) => PumpEnd::Closed,
        Err(_) => PumpEnd::WriteFailed,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[tokio::test]
    async fn a_client_that_closed_its_half_gets_its_answer() {
        let (mut client, client_end) = duplex(64);
        let (mut compute, compute_end) = duplex(64);
        let session = tokio::spawn(async move { splice(client_end, compute_end, &CancellationToken::new()).await });
        client.write_all(b"question").await.expect("write");
        client.shutdown().await.expect("shutdown");
        let mut heard = String::new();
        compute.read_to_string(&mut heard).await.expect("read");
        compute.write_all(b"answer").await.expect("write");
        drop(compute);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("read");
        assert_eq!((heard.as_str(), answer.as_str()), ("question", "answer"));
        assert_eq!(session.await.expect("no panic"), EndReason::ClientClosed);
    }

    #[tokio::test]
    async fn a_client_that_does_not_notice_is_closed() {
        let (_client, client_end) = duplex(64);
        let (compute, compute_end) = duplex(64);
        drop(compute);
        assert_eq!(splice(client_end, compute_end, &CancellationToken::new()).await, EndReason::ComputeClosed);
    }

    #[tokio::test]
    async fn a_shutdown_ends_it() {
        let (_client, client_end) = duplex(64);
        let (_compute, compute_end) = duplex(64);
        let kill = CancellationToken::new();
        kill.cancel();
        assert_eq!(splice(client_end, compute_end, &kill).await, EndReason::Shutdown);
    }
}
