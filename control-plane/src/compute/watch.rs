//! Watches running computes, and finds those that outlived the control plane that started them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use time::OffsetDateTime;

use super::{
    idle,
    manager::{Computes, Phase, Route, Running, SuspendReason},
};
use crate::{
    problem::Problem,
    store::{branches, endpoints},
};

/// How often a compute is asked how it is.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How long a compute that was being started when the control plane ended may take to come up.
const ADOPTION_TIMEOUT: Duration = Duration::from_secs(60);
const ADOPTION_INTERVAL: Duration = Duration::from_millis(100);
/// Postgres's socket in a compute directory (the port is part of its name only).
const POSTGRES_SOCKET: &str = ".s.PGSQL.5432";
/// The agent's socket in a compute directory.
const AGENT_SOCKET: &str = "agent.sock";

/// Looks after a running compute until it sleeps or dies.
pub(super) fn watch(computes: Computes, route: Arc<Route>, running: Arc<Running>) {
    tokio::spawn(async move {
        let mut problem_logged = false;
        loop {
            tokio::time::sleep(POLL_INTERVAL).await;
            if !is_current(&route, &running) {
                return;
            }
            if !computes.inner.launcher.is_alive(running.process) {
                let _turn = route.slot.turn.lock().await;
                if is_current(&route, &running) {
                    log_failure(computes.bury(&route.slot).await);
                }
                return;
            }
            let status = match computes.inner.launcher.status(&running.agent_socket).await {
                Ok(status) => status,
                Err(error) => {
                    tracing::debug!(endpoint = %running.endpoint, %error, "agent status");
                    continue;
                }
            };
            if let Some(problem) = status.problem.filter(|_| !problem_logged) {
                tracing::warn!(endpoint = %running.endpoint, branch = %route.slot.branch, problem, "compute has a problem");
                problem_logged = true;
            }
            let idle = Duration::from_millis(status.idle_ms);
            *running.last_active.lock() = OffsetDateTime::now_utc() - idle;
            if may_sleep(&computes, &route, idle).await {
                log_failure(put_to_sleep(&computes, &route, &running).await);
            }
        }
    });
}

fn is_current(route: &Route, running: &Arc<Running>) -> bool {
    matches!(&route.slot.state.lock().phase, Phase::Awake(now) if Arc::ptr_eq(now, running))
}

fn log_failure(outcome: Result<(), Problem>) {
    if let Err(error) = outcome {
        tracing::error!(%error, "watching a compute");
    }
}

async fn may_sleep(computes: &Computes, route: &Route, idle: Duration) -> bool {
    // The timeout may have been changed since the compute was started.
    let timeout = match computes.route(&route.endpoint).await {
        Ok(now) => now.suspend_timeout,
        Err(_) => route.suspend_timeout,
    };
    let since_wake = route.slot.state.lock().last_wake.elapsed();
    idle::may_sleep(timeout, idle, since_wake)
}

/// Stops it unless someone came in the meantime.
async fn put_to_sleep(computes: &Computes, route: &Arc<Route>, running: &Arc<Running>) -> Result<(), Problem> {
    let _turn = route.slot.turn.lock().await;
    if !is_current(route, running) {
        return Ok(());
    }
    let Ok(status) = computes.inner.launcher.status(&running.agent_socket).await else { return Ok(()) };
    if !may_sleep(computes, route, Duration::from_millis(status.idle_ms)).await {
        return Ok(());
    }
    computes.stop(&route.slot, running, SuspendReason::Idle).await.map(|_| ())
}

impl Computes {
    /// Takes over computes that outlived the control plane before this one. Their turns are held when this returns, so that
    /// a wake waits until it is known how they are.
    pub async fn adopt(&self) -> Result<(), Problem> {
        for row in self.inner.store.call(endpoints::with_agents).await? {
            let Some(process) = row.agent else { continue };
            let route = match self.route(&row.id).await {
                Ok(route) => route,
                Err(error) => {
                    tracing::debug!(endpoint = %row.id, %error, "a compute without a branch");
                    self.inner.launcher.kill(process);
                    continue;
                }
            };
            let turn = Arc::clone(&route.slot.turn).lock_owned().await;
            route.slot.state.lock().phase = Phase::Starting(row.id.clone());
            let directory = self.compute_dir(&row.id);
            let running = Arc::new(Running {
                endpoint: row.id,
                process,
                agent_socket: directory.join(AGENT_SOCKET),
                postgres_socket: directory.join(POSTGRES_SOCKET),
                last_active: Mutex::new(OffsetDateTime::now_utc()),
            });
            let this = self.clone();
            tokio::spawn(async move {
                let _turn = turn;
                log_failure(this.adopt_one(&route, running).await);
            });
        }
        Ok(())
    }

    async fn adopt_one(&self, route: &Arc<Route>, running: Arc<Running>) -> Result<(), Problem> {
        let deadline = Instant::now() + ADOPTION_TIMEOUT;
        let wanted = route.slot.branch.clone();
        let row = self.inner.store.call(move |db| branches::get(db, &wanted.project, &wanted.branch)).await?;
        while self.inner.launcher.is_alive(running.process) && Instant::now() < deadline {
            let status = self.inner.launcher.status(&running.agent_socket).await;
            if status.is_ok_and(|status| status.running && status.branch == row.timeline) {
                tracing::info!(endpoint = %running.endpoint, branch = %route.slot.branch, "compute was found awake");
                {
                    let mut state = route.slot.state.lock();
                    state.last_wake = Instant::now();
                    state.phase = Phase::Awake(Arc::clone(&running));
                }
                watch(self.clone(), Arc::clone(route), running);
                // The control plane before may not have come to record that it was ready.
                let timeline = row.timeline.branch;
                let own = move |db: &_| branches::subscriptions_are_its_own(db, &timeline);
                return self.inner.store.call(own).await;
            }
            tokio::time::sleep(ADOPTION_INTERVAL).await;
        }
        tracing::info!(endpoint = %running.endpoint, branch = %route.slot.branch, "compute did not outlive the control plane");
        self.inner.launcher.kill(running.process);
        route.slot.state.lock().phase = Phase::Idle;
        let (endpoint, branch) = (running.endpoint.clone(), route.slot.branch.branch.clone());
        self.inner
            .store
            .call(move |db| {
                endpoints::asleep(db, &endpoint, None)?;
                branches::set_settled(db, &branch, None)
            })
            .await
    }
}
