//! Where clients of a project may come from.

use std::net::IpAddr;

use control_plane_api::v2::{AllowedIps, ProjectSettings};
use ipnet::IpNet;

use crate::problem::Problem;

/// Most addresses and networks of a project: proxies are told of all at each login.
const MAX_NETWORKS: usize = 200;

/// Checks what is asked for.
pub fn check(settings: Option<ProjectSettings>) -> Result<Option<AllowedIps>, Problem> {
    let Some(allowed) = settings.and_then(|settings| settings.allowed_ips) else { return Ok(None) };
    if allowed.ips.len() > MAX_NETWORKS {
        return Err(Problem::Invalid(format!("settings.allowed_ips: at most {MAX_NETWORKS} addresses and networks")));
    }
    if let Some(bad) = allowed.ips.iter().find(|text| parse(text).is_none()) {
        let bad: String = bad.chars().take(60).collect();
        let message = format!("settings.allowed_ips: {bad:?} is neither an address nor a network such as 192.0.2.0/24");
        return Err(Problem::Invalid(message));
    }
    Ok(Some(allowed))
}

/// What proxies are told: the networks from which a branch may be reached; none for any.
pub fn of_branch(settings: &ProjectSettings, is_protected: bool) -> Vec<IpNet> {
    let allowed = settings.allowed_ips.as_ref().filter(|allowed| is_protected || !allowed.protected_branches_only);
    allowed.into_iter().flat_map(|allowed| &allowed.ips).filter_map(|text| parse(text)).collect()
}

fn parse(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse().ok().map(|address: IpAddr| address.into()))
}
