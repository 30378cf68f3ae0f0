//! A TCP connection that can be made to stall.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// Passes connections on; what comes back waits while it is stalled.
pub struct Link {
    /// Where to connect instead.
    pub address: SocketAddr,
    stalled: watch::Sender<bool>,
    bytes_back: Arc<AtomicU64>,
}

impl Link {
    pub async fn to(target: SocketAddr) -> Link {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("bind");
        let address = listener.local_addr().expect("address");
        let (stalled, is_stalled) = watch::channel(false);
        let bytes_back = Arc::new(AtomicU64::new(0));
        let count = bytes_back.clone();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(target).await else { continue };
                let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
                tokio::spawn(pass(near_read, far_write, watch::channel(false).1, Arc::default()));
                tokio::spawn(pass(far_read, near_write, is_stalled.clone(), count.clone()));
            }
        });
        Link { address, stalled, bytes_back }
    }

    /// What has come back over all connections.
    pub fn bytes_back(&self) -> u64 {
        self.bytes_back.load(Relaxed)
    }

    pub fn stall(&self, stalled: bool) {
        self.stalled.send_replace(stalled);
    }
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut stalled: watch::Receiver<bool>,
    count: Arc<AtomicU64>,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let Ok(bytes @ 1..) = from.read(&mut buffer).await else { return };
        // Once nobody can say any more, it is not stalled.
        let _ = stalled.wait_for(|stalled| !stalled).await;
        count.fetch_add(bytes as u64, Relaxed);
        if to.write_all(&buffer[..bytes]).await.is_err() {
            return;
        }
    }
}
