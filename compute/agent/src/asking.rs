//! Questions to the pageserver that a start cannot do without.

use std::time::Duration;

use pageserver_client::ClientError;
use types::Lsn;

/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(200);

/// A warning is logged at the first and then at every so many attempts.
const ATTEMPTS_PER_WARNING: u32 = 25;

/// Asks until the pageserver answers, unless asking again cannot help.
pub async fn patiently<T, F>(what: &str, at: Lsn, ask: impl Fn() -> F) -> Result<T, ClientError>
where
    F: Future<Output = Result<T, ClientError>>,
{
    let mut attempts = 0u32;
    loop {
        match ask().await {
            Err(error) if error.is_retryable() => {
                if attempts.is_multiple_of(ATTEMPTS_PER_WARNING) {
                    tracing::warn!(%error, lsn = %at, "waiting for {what}");
                }
                attempts += 1;
                tokio::time::sleep(PAUSE).await;
            }
            answer => return answer,
        }
    }
}
