//! How many failed logins are borne: from one address, and on one endpoint from one address. Those that succeed cost
//! nothing, so that no client with the right password is ever held up by its own number.

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use moka::sync::Cache;
use parking_lot::Mutex;
use types::EndpointId;

/// Addresses that are remembered, and pairs of address and endpoint.
const CAPACITY: u64 = 100_000;

/// A balance is forgotten when it has certainly filled up again.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);

/// After so long every balance is full again.
const FORGIVEN_AFTER: Duration = Duration::from_secs(120);

/// Failures from one address, on whatever endpoints, that are borne at once, and how fast that is forgiven.
const BY_ADDRESS: Allowance = Allowance { burst: 200.0, per_second: 2.0 };

/// Failures on one endpoint from one address.
const BY_ENDPOINT: Allowance = Allowance { burst: 30.0, per_second: 0.5 };

#[derive(Debug, Clone, Copy)]
struct Allowance {
    burst: f64,
    per_second: f64,
}

/// What is left of an allowance.
#[derive(Debug, Clone, Copy)]
struct Balance {
    left: f64,
    at: Duration,
}

/// Counts failed logins. No clock inside: `now` is the time since some start.
pub struct LoginLimit {
    by_address: Cache<IpAddr, Arc<Mutex<Balance>>>,
    by_endpoint: Cache<(IpAddr, EndpointId), Arc<Mutex<Balance>>>,
    /// Seconds after which everything has been forgiven, if nobody fails before.
    forgiven_at: AtomicU64,
}

impl Default for LoginLimit {
    fn default() -> Self {
        Self {
            by_address: Cache::builder().max_capacity(CAPACITY).time_to_idle(FORGOTTEN_AFTER).build(),
            by_endpoint: Cache::builder().max_capacity(CAPACITY).time_to_idle(FORGOTTEN_AFTER).build(),
            forgiven_at: AtomicU64::new(0),
        }
    }
}

impl LoginLimit {
    /// False when this address has failed too often to be heard now.
    pub fn admits(&self, now: Duration, address: IpAddr, endpoint: &EndpointId) -> bool {
        if now.as_secs() >= self.forgiven_at.load(Ordering::Acquire) {
            return true;
        }
        let address = network(address);
        let good = |balance: Option<Arc<Mutex<Balance>>>, allowance: Allowance| {
            balance.is_none_or(|balance| balance.lock().at(now, allowance) >= 1.0)
        };
        good(self.by_address.get(&address), BY_ADDRESS)
            && good(self.by_endpoint.get(&(address, endpoint.clone())), BY_ENDPOINT)
    }

    /// A login failed.
    pub fn failed(&self, now: Duration, address: IpAddr, endpoint: &EndpointId) {
        self.forgiven_at.fetch_max(now.as_secs() + FORGIVEN_AFTER.as_secs(), Ordering::AcqRel);
        let address = network(address);
        let full = |allowance: Allowance| Arc::new(Mutex::new(Balance { left: allowance.burst, at: now }));
        self.by_address.get_with(address, || full(BY_ADDRESS)).lock().take(now, BY_ADDRESS);
        let pair = (address, endpoint.clone());
        self.by_endpoint.get_with(pair, || full(BY_ENDPOINT)).lock().take(now, BY_ENDPOINT);
    }
}

impl Balance {
    fn at(&self, now: Duration, allowance: Allowance) -> f64 {
        let gained = now.saturating_sub(self.at).as_secs_f64() * allowance.per_second;
        allowance.burst.min(self.left + gained)
    }

    fn take(&mut self, now: Duration, allowance: Allowance) {
        *self = Self { left: (self.at(now, allowance) - 1.0).max(0.0), at: now };
    }
}

/// Who has one IPv6 address has its whole /64.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(six) => IpAddr::V6(Ipv6Addr::from_bits(six.to_bits() >> 64 << 64)),
        four @ IpAddr::V4(_) => four,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(id: &str) -> EndpointId {
        EndpointId::new(id).expect("id")
    }

    #[test]
    fn who_fails_too_often_must_wait() {
        let (limit, now) = (LoginLimit::default(), Duration::from_secs(100));
        let address: IpAddr = "192.0.2.1".parse().expect("address");
        for _ in 0..BY_ENDPOINT.burst as usize {
            assert!(limit.admits(now, address, &endpoint("ep-a")));
            limit.failed(now, address, &endpoint("ep-a"));
        }
        assert!(!limit.admits(now, address, &endpoint("ep-a")));
        assert!(limit.admits(now, address, &endpoint("ep-b")), "other endpoints");
        assert!(limit.admits(now, "192.0.2.2".parse().expect("address"), &endpoint("ep-a")), "other addresses");
        assert!(limit.admits(now + Duration::from_secs(2), address, &endpoint("ep-a")), "later");
    }

    #[test]
    fn all_is_forgiven_in_time_for_nobody_to_be_asked_about() {
        for Allowance { burst, per_second } in [BY_ADDRESS, BY_ENDPOINT] {
            assert!(burst / per_second < FORGIVEN_AFTER.as_secs_f64());
        }
    }

    #[test]
    fn trying_one_endpoint_after_the_other_does_not_help() {
        let (limit, now) = (LoginLimit::default(), Duration::ZERO);
        let address = |host: u16| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host));
        for number in 0..BY_ADDRESS.burst as u16 {
            limit.failed(now, address(number), &endpoint(&format!("ep-{number}")));
        }
        assert!(
            !limit.admits(now, address(60_000), &endpoint("ep-new")),
            "nor does another address of the same network"
        );
    }
}
