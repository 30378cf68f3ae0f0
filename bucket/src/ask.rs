//! Asking the object store where its client does not ask again, and telling of errors.

use std::{
    error::Error,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use object_store::client::{HttpError, HttpErrorKind};

/// Pause before an answer that broke off is asked for again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Times that a listing or a deletion is asked for whose answer breaks off.
const BROKEN_ANSWERS: usize = 5;

/// Asks again where the client does not: it repeats requests and goes on with an object's content, but a listing or a deletion it
/// lets fail whose answer breaks off, and a deletion that is not answered (it can't know that deleting twice is harmless). At most five times.
pub async fn whole<T, A: Future<Output = object_store::Result<T>>>(
    is_broken: fn(&object_store::Error) -> bool,
    ask: impl Fn() -> A,
) -> object_store::Result<T> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..BROKEN_ANSWERS {
        match ask().await {
            Err(error) if is_broken(&error) => tokio::time::sleep(with_jitter(pause)).await,
            outcome => return outcome,
        }
        pause *= 2;
    }
    ask().await
}

/// Up to half as long again, so that not all ask at the same moment.
pub fn with_jitter(pause: Duration) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    pause + pause * (now.subsec_micros() % 8) / 16
}

/// True when the connection failed after the request was answered: what the client has repeated in vain, and is not to be repeated
/// again, lies deeper.
pub fn broke_off(error: &object_store::Error) -> bool {
    error.source().and_then(Error::source).is_some_and(|cause| cause.is::<HttpError>())
}

/// For deletions.
pub fn is_unanswered(error: &object_store::Error) -> bool {
    let mut causes = std::iter::successors(error.source(), |cause| (*cause).source());
    let http = causes.find_map(|cause| cause.downcast_ref::<HttpError>());
    broke_off(error)
        || http.is_some_and(|http| matches!(http.kind(), HttpErrorKind::Interrupted | HttpErrorKind::Timeout))
}

/// What to say of an error: the client's text, the deepest cause, and what to do.
pub fn reason_of(error: &object_store::Error) -> String {
    use object_store::Error::{PermissionDenied, Unauthenticated};
    let advice = match error {
        PermissionDenied { .. } | Unauthenticated { .. } => "check the credentials and what they allow",
        _other => "it may be tried again; if it goes on failing, check the store and the way to it",
    };
    // The client's text leaves out why there was no answer.
    let text = error.to_string();
    let mut cause: &dyn Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    let cause = cause.to_string();
    let reason = if text.contains(&cause) { text } else { format!("{text}: {cause}") };
    format!("{reason}; {advice}")
}
