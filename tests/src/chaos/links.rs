//! What lies between the safekeepers and everybody else: forwarders in this process, which can hold bytes back.
//!
//! Nothing is closed and nothing refused while a connection is cut: whoever sends hears silence, as in a network that has come apart. That
//! takes no privileges, so it runs everywhere. What differs from a real partition: a new connection is accepted at once, and is silent
//! then. Safekeepers don't talk to one another, so these are all the ways there are to and from them.

use std::{
    net::{Ipv4Addr, SocketAddr},
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
    task::JoinHandle,
};

use crate::processes;

/// All safekeepers' forwarders. They end when it is dropped.
pub struct Links {
    addresses: Vec<SocketAddr>,
    shared: Shared,
    tasks: Vec<JoinHandle<()>>,
}

/// Which bytes are held back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// To and from these, the first being 0.
    pub safekeepers: Vec<usize>,
    /// Only from and to this process; from and to all others, without.
    pub process: Option<i32>,
    /// Which way.
    pub ways: Ways,
    /// When it ends, connections that were held break, and what was held never comes; otherwise it comes late.
    pub breaks: bool,
}

/// What a cut holds back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ways {
    /// What is sent to safekeepers.
    Requests,
    /// What safekeepers send.
    Answers,
    /// Both.
    Both,
}

#[derive(Clone)]
struct Shared {
    cuts: Arc<watch::Sender<Vec<(u64, Cut)>>>,
    held: Arc<AtomicU64>,
}

impl Links {
    /// One for each of these safekeepers.
    pub async fn to(safekeepers: &[SocketAddr]) -> anyhow::Result<Links> {
        let shared = Shared { cuts: Arc::new(watch::Sender::new(Vec::new())), held: Arc::default() };
        let (mut addresses, mut tasks) = (Vec::new(), Vec::new());
        for (index, safekeeper) in safekeepers.iter().enumerate() {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
            addresses.push(listener.local_addr()?);
            tasks.push(tokio::spawn(accept(listener, index, *safekeeper, shared.clone())));
        }
        Ok(Links { addresses, shared, tasks })
    }

    /// Where to connect instead.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Cuts until [`Links::heal`] gets this number.
    pub fn cut(&self, cut: Cut) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Relaxed);
        self.shared.cuts.send_modify(|cuts| cuts.push((number, cut)));
        number
    }

    /// Ends a cut.
    pub fn heal(&self, number: u64) {
        self.shared.cuts.send_modify(|cuts| cuts.retain(|(other, _)| *other != number));
    }

    /// Pieces of WAL, answers and whatever else that had to wait so far: whether cuts have bitten.
    pub fn held(&self) -> u64 {
        self.shared.held.load(Relaxed)
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// One direction of one connection.
#[derive(Clone, Copy)]
struct Lane {
    safekeeper: usize,
    process: Option<i32>,
    way: Ways,
}

impl Cut {
    fn holds(&self, lane: Lane) -> bool {
        let whose = self.process.is_none() || self.process == lane.process;
        let way = self.ways == Ways::Both || self.ways == lane.way;
        whose && way && self.safekeepers.contains(&lane.safekeeper)
    }
}

async fn accept(listener: TcpListener, safekeeper: usize, target: SocketAddr, shared: Shared) {
    while let Ok((near, peer)) = listener.accept().await {
        let shared = shared.clone();
        tokio::spawn(async move {
            let Ok(far) = TcpStream::connect(target).await else { return };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let owner = tokio::task::spawn_blocking(move || processes::owner_of_port(peer.port())).await;
            let process = owner.ok().flatten();
            let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
            let lane = |way| Lane { safekeeper, process, way };
            // One direction's end is the other's too.
            tokio::select! {
                () = pass(near_read, far_write, lane(Ways::Requests), &shared) => {}
                () = pass(far_read, near_write, lane(Ways::Answers), &shared) => {}
            }
        });
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, lane: Lane, shared: &Shared) {
    let mut buffer = vec![0; 64 * 1024];
    let mut cuts = shared.cuts.subscribe();
    loop {
        let read = from.read(&mut buffer).await;
        // Also an end and a reset: nobody hears of them through a cut.
        while let Some(cut) = holding(&mut cuts, lane) {
            shared.held.fetch_add(1, Relaxed);
            let healed = cuts.wait_for(|cuts| !cuts.iter().any(|(_, cut)| cut.holds(lane))).await;
            if healed.is_err() || cut.breaks {
                return;
            }
        }
        let Ok(bytes @ 1..) = read else { return };
        if to.write_all(&buffer[..bytes]).await.is_err() {
            return;
        }
    }
}

fn holding(cuts: &mut watch::Receiver<Vec<(u64, Cut)>>, lane: Lane) -> Option<Cut> {
    cuts.borrow_and_update().iter().find(|(_, cut)| cut.holds(lane)).map(|(_, cut)| cut.clone())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_millis(300);

    /// A server that sends everything back, and a link to it.
    async fn echo() -> anyhow::Result<Links> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    tokio::io::copy(&mut read, &mut write).await
                });
            }
        });
        Links::to(&[address]).await
    }

    async fn ask(stream: &mut TcpStream) -> bool {
        let mut answer = [0];
        let exchange = async {
            stream.write_all(b"x").await?;
            stream.read_exact(&mut answer).await
        };
        matches!(timeout(SOON, exchange).await, Ok(Ok(_)))
    }

    fn own(process: Option<i32>, ways: Ways, breaks: bool) -> Cut {
        Cut { safekeepers: vec![0], process, ways, breaks }
    }

    #[tokio::test]
    async fn what_is_cut_is_silent_and_comes_late_or_never() -> anyhow::Result<()> {
        let links = echo().await?;
        let mut stream = TcpStream::connect(links.addresses()[0]).await?;
        assert!(ask(&mut stream).await);
        for ways in [Ways::Both, Ways::Requests, Ways::Answers] {
            let number = links.cut(own(None, ways, false));
            assert!(!ask(&mut stream).await, "{ways:?}");
            links.heal(number);
            let mut late = [0];
            timeout(SOON, stream.read_exact(&mut late)).await??;
            assert!(ask(&mut stream).await, "{ways:?}");
        }
        let number = links.cut(own(None, Ways::Both, true));
        assert!(!ask(&mut stream).await);
        links.heal(number);
        assert_eq!(timeout(SOON, stream.read(&mut [0])).await?.unwrap_or(0), 0, "it broke");
        assert_eq!(links.held(), 4);
        Ok(())
    }

    #[tokio::test]
    async fn one_process_can_be_cut_off_alone() -> anyhow::Result<()> {
        let links = echo().await?;
        let mut stream = TcpStream::connect(links.addresses()[0]).await?;
        let this = std::process::id() as i32;
        let other = links.cut(own(Some(this + 1), Ways::Both, false));
        assert!(ask(&mut stream).await, "another's");
        links.heal(other);
        links.cut(own(Some(this), Ways::Both, false));
        assert!(!ask(&mut stream).await, "its own");
        Ok(())
    }
}
