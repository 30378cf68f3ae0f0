//! A second compute for a branch that has one: what a control plane would start that thinks the first is dead.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, bail};
use control_plane_api::compute::{AgentEvent, ComputeSpec};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, Command},
};
use types::{BranchRef, EndpointId, Member, Membership, NodeId};

use crate::{Cluster, cluster::dormouse_binary};

/// Longest wait for it to be ready; it can't be while a majority of the safekeepers is away.
const START_LIMIT: Duration = Duration::from_secs(60);

/// A compute that the control plane does not know of. Killed when dropped.
pub struct SecondCompute {
    agent: Child,
    /// Postgres's socket is in it.
    pub directory: PathBuf,
    /// The agent's process.
    pub pid: i32,
}

impl SecondCompute {
    /// Starts one. `None` when it was fenced before it was ready, as the first compute may be started anew meanwhile.
    pub async fn start(
        cluster: &Cluster,
        branch: &BranchRef,
        safekeepers: &[SocketAddr],
    ) -> anyhow::Result<Option<SecondCompute>> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let name = format!("second-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let log = std::fs::File::create(cluster.data_dir().join(format!("logs/{name}.log")))?;
        let spec = serde_json::to_vec(&spec(cluster, branch, safekeepers, &name).await?)?;
        let mut agent = Command::new(dormouse_binary())
            .arg("compute")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .context("starting a second compute")?;
        let pid = agent.id().context("its process")? as i32;
        let (Some(mut stdin), Some(stdout)) = (agent.stdin.take(), agent.stdout.take()) else { bail!("no pipes") };
        stdin.write_all(&spec).await?;
        drop(stdin);
        let mut line = String::new();
        let mut stdout = BufReader::new(stdout);
        let told = tokio::time::timeout(START_LIMIT, stdout.read_line(&mut line)).await;
        told.with_context(|| format!("{name} was not ready within {START_LIMIT:?}"))??;
        match serde_json::from_str(&line) {
            Ok(AgentEvent::Ready(_)) => {
                Ok(Some(SecondCompute { agent, directory: cluster.runtime_dir().join(&name), pid }))
            }
            Ok(AgentEvent::Failed { error }) => {
                println!("{name} did not start: {error}");
                Ok(None)
            }
            Err(error) => bail!("{name} said {line:?}: {error}"),
        }
    }

    /// Waits until it has ended by itself: it was fenced, or killed.
    pub async fn ended(&mut self, limit: Duration) -> anyhow::Result<()> {
        let ended = tokio::time::timeout(limit, self.agent.wait()).await;
        ended.context("the second compute goes on although the first was started anew")??;
        Ok(())
    }
}

async fn spec(
    cluster: &Cluster,
    branch: &BranchRef,
    safekeepers: &[SocketAddr],
    name: &str,
) -> anyhow::Result<ComputeSpec> {
    let pageserver = cluster.pageserver()?;
    let (_, branch_start_lsn) = pageserver.branch_info(branch).await?.ancestor.context("the branch has an ancestor")?;
    let member = |(index, address): (usize, &SocketAddr)| Member {
        node: NodeId(index as u64 + 1),
        address: address.to_string(),
    };
    let is_root = nix::unistd::Uid::effective().is_root();
    Ok(ComputeSpec {
        branch: branch.clone(),
        endpoint: EndpointId::new(&format!("ep-{name}"))?,
        branch_start_lsn,
        compute_dir: cluster.runtime_dir().join(name),
        page_cache_dir: cluster.runtime_dir().join(format!("{name}-pages")),
        membership: Membership::first(safekeepers.iter().enumerate().map(member).collect()),
        pageserver: pageserver.address().to_owned(),
        token: cluster.branch_token(branch)?,
        postgres_bin_dir: crate::pg_bin_dir(),
        shim_path: cluster.shim().context("no compute has been started yet")?,
        postgres_user: is_root.then(|| "postgres".to_owned()),
        settings: BTreeMap::new(),
        catalog: None,
        disable_subscriptions: false,
        page_cache_bytes: 64 << 20,
        kept_pages_bytes: 256 << 20,
        sleeping_caches_bytes: 0,
    })
}
