//! Single questions to one safekeeper.

use std::time::Duration;

use safekeeper_protocol::message::{Answer, RequestBody};
pub use safekeeper_protocol::message::{BranchStatus, NodeStatus, ReplicationAddress};
use tokio::time::timeout;
use types::{BranchId, BranchRef, Lsn, Membership, ProjectId};

use crate::connection::{Connection, ConnectionError, welcome};

const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a safekeeper did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// It could not be reached; try again.
    #[error("{0}")]
    Unreachable(String),
    /// The token does not allow it.
    #[error("{0}")]
    Denied(String),
    /// It answered that it can't.
    #[error("safekeeper {address}: {reason}")]
    Failed {
        /// `host:port`.
        address: String,
        /// In its words.
        reason: String,
    },
}

impl From<ConnectionError> for AdminError {
    fn from(error: ConnectionError) -> AdminError {
        match &error {
            ConnectionError::Denied { .. } => AdminError::Denied(error.to_string()),
            ConnectionError::Connect { .. }
            | ConnectionError::Wire { .. }
            | ConnectionError::Closed { .. }
            | ConnectionError::Silent { .. } => AdminError::Unreachable(error.to_string()),
        }
    }
}

/// Where a branch stands on one safekeeper. All zero when it has never heard of the branch.
pub async fn branch_status(address: &str, token: &str, branch: &BranchRef) -> Result<BranchStatus, AdminError> {
    match ask(address, token, branch, RequestBody::Status).await? {
        Answer::Status(status) => Ok(status),
        Answer::Done | Answer::Membership(_) | Answer::Node(_) => Err(failed(address, "unexpected answer".to_owned())),
        Answer::Failed(reason) => Err(failed(address, reason)),
    }
}

/// The newest membership of a branch that one safekeeper has been told of, if any.
pub async fn branch_membership(
    address: &str,
    token: &str,
    branch: &BranchRef,
) -> Result<Option<Membership>, AdminError> {
    match ask(address, token, branch, RequestBody::Membership).await? {
        Answer::Membership(membership) => Ok(membership),
        Answer::Done | Answer::Status(_) | Answer::Node(_) => Err(failed(address, "unexpected answer".to_owned())),
        Answer::Failed(reason) => Err(failed(address, reason)),
    }
}

/// Tells one safekeeper of a branch's membership, which must have been stored before; answers where the branch stands there,
/// with the highest generation that it has heard of. One that is not a member any more, of a membership that is not joint, drops
/// the branch's WAL. Repeating it is harmless. Needs a service's token.
pub async fn set_branch_membership(
    address: &str,
    token: &str,
    branch: &BranchRef,
    membership: &Membership,
) -> Result<BranchStatus, AdminError> {
    let body = RequestBody::SetMembership { membership: membership.clone() };
    match ask(address, token, branch, body).await? {
        Answer::Status(status) => Ok(status),
        Answer::Done | Answer::Membership(_) | Answer::Node(_) => Err(failed(address, "unexpected answer".to_owned())),
        Answer::Failed(reason) => Err(failed(address, reason)),
    }
}

/// How a safekeeper itself does. Needs a service's token.
pub async fn node_status(address: &str, token: &str) -> Result<NodeStatus, AdminError> {
    // Every request names a branch; nobody looks at this one.
    let (project, branch) = (ProjectId::new("any").expect("a valid id"), BranchId::new("any").expect("a valid id"));
    match ask(address, token, &BranchRef { project, branch }, RequestBody::Node).await? {
        Answer::Node(status) => Ok(status),
        Answer::Done | Answer::Status(_) | Answer::Membership(_) => {
            Err(failed(address, "unexpected answer".to_owned()))
        }
        Answer::Failed(reason) => Err(failed(address, reason)),
    }
}

/// Removes a branch's WAL from one safekeeper for good: the branch's id is refused there from then on. Repeating it is
/// harmless. Needs a service's token.
pub async fn delete_branch(address: &str, token: &str, branch: &BranchRef) -> Result<(), AdminError> {
    done(address, ask(address, token, branch, RequestBody::Delete).await?)
}

/// Tells one safekeeper that everything up to here is in the object store. Needs a service's token.
pub async fn report_remote_consistent(
    address: &str,
    token: &str,
    branch: &BranchRef,
    remote_consistent_lsn: Lsn,
) -> Result<(), AdminError> {
    done(address, ask(address, token, branch, RequestBody::Report { remote_consistent_lsn }).await?)
}

fn done(address: &str, answer: Answer) -> Result<(), AdminError> {
    match answer {
        Answer::Done => Ok(()),
        Answer::Status(_) | Answer::Membership(_) | Answer::Node(_) => {
            Err(failed(address, "unexpected answer".to_owned()))
        }
        Answer::Failed(reason) => Err(failed(address, reason)),
    }
}

fn failed(address: &str, reason: String) -> AdminError {
    AdminError::Failed { address: address.to_owned(), reason }
}

async fn ask(address: &str, token: &str, branch: &BranchRef, body: RequestBody) -> Result<Answer, AdminError> {
    let exchange = async {
        let mut connection = Connection::open(address, token, branch, body).await?;
        let wire = |source| ConnectionError::Wire { address: address.to_owned(), source };
        connection.writer.flush().await.map_err(wire)?;
        welcome(address, &mut connection.reader).await?;
        let answer = connection.reader.recv::<Answer>().await.map_err(wire)?;
        answer.ok_or_else(|| ConnectionError::Closed { address: address.to_owned() })
    };
    let silent = |_| ConnectionError::Silent { address: address.to_owned() };
    Ok(timeout(ANSWER_TIMEOUT, exchange).await.map_err(silent)??)
}
