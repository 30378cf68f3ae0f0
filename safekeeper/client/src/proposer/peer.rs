//! The connection to one safekeeper, kept up.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use safekeeper_protocol::{AcceptorMessage, ProposerMessage, message::RequestBody};
use tokio::{
    net::tcp::{OwnedReadHalf, OwnedWriteHalf},
    sync::{Notify, mpsc},
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};
use types::{BranchRef, NodeId};
use wire::{FrameReader, FrameWriter};

use crate::connection::{Connection, ConnectionError, welcome};

const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);
/// A follower answers a heartbeat every second; one that is silent for this long is taken to be gone.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// Messages written with one system call at most.
const MAX_MESSAGES_PER_WRITE: usize = 64;

/// What happens on a connection. `epoch` tells one connection from the next.
pub(super) enum PeerEvent {
    Connected {
        node: NodeId,
        address: String,
        epoch: u64,
        link: mpsc::UnboundedSender<ProposerMessage>,
    },
    Received {
        node: NodeId,
        epoch: u64,
        message: AcceptorMessage,
    },
    Disconnected {
        node: NodeId,
        epoch: u64,
    },
    /// An attempt to connect has failed; the next follows after a pause.
    Unreachable {
        node: NodeId,
    },
    Denied {
        reason: String,
    },
}

pub(super) struct PeerTask {
    pub node: NodeId,
    pub address: String,
    pub token: String,
    pub branch: BranchRef,
    pub events: mpsc::UnboundedSender<PeerEvent>,
    /// Numbers of connections, whosever.
    pub epochs: Arc<AtomicU64>,
    /// Ends the pause before the next attempt.
    pub hurry: Arc<Notify>,
}

impl PeerTask {
    /// Connects, again and again, until the driver is gone.
    pub async fn run(self) {
        let mut backoff = FIRST_BACKOFF;
        let mut quiet = false;
        while !self.events.is_closed() {
            let epoch = self.epochs.fetch_add(1, Ordering::Relaxed);
            let (error, worked) = self.connect_once(epoch).await;
            if let ConnectionError::Denied { reason, .. } = &error {
                let _ = self.events.send(PeerEvent::Denied { reason: reason.clone() });
            }
            if worked {
                (backoff, quiet) = (FIRST_BACKOFF, false);
            }
            if quiet {
                debug!(branch = %self.branch, safekeeper = %self.node, %error, "safekeeper away");
            } else {
                warn!(branch = %self.branch, safekeeper = %self.node, %error, "safekeeper away, will go on trying");
            }
            quiet = true;
            tokio::select! {
                () = sleep(backoff) => {}
                () = self.hurry.notified() => {}
            }
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
    }

    /// One connection from its start to its end; says whether it ever worked.
    async fn connect_once(&self, epoch: u64) -> (ConnectionError, bool) {
        let opened = Connection::open(&self.address, &self.token, &self.branch, RequestBody::Propose).await;
        let Connection { mut reader, mut writer } = match opened {
            Ok(connection) => connection,
            Err(error) => {
                let _ = self.events.send(PeerEvent::Unreachable { node: self.node });
                return (error, false);
            }
        };
        let (link, outgoing) = mpsc::unbounded_channel();
        // Told before the greeting is answered: the vote goes out with it.
        let _ = self.events.send(PeerEvent::Connected { node: self.node, address: self.address.clone(), epoch, link });
        let mut worked = false;
        let error = tokio::select! {
            error = self.write(&mut writer, outgoing) => error,
            error = self.read(&mut reader, epoch, &mut worked) => error,
        };
        let _ = self.events.send(PeerEvent::Disconnected { node: self.node, epoch });
        (error, worked)
    }

    async fn write(
        &self,
        writer: &mut FrameWriter<OwnedWriteHalf>,
        mut outgoing: mpsc::UnboundedReceiver<ProposerMessage>,
    ) -> ConnectionError {
        let mut batch = Vec::new();
        loop {
            if outgoing.recv_many(&mut batch, MAX_MESSAGES_PER_WRITE).await == 0 {
                return ConnectionError::Closed { address: self.address.clone() };
            }
            let queued = batch.drain(..).try_for_each(|message| writer.queue(&message));
            let sent = match queued {
                Ok(()) => writer.flush().await,
                Err(error) => Err(error),
            };
            if let Err(source) = sent {
                return ConnectionError::Wire { address: self.address.clone(), source };
            }
        }
    }

    async fn read(&self, reader: &mut FrameReader<OwnedReadHalf>, epoch: u64, worked: &mut bool) -> ConnectionError {
        if let Err(error) = welcome(&self.address, reader).await {
            return error;
        }
        *worked = true;
        info!(branch = %self.branch, safekeeper = %self.node, "connected to safekeeper");
        loop {
            match timeout(SILENCE_LIMIT, reader.recv::<AcceptorMessage>()).await {
                Ok(Ok(Some(message))) => {
                    let _ = self.events.send(PeerEvent::Received { node: self.node, epoch, message });
                }
                Ok(Ok(None)) => return ConnectionError::Closed { address: self.address.clone() },
                Ok(Err(source)) => return ConnectionError::Wire { address: self.address.clone(), source },
                Err(_) => return ConnectionError::Silent { address: self.address.clone() },
            }
        }
    }
}
