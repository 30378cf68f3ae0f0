//! One connection: hello, then requests that are answered as they are done.

use std::{sync::Arc, time::Duration};

use tokio::{
    net::{TcpStream, tcp::OwnedWriteHalf},
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use wire::{
    Claims, FrameReader, FrameWriter, Hello, HelloReply, MAX_GREETING_BYTES, PROTOCOL_VERSION, TokenVerifier,
    WireError,
    pageserver::{Request, Response},
};

use super::Handler;

/// Requests of one connection that are worked on at a time; further ones wait unread.
const CONCURRENT_REQUESTS: usize = 256;
/// Longest wait for the first message.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time that a client may leave an answer unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Serves the connection until the client closes it or `shutdown`.
pub(super) async fn serve(
    socket: TcpStream,
    verifier: TokenVerifier,
    handler: Arc<Handler>,
    shutdown: CancellationToken,
) -> Result<(), WireError> {
    socket.set_nodelay(true)?;
    let (read, write) = socket.into_split();
    let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
    let Ok(hello) = timeout(HELLO_TIMEOUT, reader.recv_limited::<Hello>(MAX_GREETING_BYTES)).await else {
        return Ok(());
    };
    let Some(hello) = hello? else { return Ok(()) };
    let claims = match check(&hello, &verifier) {
        Ok(claims) => Arc::new(claims),
        Err(reason) => return writer.send(&HelloReply::Denied(reason)).await,
    };
    writer.send(&HelloReply::Welcome).await?;

    let (answers, outgoing) = mpsc::channel(CONCURRENT_REQUESTS);
    // Dropped with this function: what is still worked on is cancelled by the closed channel or finishes unheard.
    let gone = CancellationToken::new();
    let writing = tokio::spawn(write_answers(writer, outgoing, gone.clone()));
    let permits = Arc::new(Semaphore::new(CONCURRENT_REQUESTS));
    let outcome = loop {
        let request = tokio::select! {
            request = reader.recv::<Request>() => request,
            () = shutdown.cancelled() => break Ok(()),
            () = gone.cancelled() => break Ok(()),
        };
        let request = match request {
            Ok(Some(request)) => request,
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        };
        let Ok(permit) = permits.clone().acquire_owned().await else { break Ok(()) };
        let (handler, claims, answers) = (handler.clone(), claims.clone(), answers.clone());
        tokio::spawn(async move {
            let id = request.id;
            let body = handler.handle(&claims, request).await;
            let _ = answers.send(Response { id, body }).await;
            drop(permit);
        });
    };
    drop(answers);
    let _ = timeout(WRITE_TIMEOUT, writing).await;
    outcome
}

fn check(hello: &Hello, verifier: &TokenVerifier) -> Result<Claims, String> {
    if hello.version != PROTOCOL_VERSION {
        return Err(format!("protocol version {}, this pageserver speaks {PROTOCOL_VERSION}", hello.version));
    }
    verifier.verify(&hello.token).map_err(|error| error.to_string())
}

async fn write_answers(
    mut writer: FrameWriter<OwnedWriteHalf>,
    mut answers: mpsc::Receiver<Response>,
    gone: CancellationToken,
) {
    let _gone = gone.drop_guard();
    while let Some(answer) = answers.recv().await {
        let mut queued = queue(&mut writer, answer);
        while let (true, Ok(more)) = (queued, answers.try_recv()) {
            queued = queue(&mut writer, more);
        }
        let flushed = timeout(WRITE_TIMEOUT, writer.flush()).await;
        if !queued || !matches!(flushed, Ok(Ok(()))) {
            return;
        }
    }
}

fn queue(writer: &mut FrameWriter<OwnedWriteHalf>, answer: Response) -> bool {
    match writer.queue(&answer) {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(%error, "an answer can't be encoded");
            false
        }
    }
}
