//! Where exactly a server is: one address of one host of the connection string.

use std::{
    fmt, io,
    net::{SocketAddr, ToSocketAddrs},
};

use super::conninfo::Host;

/// One place to connect to. Another connection to it reaches the same server, whatever other hosts there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// As it is configured; certificates are for this name.
    pub(crate) host: Host,
    /// Which address of its name; None for a Unix socket.
    pub(super) address: Option<SocketAddr>,
}

impl Place {
    /// Each address of a host, in the system's order.
    pub(crate) fn of(host: &Host) -> io::Result<Vec<Self>> {
        let place = |address| Self { host: host.clone(), address };
        let Host::Tcp { name, port } = host else { return Ok(vec![place(None)]) };
        let mut places: Vec<Self> = Vec::new();
        for address in (name.as_str(), *port).to_socket_addrs()? {
            let place = place(Some(address));
            if !places.contains(&place) {
                places.push(place);
            }
        }
        if places.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        }
        Ok(places)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, self.address) {
            (Host::Tcp { name, .. }, Some(address)) if *name != address.ip().to_string() => {
                write!(f, "{} ({})", self.host, address.ip())
            }
            _ => self.host.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_told_with_its_address_where_the_name_does_not() {
        let told = |name: &str| {
            let places = Place::of(&Host::Tcp { name: name.into(), port: 7 }).unwrap();
            places.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(told("127.0.0.1"), ["127.0.0.1:7"]);
        assert!(told("localhost").contains(&"localhost:7 (127.0.0.1)".to_owned()));
        let socket = Host::Unix("/run/pg/.s.PGSQL.5432".into());
        assert_eq!(Place::of(&socket).unwrap()[0].to_string(), "/run/pg/.s.PGSQL.5432");
    }
}
