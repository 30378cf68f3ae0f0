//! Asking the control plane for the generation to write under.

use std::{net::SocketAddr, time::Duration};

use anyhow::Context as _;
use control_plane_api::internal::{GenerationTaken, TakeGeneration};
use tokio::time::sleep;

use crate::config::Config;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The generation, from the settings or from the control plane, and which projects are served by others. Repeated while the control plane can't be reached;
/// errors when it refuses.
pub(super) async fn take(config: &Config, address: SocketAddr) -> anyhow::Result<GenerationTaken> {
    if let Some(generation) = config.generation {
        return Ok(GenerationTaken { generation, elsewhere: Vec::new(), safekeepers: Vec::new() });
    }
    let base = config.control_plane.as_deref().context("neither --control-plane nor --generation is given")?;
    let url = format!("{}/internal/v1/generations", base.trim_end_matches('/'));
    let client = reqwest::Client::builder().timeout(REQUEST_TIMEOUT).no_proxy().build()?;
    let address = config.advertise.clone().unwrap_or_else(|| address.to_string());
    let asked = TakeGeneration { pageserver: config.id, address };
    let mut pause = FIRST_PAUSE;
    loop {
        let request = client.post(&url).bearer_auth(&config.token).json(&asked);
        match request.send().await {
            Ok(response) if response.status().is_success() => {
                return response.json().await.context("the control plane's answer");
            }
            Ok(response) if response.status().is_client_error() => {
                anyhow::bail!("the control plane refuses a generation: {}", response.status());
            }
            Ok(response) => tracing::warn!(status = %response.status(), "the control plane gives no generation yet"),
            Err(error) => tracing::warn!(error = %error.without_url(), "the control plane can't be reached yet"),
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
