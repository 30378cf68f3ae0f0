//! The header by which a load balancer tells a client's address: version 2 of the PROXY protocol
//! (<https://www.haproxy.org/download/1.8/doc/proxy-protocol.txt>). Pure parsing, bounded, never panicking.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bytes before the addresses.
pub const PREFIX_BYTES: usize = 16;

/// Bytes that may follow the prefix: addresses, and what else the balancer tells. Far more than any sends.
const REST_MAX_BYTES: usize = 4096;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

const LOCAL: u8 = 0x20;
const PROXY: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;

/// The fixed part of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    command: u8,
    family: u8,
    /// Bytes that follow.
    pub rest_bytes: usize,
}

/// What is wrong with a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProxyHeaderError {
    /// Not version 2 of the protocol.
    #[error("the connection does not begin with a PROXY protocol v2 header")]
    Signature,
    /// Neither LOCAL nor PROXY.
    #[error("unknown command {0:#x} in a PROXY protocol header")]
    Command(u8),
    /// Too long, or too short for its addresses.
    #[error("a PROXY protocol header of impossible length")]
    Length,
}

impl Prefix {
    /// Reads the fixed part.
    pub fn parse(bytes: &[u8; PREFIX_BYTES]) -> Result<Self, ProxyHeaderError> {
        let (signature, [command, family, high, low]) =
            bytes.split_last_chunk::<4>().ok_or(ProxyHeaderError::Signature)?;
        if *signature != SIGNATURE {
            return Err(ProxyHeaderError::Signature);
        }
        if !matches!(*command, LOCAL | PROXY) {
            return Err(ProxyHeaderError::Command(*command));
        }
        let rest_bytes = usize::from(u16::from_be_bytes([*high, *low]));
        if rest_bytes > REST_MAX_BYTES {
            return Err(ProxyHeaderError::Length);
        }
        Ok(Self { command: *command, family: *family, rest_bytes })
    }

    /// The client's address. `None`: the balancer speaks for itself (a health check), or over something that is not TCP.
    pub fn source(self, rest: &[u8]) -> Result<Option<SocketAddr>, ProxyHeaderError> {
        if self.command == LOCAL {
            return Ok(None);
        }
        match self.family {
            TCP_OVER_IPV4 => {
                let (addresses, ports) = parts::<8>(rest)?;
                let [a, b, c, d, ..] = addresses;
                Ok(Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), ports)))
            }
            TCP_OVER_IPV6 => {
                let (addresses, port) = parts::<32>(rest)?;
                let address: [u8; 16] = *addresses.first_chunk().ok_or(ProxyHeaderError::Length)?;
                Ok(Some(SocketAddr::new(IpAddr::V6(Ipv6Addr::from(address)).to_canonical(), port)))
            }
            _ => Ok(None),
        }
    }
}

/// Both addresses, and the source's port.
fn parts<const N: usize>(rest: &[u8]) -> Result<([u8; N], u16), ProxyHeaderError> {
    let (addresses, rest) = rest.split_first_chunk::<N>().ok_or(ProxyHeaderError::Length)?;
    let (port, _) = rest.split_first_chunk::<4>().ok_or(ProxyHeaderError::Length)?;
    Ok((*addresses, u16::from_be_bytes([port[0], port[1]])))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(command: u8, family: u8, rest: &[u8]) -> Result<Option<SocketAddr>, ProxyHeaderError> {
        let mut bytes = [0; PREFIX_BYTES];
        bytes[..12].copy_from_slice(&SIGNATURE);
        (bytes[12], bytes[13]) = (command, family);
        bytes[14..].copy_from_slice(&(rest.len() as u16).to_be_bytes());
        let prefix = Prefix::parse(&bytes)?;
        assert_eq!(prefix.rest_bytes, rest.len());
        prefix.source(rest)
    }

    #[test]
    fn addresses_are_read() {
        let four = [192, 0, 2, 7, 198, 51, 100, 1, 0x30, 0x39, 0, 80];
        assert_eq!(header(PROXY, TCP_OVER_IPV4, &four), Ok(Some("192.0.2.7:12345".parse().expect("address"))));
        let mut six = [0; 36];
        six[..2].copy_from_slice(&[0x20, 1]);
        (six[15], six[33]) = (9, 5);
        assert_eq!(header(PROXY, TCP_OVER_IPV6, &six), Ok(Some("[2001::9]:5".parse().expect("address"))));
        let more = [&four[..], &[4, 0, 1, 0]].concat();
        assert!(header(PROXY, TCP_OVER_IPV4, &more).is_ok_and(|source| source.is_some()), "what else it tells");
        assert_eq!(header(LOCAL, 0, &[]), Ok(None));
        assert_eq!(header(PROXY, 0x31, &[0; 216]), Ok(None), "a Unix socket");
    }

    #[test]
    fn broken_headers_are_told_apart() {
        assert_eq!(header(PROXY, TCP_OVER_IPV4, &[0; 11]), Err(ProxyHeaderError::Length));
        assert_eq!(header(PROXY, TCP_OVER_IPV6, &[0; 35]), Err(ProxyHeaderError::Length));
        assert_eq!(header(0x11, 0, &[]), Err(ProxyHeaderError::Command(0x11)));
        assert_eq!(header(LOCAL, 0, &[0; REST_MAX_BYTES + 1]), Err(ProxyHeaderError::Length));
        assert_eq!(Prefix::parse(b"\0\0\0\x08\x04\xd2\x16\x2f\0\0\0\0\0\0\0\0"), Err(ProxyHeaderError::Signature));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes: [u8; PREFIX_BYTES], rest: Vec<u8>, family: u8) {
            if let Ok(prefix) = Prefix::parse(&bytes) {
                let _ = prefix.source(&rest);
            }
            let _ = Prefix { command: PROXY, family, rest_bytes: rest.len() }.source(&rest);
        }
    }
}
