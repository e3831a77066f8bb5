//! `--listen [NAME=]ADDRESS`: where a supervisor listens for its program.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::str::FromStr;

use crate::listeners::Address;
use crate::protocol::{Kind, name_is_valid};

/// A listener that is to be bound: `[NAME=]ADDRESS`.
///
/// An address is `PORT`, `HOST:PORT`, a path or `@NAME` (Unix), each with `udp:` or `unix-datagram:` before it for
/// datagrams; `tcp:` and `unix:` may be written too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    pub(super) name: Option<String>,
    pub(super) kind: Kind,
    pub(super) address: Address,
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = match text.split_once('=') {
            // A path may have such a character in it.
            Some((name, rest)) if !name.contains(['/', ':', '@']) => (Some(name), rest),
            _ => (None, text),
        };
        if let Some(name) = name.filter(|name| !name_is_valid(name)) {
            return Err(format!("`{name}` is no name: 1 to 255 bytes, no colon and no control characters"));
        }
        let (kind, address) = match rest.split_once(':') {
            Some(("tcp", rest)) => (Kind::Tcp, rest),
            Some(("udp", rest)) => (Kind::Udp, rest),
            Some(("unix", rest)) => (Kind::Unix, rest),
            Some(("unix-datagram", rest)) => (Kind::UnixDatagram, rest),
            _ if rest.starts_with(['/', '.', '@']) => (Kind::Unix, rest),
            _ => (Kind::Tcp, rest),
        };
        let address = match kind {
            Kind::Tcp | Kind::Udp => Address::Ip(ip_address(address)?),
            Kind::Unix | Kind::UnixDatagram if address.is_empty() => return Err("the path is missing".to_owned()),
            Kind::Unix | Kind::UnixDatagram => Address::unix(Path::new(address)),
        };
        Ok(Self { name: name.map(str::to_owned), kind, address })
    }
}

/// A port alone is one on every IPv4 address.
fn ip_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.parse::<u16>() {
        return Ok(SocketAddr::from(([0, 0, 0, 0], port)));
    }
    let found = text.to_socket_addrs().map_err(|error| {
        format!("`{text}` is no address ({error}): write PORT, HOST:PORT, or a path that begins with / or ./")
    });
    found?.next().ok_or_else(|| format!("`{text}` has no address"))
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.as_ref().map(|name| format!("{name}=")).unwrap_or_default();
        write!(f, "{name}{}:{}", self.kind, self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ways_to_write_an_address() {
        let read = |text: &str| text.parse::<Listen>().map(|listen| listen.to_string());
        let good = |text: &str| read(text).unwrap();
        assert_eq!(good("8080"), "tcp:0.0.0.0:8080");
        assert_eq!(good("http=127.0.0.1:80"), "http=tcp:127.0.0.1:80");
        assert_eq!(good("[::1]:80"), "tcp:[::1]:80");
        assert_eq!(good("dns=udp:127.0.0.1:53"), "dns=udp:127.0.0.1:53");
        assert_eq!(good("/run/a=b.sock"), "unix:/run/a=b.sock");
        assert_eq!(good("app=unix:./x.sock"), "app=unix:./x.sock");
        assert_eq!(good("@name"), "unix:@name");
        assert_eq!(good("log=unix-datagram:/run/log"), "log=unix-datagram:/run/log");
        assert!(read("=80").unwrap_err().contains("no name"));
        assert!(read("nowhere").unwrap_err().contains("is no address"));
        assert!(read("127.0.0.1:99999").unwrap_err().contains("is no address"));
        assert!(read("unix:").unwrap_err().contains("missing"));
    }

    proptest::proptest! {
        #[test]
        fn any_address_is_read_or_refused(text in "([a-z]{0,4}=)?(tcp:|udp:|unix:)?[@/:0-9\\[\\]]{0,12}") {
            if let Ok(listen) = text.parse::<Listen>() {
                assert!(listen.name.as_deref().is_none_or(name_is_valid));
            }
        }
    }
}
