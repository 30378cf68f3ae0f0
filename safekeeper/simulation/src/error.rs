//! How a run can fail.

/// What the observer saw that must never be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SimError {
    /// Something committed is not on a majority.
    #[error("lost: {0}")]
    Lost(String),
    /// Two logs, or two leaders, that can't both be right.
    #[error("diverged: {0}")]
    Diverged(String),
    /// Faults have stopped, and still nothing goes on.
    #[error("stuck: {0}")]
    Stuck(String),
    /// The state machines asked for something that makes no sense.
    #[error("wrong: {0}")]
    Wrong(String),
}

impl SimError {
    /// The same with where it happened in front.
    pub(crate) fn at(self, place: &str) -> SimError {
        let with = |text: String| format!("{place}: {text}");
        match self {
            SimError::Lost(text) => SimError::Lost(with(text)),
            SimError::Diverged(text) => SimError::Diverged(with(text)),
            SimError::Stuck(text) => SimError::Stuck(with(text)),
            SimError::Wrong(text) => SimError::Wrong(with(text)),
        }
    }
}

impl From<String> for SimError {
    fn from(text: String) -> SimError {
        SimError::Wrong(text)
    }
}
