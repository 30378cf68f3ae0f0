//! How a branch's WAL is followed straight from its safekeepers, by Postgres's own replication protocol: a token that is good for
//! nothing else, and where they are.

use std::{net::IpAddr, time::Duration};

use control_plane_api::v2::{WalReader, WalReaderRequest};
use futures::future::join_all;
use safekeeper_client::ReplicationAddress;
use time::OffsetDateTime;
use types::{BranchRef, Member, NodeId};

use crate::{
    app::App,
    problem::Problem,
    store::{self, branches, memberships},
};

/// How long a token is good unless it is asked for otherwise: 90 days.
const DEFAULT_SECONDS: u64 = 90 * 86_400;
/// The longest: a year. A token can't be taken back.
const MAX_SECONDS: u64 = 365 * 86_400;
const MIN_SECONDS: u64 = 60;
/// How long libpq waits for a safekeeper that does not answer before it tries the next.
const CONNECT_SECONDS: u32 = 10;

/// Makes a token for a branch, and asks its safekeepers where they are reached.
pub async fn wal_reader(app: &App, branch: BranchRef, request: WalReaderRequest) -> Result<WalReader, Problem> {
    let seconds = request.expires_in_seconds.unwrap_or(DEFAULT_SECONDS);
    if !(MIN_SECONDS..=MAX_SECONDS).contains(&seconds) {
        return Err(Problem::Invalid(format!("expires_in_seconds must be {MIN_SECONDS} to {MAX_SECONDS}")));
    }
    let found = app.store.call(move |db| {
        let row = branches::get(db, &branch.project, &branch.branch)?;
        let membership = memberships::of(db, &row.timeline.branch)?;
        Ok((row.timeline, membership))
    });
    let (timeline, membership) = found.await?;
    let asked = join_all(membership.all().into_iter().map(async |member| {
        let status = app.storage.safekeeper_status(&member.address).await;
        let replication = status.map(|status| status.replication.filter(|_| status.node == member.node));
        (member, replication)
    }))
    .await;
    let (mut reached, mut missing) = (Vec::new(), Vec::new());
    for (member, replication) in asked {
        match replication {
            Ok(Some(replication)) => reached.push(Reached::of(&member, &replication)?),
            Ok(None) | Err(_) => missing.push(member.node),
        }
    }
    if reached.is_empty() {
        let which = missing.iter().map(NodeId::to_string).collect::<Vec<_>>().join(", ");
        return Err(Problem::Refused(format!(
            "none of the branch's safekeepers ({which}) gives out WAL for replication: they must run with --replication-listen"
        )));
    }
    let token = app.computes.wal_reader_token(timeline.clone(), Duration::from_secs(seconds))?;
    let expires_at = store::at(OffsetDateTime::now_utc() + Duration::from_secs(seconds));
    Ok(WalReader { conninfo: conninfo(&reached, &timeline, &token), expires_at, missing_safekeepers: missing })
}

/// Where one safekeeper is reached by clients.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reached {
    host: String,
    port: String,
    tls: bool,
}

impl Reached {
    fn of(member: &Member, replication: &ReplicationAddress) -> Result<Reached, Problem> {
        let (host, port) = host_and_port(&replication.address)?;
        let is_any = host.parse().is_ok_and(|ip: IpAddr| ip.is_unspecified());
        let host = if is_any { host_and_port(&member.address)?.0 } else { host };
        Ok(Reached { host, port, tls: replication.tls })
    }
}

fn host_and_port(address: &str) -> Result<(String, String), Problem> {
    let parts = address.rsplit_once(':').filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    let (host, port) = parts.ok_or_else(|| Problem::Internal(format!("{address:?} is not host:port")))?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    Ok((host.to_owned(), port.to_owned()))
}

/// What libpq takes. Its hosts are tried in this order.
fn conninfo(reached: &[Reached], timeline: &BranchRef, token: &str) -> String {
    let list = |part: fn(&Reached) -> &str| reached.iter().map(part).collect::<Vec<_>>().join(",");
    let (hosts, ports) = (list(|one| &one.host), list(|one| &one.port));
    let tls = if reached.iter().all(|one| one.tls) { " sslmode=require" } else { "" };
    format!("host={hosts} port={ports} user={timeline} password={token} connect_timeout={CONNECT_SECONDS}{tls}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libpq_is_told_all_hosts() {
        let member = |node: u64, address: &str| Member { node: NodeId(node), address: address.to_owned() };
        let reached = |at: &str, own: &str, tls| {
            let replication = ReplicationAddress { address: own.to_owned(), tls };
            Reached::of(&member(1, at), &replication).expect("good")
        };
        let three = [
            reached("10.0.0.1:7001", "0.0.0.0:7101", false),
            reached("[fd00::2]:7001", "[::]:7102", true),
            reached("10.0.0.3:7001", "wal.example.com:7103", true),
        ];
        let branch = BranchRef { project: "p".parse().expect("id"), branch: "b".parse().expect("id") };
        let expected =
            "host=10.0.0.1,fd00::2,wal.example.com port=7101,7102,7103 user=p/b password=t connect_timeout=10";
        assert_eq!(conninfo(&three, &branch, "t"), expected);
        let expected =
            "host=fd00::2,wal.example.com port=7102,7103 user=p/b password=t connect_timeout=10 sslmode=require";
        assert_eq!(conninfo(&three[1..], &branch, "t"), expected);
        assert!(host_and_port("host").is_err() && host_and_port(":1").is_err());
    }
}
