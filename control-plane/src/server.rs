//! Puts the control plane together: keys, store, services, listener.

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use types::Member;
use wire::Scope;

use crate::{
    address::ProxyAddress,
    app::App,
    branching::Interrupted,
    compute::{ComputeSettings, Computes, ProcessLauncher},
    config::{Config, api_url_path},
    garbage, host, http,
    keys::{self, InstallationKeys},
    leftovers, membership,
    storage::{Services, Storage},
    store::{Store, generations, memberships, operations},
};

/// The control plane's own token for pageserver and safekeepers.
const SERVICE_TOKEN_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How often what a stop interrupted is tried again.
const CLEAN_UP_INTERVAL: Duration = Duration::from_secs(10);
/// Longer than a control plane takes to put its computes to sleep.
const LOCK_TIMEOUT: Duration = Duration::from_secs(50);
const LOCK_INTERVAL: Duration = Duration::from_millis(50);
/// How long requests in flight may take at the end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
const MIB: u64 = 1024 * 1024;
const ADMIN_KEY_HASH: &str = "admin_key_hash";

/// A control plane that listens and does not answer yet.
pub struct Server {
    listener: TcpListener,
    app: Arc<App>,
    interrupted: Interrupted,
    stop_computes_at_exit: bool,
    gc_interval: Duration,
    _lock: Flock<File>,
}

impl Server {
    /// Makes keys and directories at the first start, opens the store and takes the address. `shim` is where the shim is
    /// unless the settings name another.
    pub async fn bind(config: Config, shim: &Path) -> anyhow::Result<Server> {
        std::fs::create_dir_all(config.log_dir()).with_context(|| format!("making {}", config.log_dir().display()))?;
        let lock = lock(&config.data_dir).await?;
        let listener = match TcpListener::bind(config.listen).await {
            Ok(listener) => listener,
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
                anyhow::bail!("address {} is already in use; choose another with --listen", config.listen)
            }
            Err(e) => return Err(e).with_context(|| format!("listening on {}", config.listen)),
        };
        let keys = InstallationKeys::open_or_create(&config.data_dir)?;
        let store = Store::open(&config.database_path())?;
        let admin_key_hash = admin_key_hash(&store, &keys.paths.admin).await?;
        store.call(operations::fail_interrupted).await?;
        let token = keys.signer.sign(Scope::Service, SERVICE_TOKEN_LIFETIME)?;
        let settings = compute_settings(&config, shim)?;
        let safekeepers: Vec<Member> = config.safekeepers.iter().map(|arg| arg.0.clone()).collect();
        store.call(move |db| memberships::configure(db, &safekeepers)).await?;
        let services = Services::new(config.pageserver.clone(), token);
        services.set_placements(store.call(generations::placements).await?);
        let storage = Arc::new(services);
        let program = std::env::current_exe().context("finding this program")?;
        let launcher = Arc::new(ProcessLauncher::new(program, config.log_dir()));
        let computes = Computes::new(store.clone(), Arc::clone(&storage) as _, launcher, keys.signer, settings);
        computes.adopt().await?;
        let address = ProxyAddress { domain: config.domain, host: config.proxy_host, port: config.proxy_port };
        let gc_slack_seconds = config.gc_slack_seconds;
        let verifier = keys.verifier;
        let safekeepers_changed = Arc::default();
        let app =
            App { store, storage, computes, address, admin_key_hash, verifier, safekeepers_changed, gc_slack_seconds };
        let url = format!("http://{}\n", listener.local_addr()?);
        std::fs::write(api_url_path(&config.data_dir), url).context("writing api.url")?;
        let interrupted = Interrupted::read(&app.store).await?;
        Ok(Server {
            listener,
            app: Arc::new(app),
            interrupted,
            stop_computes_at_exit: config.stop_computes_at_exit,
            gc_interval: Duration::from_secs(config.gc_interval_seconds.max(1)),
            _lock: lock,
        })
    }

    /// The address that was taken.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        tracing::info!(address = %self.local_addr()?, "control plane is listening");
        let cleaning = tokio::spawn(clean_up(Arc::clone(&self.app), self.interrupted));
        let moving = tokio::spawn(membership::run(Arc::clone(&self.app)));
        let collecting = tokio::spawn(garbage::run(Arc::clone(&self.app), self.gc_interval));
        let deleting = tokio::spawn(leftovers::run(Arc::clone(&self.app), leftovers::PERIOD));
        let stop = shutdown.clone();
        let serving = axum::serve(self.listener, http::router(Arc::clone(&self.app)))
            .with_graceful_shutdown(async move { stop.cancelled().await });
        let serving = tokio::spawn(async move { serving.await });
        shutdown.cancelled().await;
        cleaning.abort();
        moving.abort();
        collecting.abort();
        deleting.abort();
        if self.stop_computes_at_exit {
            self.app.computes.stop_all().await;
        }
        match tokio::time::timeout(DRAIN_TIMEOUT, serving).await {
            Ok(served) => served.context("serving")?.context("serving")?,
            Err(_) => tracing::warn!("requests were still in flight at the end"),
        }
        tracing::info!("control plane has stopped");
        Ok(())
    }
}

/// At most one control plane has a data directory: two would each think that they own its computes. One that was told to stop
/// may still be putting computes to sleep, so it is waited for.
async fn lock(data_dir: &Path) -> anyhow::Result<Flock<File>> {
    let path = data_dir.join("control-plane.lock");
    let deadline = Instant::now() + LOCK_TIMEOUT;
    let mut told = false;
    loop {
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.with_context(|| format!("opening {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                if !told {
                    tracing::warn!("another control plane has this data directory; waiting for it to stop");
                    told = true;
                }
                tokio::time::sleep(LOCK_INTERVAL).await;
            }
            Err((_, Errno::EWOULDBLOCK)) => anyhow::bail!(
                "another control plane runs with the data directory {}; stop it, or choose another with --data-dir",
                data_dir.display()
            ),
            Err((_, error)) => return Err(error).with_context(|| format!("locking {}", path.display())),
        }
    }
}

/// Binds and runs. `shim`: see [`Server::bind`].
pub async fn run(config: Config, shim: &Path, shutdown: CancellationToken) -> anyhow::Result<()> {
    Server::bind(config, shim).await?.run(shutdown).await
}

/// The stored hash of the admin's API key. The key is made at the first start.
async fn admin_key_hash(store: &Store, path: &Path) -> anyhow::Result<[u8; 32]> {
    let stored = match store.meta(ADMIN_KEY_HASH).await? {
        Some(stored) => stored,
        None => {
            let made = keys::make_admin_key(path)?;
            store.set_meta(ADMIN_KEY_HASH, made.clone()).await?;
            tracing::info!(path = %path.display(), "admin API key was made");
            made
        }
    };
    let mut hash = [0u8; 32];
    let valid = stored.len() == 64
        && hash.iter_mut().enumerate().all(|(i, byte)| {
            let digits = stored.get(2 * i..2 * i + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
            digits.map(|value| *byte = value).is_some()
        });
    anyhow::ensure!(valid, "the stored hash of the admin's API key is damaged");
    Ok(hash)
}

fn compute_settings(config: &Config, shim: &Path) -> anyhow::Result<ComputeSettings> {
    Ok(ComputeSettings {
        runtime_dir: host::runtime_dir(config.runtime_dir.as_deref())?,
        page_cache_dir: host::disk_dir(&absolute(&config.data_dir)?, "page-cache")?,
        postgres_bin_dir: host::postgres_bin_dir(config.postgres_bin_dir.as_deref())?,
        shim_path: config.shim_path.clone().unwrap_or_else(|| shim.to_owned()),
        postgres_user: host::postgres_user(config.postgres_user.as_deref())?,
        page_cache_bytes: config.page_cache.page_cache_mib.saturating_mul(MIB),
        kept_pages_bytes: config.page_cache.kept_pages_mib.saturating_mul(MIB),
        sleeping_caches_bytes: config.page_cache.sleeping_caches_mib.saturating_mul(MIB),
        wake_timeout: config.wake_timeout(),
    })
}

/// Agents run in another directory: a relative path would mean something else to them.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("{}", path.display()))
}

async fn clean_up(app: Arc<App>, interrupted: Interrupted) {
    while let Err(error) = interrupted.clean_up(&app).await {
        tracing::warn!(%error, "finishing interrupted deletions; trying again");
        tokio::time::sleep(CLEAN_UP_INTERVAL).await;
    }
}
